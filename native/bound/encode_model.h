// The encoder's choices, for a coder that runs elsewhere, on a GPU: it counts, this decides. The same
// code as encode_bound's, so the bytes are the same too. 16-bit sources.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "bound/codec.h"
#include "bound/layout.h"
#include "bound/model.h"
#include "bound/quantize.h"

namespace moebound {

constexpr size_t kPatterns = 1u << 16;

// Used from top to bottom; what a call needs is what the one before decided.
class EncodeModel {
 public:
  // largest: the pattern of the largest finite magnitude of the array, without its sign.
  EncodeModel(const ArrayInfo& info, uint16_t largest, size_t segment_weights);

  // Rows whose patterns are to be counted, and whose symbols choose_classes reads.
  std::vector<size_t> alphabet_rows() const { return sample_rows(info_, kAlphabetSample); }
  std::vector<size_t> class_rows() const { return sample_rows(info_, kClassSample); }

  // pattern_counts: [kPatterns], of the alphabet's rows. Returns the code of every pattern.
  std::vector<uint32_t> choose_alphabet(const uint32_t* pattern_counts);

  // symbols: [n], only the class rows are read.
  void choose_classes(const MagnitudeSums& sums, const uint8_t* symbols);

  // counts: [n_tables][n_symbols], of all weights.
  void choose_tables(std::vector<uint32_t> counts);

  const Layout& layout() const { return layout_; }
  size_t n_segments() const { return layout_.segments(info_.n); }

  // The payload's bytes in front of the segments.
  std::vector<uint8_t> header(std::vector<uint32_t> segment_words) const;

 private:
  ArrayInfo info_;
  size_t segment_weights_;
  std::vector<int32_t> bins_;  // of every pattern
  Layout layout_;
};

}  // namespace moebound
