#include "attend/attend.h"

#include <algorithm>
#include <limits>

#include "base/cpu.h"
#include "base/exp.h"
#include "base/parallel.h"
#include "bound/steps.h"

namespace moebound {
namespace {

// Queries that one thread takes at a time, where more share their keys; and pieces that a text has at most.
constexpr size_t kQueriesAtOnce = 8, kMostPieces = 64;

const AttendPath& path() {
#ifdef MOEBOUND_X86
  switch (isa()) {
    case Isa::kAvx512Search:
    case Isa::kAvx512: return attend_avx512;
    case Isa::kAvx2: return __builtin_cpu_supports("fma") ? attend_avx2 : attend_scalar;
    default: break;
  }
#endif
#ifdef MOEBOUND_NEON
  if (isa() == Isa::kNeon) return attend_neon;
#endif
  return attend_scalar;
}

size_t in_wholes(size_t n, size_t of) { return (n + of - 1) / of; }

size_t tokens_of_piece(size_t tokens) { return kAttendTokens * in_wholes(tokens, kAttendTokens * kMostPieces); }

constexpr size_t kHalf = kAttendGroup / 2;

// n numbers, a multiple of kAttendGroup, with the even ones of each group first.
void to_groups(const uint16_t* from, size_t n, float* to) {
  for (size_t at = 0; at < n; at += kAttendGroup) {
    for (size_t i = 0; i < kHalf; ++i) {
      to[at + i] = BF16::value(from[at + 2 * i]);
      to[at + kHalf + i] = BF16::value(from[at + 2 * i + 1]);
    }
  }
}

void out_of_groups(const float* from, size_t n, float* to) {
  for (size_t at = 0; at < n; at += kAttendGroup) {
    for (size_t i = 0; i < kHalf; ++i) {
      to[at + 2 * i] = from[at + i];
      to[at + 2 * i + 1] = from[at + kHalf + i];
    }
  }
}

// n numbers to out[first ...].
void write(const float* from, size_t n, DType dtype, void* out, size_t first) {
  if (dtype == DType::kF32) std::copy_n(from, n, static_cast<float*>(out) + first);
  else std::transform(from, from + n, static_cast<uint16_t*>(out) + first, rounded<BF16>);
}

// Keys and values of one text, and the queries that they serve.
struct Shared {
  struct Part {
    PlainRows rows;
    const float* x;  // [m][rows.width]
  };
  std::vector<Part> keys;
  PlainRows values;
  size_t tokens;
  float* out;  // [m][values.width]
};

// A piece of a text for some of its queries: what one thread does at a time.
struct Item {
  const Shared* shared;
  size_t begin, end;      // tokens
  size_t first, queries;  // of the m
  float greatest[kQueriesAtOnce], sums[kQueriesAtOnce];
  float* values;  // [queries][shared->values.width]

  void run(const AttendPath& by, float scale) {
    const size_t n = end - begin, width = shared->values.width, stride = in_wholes(n, kAttendGroup) * kAttendGroup;
    std::vector<float> scores(queries * stride);
    for (const Shared::Part& part : shared->keys) {
      const size_t key = part.rows.width;
      const bool add = &part != shared->keys.data();
      by.dots(part.rows.from(begin), n, part.x + first * key, key, queries, scores.data(), stride, add);
    }
    for (size_t q = 0; q < queries; ++q) by.weigh(scores.data() + q * stride, n, scale, greatest[q], sums[q]);
    by.sums(shared->values.from(begin), n, scores.data(), stride, queries, values, width);
  }
};

// The pieces of a text for the same queries, each `step` behind the last; n of them.
void add_pieces(const Item* pieces, size_t n, size_t step) {
  const Item& one = pieces[0];
  const size_t width = one.shared->values.width;
  for (size_t q = 0; q < one.queries; ++q) {
    float greatest = -std::numeric_limits<float>::infinity(), sum = 0;
    for (size_t p = 0; p < n; ++p) greatest = std::max(greatest, pieces[p * step].greatest[q]);
    float* const out = one.shared->out + (one.first + q) * width;
    for (size_t p = 0; p < n; ++p) {
      const Item& piece = pieces[p * step];
      const float share = exp_of(piece.greatest[q] - greatest);
      sum += share * piece.sums[q];
      if (n == 1) break;
      const float* const values = piece.values + q * width;
      for (size_t i = 0; i < width; ++i) out[i] += share * values[i];
    }
    const float* const from = n > 1 ? out : one.values + q * width;  // one piece has a share of 1
    for (size_t i = 0; i < width; ++i) out[i] = from[i] / sum;
  }
}

// Each of m queries. What they get has to be 0 before.
void attend_all(const AttendPath& by, const std::vector<Shared>& all, size_t m, float scale, unsigned threads) {
  std::vector<Item> items;
  std::vector<size_t> begun;  // the first item of each
  size_t n_values = 0;
  for (const Shared& shared : all) {
    begun.push_back(items.size());
    const size_t step = tokens_of_piece(shared.tokens);
    for (size_t begin = 0; begin < shared.tokens; begin += step) {
      for (size_t q = 0; q < m; q += kQueriesAtOnce) {
        const size_t end = std::min(begin + step, shared.tokens), queries = std::min(kQueriesAtOnce, m - q);
        items.push_back({&shared, begin, end, q, queries, {}, {}, nullptr});
        n_values += queries * shared.values.width;
      }
    }
  }
  begun.push_back(items.size());
  std::vector<float> values(n_values);
  float* next = values.data();
  for (Item& item : items) {
    item.values = next;
    next += item.queries * item.shared->values.width;
  }
  for_each_index(items.size(), threads, [&](size_t i) { items[i].run(by, scale); });
  const size_t blocks = in_wholes(m, kQueriesAtOnce);
  const bool pieces = items.size() > all.size() * blocks;  // else there is little to add
  for_each_index(all.size() * blocks, pieces ? threads : 1, [&](size_t i) {
    const size_t first = begun[i / blocks];
    add_pieces(items.data() + first + i % blocks, (begun[i / blocks + 1] - first) / blocks, blocks);
  });
}

}  // namespace

void attend(const Queries& queries, const std::vector<Text>& texts, size_t shared, float scale, DType dtype, void* out,
            unsigned threads) {
  if (texts.empty()) return;
  const size_t m = queries.heads / shared, key = texts[0].keys.first.width, value = texts[0].values.first.width;
  std::vector<float> x(texts.size() * queries.heads * key), found(texts.size() * queries.heads * value);
  std::vector<Shared> all;
  for (size_t i = 0; i < texts.size(); ++i) {
    for (size_t h = 0; h < queries.heads; ++h) to_groups(queries.of(i, h), key, x.data() + (i * queries.heads + h) * key);
    for (size_t g = 0; g < shared; ++g) {
      const size_t first = i * queries.heads + g * m;
      all.push_back({{{texts[i].keys.head(g), x.data() + first * key}}, texts[i].values.head(g), texts[i].tokens,
                     found.data() + first * value});
    }
  }
  attend_all(path(), all, m, scale, threads);
  std::vector<float> in_order(found.size());
  out_of_groups(found.data(), found.size(), in_order.data());
  write(in_order.data(), in_order.size(), dtype, out, 0);
}

void attend_latent(const Queries& queries, const std::vector<LatentText>& texts, const uint16_t* weights, size_t nope,
                   size_t values, float scale, DType dtype, void* out, unsigned threads) {
  if (texts.empty()) return;
  const AttendPath& by = path();
  const size_t n = texts.size(), heads = queries.heads, rank = texts[0].latents.width, turn = texts[0].turned.width;
  std::vector<float> x(n * heads * rank), turned(n * heads * turn), found(n * heads * rank);
  const auto rows = [&](size_t h, size_t first) {
    return PlainRows{weights + (h * (nope + values) + first) * rank, ptrdiff_t(rank), rank};
  };
  for_each_index(heads, threads, [&](size_t h) {
    std::vector<float> some(n * nope);
    for (size_t i = 0; i < n; ++i) {
      const uint16_t* const query = queries.of(i, h);
      std::transform(query, query + nope, some.data() + i * nope, BF16::value);
      to_groups(query + nope, turn, turned.data() + (i * heads + h) * turn);
    }
    by.sums(rows(h, 0), nope, some.data(), nope, n, x.data() + h * rank, heads * rank);
  });
  std::vector<Shared> all;
  for (size_t i = 0; i < n; ++i) {
    const LatentText& text = texts[i];
    all.push_back({{{text.latents, x.data() + i * heads * rank}, {text.turned, turned.data() + i * heads * turn}},
                   text.latents, text.tokens, found.data() + i * heads * rank});
  }
  attend_all(by, all, heads, scale, threads);
  for_each_index(heads, threads, [&](size_t h) {
    std::vector<float> some(n * values);
    by.dots(rows(h, nope), values, found.data() + h * rank, heads * rank, n, some.data(), values, false);
    for (size_t i = 0; i < n; ++i) write(some.data() + i * values, values, dtype, out, (i * heads + h) * values);
  });
}

}  // namespace moebound
