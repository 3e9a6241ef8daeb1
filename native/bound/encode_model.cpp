#include "bound/encode_model.h"

#include <algorithm>

namespace moebound {
namespace {

// The bins of an array depend on nothing but its largest magnitude.
std::vector<int32_t> bins_up_to(const ArrayInfo& info, uint16_t largest) {
  ArrayInfo one = info;
  one.n = one.columns = 1;
  return Quantizer(one, &largest).bins();
}

}  // namespace

EncodeModel::EncodeModel(const ArrayInfo& info, uint16_t largest, size_t segment_weights)
    : info_(info), segment_weights_(segment_weights), bins_(bins_up_to(info, largest)) {}

std::vector<uint32_t> EncodeModel::choose_alphabet(const uint32_t* pattern_counts) {
  int32_t m = 0;
  for (const int32_t bin : bins_) {
    if (bin != kNoBin) m = std::max(m, bin);
  }
  std::vector<uint32_t> counts(2 * size_t(m) + 1);
  uint64_t n_counted = 0;
  for (size_t pattern = 0; pattern < kPatterns; ++pattern) {
    if (bins_[pattern] == kNoBin) continue;
    counts[size_t(bins_[pattern] + m)] += pattern_counts[pattern];
    n_counted += pattern_counts[pattern];
  }
  const uint32_t miss_bits = uint32_t(8 * item_size(info_.output)) + 2;
  const Alphabet alphabet = moebound::choose_alphabet(counts, n_counted, info_.n, miss_bits);
  layout_ = start_layout(info_, alphabet, segment_weights_);
  std::vector<uint32_t> codes(kPatterns);
  std::transform(bins_.begin(), bins_.end(), codes.begin(),
                 [&](int32_t bin) { return code_of(bin, alphabet); });
  return codes;
}

void EncodeModel::choose_classes(const MagnitudeSums& sums, const uint8_t* symbols) {
  moebound::choose_classes(sums, symbols, info_.n, class_rows(), layout_);
}

void EncodeModel::choose_tables(std::vector<uint32_t> counts) {
  moebound::choose_tables(std::move(counts), info_.n, layout_);
}

std::vector<uint8_t> EncodeModel::header(std::vector<uint32_t> segment_words) const {
  Layout layout = layout_;
  layout.segment_words = std::move(segment_words);
  std::vector<uint8_t> bytes;
  write_layout(layout, bytes);
  return bytes;
}

}  // namespace moebound
