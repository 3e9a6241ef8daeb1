// How every path of attention reads rows: included by each, which gets a copy of its own.
//
// A path brings `Isa`: lanes as in base/lanes_*.h, and
//   kRows, kQueries   so many rows of so many queries are multiplied at a time
//   kRowsOfOne        so many rows of one query, since each sum waits for its last one
#pragma once
#include <algorithm>
#include <limits>

#include "attend/attend.h"
#include "base/exp.h"

namespace moebound {
namespace {

constexpr size_t kLanes = kAttendGroup / 2;
// Rows that sums are added from while they stay in registers.
constexpr size_t kRowsAtOnce = 16;

template <class Isa, size_t R, size_t Q>
void block_of_dots(const PlainRows& rows, const float* x, size_t x_stride, float* out, size_t out_stride, bool add) {
  using F = typename Isa::F;
  F sums[R][Q];
#pragma GCC unroll 8
  for (size_t r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (size_t q = 0; q < Q; ++q) sums[r][q] = Isa::zero();
  }
  for (size_t at = 0; at < rows.width; at += kAttendGroup) {
    F even[R], odd[R];
#pragma GCC unroll 8
    for (size_t r = 0; r < R; ++r) {
      const uint16_t* const row = rows.at + ptrdiff_t(r) * rows.stride + at;
      __builtin_prefetch(row + ptrdiff_t(R) * rows.stride);
      Isa::widen(row, even[r], odd[r]);
    }
#pragma GCC unroll 4
    for (size_t q = 0; q < Q; ++q) {
      const F evens = Isa::load(x + q * x_stride + at), odds = Isa::load(x + q * x_stride + at + kLanes);
#pragma GCC unroll 8
      for (size_t r = 0; r < R; ++r) sums[r][q] = Isa::fma(odd[r], odds, Isa::fma(even[r], evens, sums[r][q]));
    }
  }
#pragma GCC unroll 4
  for (size_t q = 0; q < Q; ++q) {
#pragma GCC unroll 8
    for (size_t r = 0; r < R; ++r) {
      const float sum = Isa::sum(sums[r][q]);
      out[q * out_stride + r] = add ? out[q * out_stride + r] + sum : sum;
    }
  }
}

template <class Isa, size_t Q>
void dots_of(const PlainRows& rows, size_t n, const float* x, size_t x_stride, float* out, size_t out_stride, bool add) {
  constexpr size_t R = Q == 1 ? Isa::kRowsOfOne : Isa::kRows;
  size_t t = 0;
  for (; t + R <= n; t += R) block_of_dots<Isa, R, Q>(rows.from(t), x, x_stride, out + t, out_stride, add);
  for (; t < n; ++t) block_of_dots<Isa, 1, Q>(rows.from(t), x, x_stride, out + t, out_stride, add);
}

template <class Isa, size_t Q>
void sums_of(const PlainRows& rows, size_t n, const float* weights, size_t weight_stride, float* out, size_t out_stride) {
  using F = typename Isa::F;
  for (size_t begin = 0; begin < n; begin += kRowsAtOnce) {
    const size_t end = std::min(n, begin + kRowsAtOnce);
    for (size_t at = 0; at < rows.width; at += kAttendGroup) {
      F sums[Q][2];
#pragma GCC unroll 4
      for (size_t q = 0; q < Q; ++q) {
        sums[q][0] = Isa::load(out + q * out_stride + at);
        sums[q][1] = Isa::load(out + q * out_stride + at + kLanes);
      }
      for (size_t t = begin; t < end; ++t) {
        const uint16_t* const row = rows.at + ptrdiff_t(t) * rows.stride + at;
        F even, odd;
        __builtin_prefetch(row + ptrdiff_t(kRowsAtOnce) * rows.stride);
        Isa::widen(row, even, odd);
#pragma GCC unroll 4
        for (size_t q = 0; q < Q; ++q) {
          const F weight = Isa::all(weights[q * weight_stride + t]);
          sums[q][0] = Isa::fma(weight, even, sums[q][0]);
          sums[q][1] = Isa::fma(weight, odd, sums[q][1]);
        }
      }
#pragma GCC unroll 4
      for (size_t q = 0; q < Q; ++q) {
        Isa::store(out + q * out_stride + at, sums[q][0]);
        Isa::store(out + q * out_stride + at + kLanes, sums[q][1]);
      }
    }
  }
}

// some(first query, how many of them, at most Q, as a constant).
template <size_t Q, class Some>
void by_queries(size_t m, size_t first, const Some& some) {
  for (; first + Q <= m; first += Q) some(first, std::integral_constant<size_t, Q>());
  if constexpr (Q > 1) by_queries<Q - 1>(m, first, some);
}

template <class Isa>
void dots(const PlainRows& rows, size_t n, const float* x, size_t x_stride, size_t m, float* out, size_t out_stride,
          bool add) {
  by_queries<Isa::kQueries>(m, 0, [&](size_t first, auto q) {
    dots_of<Isa, q>(rows, n, x + first * x_stride, x_stride, out + first * out_stride, out_stride, add);
  });
}

template <class Isa>
void sums(const PlainRows& rows, size_t n, const float* weights, size_t weight_stride, size_t m, float* out,
          size_t out_stride) {
  by_queries<Isa::kQueries>(m, 0, [&](size_t first, auto q) {
    sums_of<Isa, q>(rows, n, weights + first * weight_stride, weight_stride, out + first * out_stride, out_stride);
  });
}

// Loops over lanes, which the compiler makes vectors of.
template <class Isa>
void weigh(float* scores, size_t n, float scale, float& greatest, float& sum) {
  constexpr float kLeast = -std::numeric_limits<float>::infinity();
  float most[kLanes];
  std::fill_n(most, kLanes, kLeast);
  const size_t padded = (n + kLanes - 1) / kLanes * kLanes;
  std::fill(scores + n, scores + padded, 0.0f);
  for (size_t t = 0; t < padded; ++t) scores[t] *= scale;
  std::fill(scores + n, scores + padded, kLeast);
  for (size_t t = 0; t < padded; t += kLanes) {
    for (size_t i = 0; i < kLanes; ++i) most[i] = scores[t + i] > most[i] ? scores[t + i] : most[i];
  }
  const float top = *std::max_element(most, most + kLanes);
  for (size_t t = 0; t < padded; ++t) scores[t] = exp_of(scores[t] - top);
  typename Isa::F total = Isa::zero();
  for (size_t t = 0; t < padded; t += kLanes) total = Isa::fma(Isa::all(1.0f), Isa::load(scores + t), total);
  greatest = top;
  sum = Isa::sum(total);
}

template <class Isa>
constexpr AttendPath path_of{dots<Isa>, sums<Isa>, weigh<Isa>};

}  // namespace
}  // namespace moebound
