#include "bound/magnitude_sums.h"

namespace moebound {

uint32_t magnitude_sums_any(const uint8_t* symbols, size_t columns, int32_t low, uint32_t* column_sums) {
  return magnitude_sums(symbols, columns, low, column_sums);
}

}  // namespace moebound
