// The encoder's choices: which bins are symbols, which weights share a table, which frequencies.
// All of it in integers and exactly rounded doubles, so that bytes are the same everywhere.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "bound_layout.h"
#include "quantize.h"

namespace moebound {

// The cheapest alphabet for bins with these counts (index bin + m, m = (size - 1) / 2), drawn from
// n weights: how many low bits to store as they are, and the window of at most 256 symbols.
// miss_bits: what a value outside costs, its position apart.
Alphabet choose_alphabet(const std::vector<uint32_t>& counts, uint64_t n_counted, size_t n,
                         uint32_t miss_bits);

// Sets layout's classes: rows and columns by their mean |bin|, in steps of a quarter octave, where
// that pays for the tables and the classes themselves.
void choose_classes(const Symbols& symbols, const Alphabet& alphabet, size_t n,
                    const std::vector<size_t>& sampled_rows, Layout& layout);

// Sets layout's table_log, mantissa_bits and frequencies from the counts of all symbols.
void choose_tables(const Symbols& symbols, size_t n, Layout& layout);

}  // namespace moebound
