// Codes of four bits, for matrices whose weights nearly all have one of sixteen codes around that of 0.
//
// A code in that window is stored less the window's start. A weight outside has the code of 0 and is named aside, for a
// patch.
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "bound/layout.h"

namespace moebound {

constexpr uint32_t kWindow = 16;

// start: the first code that is kept. zero: what is kept of the code of 0.
struct Window {
  uint8_t start, zero;
  explicit Window(uint32_t code_of_zero)
      : start(uint8_t(code_of_zero > kWindow / 2 ? code_of_zero - kWindow / 2 : 0)), zero(uint8_t(code_of_zero - start)) {}
};

// Bytes of a row of codes of so many bits.
inline size_t row_bytes(size_t columns, uint32_t bits) { return (columns * bits + 7) / 8; }

// Weights outside of the window: their places, ascending, and codes.
struct Outside {
  std::vector<uint64_t> places;
  std::vector<uint8_t> codes;

  void add(uint64_t place, uint8_t code) {
    places.push_back(place);
    codes.push_back(code);
  }
};

// Packs rows [first, last) of codes of a byte, [columns] each, into rows of whole bytes of `out`, which is the whole
// matrix's. What is outside goes to the end of `outside`.
void pack_rows(const uint8_t* codes, size_t columns, const Window& window, size_t first, size_t last, uint8_t* out,
               Outside& outside);

// The same of n_runs · kPackedRun codes; place: of the first.
constexpr size_t kPackedRun = 128;
void pack_runs_any(const uint8_t* codes, size_t n_runs, const Window&, uint64_t place, uint8_t* out, Outside&);
void pack_runs_avx2(const uint8_t* codes, size_t n_runs, const Window&, uint64_t place, uint8_t* out, Outside&);

// At most so many of n weights are outside, by the frequencies in the first bytes of a payload: what encode_bound
// makes of counts allows no more. Nothing where tables follow from a stretch, which says nothing of counts, or where
// codes have more than a byte. Throws Corrupt, too, where the tables are further behind.
std::optional<uint64_t> most_outside(const uint8_t* head, size_t head_bytes, size_t n, size_t payload_bytes);

}  // namespace moebound
