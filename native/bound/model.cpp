#include "bound/model.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <numeric>
#include <utility>

#include "base/bits.h"
#include "base/cpu.h"
#include "base/fixed_log.h"
#include "bound/magnitude_sums.h"
#include "bound/stretched.h"

namespace moebound {
namespace {

using Cost = uint64_t;  // in 1/65536 bit

constexpr Cost kTableSymbolBits = 6;  // about what a frequency costs in a table
// A coder fitted to few samples looks better on them than it is: 1/(2 ln 2) bit a parameter.
constexpr Cost kFitBias = 47274;
// 1.44 bits · n / 4096: what it costs all others to leave one slot of a table to a rare symbol.
Cost slot_cost(uint64_t n) { return n * 94548 / 4096; }

// Bits of an ideal coder for these counts.
template <class Count>
Cost entropy(const Count* counts, size_t size) {
  uint64_t total = 0;
  Cost cost = 0;
  for (size_t i = 0; i < size; ++i) {
    if (!counts[i]) continue;
    total += counts[i];
    cost += uint64_t(counts[i]) * fixed_log2(counts[i]);
  }
  return total ? total * fixed_log2(total) - cost : 0;
}

// Levels are quarter octaves around 1: level(v) = round(4 · log2 v), in -16 .. 16.
constexpr int kMaxLevel = 16;
int level(double v) {
  static constexpr double kEighth[4] = {0x1.172b83c7d517bp+0, 0x1.4bfdad5362a27p+0,
                                        0x1.8ace5422aa0dbp+0, 0x1.d5818dcfba487p+0};  // 2^(1,3,5,7)/8
  int found = -kMaxLevel;
  // Thresholds 2^((c - 1/2) / 4) for c = -15 .. 16, ascending.
  for (int c = -kMaxLevel + 1; c <= kMaxLevel; ++c) {
    const int eighths = 2 * c - 1, octave = eighths >> 3;
    const double scale = octave >= 0 ? double(1u << octave) : 1.0 / double(1u << -octave);
    const double threshold = kEighth[(eighths & 7) / 2] * scale;
    if (v < threshold) break;
    found = c;
  }
  return found;
}

std::vector<int> levels(const std::vector<uint64_t>& sums, const std::vector<size_t>& counts,
                        uint64_t total, size_t n) {
  std::vector<int> result(sums.size());
  for (size_t i = 0; i < sums.size(); ++i) {
    result[i] = level(double(sums[i]) * double(n) / (double(total) * double(counts[i])));
  }
  return result;
}

size_t row_end(const Layout& layout, size_t row, size_t n) {
  return std::min<size_t>(layout.columns, n - row * layout.columns);
}

struct Scales {
  std::vector<int> row, column;  // levels, empty if there is nothing to tell apart
};

Scales scales_of(const MagnitudeSums& sums, size_t n, const Layout& layout) {
  const uint64_t total = std::accumulate(sums.row.begin(), sums.row.end(), uint64_t(0));
  if (!total) return {};
  const size_t columns = layout.columns;
  std::vector<size_t> row_counts(sums.row.size()), column_counts(columns);
  for (size_t row = 0; row < row_counts.size(); ++row) row_counts[row] = row_end(layout, row, n);
  for (size_t j = 0; j < columns; ++j) column_counts[j] = (n - j + columns - 1) / columns;
  return {levels(sums.row, row_counts, total, n), levels(sums.column, column_counts, total, n)};
}

// Which of the two scales tell tables apart.
struct Option {
  bool by_row, by_column;
};

// Tables' range: the levels row + column that have tables of their own; those beyond share the last.
struct Range {
  int low, high;
};

// Of levels 0 .. n - 1 with these weights, at most kMaxTables whose ends have at least `enough` weights,
// those beyond counted in.
Range narrowed(const uint64_t* weights, int n, uint64_t enough) {
  int low = 0, high = n - 1;
  uint64_t below = weights[0], above = weights[high];
  while (low < high && below < enough) below += weights[++low];
  while (high > low && above < enough) above += weights[--high];
  while (high - low + 1 > int(kMaxTables)) {  // the sparser end shares
    if (below <= above) below += weights[++low];
    else above += weights[--high];
  }
  return {low, high};
}

// Every table shall have a part of the weights that is worth it.
Range table_range(const Scales& scales, Option option, size_t n) {
  constexpr int kSpan = 4 * kMaxLevel + 1;
  std::array<uint64_t, 2 * kMaxLevel + 1> rows{}, columns{};
  if (option.by_row) for (const int l : scales.row) ++rows[size_t(l + kMaxLevel)];
  else rows[kMaxLevel] = scales.row.size();
  if (option.by_column) for (const int l : scales.column) ++columns[size_t(l + kMaxLevel)];
  else columns[kMaxLevel] = scales.column.size();
  std::array<uint64_t, kSpan> weights{};
  for (size_t a = 0; a < rows.size(); ++a) {
    for (size_t b = 0; b < columns.size(); ++b) weights[a + b] += rows[a] * columns[b];
  }
  const Range range = narrowed(weights.data(), kSpan, std::max<uint64_t>(n / 128, 256));
  return {range.low - 2 * kMaxLevel, range.high - 2 * kMaxLevel};
}

void apply(const Scales& scales, Option option, size_t n, Layout& layout) {
  layout.n_tables = 1;
  layout.class_base = 0;
  layout.row_classes.clear();
  layout.column_classes.clear();
  if (!option.by_row && !option.by_column) return;
  const Range range = table_range(scales, option, n);
  if (range.low == range.high) return;
  layout.n_tables = uint32_t(range.high - range.low + 1);
  // Shift levels so that both kinds begin at 0.
  const auto classes = [](const std::vector<int>& levels, bool used, int& lowest) {
    lowest = used ? *std::min_element(levels.begin(), levels.end()) : 0;
    std::vector<uint8_t> result(levels.size());
    if (used) {
      for (size_t i = 0; i < levels.size(); ++i) result[i] = uint8_t(levels[i] - lowest);
    }
    return result;
  };
  int row_low, column_low;
  layout.row_classes = classes(scales.row, option.by_row, row_low);
  layout.column_classes = classes(scales.column, option.by_column, column_low);
  layout.class_base = uint32_t(std::max(0, range.low - row_low - column_low));
}

// Bits for all n weights under the layout's classes, judged from the sampled rows.
Cost class_cost(const uint8_t* symbols, const Layout& layout, size_t n, const std::vector<size_t>& rows) {
  uint64_t n_counted = 0;
  for (const size_t row : rows) n_counted += row_end(layout, row, n);
  const std::vector<uint32_t> counts = count_symbols(symbols, layout, n, rows);
  Cost sampled = 0;
  uint64_t n_parameters = 0;
  for (uint32_t t = 0; t < layout.n_tables; ++t) {
    const uint32_t* c = counts.data() + t * layout.n_symbols;
    sampled += entropy(c, layout.n_symbols);
    n_parameters += uint64_t(layout.n_symbols - std::count(c, c + layout.n_symbols, 0u));
  }
  sampled += n_parameters * kFitBias;
  const auto side = [](const std::vector<uint8_t>& classes) -> Cost {
    if (classes.empty()) return 0;
    return classes.size() * bit_length(*std::max_element(classes.begin(), classes.end())) * kLogOne;
  };
  // n_counted is at most n: the quotient keeps the product within 64 bits for any n.
  const double scale = double(n) / double(n_counted);
  return Cost(double(sampled) * scale) + n_parameters * kTableSymbolBits * kLogOne +
         side(layout.row_classes) + side(layout.column_classes);
}

// f rounded to the nearest number with `bits` bits below its leading one.
uint32_t round_mantissa(uint32_t f, uint32_t bits) {
  const uint32_t length = bit_length(f);
  if (length <= bits + 1) return f;
  const uint32_t drop = length - bits - 1;
  return ((f + (1u << (drop - 1))) >> drop) << drop;
}

// Frequencies that sum to 2^table_log, each symbol that occurs with at least one. Returns the
// symbol that takes what the others leave, the most frequent one.
uint8_t normalize(const uint32_t* counts, const Layout& layout, uint16_t* f) {
  const uint32_t sum = 1u << layout.table_log;
  const uint8_t rest = uint8_t(std::max_element(counts, counts + layout.n_symbols) - counts);
  uint64_t total = 0;
  for (uint32_t s = 0; s < layout.n_symbols; ++s) total += counts[s];
  uint32_t others = 0;
  for (uint32_t s = 0; s < layout.n_symbols; ++s) {
    f[s] = 0;
    if (s == rest || !counts[s]) continue;
    const uint64_t exact = (uint64_t(counts[s]) * sum * 2 + total) / (2 * total);
    f[s] = uint16_t(std::max<uint32_t>(1, round_mantissa(uint32_t(exact), layout.mantissa_bits)));
    others += f[s];
  }
  // Rounding up may leave too little for the most frequent one: take it from the next ones.
  while (others >= sum) {
    uint8_t most = rest;
    for (uint32_t s = 0; s < layout.n_symbols; ++s) {
      if (s != rest && f[s] > 1 && (most == rest || f[s] > f[most])) most = uint8_t(s);
    }
    const uint16_t less = uint16_t(f[most] / 2);
    others -= f[most] - less;
    f[most] = uint16_t(round_mantissa(less, layout.mantissa_bits));
    others += f[most] - less;
  }
  f[rest] = uint16_t(sum - others);
  return rest;
}

// log2 of frequencies up to 2^kMaxTableLog.
const std::vector<Cost>& frequency_logs() {
  static const std::vector<Cost> logs = [] {
    std::vector<Cost> found((size_t(1) << kMaxTableLog) + 1);
    for (size_t f = 1; f < found.size(); ++f) found[f] = fixed_log2(f);
    return found;
  }();
  return logs;
}

Cost coded_cost(const std::vector<uint32_t>& counts, const Layout& layout, const std::vector<uint16_t>& f) {
  const auto& logs = frequency_logs();
  Cost cost = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    if (counts[i]) cost += Cost(counts[i]) * (layout.table_log * kLogOne - logs[f[i]]);
  }
  return cost;
}

// Sets layout's table_log and frequencies for these counts and mantissa bits, and returns what all
// symbols then cost. From the finest down: a smaller table decodes quicker, so it may cost one part in
// `tolerance` more where several share the cache, a ten-thousandth where one is alone.
Cost fit_tables(std::vector<uint32_t>& counts, Cost tolerance, Layout& layout) {
  std::vector<uint16_t> f(counts.size());
  std::vector<uint8_t> rests(layout.n_tables);
  Cost best_cost = 0, chosen = 0;
  for (uint32_t log = kMaxTableLog; log >= kLeastEncodedTableLog; --log) {
    layout.table_log = log;
    for (uint32_t t = 0; t < layout.n_tables; ++t) {
      uint32_t* c = counts.data() + t * layout.n_symbols;
      // A table that no weight uses still needs a symbol.
      if (std::all_of(c, c + layout.n_symbols, [](uint32_t v) { return v == 0; })) c[0] = 1;
      rests[t] = normalize(c, layout, f.data() + t * layout.n_symbols);
    }
    const Cost cost = coded_cost(counts, layout, f);
    if (log == kMaxTableLog) best_cost = cost;
    if (cost > best_cost + best_cost / (layout.n_tables > 1 ? tolerance : 10000)) {
      layout.table_log = log + 1;
      break;
    }
    chosen = cost;
    layout.frequencies = f;
    layout.rests = rests;
  }
  return chosen;
}

// Classes that are the levels of steps, those in a range of at most kMaxTables with a table each: its
// ends have at least `enough` weights. Returns whether there are several.
bool apply_levels(size_t n, uint64_t enough, Layout& layout) {
  set_classes_by_level(layout, n);
  std::array<uint64_t, kMaxLevels> rows{}, columns{};
  for (const uint8_t level : layout.row_classes) ++rows[level];
  for (const uint8_t level : layout.column_classes) ++columns[level];
  std::array<uint64_t, 2 * kMaxLevels> weights{};
  for (size_t a = 0; a < kMaxLevels; ++a) {
    for (size_t b = 0; b < kMaxLevels; ++b) weights[a + b] += rows[a] * columns[b];
  }
  const auto [low, high] = narrowed(weights.data(), int(weights.size()), enough);
  layout.n_tables = uint32_t(high - low + 1);
  layout.class_base = uint32_t(low);
  return low < high;
}

// Sets layout's tables to the cheapest stretch for these counts, and returns what all symbols then cost.
Cost fit_stretch(const std::vector<uint32_t>& counts, Layout& layout) {
  layout.stretched = true;
  layout.table_log = kMaxTableLog;
  Cost best_cost = ~Cost(0);
  uint32_t best = 0;
  const auto consider = [&](uint32_t stretch) {
    layout.stretch = stretch;
    set_stretched_tables(layout);
    const Cost cost = coded_cost(counts, layout, layout.frequencies);
    if (cost >= best_cost) return;
    best_cost = cost;
    best = stretch;
  };
  for (uint32_t stretch = 0; stretch <= kMostStretch; stretch += 8) consider(stretch);
  for (uint32_t by = 4; by > 0; by /= 2) {
    const uint32_t middle = best;
    if (middle >= by) consider(middle - by);
    if (middle + by <= kMostStretch) consider(middle + by);
  }
  layout.stretch = best;
  set_stretched_tables(layout);
  return best_cost;
}

}  // namespace

Alphabet choose_alphabet(const std::vector<uint32_t>& counts, uint64_t n_counted, size_t n,
                         uint32_t miss_bits, bool stretched) {
  const int32_t m = int32_t(counts.size() / 2);
  const Cost symbol_cost = stretched ? slot_cost(n) : kTableSymbolBits * kLogOne;
  Alphabet best;
  if (!n_counted) return best;
  const double scale = double(n) / double(n_counted);
  Cost best_cost = ~Cost(0);
  for (uint32_t low_bits = 0; low_bits <= kMaxLowBits; ++low_bits) {
    const int32_t first = -m >> low_bits;
    std::vector<uint32_t> merged(size_t((m >> low_bits) - first) + 1);
    for (int32_t bin = -m; bin <= m; ++bin) {
      merged[size_t((bin >> low_bits) - first)] += counts[size_t(bin + m)];
    }
    // From both ends, drop the rarer symbol while the window is too wide or misses are cheaper.
    size_t begin = 0, end = merged.size();
    uint64_t missed = 0;
    const auto full = [&](uint32_t count) { return uint64_t(double(count) * scale); };
    while (end - begin > 1) {
      const bool at_begin = merged[begin] <= merged[end - 1];
      const uint32_t count = at_begin ? merged[begin] : merged[end - 1];
      if (end - begin <= kMaxSymbols) {
        const uint64_t c = full(count);
        const Cost keep = symbol_cost + (c < n >> kMaxTableLog ? slot_cost(n) : 0) +
                          c * kMaxTableLog * kLogOne;
        const Cost miss = c * (miss_bits * kLogOne + fixed_log2(std::max<uint64_t>(1, n / std::max<uint64_t>(1, c))));
        if (keep <= miss) break;
      }
      missed += count;
      at_begin ? ++begin : --end;
    }
    uint64_t n_rare = 0;
    for (size_t s = begin; s < end; ++s) n_rare += full(merged[s]) < n >> kMaxTableLog;
    const uint64_t missed_all = full(uint32_t(std::min<uint64_t>(missed, UINT32_MAX)));
    const Cost per_miss = miss_bits * kLogOne + (missed_all ? fixed_log2(std::max<uint64_t>(1, n / missed_all)) : 0);
    const Cost cost = Cost(double(entropy(merged.data() + begin, end - begin)) * scale) +
                      uint64_t(n) * low_bits * kLogOne + missed_all * per_miss + n_rare * slot_cost(n) / 2 +
                      (end - begin) * symbol_cost;
    if (cost < best_cost) {
      best_cost = cost;
      best.low_bits = low_bits;
      best.symbol_low = first + int32_t(begin);
      best.n_symbols = uint32_t(end - begin);
      const auto top = std::max_element(merged.begin() + std::ptrdiff_t(begin), merged.begin() + std::ptrdiff_t(end));
      best.stand_in = uint8_t(top - merged.begin() - std::ptrdiff_t(begin));
    }
    if (end - begin == merged.size() && low_bits > 0 && merged.size() <= 16) break;
  }
  return best;
}

Layout start_layout(const ArrayInfo& info, const Alphabet& alphabet, size_t segment_weights) {
  Layout layout;
  layout.columns = info.columns;
  // Few lanes for few weights: each state costs about 24 bits.
  layout.lanes_log = info.n < 1u << 13 ? 0 : info.n < 1u << 15 ? 2 : kMaxLanesLog;
  layout.low_bits = alphabet.low_bits;
  layout.symbol_low = alphabet.symbol_low;
  layout.n_symbols = alphabet.n_symbols;
  const size_t rows = layout.rows(info.n);
  const size_t most_rows = std::max<size_t>(1, segment_weights / layout.columns);
  const size_t n_segments = (rows + most_rows - 1) / most_rows;
  layout.rows_per_segment = uint32_t((rows + n_segments - 1) / n_segments);
  return layout;
}

MagnitudeSums magnitude_sums(const uint8_t* symbols, int32_t symbol_low, size_t n, const Layout& layout) {
  const size_t columns = layout.columns, rows = layout.rows(n);
#ifdef MOEBOUND_X86
  const auto add = isa() == Isa::kScalar ? magnitude_sums_any : magnitude_sums_avx2;
#else
  const auto add = magnitude_sums_any;
#endif
  // A row's sum fits 32 bits (2^16 columns, magnitudes below 2^16), and so do a few thousand rows'.
  constexpr size_t kRowsAtOnce = 1 << 12;
  MagnitudeSums sums{std::vector<uint64_t>(rows), std::vector<uint64_t>(columns)};
  std::vector<uint32_t> block_sums(columns);
  for (size_t row = 0; row < rows; ++row) {
    sums.row[row] = add(symbols + row * columns, row_end(layout, row, n), symbol_low, block_sums.data());
    if ((row + 1) % kRowsAtOnce && row + 1 < rows) continue;
    for (size_t j = 0; j < columns; ++j) sums.column[j] += std::exchange(block_sums[j], 0);
  }
  return sums;
}

std::vector<uint32_t> count_symbols(const uint8_t* symbols, const Layout& layout, size_t n,
                                    const std::vector<size_t>& rows) {
  // Four sets of counters: a run of one symbol does not wait for its own last count.
  constexpr size_t kSets = 4;
  const size_t size = size_t(layout.n_tables) * layout.n_symbols;
  std::vector<uint32_t> counts(kSets * size);
  uint32_t* const set = counts.data();
  const TableStarts starts = table_starts(layout, layout.n_symbols);
  for (const size_t row : rows) {
    const uint32_t* start_at = starts.of_row(row);
    const uint8_t* s = symbols + row * layout.columns;
    const size_t end = row_end(layout, row, n);
    size_t j = 0;
    for (; j + kSets <= end; j += kSets) {
      ++set[start_at[j] + s[j]];
      ++set[start_at[j + 1] + s[j + 1] + size];
      ++set[start_at[j + 2] + s[j + 2] + 2 * size];
      ++set[start_at[j + 3] + s[j + 3] + 3 * size];
    }
    for (; j < end; ++j) ++set[start_at[j] + s[j]];
  }
  for (size_t i = size; i < kSets * size; ++i) set[i % size] += set[i];
  counts.resize(size);
  return counts;
}

void choose_classes(const MagnitudeSums& sums, const uint8_t* symbols, size_t n,
                    const std::vector<size_t>& sampled_rows, Layout& layout) {
  layout.n_tables = 1;
  const Scales scales = scales_of(sums, n, layout);
  if (scales.row.empty()) return;
  constexpr Option kOptions[] = {{false, false}, {true, false}, {false, true}, {true, true}};
  Option best = kOptions[0];
  Cost best_cost = ~Cost(0);
  for (const Option option : kOptions) {
    apply(scales, option, n, layout);
    if (layout.n_tables == 1 && (option.by_row || option.by_column)) continue;
    const Cost cost = class_cost(symbols, layout, n, sampled_rows);
    if (cost < best_cost) {
      best_cost = cost;
      best = option;
    }
  }
  apply(scales, best, n, layout);
}

void choose_tables(std::vector<uint32_t> counts, size_t n, Layout& layout) {
  layout.mantissa_bits = n < 1u << 17 ? 3 : 6;  // what rounding costs against what bits cost
  fit_tables(counts, 1000, layout);
}

uint64_t choose_scaled(const uint8_t* symbols, size_t n, const std::vector<size_t>& sampled_rows, Layout& layout) {
  std::vector<size_t> rows(layout.rows(n));
  std::iota(rows.begin(), rows.end(), size_t(0));
  Layout best;
  Cost best_cost = ~Cost(0);
  const auto consider = [&](const Layout& candidate, Cost coded) {
    std::vector<uint8_t> header;
    write_layout(candidate, header);
    const Cost cost = coded + 8 * header.size() * kLogOne;
    if (cost >= best_cost) return;
    best_cost = cost;
    best = candidate;
  };
  const auto with_tables = [&](Layout candidate) {
    auto counts = count_symbols(symbols, candidate, n, rows);
    for (const uint32_t mantissa_bits : {1u, 2u, 3u, 4u, 6u}) {
      candidate.mantissa_bits = mantissa_bits;
      consider(candidate, fit_tables(counts, 400, candidate));
    }
  };
  Layout by_magnitude = layout;
  choose_classes(magnitude_sums(symbols, layout.symbol_low, n, layout), symbols, n, sampled_rows, by_magnitude);
  with_tables(by_magnitude);
  if (apply_levels(n, std::max<uint64_t>(n / 128, 256), layout)) with_tables(layout);
  if (n <= kMostStretchedWeights) {
    apply_levels(n, 1, layout);
    const auto counts = count_symbols(symbols, layout, n, rows);
    consider(layout, fit_stretch(counts, layout));
  }
  layout = std::move(best);
  return best_cost / kLogOne;
}

}  // namespace moebound
