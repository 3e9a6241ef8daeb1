#include "product/product.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "base/bytes.h"
#include "base/cpu.h"
#include "base/parallel.h"
#include "bound/steps.h"

namespace moebound {
namespace {

// Rows that one thread takes at a time.
constexpr size_t kRowsAtOnce = 64;

ProductRows rows_function() {
#ifdef MOEBOUND_X86
  switch (isa()) {
    case Isa::kAvx512Search:
    case Isa::kAvx512: return product_rows_avx512;
    case Isa::kAvx2: return __builtin_cpu_supports("fma") ? product_rows_avx2 : product_rows_scalar;
    default: break;
  }
#endif
#ifdef MOEBOUND_NEON
  if (isa() == Isa::kNeon) return product_rows_neon;
#endif
  return product_rows_scalar;
}

// n numbers, filled up with 0 to whole groups, of each group first the even places.
template <class Number>
void to_groups(const Number& number, size_t n, float* out) {
  const size_t groups = (n + kProductGroup - 1) / kProductGroup;
  std::fill_n(out, groups * kProductGroup, 0.0f);
  for (size_t j = 0; j < n; ++j) {
    const size_t at = j % kProductGroup;
    out[j - at + at / 2 + at % 2 * kProductLanes] = number(j);
  }
}

template <class T>
typename T::Bits rounded(float value) {
  if (std::isnan(value)) return pattern_of<T>(std::numeric_limits<float>::quiet_NaN());
  return pattern_of<T>(value);
}
template <>
F16::Bits rounded<F16>(float value) {
  return std::isnan(value) ? uint16_t(0x7E00) : pattern_of<F16>(value);
}

void add_patches(const CodeMatrix& matrix, const float* x, size_t padded, size_t begin, size_t end, size_t n_tokens,
                 float* y) {
  const uint64_t* const all = matrix.patched;
  const uint64_t* const last = std::lower_bound(all, all + matrix.n_patches, uint64_t(end) * matrix.columns);
  for (const uint64_t* at = std::lower_bound(all, last, uint64_t(begin) * matrix.columns); at != last; ++at) {
    const size_t row = size_t(*at / matrix.columns), j = size_t(*at % matrix.columns), place = j % kProductGroup;
    const size_t from = j - place + place / 2 + place % 2 * kProductLanes;
    const float weight = matrix.patch_weights[at - all];
    for (size_t t = 0; t < n_tokens; ++t) {
      float& sum = y[t * matrix.rows + row];
      sum = std::fma(weight, x[t * padded + from], sum);
    }
  }
}

}  // namespace

void product(const CodeMatrix& matrix, DType dtype, const void* x, size_t n_tokens, void* y, size_t y_stride,
             unsigned threads) {
  ProductSetup setup{};
  setup.matrix = &matrix;
  setup.n_tokens = n_tokens;
  setup.groups = (matrix.columns + kProductGroup - 1) / kProductGroup;
  const size_t padded = setup.groups * kProductGroup;
  std::vector<float> inputs(n_tokens * padded), steps, sums(n_tokens * matrix.rows);
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    const auto* const from = static_cast<const typename T::Bits*>(x);
    for (size_t token = 0; token < n_tokens; ++token) {
      to_groups([&](size_t j) { return T::value(from[token * matrix.columns + j]); }, matrix.columns,
                inputs.data() + token * padded);
    }
  });
  setup.x = inputs.data();
  setup.y = sums.data();
  if (matrix.table) {
    for (size_t c = 0; c < kCodeTable; ++c) setup.words[c] = uint16_t(std::bit_cast<uint32_t>(matrix.table[c]) >> 16);
  } else if (!matrix.by_row) {
    steps.resize(padded);
    to_groups([&](size_t j) { return matrix.steps[j]; }, matrix.columns, steps.data());
    setup.steps = steps.data();
  }
  const ProductRows rows = rows_function();
  const size_t n_blocks = (matrix.rows + kRowsAtOnce - 1) / kRowsAtOnce;
  for_each_index(n_blocks, threads, [&](size_t i) {
    const size_t begin = i * kRowsAtOnce, end = std::min(begin + kRowsAtOnce, matrix.rows);
    rows(setup, begin, end);
    add_patches(matrix, setup.x, padded, begin, end, n_tokens, setup.y);
    with_dtype(dtype, [&](auto t) {
      using T = decltype(t);
      auto* const out = static_cast<typename T::Bits*>(y);
      for (size_t token = 0; token < n_tokens; ++token) {
        for (size_t row = begin; row < end; ++row) {
          out[token * y_stride + row] = rounded<T>(setup.y[token * matrix.rows + row]);
        }
      }
    });
  });
}

void weights_of_codes(const CodeMatrix& matrix, void* out) {
  with_dtype(matrix.dtype, [&](auto t) {
    using T = decltype(t);
    auto* const to = static_cast<typename T::Bits*>(out);
    for (size_t row = 0; row < matrix.rows; ++row) {
      const uint8_t* const codes = matrix.codes + row * matrix.columns;
      auto* const into = to + row * matrix.columns;
      const auto each = [&](auto weight) {
        for (size_t j = 0; j < matrix.columns; ++j) into[j] = pattern_of<T>(weight(j));
      };
      // A loop for each kind, so that the compiler makes vectors of it.
      const float first = float(matrix.first), own = matrix.by_row && !matrix.table ? matrix.steps[row] : 0.0f;
      if (matrix.table) {
        each([&](size_t j) { return matrix.table[codes[j]]; });
      } else if (matrix.by_row) {
        each([&](size_t j) { return (float(codes[j]) + first) * own; });
      } else {
        each([&](size_t j) { return (float(codes[j]) + first) * matrix.steps[j]; });
      }
    }
    for (size_t i = 0; i < matrix.n_patches; ++i) to[matrix.patched[i]] = rounded<T>(matrix.patch_weights[i]);
  });
}

}  // namespace moebound
