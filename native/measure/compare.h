// The judge: errors of decoded values and statistics of original ones, in double.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/dtype.h"

namespace moebound {

struct Comparison {
  double max_abs_error = 0, square_sum = 0;
  uint64_t n_finite = 0, n_broken = 0;
};

struct Stats {
  uint64_t n_finite = 0;
  double abs_sum = 0, square_sum = 0, lowest, highest;
};

// A finite original breaks the bound if !(|w - w'| <= bound) in double; a non-finite one if its
// bits do not come back (any dtype pair: as float bits). Sums run in a fixed order, the same on
// every machine.
Comparison compare(DType dtype_w, const void* w, DType dtype_d, const void* d, size_t n, double bound);
std::vector<uint64_t> violations(DType dtype_w, const void* w, DType dtype_d, const void* d, size_t n,
                                 double bound);
Stats stats(DType dtype, const void* w, size_t n);

}  // namespace moebound
