#include "bound/payload.h"

#include <algorithm>
#include <stdexcept>

#include "base/status.h"

namespace moebound {

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

std::vector<uint32_t> multiples(const Layout& layout, float step, DType output) {
  std::vector<uint32_t> values(size_t(layout.n_symbols) << layout.low_bits);
  with_dtype(output, [&](auto t) {
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = pattern_of<decltype(t)>(float(first_bin(layout) + int32_t(i)) * step);
    }
  });
  return values;
}

int32_t first_bin(const Layout& layout) { return int32_t(int64_t(layout.symbol_low) << layout.low_bits); }

namespace {

int64_t furthest_bin(const Layout& layout) {
  const int64_t first = int64_t(layout.symbol_low) << layout.low_bits;
  const int64_t last = first + (int64_t(layout.n_symbols) << layout.low_bits) - 1;
  return std::max(-first, last);
}

}  // namespace

void check_bins(const Layout& layout) {
  if (furthest_bin(layout) >= int64_t(kMaxCells) + (int64_t(1) << layout.low_bits)) {
    throw Corrupt("bins beyond the largest grid");
  }
}

Grid grid_of(const ArrayInfo& info, const Layout& layout) {
  check_bins(layout);
  return make_grid(info.source, info.output, info.bound, size_t(furthest_bin(layout)) + 1);
}

std::vector<float> steps_of(const Layout& layout, double bound) {
  check_bins(layout);
  try {
    return step_sizes(layout.steps, bound);
  } catch (const std::invalid_argument& error) {
    throw Corrupt(error.what());
  }
}

void check_exact(const Layout& layout) {
  if (layout.scaled || layout.low_bits != kExactLowBits || layout.symbol_low < 0 ||
      uint32_t(layout.symbol_low) + layout.n_symbols > 256) {
    throw Corrupt("not an exact copy's layout");
  }
}

ParsedPayload parse_payload(const ArrayInfo& info, const uint8_t* payload, size_t n_bytes) {
  ParsedPayload parsed;
  std::vector<SegmentBytes> segments;
  parsed.layout = parse_layout(payload, n_bytes, info.n, segments);
  parsed.segments.reserve(segments.size());
  for (const SegmentBytes& segment : segments) parsed.segments.push_back(uint64_t(segment.states - payload));
  if (info.bound == 0) {
    check_exact(parsed.layout);
  } else if (parsed.layout.scaled) {
    parsed.steps = steps_of(parsed.layout, info.bound);
    parsed.factors = step_factors(parsed.layout.steps);
  } else {
    const uint32_t sign = info.output == DType::kF32 ? F32::kSign : BF16::kSign;
    parsed.values = bin_values(parsed.layout, grid_of(info, parsed.layout), sign);
  }
  return parsed;
}

}  // namespace moebound
