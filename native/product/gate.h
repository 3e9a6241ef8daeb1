// The gate of an expert: silu(gate) · up. Included by the paths of products, each of which gets a copy of its own that
// its compiler makes vectors of.
#pragma once
#include <cmath>
#include <cstddef>

#include "base/exp.h"
#include "bound/steps.h"
#include "product/product.h"

namespace moebound {
namespace {

// x / (1 + e^-x). The exponential is that of a number at most 0, so that nothing overflows; it is 0 below -87.
// NaN stays NaN, and of minus infinity comes NaN, as torch has it.
inline float silu(float x) {
  const float power = exp_of(-std::fabs(x)), weighed = x * power;
  return (x >= 0.0f ? x : weighed) / (1.0f + power);
}

template <class T>
void gate_values(const typename T::Bits* gate, const typename T::Bits* up, size_t n, typename T::Bits* out) {
  for (size_t i = 0; i < n; ++i) {
    const float activated = T::value(rounded<T>(silu(T::value(gate[i]))));
    out[i] = rounded<T>(activated * T::value(up[i]));
  }
}

void gate_of(DType dtype, const void* gate, const void* up, size_t n, void* out) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    using Bits = typename T::Bits;
    gate_values<T>(static_cast<const Bits*>(gate), static_cast<const Bits*>(up), n, static_cast<Bits*>(out));
  });
}

}  // namespace
}  // namespace moebound
