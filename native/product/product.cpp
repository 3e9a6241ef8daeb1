#include "product/product.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <memory>

#include "base/bytes.h"
#include "base/cpu.h"
#include "base/parallel.h"
#include "bound/steps.h"

namespace moebound {
namespace {

// Rows that one thread takes at a time.
constexpr size_t kRowsAtOnce = 64;
// So many values of a gate take as long as waking a thread does.
constexpr size_t kValuesWorthThreads = 1 << 15;

const ProductPath& path() {
#ifdef MOEBOUND_X86
  switch (isa()) {
    case Isa::kAvx512Search:
    case Isa::kAvx512: return product_avx512;
    case Isa::kAvx2: return __builtin_cpu_supports("fma") ? product_avx2 : product_scalar;
    default: break;
  }
#endif
#ifdef MOEBOUND_NEON
  if (isa() == Isa::kNeon) return product_neon;
#endif
  return product_scalar;
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

void add_patches(const CodeMatrix& matrix, const float* x, size_t padded, size_t begin, size_t end, size_t n_tokens,
                 float* y) {
  const uint32_t* const all = matrix.patched;
  const uint32_t* const last = std::lower_bound(all, all + matrix.n_patches, uint64_t(end) * matrix.columns);
  size_t row = begin, row_end = (begin + 1) * matrix.columns;
  for (const uint32_t* at = std::lower_bound(all, last, uint64_t(begin) * matrix.columns); at != last; ++at) {
    for (; *at >= row_end; row_end += matrix.columns) ++row;
    const size_t j = size_t(*at) + matrix.columns - row_end, place = j % kProductGroup;
    const size_t from = j - place + place / 2 + place % 2 * kProductLanes;
    const float weight = matrix.patch_weights[at - all];
    for (size_t t = 0; t < n_tokens; ++t) {
      float& sum = y[t * matrix.rows + row];
      sum = std::fma(weight, x[t * padded + from], sum);
    }
  }
}

// One product under way.
struct Work {
  ProductSetup setup{};
  std::vector<float> own_inputs, steps, sums;
  size_t padded = 0, first_block = 0;

  void begin(const Product& product, DType dtype, const Work* before, const Product* product_before) {
    const CodeMatrix& matrix = *product.matrix;
    setup.matrix = &matrix;
    setup.n_tokens = product.n_tokens;
    setup.groups = (matrix.columns + kProductGroup - 1) / kProductGroup;
    padded = setup.groups * kProductGroup;
    sums.resize(product.n_tokens * matrix.rows);
    setup.y = sums.data();
    if (before && product_before->x == product.x && product_before->n_tokens == product.n_tokens &&
        product_before->matrix->columns == matrix.columns) {
      setup.x = before->setup.x;
    } else {
      own_inputs.resize(product.n_tokens * padded);
      with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        const auto* const from = static_cast<const typename T::Bits*>(product.x);
        for (size_t token = 0; token < product.n_tokens; ++token) {
          to_groups([&](size_t j) { return T::value(from[token * matrix.columns + j]); }, matrix.columns,
                    own_inputs.data() + token * padded);
        }
      });
      setup.x = own_inputs.data();
    }
    if (matrix.plain()) return;
    if (matrix.table) {
      for (size_t c = 0; c < kCodeTable; ++c) setup.words[c] = uint16_t(std::bit_cast<uint32_t>(matrix.table[c]) >> 16);
    } else if (!matrix.by_row) {
      steps.resize(padded);
      to_groups([&](size_t j) { return matrix.steps[j]; }, matrix.columns, steps.data());
      setup.steps = steps.data();
    }
  }

  void block(const Product& product, DType dtype, const ProductPath& path, size_t i) const {
    const CodeMatrix& matrix = *setup.matrix;
    const size_t begin = i * kRowsAtOnce, end = std::min(begin + kRowsAtOnce, matrix.rows);
    path.rows(setup, begin, end);
    add_patches(matrix, setup.x, padded, begin, end, product.n_tokens, setup.y);
    if (product.bias) add_bias(product, begin, end);
    with_dtype(dtype, [&](auto t) {
      using T = decltype(t);
      auto* const out = static_cast<typename T::Bits*>(product.y);
      for (size_t token = 0; token < product.n_tokens; ++token) {
        for (size_t row = begin; row < end; ++row) {
          out[token * product.y_stride + row] = rounded<T>(setup.y[token * matrix.rows + row]);
        }
      }
    });
  }

  void add_bias(const Product& product, size_t begin, size_t end) const {
    with_dtype(setup.matrix->dtype, [&](auto t) {
      using T = decltype(t);
      const auto* const bias = static_cast<const typename T::Bits*>(product.bias);
      for (size_t token = 0; token < product.n_tokens; ++token) {
        for (size_t row = begin; row < end; ++row) {
          setup.y[token * setup.matrix->rows + row] += T::value(bias[row]);
        }
      }
    });
  }
};

// The weights of rows [begin, end), at `to`.
template <class T>
void weights_of_rows(const CodeMatrix& matrix, size_t begin, size_t end, typename T::Bits* to) {
  std::vector<uint8_t> unpacked(matrix.bits == 4 ? 2 * matrix.row_bytes() : 0);
  for (size_t row = begin; row < end; ++row) {
    const uint8_t* codes = matrix.codes + row * matrix.row_bytes();
    if (matrix.bits == 4) {
      for (size_t i = 0; i < matrix.row_bytes(); ++i) {
        unpacked[2 * i] = codes[i] & 15;
        unpacked[2 * i + 1] = codes[i] >> 4;
      }
      codes = unpacked.data();
    }
    auto* const into = to + (row - begin) * matrix.columns;
    const auto each = [&](auto weight) {
      for (size_t j = 0; j < matrix.columns; ++j) into[j] = pattern_of<T>(weight(j));
    };
    // A loop for each kind, so that the compiler makes vectors of it.
    const float first = float(matrix.first), own = matrix.by_row && !matrix.table ? matrix.steps[row] : 0.0f;
    const float factor = matrix.factors ? matrix.factors[row] : 1.0f;
    if (matrix.table) {
      each([&](size_t j) { return matrix.table[codes[j]]; });
    } else if (matrix.by_row) {
      each([&](size_t j) { return (float(codes[j]) + first) * own; });
    } else if (matrix.factors) {
      each([&](size_t j) { return (float(codes[j]) + first) * (matrix.steps[j] * factor); });
    } else {
      each([&](size_t j) { return (float(codes[j]) + first) * matrix.steps[j]; });
    }
  }
  const uint32_t* const all = matrix.patched;
  const size_t place = begin * matrix.columns;
  const uint32_t* const last = std::lower_bound(all, all + matrix.n_patches, uint64_t(end) * matrix.columns);
  for (const uint32_t* at = std::lower_bound(all, last, uint64_t(place)); at != last; ++at) {
    to[*at - place] = rounded<T>(matrix.patch_weights[at - all]);
  }
}

}  // namespace

CodeMatrix plain_matrix(const uint16_t* weights, size_t rows, size_t columns) {
  CodeMatrix matrix{};
  matrix.codes = reinterpret_cast<const uint8_t*>(weights);
  matrix.rows = rows;
  matrix.columns = columns;
  matrix.dtype = DType::kBF16;
  matrix.bits = kPlainBits;
  return matrix;
}

void multiply(const Product* products, size_t n, DType dtype, unsigned threads) {
  std::vector<Work> work(n);
  size_t n_blocks = 0;
  for (size_t p = 0; p < n; ++p) {
    work[p].begin(products[p], dtype, p ? &work[p - 1] : nullptr, p ? &products[p - 1] : nullptr);
    work[p].first_block = n_blocks;
    n_blocks += (products[p].matrix->rows + kRowsAtOnce - 1) / kRowsAtOnce;
  }
  const ProductPath& with = path();
  for_each_index(n_blocks, threads, [&](size_t i) {
    const auto behind = std::upper_bound(work.begin(), work.end(), i,
                                         [](size_t at, const Work& some) { return at < some.first_block; });
    const size_t p = size_t(behind - work.begin()) - 1;
    work[p].block(products[p], dtype, with, i - work[p].first_block);
  });
}

void compute_gated(const GatedExpert* experts, size_t n, DType dtype, unsigned threads) {
  struct Row {
    const uint8_t* inner;  // gate and up, `width` values each
    uint8_t* active;
    size_t width;
  };
  const size_t size = item_size(dtype);
  size_t n_active = 0, n_rows = 0;
  for (size_t e = 0; e < n; ++e) {
    n_active += experts[e].n_tokens * experts[e].down->columns;
    n_rows += experts[e].n_tokens;
  }
  const auto inner = std::make_unique_for_overwrite<uint8_t[]>(2 * n_active * size);
  const auto active = std::make_unique_for_overwrite<uint8_t[]>(n_active * size);
  std::vector<Product> into, out_of;
  std::vector<Row> rows;
  rows.reserve(n_rows);
  size_t at = 0;
  for (size_t e = 0; e < n; ++e) {
    const GatedExpert& one = experts[e];
    const size_t width = one.down->columns;
    uint8_t *const gate = inner.get() + 2 * at * size, *const hidden = active.get() + at * size;
    into.push_back({one.gate, one.x, one.n_tokens, gate, 2 * width});
    if (one.up) into.push_back({one.up, one.x, one.n_tokens, gate + width * size, 2 * width});
    out_of.push_back({one.down, hidden, one.n_tokens, one.y, one.down->rows});
    for (size_t t = 0; t < one.n_tokens; ++t) {
      rows.push_back({gate + 2 * t * width * size, hidden + t * width * size, width});
    }
    at += one.n_tokens * width;
  }
  multiply(into.data(), into.size(), dtype, threads);
  const ProductPath& with = path();
  for_each_index(rows.size(), n_active < kValuesWorthThreads ? 1 : threads, [&](size_t i) {
    const Row& row = rows[i];
    with.gate(dtype, row.inner, row.inner + row.width * size, row.width, row.active);
  });
  multiply(out_of.data(), out_of.size(), dtype, threads);
}

void weights_of_codes(const CodeMatrix& matrix, size_t first_row, size_t last_row, void* out, unsigned threads) {
  const size_t n_blocks = (last_row - first_row + kRowsAtOnce - 1) / kRowsAtOnce;
  for_each_index(n_blocks, threads, [&](size_t i) {
    const size_t begin = first_row + i * kRowsAtOnce, end = std::min(begin + kRowsAtOnce, last_row);
    with_dtype(matrix.dtype, [&](auto t) {
      using T = decltype(t);
      weights_of_rows<T>(matrix, begin, end, static_cast<typename T::Bits*>(out) + (begin - first_row) * matrix.columns);
    });
  });
}

}  // namespace moebound
