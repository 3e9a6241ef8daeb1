// The plain path, to be read: product.h's order word by word.
#include <cmath>

#include "bound/steps.h"
#include "product/gate.h"
#include "product/product.h"

namespace moebound {
namespace {

template <class T>
float weight_at(const ProductSetup& setup, size_t row, size_t group, size_t at) {
  const CodeMatrix& matrix = *setup.matrix;
  const size_t column = group * kProductGroup + at;
  const uint8_t* const codes = matrix.codes + row * matrix.row_bytes();
  if (matrix.plain()) {
    return column < matrix.columns ? BF16::value(reinterpret_cast<const uint16_t*>(codes)[column]) : 0.0f;
  }
  uint8_t code = matrix.zero;
  if (column < matrix.columns) code = matrix.bits == 8 ? codes[column] : codes[column / 2] >> column % 2 * 4 & 15;
  if (matrix.table) return matrix.table[code];
  float step = matrix.by_row ? matrix.steps[row] : column < matrix.columns ? matrix.steps[column] : 0.0f;
  if (matrix.factors) step *= matrix.factors[row];
  return T::value(pattern_of<T>(float(int32_t(code) + matrix.first) * step));
}

template <class T>
void rows_of(const ProductSetup& setup, size_t begin, size_t end) {
  const size_t padded = setup.groups * kProductGroup;
  for (size_t row = begin; row < end; ++row) {
    for (size_t token = 0; token < setup.n_tokens; ++token) {
      float lanes[kProductLanes] = {};
      for (size_t g = 0; g < setup.groups; ++g) {
        const float* const x = setup.x + token * padded + g * kProductGroup;
        for (size_t odd = 0; odd < 2; ++odd) {
          for (size_t i = 0; i < kProductLanes; ++i) {
            lanes[i] = std::fma(weight_at<T>(setup, row, g, 2 * i + odd), x[odd * kProductLanes + i], lanes[i]);
          }
        }
      }
      for (size_t half = kProductLanes / 2; half > 0; half /= 2) {
        for (size_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
      }
      setup.y[token * setup.matrix->rows + row] = lanes[0];
    }
  }
}

void rows_of_products(const ProductSetup& setup, size_t begin, size_t end) {
  with_dtype(setup.matrix->dtype, [&](auto t) { rows_of<decltype(t)>(setup, begin, end); });
}

}  // namespace

const ProductPath product_scalar{rows_of_products, gate_of};

}  // namespace moebound
