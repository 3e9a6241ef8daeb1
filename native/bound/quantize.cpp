#include "bound/quantize.h"

#include "base/scratch.h"

#include <algorithm>
#include <type_traits>

namespace moebound {
namespace {

template <class T>
uint32_t largest_finite(const typename T::Bits* patterns, size_t n) {
  // Magnitudes fit the signed type, for which every vector unit has a maximum.
  using Signed = std::make_signed_t<typename T::Bits>;
  Signed largest = 0;
  for (size_t i = 0; i < n; ++i) {
    const Signed magnitude = Signed(patterns[i] & typename T::Bits(~T::kSign));
    const Signed finite = magnitude <= Signed(T::kMaxFinite) ? magnitude : Signed(0);
    largest = finite > largest ? finite : largest;
  }
  return uint32_t(largest);
}

template <class T>
const typename T::Bits* as(const void* source) {
  return static_cast<const typename T::Bits*>(source);
}

template <class CodeAt>
void put_codes(size_t n, const CodeAt& code_at, Symbols& symbols) {
  constexpr size_t kChunk = 256;
  uint8_t* const symbol = symbols.symbol;
  uint8_t* const low = symbols.low;
  for (size_t start = 0; start < n; start += kChunk) {
    const size_t end = std::min(n, start + kChunk);
    uint32_t any = 0;
    if (low) {
#pragma GCC unroll 8
      for (size_t i = start; i < end; ++i) {
        const uint32_t code = code_at(i);
        any |= code;
        symbol[i] = uint8_t(code);
        low[i] = uint8_t(code >> 8);
      }
    } else {
#pragma GCC unroll 8
      for (size_t i = start; i < end; ++i) {
        const uint32_t code = code_at(i);
        any |= code;
        symbol[i] = uint8_t(code);
      }
    }
    if (!(any & kMiss)) continue;
    for (size_t i = start; i < end; ++i) {
      if (code_at(i) & kMiss) symbols.misses.push_back(i);
    }
  }
}

thread_local Scratch<uint8_t> symbol_scratch, low_scratch;

}  // namespace

Symbols room_for_symbols(size_t n, bool with_low) {
  return {symbol_scratch.room_for(n), with_low ? low_scratch.room_for(n) : nullptr, {}};
}

void release_symbols() {
  symbol_scratch.shrink();
  low_scratch.shrink();
}

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
      inverse_width_ = 0.5 / info.bound;
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
  // Cells are about 2ε wide: the nearest multiple is the cell nearly always.
  const double guess = double(F32::value(magnitude)) * inverse_width_ + 0.5;
  if (guess < double(n_cells())) {
    const size_t m = size_t(guess);
    if (magnitude <= grid_.edges[m] && (m == 0 || magnitude > grid_.edges[m - 1])) {
      return pattern & F32::kSign ? -int32_t(m) : int32_t(m);
    }
  }
  const uint32_t high = magnitude >> 16;
  const auto begin = grid_.edges.begin();
  const auto last = begin + std::ptrdiff_t(std::min<size_t>(first_cell_[high + 1] + 1, n_cells()));
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
  const auto code = [&](int32_t bin) { return code_of(bin, alphabet); };
  Symbols result = room_for_symbols(info_.n, alphabet.low_bits > 0);
  if (info_.source == DType::kF32) {
    const auto* patterns = as<F32>(source_);
    put_codes(info_.n, [&](size_t i) { return code(bin_of_f32(patterns[i])); }, result);
  } else {
    std::vector<uint32_t> codes(1u << 16);
    for (size_t pattern = 0; pattern < codes.size(); ++pattern) codes[pattern] = code(bins_[pattern]);
    const auto* patterns = as<BF16>(source_);
    put_codes(info_.n, [&](size_t i) { return codes[patterns[i]]; }, result);
  }
  return result;
}

}  // namespace moebound
