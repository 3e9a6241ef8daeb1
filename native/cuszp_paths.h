// A chunk of cuSZp's stream on each instruction set, and what they have in common.
#pragma once
#include <cstddef>
#include <cstdint>

#include "bit_matrix.h"
#include "cuszp.h"
#include "dtype.h"

namespace moebound {

constexpr size_t kCuszpBlock = 32, kCuszpChunkBlocks = 1024, kCuszpChunk = kCuszpBlock * kCuszpChunkBlocks;

// How a block is stored: planes below its signs, bytes of its first value kept apart from them.
struct CuszpRate {
  uint32_t planes, outlier_bytes;

  __attribute__((always_inline)) size_t n_bytes() const { return planes | outlier_bytes ? 4 + 4 * size_t(planes) + outlier_bytes : 0; }
  __attribute__((always_inline)) uint8_t code() const { return uint8_t(outlier_bytes ? 0x80u | (outlier_bytes - 1) << 5 | planes : planes); }
  __attribute__((always_inline)) static CuszpRate from_code(uint8_t code) { return {code & 31u, code & 0x80u ? (code >> 5 & 3u) + 1 : 0}; }
};

// bound: ε. reciprocal: 0.5 / ε; step: 2 ε; all of them normal floats.
struct CuszpCoding {
  CuszpCoding(float bound, CuszpMode which) : reciprocal(0.5f / bound), step(2 * bound), mode(which) {}
  float reciprocal, step;
  CuszpMode mode;
};

// n: values of the chunk, at most kCuszpChunk; each block of them has a code.
struct CuszpPath {
  // Writes codes, returns the bytes of their payload.
  size_t (*measure)(DType source, const void* values, size_t n, const CuszpCoding&, uint8_t* codes);
  void (*write)(DType source, const void* values, size_t n, const CuszpCoding&, const uint8_t* codes, uint8_t* payload);
  void (*decode)(DType output, void* out, size_t n, const CuszpCoding&, const uint8_t* codes, const uint8_t* payload);
};

CuszpPath cuszp_avx2();
CuszpPath cuszp_avx512();

}  // namespace moebound
