#include "quantize.h"

#include <algorithm>

namespace moebound {
namespace {

template <class T>
uint32_t largest_finite(const typename T::Bits* patterns, size_t n) {
  using Bits = typename T::Bits;
  Bits largest = 0;
  for (size_t i = 0; i < n; ++i) {
    const Bits magnitude = Bits(patterns[i] & Bits(~T::kSign));
    const Bits finite = magnitude <= T::kMaxFinite ? magnitude : Bits(0);
    largest = std::max(largest, finite);
  }
  return largest;
}

template <class T>
const typename T::Bits* as(const void* source) {
  return static_cast<const typename T::Bits*>(source);
}

}  // namespace

std::vector<size_t> sample_rows(const ArrayInfo& info, size_t weights) {
  const size_t rows = (info.n + info.columns - 1) / info.columns;
  const size_t stride = std::max<size_t>(1, info.n / weights);
  std::vector<size_t> sampled;
  for (size_t row = 0; row < rows; row += stride) sampled.push_back(row);
  return sampled;
}

Quantizer::Quantizer(const ArrayInfo& info, const void* source) : info_(info), source_(source) {
  with_dtype(info.source, [&](auto t) {
    using T = decltype(t);
    const uint32_t largest = largest_finite<T>(as<T>(source), info.n);
    grid_ = make_grid(info.source, info.output, info.bound, kMaxCells, largest);
    if constexpr (T::kDType == DType::kF32) {
      first_cell_.resize((1u << 15) + 1);
      uint32_t cell = 0;
      for (uint32_t high = 0; high < first_cell_.size(); ++high) {
        const uint64_t lowest = uint64_t(high) << 16;
        while (cell < n_cells() && grid_.edges[cell] < lowest) ++cell;
        first_cell_[high] = cell;
      }
    } else {
      bins_.assign(1u << 16, kNoBin);
      uint32_t pattern = 0;
      for (size_t m = 0; m < n_cells(); ++m) {
        for (; pattern <= std::min<uint32_t>(grid_.edges[m], T::kMaxFinite); ++pattern) {
          bins_[pattern] = int32_t(m);
          bins_[pattern | T::kSign] = -int32_t(m);
        }
      }
    }
  });
}

int32_t Quantizer::bin_of_f32(uint32_t pattern) const {
  const uint32_t magnitude = pattern & ~F32::kSign;
  if (magnitude > F32::kMaxFinite) return kNoBin;
  const uint32_t high = magnitude >> 16;
  const auto begin = grid_.edges.begin();
  const auto last = begin + std::min<size_t>(first_cell_[high + 1] + 1, n_cells());
  const auto cell = std::lower_bound(begin + first_cell_[high], last, magnitude);
  if (cell == grid_.edges.end()) return kNoBin;
  const int32_t m = int32_t(cell - begin);
  return pattern & F32::kSign ? -m : m;
}

template <class T>
int32_t Quantizer::bin_of(typename T::Bits pattern) const {
  if constexpr (T::kDType == DType::kF32) return bin_of_f32(pattern);
  return bins_[pattern];
}

std::vector<uint32_t> Quantizer::histogram(const std::vector<size_t>& rows, uint64_t& n_counted) const {
  const int32_t m = int32_t(n_cells()) - 1;
  std::vector<uint32_t> counts(2 * size_t(m) + 1);
  n_counted = 0;
  with_dtype(info_.source, [&](auto t) {
    using T = decltype(t);
    for (const size_t row : rows) {
      const size_t end = std::min(info_.n, (row + 1) * info_.columns);
      for (size_t i = row * info_.columns; i < end; ++i) {
        const int32_t bin = bin_of<T>(as<T>(source_)[i]);
        if (bin == kNoBin) continue;
        ++counts[size_t(bin + m)];
        ++n_counted;
      }
    }
  });
  return counts;
}

Symbols Quantizer::symbols(const Alphabet& alphabet) const {
  constexpr uint32_t kMiss = 1u << 16;
  const uint32_t low_mask = (1u << alphabet.low_bits) - 1;
  const auto code = [&](int32_t bin) -> uint32_t {  // symbol | low << 8, or a miss
    const int32_t symbol = bin == kNoBin ? -1 : (bin >> alphabet.low_bits) - alphabet.symbol_low;
    if (symbol < 0 || symbol >= int32_t(alphabet.n_symbols)) return alphabet.stand_in | kMiss;
    return uint32_t(symbol) | (uint32_t(bin) & low_mask) << 8;
  };
  Symbols result;
  result.symbol.resize(info_.n);
  if (alphabet.low_bits) result.low.resize(info_.n);
  const auto put = [&](const auto& code_at) {
    constexpr size_t kChunk = 256;
    for (size_t start = 0; start < info_.n; start += kChunk) {
      const size_t end = std::min(info_.n, start + kChunk);
      uint32_t any = 0;
      for (size_t i = start; i < end; ++i) {
        const uint32_t c = code_at(i);
        any |= c;
        result.symbol[i] = uint8_t(c);
        if (alphabet.low_bits) result.low[i] = uint8_t(c >> 8);
      }
      if (!(any & kMiss)) continue;
      for (size_t i = start; i < end; ++i) {
        if (code_at(i) & kMiss) result.misses.push_back(i);
      }
    }
  };
  if (info_.source == DType::kF32) {
    const auto* patterns = as<F32>(source_);
    put([&](size_t i) { return code(bin_of_f32(patterns[i])); });
  } else {
    std::vector<uint32_t> codes(1u << 16);
    for (size_t pattern = 0; pattern < codes.size(); ++pattern) codes[pattern] = code(bins_[pattern]);
    const auto* patterns = as<BF16>(source_);
    put([&](size_t i) { return codes[patterns[i]]; });
  }
  return result;
}

}  // namespace moebound
