#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>

#include "base/bytes.h"
#include "base/cpu.h"
#include "base/parallel.h"
#include "base/scratch.h"
#include "bound/codec.h"
#include "bound/layout.h"
#include "bound/model.h"
#include "bound/planes.h"
#include "bound/quantize.h"
#include "bound/rans/coder.h"

namespace moebound {
namespace {

EncodeSegment encoder() {
#ifdef MOEBOUND_X86
  switch (isa()) {
    case Isa::kAvx512Search:
    case Isa::kAvx512: return encode_segment_avx512;
    case Isa::kAvx2: return encode_segment_avx2;
    default: break;
  }
#endif
#ifdef MOEBOUND_NEON
  if (isa() == Isa::kNeon) return encode_segment_neon;
#endif
  return encode_segment_scalar;
}

PutPlanes planes_writer() {
#ifdef MOEBOUND_X86
  if (isa() != Isa::kScalar) return put_planes_avx2;
#endif
#ifdef MOEBOUND_NEON
  if (isa() == Isa::kNeon) return put_planes_neon;
#endif
  return put_planes_any;
}

std::vector<size_t> all_rows(const Layout& layout, size_t n) {
  std::vector<size_t> rows(layout.rows(n));
  std::iota(rows.begin(), rows.end(), size_t(0));
  return rows;
}

std::vector<uint32_t> encode_entries(const Layout& layout) {
  std::vector<uint32_t> entries(layout.frequencies.size());
  for (uint32_t t = 0; t < layout.n_tables; ++t) {
    uint32_t cumulative = 0;
    for (uint32_t s = 0; s < layout.n_symbols; ++s) {
      const uint32_t f = layout.frequencies[t * layout.n_symbols + s];
      if (f) entries[t * layout.n_symbols + s] = (f - 1) | cumulative << 12;
      cumulative += f;
    }
  }
  return entries;
}

struct Segment {
  std::unique_ptr<uint8_t[]> bytes;
  size_t n_bytes = 0;
  uint32_t n_words = 0;
};

Segment make_segment(const EncodeSetup& setup, const Symbols& symbols, size_t first, size_t last) {
  const Layout& layout = *setup.layout;
  const size_t n_weights = std::min(setup.n, last * layout.columns) - first * layout.columns;
  thread_local Scratch<uint16_t> words_scratch;  // at most kMaxSegmentWeights: never large
  uint16_t* const words_end = words_scratch.room_for(n_weights + kWordSlack) + n_weights + kWordSlack;
  uint32_t states[1u << kMaxLanesLog];
  const PutPlanes put = planes_writer();
  const uint16_t* const words = encoder()(setup, first, last, states, words_end);
  Segment segment;
  segment.n_words = uint32_t(words_end - words);
  segment.n_bytes = segment_n_bytes(layout, segment.n_words, groups_in_rows(layout, first, last, setup.n));
  segment.bytes = std::make_unique_for_overwrite<uint8_t[]>(segment.n_bytes);
  uint8_t* const behind_states = segment.bytes.get() + 4 * layout.lanes();
  uint8_t* const behind_words = std::copy_n(reinterpret_cast<const uint8_t*>(words), 2 * size_t(segment.n_words), behind_states);
  uint8_t* planes = segment.bytes.get() + segment_n_bytes(layout, segment.n_words, 0);
  std::memcpy(segment.bytes.get(), states, 4 * layout.lanes());
  std::fill(behind_words, planes, uint8_t(0));
  for (size_t row = first; layout.low_bits && row < last; ++row) {
    const size_t row_stop = std::min(setup.n, (row + 1) * layout.columns);
    for (size_t i = row * layout.columns; i < row_stop; i += kGroup, planes += 4 * layout.low_bits) {
      put(symbols.low + i, std::min<size_t>(kGroup, row_stop - i), layout.low_bits, planes);
    }
  }
  return segment;
}

// Every weight's cell, and the alphabet that is cheapest for them.
Symbols symbols_within_bound(const ArrayInfo& info, const void* source, Alphabet& alphabet) {
  const Quantizer quantizer(info, source);
  uint64_t n_counted = 0;
  const auto counts = quantizer.histogram(sample_rows(info, kAlphabetSample), n_counted);
  alphabet = choose_alphabet(counts, n_counted, info.n, uint32_t(8 * item_size(info.output)) + 2);
  return quantizer.symbols(alphabet);
}

// Every weight's pattern: the top byte is the symbol, the other is stored as it is.
Symbols exact_symbols(const ArrayInfo& info, const void* source, Alphabet& alphabet) {
  const auto* patterns = static_cast<const uint16_t*>(source);
  Symbols symbols = room_for_symbols(info.n, true);
  for (size_t i = 0; i < info.n; ++i) {
    const uint16_t bin = rotated(patterns[i]);
    symbols.symbol[i] = uint8_t(bin >> kExactLowBits);
    symbols.low[i] = uint8_t(bin);
  }
  const auto [lowest, highest] = std::minmax_element(symbols.symbol, symbols.symbol + info.n);
  alphabet.symbol_low = *lowest;
  alphabet.n_symbols = uint32_t(*highest - *lowest) + 1;
  alphabet.low_bits = kExactLowBits;
  const uint8_t low = *lowest;
  for (size_t i = 0; i < info.n; ++i) symbols.symbol[i] = uint8_t(symbols.symbol[i] - low);
  return symbols;
}

constexpr uint64_t kPositionBits = 8;  // of a miss, about

bool in_range(int32_t code) { return code > -int32_t(kMaxCells) && code < int32_t(kMaxCells); }

// Counts of codes -m .. m in the sampled rows.
std::vector<uint32_t> count_codes(const ArrayInfo& info, const int32_t* codes, uint64_t& n_counted) {
  int32_t m = 0;
  for (size_t i = 0; i < info.n; ++i) {
    if (in_range(codes[i])) m = std::max(m, codes[i] < 0 ? -codes[i] : codes[i]);
  }
  std::vector<uint32_t> counts(2 * size_t(m) + 1);
  n_counted = 0;
  for (const size_t row : sample_rows(info, kAlphabetSample)) {
    const size_t end = std::min(info.n, (row + 1) * info.columns);
    for (size_t i = row * info.columns; i < end; ++i) {
      if (!in_range(codes[i])) continue;
      ++counts[size_t(codes[i] + m)];
      ++n_counted;
    }
  }
  return counts;
}

// The symbols of codes; those beyond the alphabet, or that do not keep their weight's bound, are misses.
Symbols scaled_symbols(const ArrayInfo& info, const void* source, const int32_t* codes, const Steps& steps,
                       const std::vector<float>& sizes, const std::vector<float>& factors, const Alphabet& alphabet) {
  const double half_kappa = double(half_to_float(steps.kappa)) / 2;
  Symbols symbols = room_for_symbols(info.n, alphabet.low_bits > 0);
  with_dtype(info.source, [&](auto s) {
    with_dtype(info.output, [&](auto t) {
      using S = decltype(s);
      using T = decltype(t);
      const auto* patterns = static_cast<const typename S::Bits*>(source);
      for (size_t i = 0, row = 0; i < info.n; ++row) {
        for (size_t j = 0; j < info.columns && i < info.n; ++i, ++j) {
          const float own = sizes[steps.by_row ? row : j];
          const float step = factors.empty() ? own : own * factors[steps.by_row ? j : row];
          const double decoded = double(T::value(pattern_of<T>(float(codes[i]) * step)));
          // Written so that what is not a number is a miss.
          const bool kept = std::fabs(double(S::value(patterns[i])) - decoded) <= half_kappa * double(step);
          const uint32_t code = code_of(kept && in_range(codes[i]) ? codes[i] : kNoBin, alphabet);
          symbols.symbol[i] = uint8_t(code);
          if (symbols.low) symbols.low[i] = uint8_t(code >> 8);
          if (code & kMiss) symbols.misses.push_back(i);
        }
      }
    });
  });
  return symbols;
}

// Symbols and their layout, whole but for the segments' words, as bytes.
EncodedBound payload_of(Layout& layout, Symbols& symbols, size_t n, unsigned threads) {
  const EncodeSetup setup{&layout, n, symbols.symbol, encode_entries(layout),
                          table_starts(layout, layout.n_symbols)};
  std::vector<Segment> segments(layout.segments(n));
  for_each_index(segments.size(), threads, [&](size_t i) {
    const size_t first = i * layout.rows_per_segment;
    segments[i] = make_segment(setup, symbols, first, std::min(first + layout.rows_per_segment, layout.rows(n)));
  });

  EncodedBound encoded;
  for (const Segment& segment : segments) layout.segment_words.push_back(segment.n_words);
  size_t n_bytes = 0;
  for (const Segment& segment : segments) n_bytes += segment.n_bytes;
  write_layout(layout, encoded.payload);
  encoded.payload.reserve(encoded.payload.size() + n_bytes);
  for (const Segment& segment : segments) {
    encoded.payload.insert(encoded.payload.end(), segment.bytes.get(), segment.bytes.get() + segment.n_bytes);
  }
  encoded.misses = std::move(symbols.misses);
  release_symbols();
  return encoded;
}

}  // namespace

EncodedBound encode_bound(const ArrayInfo& info, const void* source, const EncodeOptions& options) {
  const size_t n = info.n;
  Alphabet alphabet;
  Symbols symbols = info.bound > 0 ? symbols_within_bound(info, source, alphabet)
                                   : exact_symbols(info, source, alphabet);

  Layout layout = start_layout(info, alphabet, options.segment_weights);
  const MagnitudeSums sums = magnitude_sums(symbols.symbol, alphabet.symbol_low, n, layout);
  choose_classes(sums, symbols.symbol, n, sample_rows(info, kClassSample), layout);
  choose_tables(count_symbols(symbols.symbol, layout, n, all_rows(layout, n)), n, layout);
  return payload_of(layout, symbols, n, options.threads);
}

EncodedBound encode_scaled(const ArrayInfo& info, const void* source, const int32_t* codes, const Steps& steps,
                           const EncodeOptions& options) {
  const std::vector<float> sizes = step_sizes(steps, info.bound), factors = step_factors(steps);
  const uint32_t miss_bits = uint32_t(8 * item_size(info.output)) + 2;
  uint64_t n_counted = 0;
  const auto counts = count_codes(info, codes, n_counted);
  // Tables that are not stored want an alphabet of their own: with both, see which takes fewer bits.
  Layout best;
  uint64_t fewest = UINT64_MAX;
  Alphabet chosen, of_symbols;
  Symbols symbols;
  for (const bool stretched : {false, true}) {
    if (stretched && info.n > kMostStretchedWeights) break;
    const Alphabet alphabet = choose_alphabet(counts, n_counted, info.n, miss_bits, stretched);
    if (stretched && alphabet == of_symbols) break;
    of_symbols = alphabet;
    symbols = scaled_symbols(info, source, codes, steps, sizes, factors, alphabet);
    Layout layout = start_layout(info, alphabet, options.segment_weights);
    layout.scaled = true;
    layout.steps = steps;
    const uint64_t n_bits = choose_scaled(symbols.symbol, info.n, sample_rows(info, kClassSample), layout) +
                            info.n * alphabet.low_bits + symbols.misses.size() * (miss_bits + kPositionBits);
    if (n_bits >= fewest) continue;
    fewest = n_bits;
    chosen = alphabet;
    best = std::move(layout);
  }
  if (!(of_symbols == chosen)) symbols = scaled_symbols(info, source, codes, steps, sizes, factors, chosen);
  return payload_of(best, symbols, info.n, options.threads);
}

}  // namespace moebound
