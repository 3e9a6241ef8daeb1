#include <algorithm>
#include <atomic>
#include <string>

#include "bound.h"
#include "bound_layout.h"
#include "cpu.h"
#include "grid.h"
#include "parallel.h"
#include "rans.h"
#include "status.h"

namespace moebound {
namespace {

constexpr size_t kMaxShuffleSymbols = 128;

DecodeSegment decoder() {
#ifdef MOEBOUND_X86
  switch (isa()) {
    case Isa::kAvx512: return decode_segment_avx512;
    case Isa::kAvx2: return decode_segment_avx2;
    case Isa::kScalar: break;
  }
#endif
  return decode_segment_scalar;
}

void fill_tables(const Layout& layout, DecodePlan& plan) {
  plan.tables.reserve(size_t(layout.n_tables) << layout.table_log);
  for (uint32_t t = 0; t < layout.n_tables; ++t) {
    const uint16_t* f = layout.frequencies.data() + t * layout.n_symbols;
    for (uint32_t s = 0; s < layout.n_symbols; ++s) {
      for (uint32_t k = 0; k < f[s]; ++k) plan.tables.push_back(table_entry(s, f[s], k));
    }
  }
}

// The patterns of every bin the symbols can name, by symbol << low_bits | low.
std::vector<uint32_t> bin_values(const Layout& layout, const Grid& grid, uint32_t sign) {
  const int64_t first = int64_t(layout.symbol_low) << layout.low_bits;
  const size_t n = size_t(layout.n_symbols) << layout.low_bits;
  std::vector<uint32_t> values(n);
  for (size_t i = 0; i < n; ++i) {
    const int64_t bin = first + int64_t(i);
    // Bins beyond the grid are never coded; they are there because low bits come in full ranges.
    const size_t m = std::min<size_t>(size_t(bin < 0 ? -bin : bin), grid.values.size() - 1);
    values[i] = grid.values[m] | (bin < 0 ? sign : 0);
  }
  return values;
}

void fill_values(const ArrayInfo& info, const Layout& layout, DecodePlan& plan) {
  if (info.bound == 0) {
    if (layout.low_bits != kExactLowBits || layout.symbol_low < 0 ||
        uint32_t(layout.symbol_low) + layout.n_symbols > 256) {
      throw Corrupt("not an exact copy's layout");
    }
    plan.values16.resize(size_t(layout.n_symbols) << kExactLowBits);
    for (size_t i = 0; i < plan.values16.size(); ++i) {
      plan.values16[i] = unrotated(uint16_t((size_t(layout.symbol_low) << kExactLowBits) + i));
    }
    plan.values32.assign(plan.values16.begin(), plan.values16.end());
    return;
  }
  const int64_t first = int64_t(layout.symbol_low) << layout.low_bits;
  const int64_t last = first + (int64_t(layout.n_symbols) << layout.low_bits) - 1;
  if (std::max(-first, last) >= int64_t(kMaxCells) + (int64_t(1) << layout.low_bits)) {
    throw Corrupt("bins beyond the largest grid");
  }
  const Grid grid = make_grid(info.source, info.output, info.bound, size_t(std::max(-first, last)) + 1);
  plan.values32 = bin_values(layout, grid, info.output == DType::kF32 ? F32::kSign : BF16::kSign);
  if (info.output == DType::kF32) return;
  plan.values16.assign(plan.values32.begin(), plan.values32.end());
  if (layout.low_bits || layout.n_symbols > kMaxShuffleSymbols) return;
  const size_t n_blocks = (layout.n_symbols + 15) / 16;
  plan.shuffle_low.assign(32 * n_blocks, 0);
  plan.shuffle_high.assign(32 * n_blocks, 0);
  for (size_t s = 0; s < layout.n_symbols; ++s) {
    for (size_t half = 0; half < 32; half += 16) {
      plan.shuffle_low[s / 16 * 32 + half + s % 16] = uint8_t(plan.values16[s]);
      plan.shuffle_high[s / 16 * 32 + half + s % 16] = uint8_t(plan.values16[s] >> 8);
    }
  }
}

}  // namespace

void decode_bound(const ArrayInfo& info, const uint8_t* payload, size_t n_bytes, void* out,
                  unsigned threads) {
  std::vector<SegmentBytes> segments;
  const Layout layout = parse_layout(payload, n_bytes, info.n, segments);
  DecodePlan plan;
  plan.layout = &layout;
  plan.n = info.n;
  plan.output = info.output;
  fill_tables(layout, plan);
  fill_values(info, layout, plan);
  plan.starts = table_starts(layout, 1u << layout.table_log);
  const DecodeSegment decode = decoder();
  const size_t stride = size_t(layout.rows_per_segment) * layout.columns * item_size(info.output);
  std::atomic<size_t> damaged{SIZE_MAX};
  for_each_index(segments.size(), threads, [&](size_t i) {
    const size_t first = i * layout.rows_per_segment;
    const size_t last = std::min(first + layout.rows_per_segment, layout.rows(info.n));
    if (!decode(plan, segments[i], first, last, static_cast<uint8_t*>(out) + i * stride)) damaged = i;
  });
  if (damaged != SIZE_MAX) throw Corrupt("segment " + std::to_string(damaged) + " is damaged");
}

}  // namespace moebound
