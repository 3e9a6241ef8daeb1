// How a vector path walks the rows of a product. Included by these paths only, each of which gets its
// own copy.
//
// A path brings `Isa`:
//   F                      16 floats, with zero(), load(p), store(p, f), fma(a, b, c), sum(f): as product.h adds them
//   kRows, kTokens         so many rows and tokens are summed at a time, once weights are numbers
// and decoders: decoder(codes, steps, even, odd) makes 32 codes into weights; begin_row(row) comes before;
// kCodeBytes, if a code has more than one.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "product/product.h"

namespace moebound {
namespace {

// Bytes of a code: 2 where it is the weight itself, a pattern of bfloat16.
template <class Decoder>
constexpr size_t code_bytes() {
  if constexpr (requires { Decoder::kCodeBytes; }) return Decoder::kCodeBytes;
  else return 1;
}

// The codes of a row, group by group; those of a ragged end from a copy that is filled up.
template <size_t kBytes>
class RowCodes {
 public:
  void begin(const CodeMatrix& matrix, size_t row) {
    codes_ = matrix.codes + row * matrix.columns * kBytes;
    whole_ = matrix.columns / kProductGroup;
    const size_t left = matrix.columns % kProductGroup;
    if (left) {
      std::memset(ragged_, matrix.zero, sizeof ragged_);
      std::memcpy(ragged_, codes_ + whole_ * kProductGroup * kBytes, left * kBytes);
    }
  }
  const uint8_t* operator[](size_t group) const {
    return group < whole_ ? codes_ + group * kProductGroup * kBytes : ragged_;
  }

 private:
  const uint8_t* codes_;
  size_t whole_;
  uint8_t ragged_[kProductGroup * kBytes];
};

// One token: weights go from codes to sums in registers. Several rows at a time, since a sum waits for
// its last one.
template <class Isa, class Decoder, size_t R>
void rows_of_one(const ProductSetup& setup, Decoder& decoder, size_t row) {
  using F = typename Isa::F;
  RowCodes<code_bytes<Decoder>()> codes[R];
  F sums[R];
  for (size_t r = 0; r < R; ++r) {
    codes[r].begin(*setup.matrix, row + r);
    decoder.begin_row(r, row + r);
    sums[r] = Isa::zero();
  }
  // The next rows are asked for now: processors look ahead within a page only, which is a row or two.
  const size_t ahead = R * setup.matrix->columns * code_bytes<Decoder>();
  for (size_t g = 0; g < setup.groups; ++g) {
    const float* const x = setup.x + g * kProductGroup;
    const F x_even = Isa::load(x), x_odd = Isa::load(x + kProductLanes);
    const float* const steps = setup.steps ? setup.steps + g * kProductGroup : nullptr;
#pragma GCC unroll 4
    for (size_t r = 0; r < R; ++r) {
      F even, odd;
      __builtin_prefetch(codes[r][g] + ahead);
      decoder(r, codes[r][g], steps, even, odd);
      sums[r] = Isa::fma(odd, x_odd, Isa::fma(even, x_even, sums[r]));
    }
  }
  for (size_t r = 0; r < R; ++r) setup.y[row + r] = Isa::sum(sums[r]);
}

// T tokens times R rows of weights, [R][groups][32].
template <class Isa, size_t R, size_t T>
void block(const ProductSetup& setup, const float* weights, size_t row, size_t token) {
  using F = typename Isa::F;
  const size_t n = setup.groups * kProductGroup;
  F sums[R][T];
#pragma GCC unroll 8
  for (size_t r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (size_t t = 0; t < T; ++t) sums[r][t] = Isa::zero();
  }
  const float* const x = setup.x + token * n;
  for (size_t j = 0; j < n; j += kProductLanes) {
    F w[R];
#pragma GCC unroll 8
    for (size_t r = 0; r < R; ++r) w[r] = Isa::load(weights + r * n + j);
#pragma GCC unroll 8
    for (size_t t = 0; t < T; ++t) {
      const F some = Isa::load(x + t * n + j);
#pragma GCC unroll 8
      for (size_t r = 0; r < R; ++r) sums[r][t] = Isa::fma(w[r], some, sums[r][t]);
    }
  }
  const size_t rows = setup.matrix->rows;
  for (size_t r = 0; r < R; ++r) {
    for (size_t t = 0; t < T; ++t) setup.y[(token + t) * rows + row + r] = Isa::sum(sums[r][t]);
  }
}

// As block, of n tokens, 1 to T.
template <class Isa, size_t R, size_t T>
void some_tokens(const ProductSetup& setup, const float* weights, size_t row, size_t token, size_t n) {
  if (n == T) return block<Isa, R, T>(setup, weights, row, token);
  if constexpr (T > 1) some_tokens<Isa, R, T - 1>(setup, weights, row, token, n);
}

// Several tokens: weights become numbers once for all of them.
template <class Isa, class Decoder, size_t R>
void rows_of_many(const ProductSetup& setup, Decoder& decoder, size_t row, float* weights) {
  using F = typename Isa::F;
  const size_t n = setup.groups * kProductGroup;
  for (size_t r = 0; r < R; ++r) {
    RowCodes<code_bytes<Decoder>()> codes;
    codes.begin(*setup.matrix, row + r);
    decoder.begin_row(0, row + r);
    for (size_t g = 0; g < setup.groups; ++g) {
      F even, odd;
      decoder(0, codes[g], setup.steps ? setup.steps + g * kProductGroup : nullptr, even, odd);
      float* const to = weights + r * n + g * kProductGroup;
      Isa::store(to, even);
      Isa::store(to + kProductLanes, odd);
    }
  }
  // As evenly as possible: a block of one token would wait for its own sums.
  const size_t n_blocks = (setup.n_tokens + Isa::kTokens - 1) / Isa::kTokens;
  for (size_t i = 0, token = 0; i < n_blocks; ++i) {
    const size_t end = setup.n_tokens * (i + 1) / n_blocks;
    some_tokens<Isa, R, Isa::kTokens>(setup, weights, row, token, end - token);
    token = end;
  }
}

template <class Isa, class Decoder>
void all_rows(const ProductSetup& setup, Decoder decoder, size_t begin, size_t end) {
  constexpr size_t kRows = Isa::kRows;
  size_t row = begin;
  if (setup.n_tokens == 1) {
    for (; row + kRows <= end; row += kRows) rows_of_one<Isa, Decoder, kRows>(setup, decoder, row);
    for (; row < end; ++row) rows_of_one<Isa, Decoder, 1>(setup, decoder, row);
    return;
  }
  std::vector<float> weights(kRows * setup.groups * kProductGroup);
  for (; row + kRows <= end; row += kRows) rows_of_many<Isa, Decoder, kRows>(setup, decoder, row, weights.data());
  for (; row < end; ++row) rows_of_many<Isa, Decoder, 1>(setup, decoder, row, weights.data());
}

// As all_rows, of a matrix with steps. FromSteps: the path's decoder, by dtype and kind of steps.
template <class Isa, template <class, StepsOf> class FromSteps>
void all_rows_of_steps(const ProductSetup& setup, size_t begin, size_t end) {
  const CodeMatrix& matrix = *setup.matrix;
  with_dtype(matrix.dtype, [&](auto t) {
    using T = decltype(t);
    if (matrix.factors) all_rows<Isa>(setup, FromSteps<T, StepsOf::kBoth>(setup), begin, end);
    else if (matrix.by_row) all_rows<Isa>(setup, FromSteps<T, StepsOf::kRows>(setup), begin, end);
    else all_rows<Isa>(setup, FromSteps<T, StepsOf::kColumns>(setup), begin, end);
  });
}

}  // namespace
}  // namespace moebound
