// Codec `bound`: the grid, the classes, the tables and the segments, put together.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/dtype.h"
#include "bound/packed.h"
#include "bound/steps.h"

namespace moebound {

// An array as both ends know it. columns: of the matrix the coder sees. bound: ε, at least 0; 0 is
// for an exact copy of a 16-bit dtype (source and output the same): bins are then not cells of a
// grid but the patterns themselves, rotated so that the exponent is on top, `rotated`.
struct ArrayInfo {
  DType source, output;
  double bound;
  size_t n;
  uint32_t columns;
};

// Exponent and mantissa, then the sign: what little order weights have is in the top byte.
inline uint16_t rotated(uint16_t pattern) { return uint16_t(pattern << 1 | pattern >> 15); }
inline uint16_t unrotated(uint16_t bin) { return uint16_t(bin >> 1 | bin << 15); }
constexpr uint32_t kExactLowBits = 8;

struct EncodeOptions {
  size_t segment_weights = 1 << 18;
  unsigned threads = 1;
};

struct EncodedBound {
  std::vector<uint8_t> payload;
  std::vector<uint64_t> misses;  // ascending flat positions of values the payload does not carry
};

// source: n patterns of info.source. The same bytes on every machine and for any thread count.
EncodedBound encode_bound(const ArrayInfo& info, const void* source, const EncodeOptions& options);

// The same in version 2, of whole numbers that somebody has rounded to: codes, [n], stand for code ·
// step. Misses are what is not finite, or further than its own bound from it, kappa half steps, once
// that is cast. steps: a level for each column, or row. Throws std::invalid_argument as step_sizes.
EncodedBound encode_scaled(const ArrayInfo& info, const void* source, const int32_t* codes, const Steps& steps,
                           const EncodeOptions& options);

// Writes n patterns of info.output. Throws Corrupt on bytes that encode_bound cannot have made.
void decode_bound(const ArrayInfo& info, const uint8_t* payload, size_t n_bytes, void* out, unsigned threads);

// What the codes of a matrix stand for: value c of `values`, a pattern of the output dtype, or, where
// there are steps, (c + first) · step, rounded to the output dtype. With factors, of all rows, steps are the
// columns', and the float32 product of both is the step.
struct CodeValues {
  uint32_t n_codes = 0;
  int32_t first = 0;
  std::vector<uint32_t> values;
  bool by_row = false;
  std::vector<float> steps;  // of all columns, or of all rows
  std::vector<float> factors;

  // The weight of a code at a place of a matrix of so many columns, a number of the output dtype T.
  template <class T>
  float weight(uint8_t code, size_t place, size_t columns) const {
    if (steps.empty()) return T::value(typename T::Bits(values[code]));
    float step = steps[by_row ? place / columns : place % columns];
    if (!factors.empty()) step *= factors[place / columns];
    return T::value(pattern_of<T>(float(int32_t(code) + first) * step));
  }
};

constexpr uint32_t kMostCodes = 256;

// The same as decode_bound, but for the last step: writes n codes of a byte each. Throws Corrupt too
// where there are more codes than kMostCodes, or the bound is 0.
CodeValues decode_codes(const ArrayInfo& info, const uint8_t* payload, size_t n_bytes, uint8_t* out, unsigned threads);

// The same to codes of four bits (packed.h): `out` has rows of whole bytes, and codes and first remain those of a byte.
// Throws Corrupt where the payload's columns are not info's, or no code is 0.
CodeValues decode_packed_codes(const ArrayInfo& info, const uint8_t* payload, size_t n_bytes, uint8_t* out,
                               unsigned threads, Outside& outside);

}  // namespace moebound
