#include "attend/attend.h"

#include <algorithm>
#include <limits>

#include "attend/exp.h"
#include "base/cpu.h"
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

// Where the number at `i` stands in groups.
size_t place(size_t i) { return i - i % kAttendGroup + i % kAttendGroup / 2 + i % 2 * (kAttendGroup / 2); }

void to_groups(const uint16_t* from, size_t n, float* to) {
  for (size_t i = 0; i < n; ++i) to[place(i)] = BF16::value(from[i]);
}

// n numbers to out[first ...]; number(i) is the i-th.
template <class Number>
void write(const Number& number, size_t n, DType dtype, void* out, size_t first) {
  for (size_t i = 0; i < n; ++i) {
    if (dtype == DType::kF32) static_cast<float*>(out)[first + i] = number(i);
    else static_cast<uint16_t*>(out)[first + i] = rounded<BF16>(number(i));
  }
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

// What one item of work found: [queries] each.
struct Piece {
  std::vector<float> greatest, sums, values;
};

Piece piece_of(const AttendPath& by, const Shared& shared, size_t begin, size_t end, size_t first, size_t queries,
               float scale) {
  const size_t n = end - begin, width = shared.values.width, stride = in_wholes(n, kAttendGroup) * kAttendGroup;
  Piece found{std::vector<float>(queries), std::vector<float>(queries), std::vector<float>(queries * width)};
  std::vector<float> scores(queries * stride);
  for (const Shared::Part& part : shared.keys) {
    const size_t key = part.rows.width;
    by.dots(part.rows.from(begin), n, part.x + first * key, key, queries, scores.data(), stride, &part != shared.keys.data());
  }
  for (size_t q = 0; q < queries; ++q) by.weigh(scores.data() + q * stride, n, scale, found.greatest[q], found.sums[q]);
  by.sums(shared.values.from(begin), n, scores.data(), stride, queries, found.values.data(), width);
  return found;
}

void add_pieces(const Shared& shared, const Piece* pieces, size_t n_pieces, size_t of_queries, size_t first, size_t m) {
  const size_t width = shared.values.width;
  for (size_t q = first; q < std::min(m, first + kQueriesAtOnce); ++q) {
    float greatest = -std::numeric_limits<float>::infinity(), sum = 0;
    for (size_t p = 0; p < n_pieces; ++p) greatest = std::max(greatest, pieces[p * of_queries].greatest[q - first]);
    float* const out = shared.out + q * width;
    std::fill_n(out, width, 0.0f);
    for (size_t p = 0; p < n_pieces; ++p) {
      const Piece& piece = pieces[p * of_queries];
      const float share = exp_of(piece.greatest[q - first] - greatest);
      sum = std::fma(share, piece.sums[q - first], sum);
      const float* const values = piece.values.data() + (q - first) * width;
      for (size_t i = 0; i < width; ++i) out[i] = std::fma(share, values[i], out[i]);
    }
    for (size_t i = 0; i < width; ++i) out[i] /= sum;
  }
}

// Each of m queries.
void attend_all(const AttendPath& by, const std::vector<Shared>& all, size_t m, float scale, unsigned threads) {
  const size_t of_queries = in_wholes(m, kQueriesAtOnce);
  struct Item {
    const Shared* shared;
    size_t begin, end, first;
  };
  std::vector<Item> items;
  std::vector<size_t> begun;  // the first item of each
  for (const Shared& shared : all) {
    begun.push_back(items.size());
    const size_t step = tokens_of_piece(shared.tokens);
    for (size_t begin = 0; begin < shared.tokens; begin += step) {
      for (size_t q = 0; q < m; q += kQueriesAtOnce) items.push_back({&shared, begin, std::min(begin + step, shared.tokens), q});
    }
  }
  std::vector<Piece> pieces(items.size());
  for_each_index(items.size(), threads, [&](size_t i) {
    const Item& item = items[i];
    pieces[i] = piece_of(by, *item.shared, item.begin, item.end, item.first, std::min(kQueriesAtOnce, m - item.first), scale);
  });
  begun.push_back(items.size());
  for_each_index(all.size() * of_queries, threads, [&](size_t i) {
    const size_t s = i / of_queries, block = i % of_queries;
    add_pieces(all[s], pieces.data() + begun[s] + block, (begun[s + 1] - begun[s]) / of_queries, of_queries,
               block * kQueriesAtOnce, m);
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
  for (size_t row = 0; row < texts.size() * queries.heads; ++row) {
    write([&](size_t i) { return found[row * value + place(i)]; }, value, dtype, out, row * value);
  }
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
    for (size_t i = 0; i < n; ++i) {
      write([&](size_t v) { return some[i * values + v]; }, values, dtype, out, (i * heads + h) * values);
    }
  });
}

}  // namespace moebound
