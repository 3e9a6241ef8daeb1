#include "bound/packed.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "base/bytes.h"
#include "base/cpu.h"
#include "bound/codec.h"
#include "bound/payload.h"

namespace moebound {
namespace {

// Names the codes of a run that are outside, and makes them 0. place: of the first.
void put_aside(uint8_t* run, uint8_t start, uint8_t zero, size_t place, Outside& outside) {
  for (size_t i = 0; i < kPackedRun; i += 8) {
    uint8_t eight[8];
    for (size_t k = 0; k < 8; ++k) eight[k] = uint8_t(run[i + k] - start);
    if (!(load<uint64_t>(eight) & 0xF0F0F0F0F0F0F0F0u)) continue;
    for (size_t k = 0; k < 8; ++k) {
      if (eight[k] < kWindow) continue;
      outside.places.push_back(place + i + k);
      outside.codes.push_back(run[i + k]);
      run[i + k] = zero;
    }
  }
}

}  // namespace

size_t pack_runs_any(const uint8_t* codes, size_t n_runs, uint8_t start, uint8_t* out) {
  for (size_t run = 0; run < n_runs; ++run, codes += kPackedRun, out += kPackedRun / 2) {
    uint32_t any = 0;
    for (size_t i = 0; i < kPackedRun / 2; ++i) {
      const uint32_t low = uint8_t(codes[2 * i] - start), high = uint8_t(codes[2 * i + 1] - start);
      any |= low | high;
      out[i] = uint8_t(low | high << 4);
    }
    if (any >= kWindow) return run;
  }
  return n_runs;
}

void pack_rows(const uint8_t* codes, size_t columns, uint32_t start, uint8_t zero, size_t first, size_t last, uint8_t* out,
               Outside& outside) {
#ifdef MOEBOUND_X86
  const auto pack = isa() == Isa::kScalar ? pack_runs_any : pack_runs_avx2;
#else
  const auto pack = pack_runs_any;
#endif
  const auto from = uint8_t(start);
  for (size_t row = first; row < last; ++row, codes += columns) {
    uint8_t* const to = out + row * row_bytes(columns, 4);
    for (size_t j = 0; j < columns;) {
      j += kPackedRun * pack(codes + j, (columns - j) / kPackedRun, from, to + j / 2);
      if (j == columns) break;
      // A run with codes outside, or the last one, which is shorter.
      const size_t n = std::min(kPackedRun, columns - j);
      uint8_t run[kPackedRun], packed[kPackedRun / 2];
      std::copy_n(codes + j, n, run);
      std::fill(run + n, run + kPackedRun, zero);
      put_aside(run, from, zero, row * columns + j, outside);
      pack(run, 1, from, packed);
      std::copy_n(packed, (n + 1) / 2, to + j / 2);
      j += n;
    }
  }
}

std::optional<uint64_t> most_outside(const uint8_t* head, size_t head_bytes, size_t n, size_t payload_bytes) {
  const Layout layout = parse_tables(head, head_bytes, n, payload_bytes);
  if (layout.stretched) return {};
  const int32_t first = first_bin(layout);
  const uint32_t n_codes = layout.n_symbols << layout.low_bits;
  if (first > 0 || -first >= int32_t(kMostCodes) || n_codes > kMostCodes) return {};
  const uint32_t start = window_start(uint32_t(-first));
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
