// Attention of one token a text: out[h] = sum over t of softmax over t(scale · q[h] . K[t]) · V[t], for n texts at
// once, each with keys and values in memory of its own. Heads that share keys and values are computed together.
//
// Keys and values are bfloat16, all else is float32. The order of operations depends on nothing but widths and the
// number of a text's tokens:
//   q . K[t] is added as products of native/product/product.h are: groups of 32 numbers, 16 lanes, a fixed tree;
//     of keys in two parts each part has such a sum, and the two are added;
//   tokens are in pieces of `tokens_of_piece`: of each, m is the greatest score, p[t] = exp_of(score - m), the
//     weights p are added in 16 lanes, t = i, i + 16, ..., and by the same tree, and p[t] · V[t] in the order of t,
//     by fused multiply-add;
//   pieces are added in their order, each times exp_of(its m - the greatest m); then the sum of values is divided by
//     the sum of weights, and rounded once.
// So threads, other texts and the instruction set do not show in a result.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/dtype.h"

namespace moebound {

constexpr size_t kAttendGroup = 32;  // widths are multiples of it
constexpr size_t kAttendTokens = 256;

// Rows of bfloat16 patterns, `stride` values apart.
struct PlainRows {
  const uint16_t* at;
  ptrdiff_t stride;
  size_t width;

  PlainRows from(size_t row) const { return {at + ptrdiff_t(row) * stride, stride, width}; }
};

// Keys or values of a text: [heads][tokens][width].
struct HeadRows {
  PlainRows first;  // of the first head
  ptrdiff_t head_stride;

  PlainRows head(size_t h) const { return {first.at + ptrdiff_t(h) * head_stride, first.stride, first.width}; }
};

struct Text {
  HeadRows keys, values;
  size_t tokens;
};

// Queries of n texts, [texts][heads][the width of keys].
struct Queries {
  const uint16_t* at;
  ptrdiff_t text_stride, head_stride;
  size_t texts, heads;

  const uint16_t* of(size_t text, size_t head) const {
    return at + ptrdiff_t(text) * text_stride + ptrdiff_t(head) * head_stride;
  }
};

// `shared` heads of keys serve heads / shared queries each. out: [texts][heads][the width of values] of dtype,
// which is bfloat16 or float32.
void attend(const Queries& queries, const std::vector<Text>& texts, size_t shared, float scale, DType dtype, void* out,
            unsigned threads);

// A text of latent attention: what keys and values are made of, and the part of keys that all heads share.
struct LatentText {
  PlainRows latents, turned;
  size_t tokens;
};

// Keys of head h are (W_h latent, turned), its values U_h latent, W_h being the first `nope` rows of the head's
// weights and U_h the `values` rows behind. They are not computed: with q = (a, b), q . key = (a W_h) . latent +
// b . turned, and the sum of values is U_h times the sum of latents. weights: [heads][nope + values][rank]. a W_h is added
// in the order of rows by fused multiply-add, U_h times a sum as q . K[t] is. out: [texts][heads][values].
void attend_latent(const Queries& queries, const std::vector<LatentText>& texts, const uint16_t* weights, size_t nope,
                   size_t values, float scale, DType dtype, void* out, unsigned threads);

// What an instruction set brings. Numbers that meet rows, x and `out` of `sums`, are in groups: of 32 the 16 even ones,
// then the 16 odd ones. Everything is of m queries, the numbers of which are a stride apart.
struct AttendPath {
  // out[j][t] = x[j] . rows[t], or is increased by it, t below n.
  void (*dots)(const PlainRows& rows, size_t n, const float* x, size_t x_stride, size_t m, float* out, size_t out_stride,
               bool add);
  // out[j] += weights[j][t] · rows[t], t = 0 .. n - 1.
  void (*sums)(const PlainRows& rows, size_t n, const float* weights, size_t weight_stride, size_t m, float* out,
               size_t out_stride);
  // Of n scores, with room for whole lanes behind them: exp_of(scale · score - the greatest of these), in place.
  void (*weigh)(float* scores, size_t n, float scale, float& greatest, float& sum);
};
extern const AttendPath attend_scalar, attend_avx2, attend_avx512, attend_neon;

}  // namespace moebound
