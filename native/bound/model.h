// The encoder's choices: which bins are symbols, which weights share a table, which frequencies.
// All of it in integers and exactly rounded doubles, so that bytes are the same everywhere.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "bound/layout.h"
#include "bound/quantize.h"

namespace moebound {

constexpr size_t kAlphabetSample = 1 << 18;  // weights that choose the alphabet
constexpr size_t kClassSample = 1 << 15;     // weights that judge the classes

// The cheapest alphabet for bins with these counts (index bin + m, m = (size - 1) / 2), drawn from
// n weights: how many low bits to store as they are, and the window of at most 256 symbols.
// miss_bits: what a value outside costs, its position apart. stretched: tables will not be stored, so
// that a symbol costs no more than its slot.
Alphabet choose_alphabet(const std::vector<uint32_t>& counts, uint64_t n_counted, size_t n,
                         uint32_t miss_bits, bool stretched = false);

// So many weights pay for tables of their own, whatever stretched ones save.
constexpr size_t kMostStretchedWeights = 1 << 18;

// The layout of n weights in segments of at most about segment_weights, without classes and tables.
Layout start_layout(const ArrayInfo& info, const Alphabet& alphabet, size_t segment_weights);

// Sums of |symbol_low + symbol| along each row and down each column.
struct MagnitudeSums {
  std::vector<uint64_t> row, column;
};
MagnitudeSums magnitude_sums(const uint8_t* symbols, int32_t symbol_low, size_t n, const Layout& layout);

// Sets layout's classes: rows and columns by their mean |bin|, in steps of a quarter octave, where
// that pays for the tables and the classes themselves. symbols: only sampled rows are read.
void choose_classes(const MagnitudeSums& sums, const uint8_t* symbols, size_t n,
                    const std::vector<size_t>& sampled_rows, Layout& layout);

// How often each table codes each symbol in these rows: [n_tables][n_symbols].
std::vector<uint32_t> count_symbols(const uint8_t* symbols, const Layout& layout, size_t n,
                                    const std::vector<size_t>& rows);

// Sets layout's table_log, mantissa_bits and frequencies from the counts of all symbols.
void choose_tables(std::vector<uint32_t> counts, size_t n, Layout& layout);

// Sets a scaled layout's classes and tables: those of version 1, classes that are the levels of steps, or
// tables that follow from a stretch, whatever takes the fewest bits: these are returned. symbols: [n].
uint64_t choose_scaled(const uint8_t* symbols, size_t n, const std::vector<size_t>& sampled_rows, Layout& layout);

}  // namespace moebound
