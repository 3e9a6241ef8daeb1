// Envelopes of codec `bound`, taken apart, checked, decoded and patched in one go. docs/format.md, sections 2 and 3,
// has every byte; codec/envelope.py is the reference, and says what is wrong with bytes that are refused here.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/dtype.h"
#include "bound/codec.h"

namespace moebound {

// What an envelope is to be: bytes, and the shape and dtype of the array in them.
struct ExpectedEnvelope {
  const uint8_t* data;
  size_t n_bytes;
  std::vector<uint64_t> shape;
  DType dtype;
};

// Writes the array's patterns. False, with anything in `out`, for an envelope that is damaged, of another codec, a newer
// version, another shape or dtype, an exact copy, or too large for the memory there is: the reference reads it then.
bool decode_envelope(const ExpectedEnvelope& expected, void* out, unsigned threads);

constexpr uint64_t kMostCoded = uint64_t(1) << 32;  // weights of a matrix of codes: of places that are patched, 32 bits

// What codes stand for: entry c of `table`, or, where that is empty, what CodeValues has. The places `patched` have
// code -first, and their weights stand beside. Of codes of four bits, `first` and `table` are those of the window.
struct EnvelopeCodes {
  CodeValues values;
  std::vector<float> table;
  std::vector<uint32_t> patched;
  std::vector<float> patch_weights;
};

// The same of a matrix, as codes of 8 or 4 bits, rows of whole bytes. False, too, where there are no codes of a byte.
bool decode_envelope_codes(const ExpectedEnvelope& expected, uint32_t bits, uint8_t* out, unsigned threads,
                           EnvelopeCodes& found);

}  // namespace moebound
