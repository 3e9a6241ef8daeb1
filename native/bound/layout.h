// The payload of codec `bound`, byte by byte: docs/format.md, section 4, has the same in words.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "bound/steps.h"

namespace moebound {

constexpr uint32_t kMaxTableLog = 12;
constexpr uint32_t kLeastEncodedTableLog = 10;  // a decoder takes any; see encode_segment_avx2
constexpr uint32_t kMaxLanesLog = 5;
constexpr uint32_t kMaxLowBits = 8;
constexpr uint32_t kMaxTables = 16;
constexpr uint32_t kMaxLevels = 64;
constexpr uint32_t kMaxSymbols = 256;
constexpr uint32_t kMaxColumns = 1u << 16;
constexpr uint32_t kMaxSegmentWeights = 1u << 18;
constexpr uint32_t kGroup = 32;  // weights that share one word of each low-bit plane

// The first byte of a payload of version 2 or 3, below the flags; that of version 1 is at most kMaxTableLog.
constexpr uint32_t kScaled = 0x80;
constexpr uint32_t kByRow = 1, kClassesByLevel = 2, kStretched = 4, kFactors = 8, kAllFlags = 15;  // 8: version 3

// Everything in front of the segments.
struct Layout {
  bool scaled = false;            // versions 2 and 3: bins are multiples of steps, not cells of a grid
  Steps steps;                    // none if not scaled
  bool classes_by_level = false;  // the classes of what has steps are their levels, not stored
  bool stretched = false;         // tables follow from `stretch`
  uint32_t stretch = 0;
  uint32_t table_log = 0;    // frequencies of a table sum to 2^table_log
  uint32_t lanes_log = 0;    // 2^lanes_log interleaved rANS states
  uint32_t low_bits = 0;     // bits of each bin index stored as they are
  uint32_t n_tables = 1;
  uint32_t mantissa_bits = 0;  // of the stored frequencies
  uint32_t columns = 0;
  uint32_t rows_per_segment = 0;
  int32_t symbol_low = 0;    // bin index >> low_bits of symbol 0
  uint32_t n_symbols = 0;
  uint32_t class_base = 0;   // table of (row, column) = clamp(row + column - base, 0, n_tables - 1)
  std::vector<uint8_t> row_classes, column_classes;  // empty if n_tables is 1
  std::vector<uint16_t> frequencies;                 // [n_tables][n_symbols]
  std::vector<uint8_t> rests;  // of each table, the symbol that takes what the others leave
  std::vector<uint32_t> segment_words;               // 16-bit words of each segment

  uint32_t lanes() const { return 1u << lanes_log; }
  size_t rows(size_t n) const { return (n + columns - 1) / columns; }
  size_t segments(size_t n) const { return (rows(n) + rows_per_segment - 1) / rows_per_segment; }
  uint32_t table_of(size_t row, size_t column) const {
    if (n_tables == 1) return 0;
    const int t = int(row_classes[row]) + int(column_classes[column]) - int(class_base);
    return t < 0 ? 0 : t >= int(n_tables) ? n_tables - 1 : uint32_t(t);
  }
  size_t groups_per_row() const { return (columns + kGroup - 1) / kGroup; }
};

// Where one segment's parts are.
struct SegmentBytes {
  const uint8_t* states;  // lanes × u32
  const uint8_t* words;   // u16 × n_words
  const uint8_t* planes;  // low_bits × u32 for each group
  uint32_t n_words;
};

// Where the table of each column begins, for every row class that occurs, if tables are `unit`
// apart. Padded to whole groups. One row of zeros if there is one table.
struct TableStarts {
  std::vector<std::vector<uint32_t>> by_class;
  const Layout* layout;
  const uint32_t* of_row(size_t row) const {
    return by_class[layout->n_tables == 1 ? 0 : layout->row_classes[row]].data();
  }
};
TableStarts table_starts(const Layout& layout, uint32_t unit);

// Appends the layout; the segments follow, each as its encoder made it.
void write_layout(const Layout& layout, std::vector<uint8_t>& out);

// Parses the layout of n weights and finds every segment. Throws Corrupt.
Layout parse_layout(const uint8_t* data, size_t n_bytes, size_t n, std::vector<SegmentBytes>& segments);

// The same as far as the tables, of a payload of payload_bytes, whose first n_bytes these are. Throws Corrupt, too, if
// the tables end behind them.
Layout parse_tables(const uint8_t* data, size_t n_bytes, size_t n, size_t payload_bytes);

// Sets row and column classes: those of what has levels are its levels, the others 0.
void set_classes_by_level(Layout& layout, size_t n);

// Sets the frequencies of tables that follow from layout's stretch.
void set_stretched_tables(Layout& layout);

// Groups of kGroup weights in rows [first, last) of n weights.
size_t groups_in_rows(const Layout& layout, size_t first, size_t last, size_t n);

// Bytes of a segment: states, words, zero padding to 4, planes.
size_t segment_n_bytes(const Layout& layout, uint32_t n_words, size_t n_groups);

}  // namespace moebound
