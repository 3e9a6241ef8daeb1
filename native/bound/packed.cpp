#include "bound/packed.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "base/cpu.h"
#include "bound/codec.h"
#include "bound/payload.h"

namespace moebound {
void pack_runs_any(const uint8_t* codes, size_t n_runs, const Window& window, uint64_t place, uint8_t* out,
                     Outside& outside) {
  const size_t n = n_runs * kPackedRun;
  for (size_t i = 0; i < n; i += 2) {
    uint8_t pair[2];
    for (size_t k = 0; k < 2; ++k) {
      pair[k] = uint8_t(codes[i + k] - window.start);
      if (pair[k] < kWindow) continue;
      outside.add(place + i + k, codes[i + k]);
      pair[k] = window.zero;
    }
    out[i / 2] = uint8_t(pair[0] | pair[1] << 4);
  }
}

void pack_rows(const uint8_t* codes, size_t columns, const Window& window, size_t first, size_t last, uint8_t* out,
               Outside& outside) {
#ifdef MOEBOUND_X86
  const auto pack = isa() == Isa::kScalar ? pack_runs_any : pack_runs_avx2;
#else
  const auto pack = pack_runs_any;
#endif
  const size_t left = columns % kPackedRun, whole = columns - left;
  for (size_t row = first; row < last; ++row, codes += columns) {
    uint8_t* const to = out + row * row_bytes(columns, 4);
    pack(codes, whole / kPackedRun, window, row * columns, to, outside);
    if (!left) continue;
    uint8_t run[kPackedRun], packed[kPackedRun / 2];
    std::copy_n(codes + whole, left, run);
    std::fill(run + left, run + kPackedRun, uint8_t(window.start + window.zero));
    pack(run, 1, window, row * columns + whole, packed, outside);
    std::copy_n(packed, (left + 1) / 2, to + whole / 2);
  }
}

std::optional<uint64_t> most_outside(const uint8_t* head, size_t head_bytes, size_t n, size_t payload_bytes) {
  const Layout layout = parse_tables(head, head_bytes, n, payload_bytes);
  if (layout.stretched) return {};
  const int32_t first = first_bin(layout);
  const uint32_t n_codes = layout.n_symbols << layout.low_bits;
  if (first > 0 || -first >= int32_t(kMostCodes) || n_codes > kMostCodes) return {};
  const uint32_t start = Window(uint32_t(-first)).start;
  // How many weights each table has.
  std::vector<uint64_t> weights(layout.n_tables);
  if (layout.n_tables == 1) {
    weights[0] = n;
  } else {
    std::array<uint64_t, 256> rows{}, columns{};
    for (const uint8_t c : layout.row_classes) ++rows[c];
    for (const uint8_t c : layout.column_classes) ++columns[c];
    for (size_t a = 0; a < rows.size(); ++a) {
      for (size_t b = 0; rows[a] && b < columns.size(); ++b) {
        const int t = int(a + b) - int(layout.class_base);
        weights[size_t(std::clamp(t, 0, int(layout.n_tables) - 1))] += rows[a] * columns[b];
      }
    }
  }
  // A frequency is the symbol's share of 2^table_log slots, rounded to the nearest, and again to mantissa_bits below
  // its first one, but 1 at least; that of the table's `rest` symbol is what the others leave.
  const double rounded = 1 / (1 - std::ldexp(0.5, -int(layout.mantissa_bits)));
  double most = 0;
  for (uint32_t t = 0; t < layout.n_tables; ++t) {
    const double slot = double(weights[t]) / double(1u << layout.table_log);
    for (uint32_t s = 0; s < layout.n_symbols; ++s) {
      const uint32_t f = layout.frequencies[t * layout.n_symbols + s], code = s << layout.low_bits;
      if (f == 0 || (code >= start && code + (1u << layout.low_bits) <= start + kWindow)) continue;
      most += s == layout.rests[t] ? double(weights[t]) : std::ceil((f * rounded + 0.5) * slot);
    }
  }
  return uint64_t(std::min(most, double(n)));
}

}  // namespace moebound
