// How a vector path walks the rows of a product. Included by these paths only, each of which gets its
// own copy.
//
// A path brings `Isa`:
//   F                      16 floats, with zero(), load(p), store(p, f), fma(a, b, c), sum(f): as product.h adds them
//   kRows                  so many rows are summed at a time; kRowsOfOne, where there is one token, since each sum
//                          waits for its last one
//   kFew                   so many tokens, at most, with weights that go from codes to sums
//   kTokens                so many, once weights are numbers in memory, which pays from more than kMostByFew on
// and decoders: decoder(codes, steps, even, odd) makes 32 codes into weights; begin_row(row) comes before;
// kGroupBytes: of 32 codes.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "product/product.h"

namespace moebound {
namespace {

// The codes of a row, group by group; those of a ragged end from a copy that is filled up.
template <size_t kGroupBytes>
class RowCodes {
 public:
  void begin(const CodeMatrix& matrix, size_t row) {
    const size_t row_bytes = matrix.row_bytes();
    codes_ = matrix.codes + row * row_bytes;
    whole_ = matrix.columns / kProductGroup;
    if (matrix.columns % kProductGroup) {
      std::memset(ragged_, matrix.bits == 4 ? matrix.zero * 0x11 : matrix.zero, sizeof ragged_);
      std::memcpy(ragged_, codes_ + whole_ * kGroupBytes, row_bytes - whole_ * kGroupBytes);
    }
  }
  const uint8_t* operator[](size_t group) const { return group < whole_ ? codes_ + group * kGroupBytes : ragged_; }

 private:
  const uint8_t* codes_;
  size_t whole_;
  uint8_t ragged_[kGroupBytes];
};

// A few tokens: weights go from codes to sums in registers.
template <class Isa, class Decoder, size_t R, size_t T>
void rows_of_few(const ProductSetup& setup, Decoder& decoder, size_t row, size_t token) {
  using F = typename Isa::F;
  RowCodes<Decoder::kGroupBytes> codes[R];
  F sums[R][T];
#pragma GCC unroll 8
  for (size_t r = 0; r < R; ++r) {
    codes[r].begin(*setup.matrix, row + r);
    decoder.begin_row(r, row + r);
#pragma GCC unroll 8
    for (size_t t = 0; t < T; ++t) sums[r][t] = Isa::zero();
  }
  // The next rows are asked for now: processors look ahead within a page only, which is a row or two.
  const size_t ahead = R * setup.matrix->row_bytes(), padded = setup.groups * kProductGroup;
  for (size_t g = 0; g < setup.groups; ++g) {
    const float* const x = setup.x + token * padded + g * kProductGroup;
    const float* const steps = setup.steps ? setup.steps + g * kProductGroup : nullptr;
#pragma GCC unroll 8
    for (size_t r = 0; r < R; ++r) {
      F even, odd;
      __builtin_prefetch(codes[r][g] + ahead);
      decoder(r, codes[r][g], steps, even, odd);
#pragma GCC unroll 8
      for (size_t t = 0; t < T; ++t) {
        const float* const of_token = x + t * padded;
        sums[r][t] = Isa::fma(even, Isa::load(of_token), sums[r][t]);
        sums[r][t] = Isa::fma(odd, Isa::load(of_token + kProductLanes), sums[r][t]);
      }
    }
  }
  for (size_t r = 0; r < R; ++r) {
    for (size_t t = 0; t < T; ++t) setup.y[(token + t) * setup.matrix->rows + row + r] = Isa::sum(sums[r][t]);
  }
}

// As rows_of_few, of n tokens, 1 to T.
template <class Isa, class Decoder, size_t R, size_t T>
void rows_of_some(const ProductSetup& setup, Decoder& decoder, size_t row, size_t token, size_t n) {
  if (n == T) return rows_of_few<Isa, Decoder, R, T>(setup, decoder, row, token);
  if constexpr (T > 1) rows_of_some<Isa, Decoder, R, T - 1>(setup, decoder, row, token, n);
}

// calls each(token, n) with parts of at most `most` tokens, as even as possible: one token by itself would wait for
// its own sums.
template <class Each>
void in_parts(size_t n_tokens, size_t most, Each each) {
  const size_t n_parts = (n_tokens + most - 1) / most;
  for (size_t i = 0, token = 0; i < n_parts; ++i) {
    const size_t end = n_tokens * (i + 1) / n_parts;
    each(token, end - token);
    token = end;
  }
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
    RowCodes<Decoder::kGroupBytes> codes;
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
  in_parts(setup.n_tokens, Isa::kTokens, [&](size_t token, size_t some) {
    some_tokens<Isa, R, Isa::kTokens>(setup, weights, row, token, some);
  });
}

template <class Isa, class Decoder>
void all_rows(const ProductSetup& setup, Decoder decoder, size_t begin, size_t end) {
  constexpr size_t kRows = Isa::kRows;
  size_t row = begin;
  if (setup.n_tokens <= Isa::kMostByFew) {
    if (setup.n_tokens == 1) {
      for (; row + Isa::kRowsOfOne <= end; row += Isa::kRowsOfOne) {
        rows_of_few<Isa, Decoder, Isa::kRowsOfOne, 1>(setup, decoder, row, 0);
      }
    }
    for (; row + kRows <= end; row += kRows) {
      in_parts(setup.n_tokens, Isa::kFew, [&](size_t token, size_t some) {
        rows_of_some<Isa, Decoder, kRows, Isa::kFew>(setup, decoder, row, token, some);
      });
    }
    for (; row < end; ++row) {
      for (size_t t = 0; t < setup.n_tokens; ++t) rows_of_few<Isa, Decoder, 1, 1>(setup, decoder, row, t);
    }
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
