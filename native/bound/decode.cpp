#include <algorithm>
#include <atomic>
#include <functional>
#include <string>

#include "base/cpu.h"
#include "base/parallel.h"
#include "base/scratch.h"
#include "base/status.h"
#include "bound/codec.h"
#include "bound/grid.h"
#include "bound/layout.h"
#include "bound/payload.h"
#include "bound/rans/coder.h"

namespace moebound {
namespace {

constexpr size_t kMaxShuffleSymbols = 128;

DecodeSegments decoder() {
#ifdef MOEBOUND_X86
  switch (isa()) {
    case Isa::kAvx512Search:
    case Isa::kAvx512: return decode_segments_avx512;
    case Isa::kAvx2: return decode_segments_avx2;
    default: break;
  }
#endif
#ifdef MOEBOUND_NEON
  if (isa() == Isa::kNeon) return decode_segments_neon;
#endif
  return decode_segments_scalar;
}

// How wide the tables are to be for a decoder that searches them in registers; 0 for one that looks
// up. Searching needs small alphabets and one table a row.
size_t search_width(const Layout& layout) {
  if (isa() != Isa::kAvx512Search || layout.lanes() != kGroup) return 0;
  const auto& classes = layout.column_classes;
  if (std::adjacent_find(classes.begin(), classes.end(), std::not_equal_to<>()) != classes.end()) return 0;
  for (size_t width = kLeastSearch; width <= kWidestSearch; width *= 2) {
    if (layout.n_symbols <= width) return width;
  }
  return 0;
}

void fill_search_tables(const Layout& layout, DecodeSetup& setup) {
  const size_t width = setup.search_width;
  setup.search_tables.resize(2 * width * layout.n_tables);
  for (uint32_t t = 0; t < layout.n_tables; ++t) {
    uint16_t* const cumulative = setup.search_tables.data() + 2 * width * t;
    uint16_t* const frequency = cumulative + width;
    std::fill_n(cumulative, width, uint16_t(0xFFFF));
    std::copy_n(layout.frequencies.data() + t * layout.n_symbols, layout.n_symbols, frequency);
    uint16_t sum = 0;
    for (uint32_t s = 0; s < layout.n_symbols; sum = uint16_t(sum + frequency[s++])) cumulative[s] = sum;
  }
}

void fill_tables(const Layout& layout, DecodeSetup& setup) {
  setup.tables.resize(size_t(layout.n_tables) << layout.table_log);
  uint32_t* entry = setup.tables.data();
  for (uint32_t t = 0; t < layout.n_tables; ++t) {
    const uint16_t* f = layout.frequencies.data() + t * layout.n_symbols;
    for (uint32_t s = 0; s < layout.n_symbols; ++s) {
      for (uint32_t k = 0; k < f[s]; ++k) *entry++ = table_entry(s, f[s], k);
    }
  }
}

void fill_values(const ArrayInfo& info, const Layout& layout, DecodeSetup& setup) {
  if (info.bound == 0) {
    check_exact(layout);
    setup.values16.resize(size_t(layout.n_symbols) << kExactLowBits);
    for (size_t i = 0; i < setup.values16.size(); ++i) {
      setup.values16[i] = unrotated(uint16_t((size_t(layout.symbol_low) << kExactLowBits) + i));
    }
    setup.values32.assign(setup.values16.begin(), setup.values16.end());
    return;
  }
  if (layout.scaled) {
    setup.steps = steps_of(layout, info.bound);
    const std::vector<uint8_t>& levels = layout.steps.levels;
    setup.row_factors = step_factors(layout.steps);
    if (setup.row_factors.empty() &&
        std::all_of(levels.begin(), levels.end(), [&](uint8_t level) { return level == levels[0]; })) {
      setup.values32 = multiples(layout, setup.steps[0], info.output);  // a table, as of any grid
    } else {
      setup.scaled = true;
      // A product of two is the same the other way round.
      if (layout.steps.by_row && !setup.row_factors.empty()) std::swap(setup.steps, setup.row_factors);
      else setup.by_row = layout.steps.by_row;
      setup.first_bin = first_bin(layout);
      if (!setup.by_row) setup.steps.resize(layout.groups_per_row() * kGroup);
      return;
    }
  } else {
    const Grid grid = grid_of(info, layout);
    setup.values32 = bin_values(layout, grid, info.output == DType::kF32 ? F32::kSign : BF16::kSign);
  }
  if (info.output == DType::kF32) return;
  setup.values16.assign(setup.values32.begin(), setup.values32.end());
  setup.values16.resize(std::max(setup.values16.size(), kMostPermuted));  // whole registers
  if (layout.low_bits || layout.n_symbols > kMaxShuffleSymbols) return;
  const size_t n_blocks = (layout.n_symbols + 15) / 16;
  setup.shuffle_low.assign(32 * n_blocks, 0);
  setup.shuffle_high.assign(32 * n_blocks, 0);
  for (size_t s = 0; s < layout.n_symbols; ++s) {
    for (size_t half = 0; half < 32; half += 16) {
      setup.shuffle_low[s / 16 * 32 + half + s % 16] = uint8_t(setup.values16[s]);
      setup.shuffle_high[s / 16 * 32 + half + s % 16] = uint8_t(setup.values16[s] >> 8);
    }
  }
}

// Everything that all segments share, but for their values.
DecodeSetup setup_of(const ArrayInfo& info, const Layout& layout) {
  DecodeSetup setup;
  setup.layout = &layout;
  setup.n = info.n;
  setup.output = info.output;
  setup.search_width = search_width(layout);
  if (setup.search_width) {
    fill_search_tables(layout, setup);
  } else {
    fill_tables(layout, setup);
    setup.starts = table_starts(layout, 1u << layout.table_log);
  }
  return setup;
}

// Segments go to threads in batches of up to kMostTogether, of even size, as many for each thread.
size_t batches(size_t n_segments, unsigned threads) {
  const size_t least = (n_segments + kMostTogether - 1) / kMostTogether, each = threads ? threads : 1;
  return std::min(n_segments, (least + each - 1) / each * each);
}

// out(row, n_values): where a batch goes whose first row this is. done(batch, first, last, at): of the rows that are there.
template <class Out, class Done>
void decode_all(const DecodeSetup& setup, const std::vector<SegmentBytes>& segments, unsigned threads, Out out, Done done) {
  const Layout& layout = *setup.layout;
  const DecodeSegments decode = decoder();
  const size_t rows = layout.rows(setup.n), n = segments.size(), n_batches = batches(n, threads);
  std::atomic<size_t> damaged{SIZE_MAX};
  for_each_index(n_batches, threads, [&](size_t batch) {
    const size_t begin = batch * n / n_batches, end = (batch + 1) * n / n_batches;
    const size_t from = begin * layout.rows_per_segment, to = std::min(end * layout.rows_per_segment, rows);
    uint8_t* const at = out(from, (to - from) * layout.columns);
    SegmentJob jobs[kMostTogether];
    for (size_t i = begin; i < end; ++i) {
      const size_t first = i * layout.rows_per_segment, last = std::min(first + layout.rows_per_segment, rows);
      jobs[i - begin] = {&segments[i], first, last, at + (first - from) * layout.columns * setup.value_bytes()};
    }
    if (decode(setup, jobs, end - begin)) done(batch, from, to, at);
    else damaged = begin;
  });
  if (damaged != SIZE_MAX) {
    throw Corrupt("segment " + std::to_string(damaged) + " or one soon behind it is damaged");
  }
}

void decode_to(void* out, const DecodeSetup& setup, const std::vector<SegmentBytes>& segments, unsigned threads) {
  const size_t row_bytes = setup.layout->columns * setup.value_bytes();
  decode_all(
      setup, segments, threads, [&](size_t row, size_t) { return static_cast<uint8_t*>(out) + row * row_bytes; },
      [](size_t, size_t, size_t, const uint8_t*) {});
}

// Decodes codes: decode(setup, segments, found) has them written. What they stand for.
template <class Decode>
CodeValues codes_by(const ArrayInfo& info, const uint8_t* payload, size_t n_bytes, Decode decode) {
  std::vector<SegmentBytes> segments;
  const Layout layout = parse_layout(payload, n_bytes, info.n, segments);
  CodeValues found;
  found.n_codes = layout.n_symbols << layout.low_bits;
  if (info.bound == 0 || found.n_codes > kMostCodes) throw Corrupt("more codes than a byte has");
  found.first = first_bin(layout);
  DecodeSetup setup = setup_of(info, layout);
  fill_values(info, layout, setup);
  setup.codes = true;
  found.factors.swap(setup.row_factors);  // codes need none on the way
  decode(setup, segments, found);
  found.by_row = setup.by_row;
  if (setup.scaled) {
    found.steps = std::move(setup.steps);
    if (!setup.by_row) found.steps.resize(layout.columns);
  } else {
    found.values = std::move(setup.values32);
  }
  return found;
}

}  // namespace

void decode_bound(const ArrayInfo& info, const uint8_t* payload, size_t n_bytes, void* out,
                  unsigned threads) {
  std::vector<SegmentBytes> segments;
  const Layout layout = parse_layout(payload, n_bytes, info.n, segments);
  DecodeSetup setup = setup_of(info, layout);
  fill_values(info, layout, setup);
  decode_to(out, setup, segments, threads);
}

CodeValues decode_codes(const ArrayInfo& info, const uint8_t* payload, size_t n_bytes, uint8_t* out,
                        unsigned threads) {
  return codes_by(info, payload, n_bytes, [&](const DecodeSetup& setup, const auto& segments, const CodeValues&) {
    decode_to(out, setup, segments, threads);
  });
}

CodeValues decode_packed_codes(const ArrayInfo& info, const uint8_t* payload, size_t n_bytes, uint8_t* out,
                               unsigned threads, Outside& outside) {
  return codes_by(info, payload, n_bytes, [&](const DecodeSetup& setup, const auto& segments, const CodeValues& found) {
    const size_t columns = info.columns;
    if (setup.layout->columns != columns || info.n % columns) throw Corrupt("other columns than the matrix has");
    if (found.first > 0 || -found.first >= int32_t(kMostCodes)) throw Corrupt("no code is 0");
    const Window window(uint32_t(-found.first));
    std::vector<Outside> parts(batches(segments.size(), threads));
    thread_local Scratch<uint8_t> scratch;
    decode_all(
        setup, segments, threads, [&](size_t, size_t n) { return scratch.room_for(n); },
        [&](size_t batch, size_t first, size_t last, const uint8_t* codes) {
          pack_rows(codes, columns, window, first, last, out, parts[batch]);
        });
    for (const Outside& part : parts) {
      outside.places.insert(outside.places.end(), part.places.begin(), part.places.end());
      outside.codes.insert(outside.codes.end(), part.codes.begin(), part.codes.end());
    }
  });
}

}  // namespace moebound
