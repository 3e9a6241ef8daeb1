// Sums of |symbol + low| along a row and down the columns: the scales that classes are made of.
#pragma once
#include <cstddef>
#include <cstdint>

namespace moebound {

// Adds each column's magnitude to column_sums and returns the row's sum. Compiled twice, for any
// machine and for AVX2; integers, so both are the same.
__attribute__((always_inline)) inline uint32_t magnitude_sums(const uint8_t* symbols, size_t columns, int32_t low,
                                                              uint32_t* column_sums) {
  uint32_t row_sum = 0;
  for (size_t j = 0; j < columns; ++j) {
    const int32_t bin = int32_t(symbols[j]) + low;
    const uint32_t magnitude = uint32_t(bin < 0 ? -bin : bin);
    column_sums[j] += magnitude;
    row_sum += magnitude;
  }
  return row_sum;
}

uint32_t magnitude_sums_any(const uint8_t*, size_t, int32_t, uint32_t*);
uint32_t magnitude_sums_avx2(const uint8_t*, size_t, int32_t, uint32_t*);

}  // namespace moebound
