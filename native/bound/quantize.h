// Source patterns to bins of the grid, and bins to symbols: every weight's cell by look-up.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "bound/codec.h"
#include "bound/grid.h"

namespace moebound {

constexpr int32_t kNoBin = INT32_MIN;

// What the coder sees of a bin: bin = (symbol_low + symbol) << low_bits | low.
struct Alphabet {
  int32_t symbol_low = 0;
  uint32_t n_symbols = 1;
  uint32_t low_bits = 0;
  uint8_t stand_in = 0;  // the symbol coded in place of a miss
  bool operator==(const Alphabet&) const = default;
};

// A weight's code: symbol | low << 8, and this bit if the code only stands in for the weight.
constexpr uint32_t kMiss = 1u << 16;

inline uint32_t code_of(int32_t bin, const Alphabet& alphabet) {
  const int32_t symbol = bin == kNoBin ? -1 : (bin >> alphabet.low_bits) - alphabet.symbol_low;
  if (symbol < 0 || symbol >= int32_t(alphabet.n_symbols)) return alphabet.stand_in | kMiss;
  return uint32_t(symbol) | (uint32_t(bin) & ((1u << alphabet.low_bits) - 1)) << 8;
}

// The coded part of every weight, in this thread's scratch memory: one at a time, until
// release_symbols().
struct Symbols {
  uint8_t* symbol = nullptr;  // [n]
  uint8_t* low = nullptr;     // [n], none if low_bits is 0
  std::vector<uint64_t> misses;
};

Symbols room_for_symbols(size_t n, bool with_low);
void release_symbols();

// Rows that stand for all: about `weights` weights, evenly spread, the first row among them.
std::vector<size_t> sample_rows(const ArrayInfo& info, size_t weights);

class Quantizer {
 public:
  // The grid that covers these values, as far as kMaxCells cells reach.
  Quantizer(const ArrayInfo& info, const void* source);

  // Counts of bins -m .. m in the sampled rows at index bin + m, where m = n_cells() - 1.
  std::vector<uint32_t> histogram(const std::vector<size_t>& rows, uint64_t& n_counted) const;

  // Every weight's symbol. Misses are non-finite values and those outside the alphabet.
  Symbols symbols(const Alphabet& alphabet) const;

  size_t n_cells() const { return grid_.values.size(); }

  // 16-bit sources: bin of every pattern.
  const std::vector<int32_t>& bins() const { return bins_; }

 private:
  int32_t bin_of_f32(uint32_t pattern) const;
  template <class T>
  int32_t bin_of(typename T::Bits pattern) const;

  const ArrayInfo& info_;
  const void* source_;
  Grid grid_;
  std::vector<int32_t> bins_;         // 16-bit sources: bin of every pattern
  double inverse_width_ = 0;          // 1 / 2ε
  std::vector<uint32_t> first_cell_;  // 32-bit sources: by the pattern's high half, sign dropped
};

}  // namespace moebound
