// Tables that follow from a scale: a Gaussian's, stretched by one level from table to table. For
// matrices so small that tables of their own would cost more than they gain.
#pragma once
#include <cstdint>

namespace moebound {

constexpr uint32_t kMostStretch = 255;
constexpr uint32_t kStretchOfLevel = 2;

// Sets the n_symbols frequencies of a table, each at least 1, their sum 2^table_log (n_symbols is at
// most that). Bins begin at symbol_low << low_bits. stretch: the standard deviation is
// 2^((stretch - 32) / 8) bins.
void stretched_table(uint32_t stretch, int32_t symbol_low, uint32_t n_symbols, uint32_t low_bits,
                     uint32_t table_log, uint16_t* frequencies);

}  // namespace moebound
