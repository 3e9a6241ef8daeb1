// A chunk of cuSZp's stream on each instruction set, and what they have in common.
#pragma once
#include <cstddef>
#include <cstdint>

#include "base/dtype.h"
#include "cuszp/codec.h"

// Each path inlines its own copy: one that was compiled for AVX2 must not end up in another path.
#define MOEBOUND_INLINE __attribute__((always_inline)) inline

namespace moebound {

constexpr size_t kCuszpBlock = 32, kCuszpChunkBlocks = 1024, kCuszpChunk = kCuszpBlock * kCuszpChunkBlocks;

// How a block is stored: planes behind its signs, bytes of its first value in front of them.
struct CuszpRate {
  uint32_t planes, outlier_bytes;

  MOEBOUND_INLINE size_t n_bytes() const {
    return planes | outlier_bytes ? 4 + 4 * size_t(planes) + outlier_bytes : 0;
  }
  // Its byte of the table of rates.
  MOEBOUND_INLINE uint8_t code() const {
    return uint8_t(outlier_bytes ? 0x80u | (outlier_bytes - 1) << 5 | planes : planes);
  }
  MOEBOUND_INLINE static CuszpRate from_code(uint8_t code) {
    return {code & 31u, code & 0x80u ? (code >> 5 & 3u) + 1 : 0};
  }
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

CuszpPath cuszp_scalar();
CuszpPath cuszp_avx2();

}  // namespace moebound
