#include "bound/layout.h"

#include <algorithm>

#include "base/bits.h"
#include "base/bytes.h"
#include "base/status.h"
#include "bound/stretched.h"

namespace moebound {
namespace {

void put_varint(std::vector<uint8_t>& out, uint64_t value) {
  for (; value >= 0x80; value >>= 7) out.push_back(uint8_t(value | 0x80));
  out.push_back(uint8_t(value));
}

class ByteReader {
 public:
  ByteReader(const uint8_t* data, size_t n_bytes) : begin_(data), at_(data), end_(data + n_bytes) {}
  uint8_t byte() { return *take(1); }
  const uint8_t* take(size_t n_bytes) {
    if (n_bytes > size_t(end_ - at_)) throw Corrupt("payload ends early");
    at_ += n_bytes;
    return at_ - n_bytes;
  }
  uint32_t varint(uint32_t at_most, const char* what) {
    uint64_t value = 0;
    for (uint32_t shift = 0; shift < 35; shift += 7) {
      const uint8_t b = byte();
      value |= uint64_t(b & 0x7F) << shift;
      if (b < 0x80) {
        if (value > at_most) break;
        return uint32_t(value);
      }
    }
    throw Corrupt(std::string(what) + " is out of range");
  }
  BitReader bits() const { return {at_, size_t(end_ - at_)}; }
  size_t offset() const { return size_t(at_ - begin_); }
  size_t left() const { return size_t(end_ - at_); }

 private:
  const uint8_t *begin_, *at_, *end_;
};

size_t align4(size_t n) { return (n + 3) & ~size_t(3); }

// A table is the bit lengths of its frequencies, each as the difference to the one before, and
// the top mantissa_bits bits below the leading one. The table's `rest` symbol is not stored: it
// has what is left of 2^table_log.
void write_table(const uint16_t* f, uint32_t rest, const Layout& layout, BitWriter& bits) {
  bits.put(rest, 8);
  uint32_t length = layout.table_log - 1;
  for (uint32_t s = 0; s < layout.n_symbols; ++s) {
    if (s == rest) continue;
    const uint32_t now = bit_length(f[s]);
    bits.put_unary(zigzag(int32_t(now) - int32_t(length)));
    length = now;
    if (now > 1) {
      const uint32_t below = now - 1, kept = std::min(below, layout.mantissa_bits);
      bits.put((f[s] & ((1u << below) - 1)) >> (below - kept), kept);
    }
  }
}

uint8_t read_table(uint16_t* f, const Layout& layout, BitReader& bits) {
  const uint32_t rest = bits.take(8);
  if (rest >= layout.n_symbols) throw Corrupt("a table names a symbol that is not there");
  uint32_t length = layout.table_log - 1, sum = 0;
  for (uint32_t s = 0; s < layout.n_symbols; ++s) {
    if (s == rest) continue;
    const int32_t now = int32_t(length) + unzigzag(bits.take_unary(2 * kMaxTableLog + 2));
    if (now < 0 || now > int32_t(layout.table_log)) throw Corrupt("a frequency is out of range");
    length = uint32_t(now);
    uint32_t value = now ? 1 : 0;
    if (now > 1) {
      const uint32_t below = length - 1, kept = std::min(below, layout.mantissa_bits);
      value = ((1u << kept) | bits.take(kept)) << (below - kept);
    }
    f[s] = uint16_t(value);
    sum += value;
  }
  if (sum >= 1u << layout.table_log) throw Corrupt("a table's frequencies exceed their sum");
  f[rest] = uint16_t((1u << layout.table_log) - sum);
  return uint8_t(rest);
}

void write_classes(const std::vector<uint8_t>& classes, std::vector<uint8_t>& out) {
  const uint32_t highest = *std::max_element(classes.begin(), classes.end());
  const uint32_t n_bits = bit_length(highest);
  out.push_back(uint8_t(n_bits));
  BitWriter bits(out);
  for (const uint8_t c : classes) bits.put(c, n_bits);
}

std::vector<uint8_t> read_classes(ByteReader& read, size_t count) {
  const uint32_t n_bits = read.byte();
  if (n_bits > bit_length(kMaxLevels - 1)) throw Corrupt("classes are out of range");
  const size_t n_bytes = (count * n_bits + 7) / 8;
  BitReader bits(read.take(n_bytes), n_bytes);
  std::vector<uint8_t> classes(count);
  for (auto& c : classes) c = uint8_t(bits.take(n_bits));
  return classes;
}

// Levels are Rice codes of their distances from one of them: `centre`, and r in front of it, the low
// bits of a code. 255 for r says that all are the centre.
constexpr uint32_t kAllAlike = 255, kMostRice = 7;

void write_levels(const std::vector<uint8_t>& levels, std::vector<uint8_t>& out) {
  uint64_t counts[kMostLevel + 1] = {};
  for (const uint8_t level : levels) ++counts[level];
  const auto [lowest, highest] = std::minmax_element(levels.begin(), levels.end());
  uint32_t best_r = kAllAlike;
  int best_centre = *lowest;
  uint64_t fewest = UINT64_MAX;
  for (int centre = *lowest; *lowest < *highest && centre <= int(*highest); ++centre) {
    for (uint32_t r = 0; r <= kMostRice; ++r) {
      uint64_t n_bits = 0;
      for (int level = *lowest; level <= int(*highest); ++level) {
        n_bits += counts[level] * ((zigzag(level - centre) >> r) + 1 + r);
      }
      if (n_bits >= fewest) continue;
      fewest = n_bits;
      best_r = r;
      best_centre = centre;
    }
  }
  out.push_back(uint8_t(best_r));
  out.push_back(uint8_t(best_centre));
  if (best_r == kAllAlike) return;
  BitWriter bits(out);
  for (const uint8_t level : levels) {
    const uint32_t code = zigzag(int(level) - best_centre);
    bits.put_unary(code >> best_r);
    bits.put(code & ((1u << best_r) - 1), best_r);
  }
}

std::vector<uint8_t> read_levels(ByteReader& read, size_t count) {
  const uint32_t r = read.byte();
  const int centre = read.byte();
  if (r == kAllAlike) return std::vector<uint8_t>(count, uint8_t(centre));
  if (r > kMostRice) throw Corrupt("levels are out of range");
  BitReader bits = read.bits();
  if (count > 8 * read.left()) throw Corrupt("payload is too short for its levels");
  std::vector<uint8_t> levels(count);
  for (auto& level : levels) {
    const uint32_t high = bits.take_unary(2 * kMostLevel >> r);
    const int found = centre + unzigzag(high << r | bits.take(r));
    if (found < 0 || found > int(kMostLevel)) throw Corrupt("a level is out of range");
    level = uint8_t(found);
  }
  read.take(bits.bytes_used());
  return levels;
}

}  // namespace

void set_classes_by_level(Layout& layout, size_t n) {
  layout.classes_by_level = true;
  layout.row_classes.assign(layout.rows(n), 0);
  layout.column_classes.assign(layout.columns, 0);
  const auto set = [](std::vector<uint8_t>& classes, const std::vector<uint8_t>& levels) {
    for (size_t i = 0; i < levels.size(); ++i) classes[i] = uint8_t(std::min<uint32_t>(levels[i], kMaxLevels - 1));
  };
  set(layout.steps.by_row ? layout.row_classes : layout.column_classes, layout.steps.levels);
  set(layout.steps.by_row ? layout.column_classes : layout.row_classes, layout.steps.factor_levels);
}

void set_stretched_tables(Layout& layout) {
  layout.frequencies.resize(size_t(layout.n_tables) * layout.n_symbols);
  for (uint32_t t = 0; t < layout.n_tables; ++t) {
    stretched_table(std::min(layout.stretch + kStretchOfLevel * t, kMostStretch), layout.symbol_low, layout.n_symbols,
                    layout.low_bits, layout.table_log, layout.frequencies.data() + t * layout.n_symbols);
  }
}

size_t groups_in_rows(const Layout& layout, size_t first, size_t last, size_t n) {
  const size_t per_row = layout.groups_per_row();
  const size_t end = std::min(n, last * layout.columns);
  const size_t whole = (end - first * layout.columns) / layout.columns;
  const size_t left = end - (first + whole) * layout.columns;
  return whole * per_row + (left + kGroup - 1) / kGroup;
}

size_t segment_n_bytes(const Layout& layout, uint32_t n_words, size_t n_groups) {
  return 4 * layout.lanes() + align4(2 * size_t(n_words)) + 4 * size_t(layout.low_bits) * n_groups;
}

TableStarts table_starts(const Layout& layout, uint32_t unit) {
  TableStarts starts{{}, &layout};
  const size_t padded = layout.groups_per_row() * kGroup;
  if (layout.n_tables == 1) {
    starts.by_class.emplace_back(padded, 0u);
    return starts;
  }
  starts.by_class.resize(kMaxLevels);
  for (size_t row = 0; row < layout.row_classes.size(); ++row) {
    auto& at = starts.by_class[layout.row_classes[row]];
    if (!at.empty()) continue;
    at.resize(padded);
    for (size_t j = 0; j < layout.columns; ++j) at[j] = layout.table_of(row, j) * unit;
  }
  return starts;
}

void write_layout(const Layout& layout, std::vector<uint8_t>& out) {
  const size_t start = out.size();
  const Steps& steps = layout.steps;
  if (layout.scaled) {
    out.push_back(uint8_t(kScaled | (steps.by_row ? kByRow : 0) | (layout.classes_by_level ? kClassesByLevel : 0) |
                          (layout.stretched ? kStretched : 0) | (steps.factor_levels.empty() ? 0 : kFactors)));
    out.push_back(uint8_t(steps.kappa));
    out.push_back(uint8_t(steps.kappa >> 8));
    out.push_back(uint8_t(layout.table_log | layout.lanes_log << 4));
    out.push_back(uint8_t(layout.low_bits | (layout.n_tables - 1) << 4));
    if (!layout.stretched) out.push_back(uint8_t(layout.mantissa_bits));
  } else {
    for (const uint32_t field :
         {layout.table_log, layout.lanes_log, layout.low_bits, layout.n_tables, layout.mantissa_bits}) {
      out.push_back(uint8_t(field));
    }
  }
  put_varint(out, layout.columns);
  put_varint(out, layout.rows_per_segment);
  put_varint(out, zigzag(layout.symbol_low));
  put_varint(out, layout.n_symbols);
  if (layout.scaled) write_levels(steps.levels, out);
  if (!steps.factor_levels.empty()) write_levels(steps.factor_levels, out);
  if (layout.n_tables > 1) {
    out.push_back(uint8_t(layout.class_base));
    if (!layout.classes_by_level) {
      write_classes(layout.row_classes, out);
      write_classes(layout.column_classes, out);
    }
  }
  if (layout.stretched) out.push_back(uint8_t(layout.stretch));
  BitWriter bits(out);
  for (uint32_t t = 0; t < layout.n_tables && !layout.stretched; ++t) {
    write_table(layout.frequencies.data() + t * layout.n_symbols, layout.rests[t], layout, bits);
  }
  for (const uint32_t n_words : layout.segment_words) put_varint(out, n_words);
  while ((out.size() - start) % 4) out.push_back(0);
}

namespace {

Layout read_tables(ByteReader& read, size_t n, size_t payload_bytes) {
  Layout layout;
  bool factors = false;
  layout.table_log = read.byte();
  if (layout.table_log & kScaled) {
    const uint32_t flags = layout.table_log;
    if (flags & ~(kScaled | kAllFlags)) throw Corrupt("flags are not known");
    factors = flags & kFactors;
    layout.scaled = true;
    layout.steps.by_row = flags & kByRow;
    layout.classes_by_level = flags & kClassesByLevel;
    layout.stretched = flags & kStretched;
    layout.steps.kappa = uint16_t(read.byte());
    layout.steps.kappa = uint16_t(layout.steps.kappa | read.byte() << 8);
    const uint32_t logs = read.byte(), counts = read.byte();
    layout.table_log = logs & 15;
    layout.lanes_log = logs >> 4;
    layout.low_bits = counts & 15;
    layout.n_tables = (counts >> 4) + 1;
    if (!layout.stretched) layout.mantissa_bits = read.byte();
  } else {
    layout.lanes_log = read.byte();
    layout.low_bits = read.byte();
    layout.n_tables = read.byte();
    layout.mantissa_bits = read.byte();
  }
  if (layout.table_log < 1 || layout.table_log > kMaxTableLog || layout.lanes_log > kMaxLanesLog ||
      layout.low_bits > kMaxLowBits || layout.n_tables < 1 || layout.n_tables > kMaxTables ||
      layout.mantissa_bits > kMaxTableLog) {
    throw Corrupt("a parameter is out of range");
  }
  layout.columns = read.varint(kMaxColumns, "columns");
  layout.rows_per_segment = read.varint(kMaxSegmentWeights, "rows per segment");
  layout.symbol_low = unzigzag(read.varint(1u << 18, "the lowest symbol"));
  layout.n_symbols = read.varint(kMaxSymbols, "symbols");
  if (layout.columns < 1 || layout.rows_per_segment < 1 || layout.n_symbols < 1 ||
      uint64_t(layout.rows_per_segment) * layout.columns > kMaxSegmentWeights) {
    throw Corrupt("a size is out of range");
  }
  // Every segment has at least its states: n cannot make us allocate more than the payload backs.
  const size_t n_segments = layout.segments(n);
  if (n_segments > payload_bytes / 4) throw Corrupt("payload is too short for its segments");
  if (layout.scaled) {
    layout.steps.levels = read_levels(read, layout.steps.by_row ? layout.rows(n) : layout.columns);
    if (factors) layout.steps.factor_levels = read_levels(read, layout.steps.by_row ? layout.columns : layout.rows(n));
  }
  if (layout.n_tables > 1) {
    layout.class_base = read.byte();
    if (layout.classes_by_level) {
      set_classes_by_level(layout, n);
    } else {
      layout.row_classes = read_classes(read, layout.rows(n));
      layout.column_classes = read_classes(read, layout.columns);
    }
  }
  if (layout.stretched) {
    layout.stretch = read.byte();
    if (layout.n_symbols > 1u << layout.table_log) throw Corrupt("more symbols than a table has slots");
    set_stretched_tables(layout);
  } else {
    layout.frequencies.resize(size_t(layout.n_tables) * layout.n_symbols);
    BitReader bits = read.bits();
    for (uint32_t t = 0; t < layout.n_tables; ++t) {
      layout.rests.push_back(read_table(layout.frequencies.data() + t * layout.n_symbols, layout, bits));
    }
    read.take(bits.bytes_used());
  }
  return layout;
}

}  // namespace

Layout parse_tables(const uint8_t* data, size_t n_bytes, size_t n, size_t payload_bytes) {
  ByteReader read(data, n_bytes);
  return read_tables(read, n, payload_bytes);
}

Layout parse_layout(const uint8_t* data, size_t n_bytes, size_t n, std::vector<SegmentBytes>& segments) {
  ByteReader read(data, n_bytes);
  Layout layout = read_tables(read, n, n_bytes);
  const size_t n_segments = layout.segments(n);
  layout.segment_words.resize(n_segments);
  for (auto& n_words : layout.segment_words) n_words = read.varint(kMaxSegmentWeights, "words");
  read.take(align4(read.offset()) - read.offset());
  segments.clear();
  segments.reserve(n_segments);
  for (size_t i = 0; i < n_segments; ++i) {
    const size_t first = i * layout.rows_per_segment;
    const size_t last = std::min(first + layout.rows_per_segment, layout.rows(n));
    const uint32_t n_words = layout.segment_words[i];
    const size_t n_groups = groups_in_rows(layout, first, last, n);
    const uint8_t* at = read.take(segment_n_bytes(layout, n_words, n_groups));
    const uint8_t* words = at + 4 * layout.lanes();
    segments.push_back({at, words, words + align4(2 * size_t(n_words)), n_words});
  }
  if (read.left()) throw Corrupt("bytes behind the last segment");
  return layout;
}

}  // namespace moebound
