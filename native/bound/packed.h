// Codes of four bits, for matrices whose weights nearly all have one of sixteen codes around that of 0.
//
// The window begins at window_start. A code in it is stored less that; a weight outside has the code of 0 and is
// named aside, for a patch.
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "bound/layout.h"

namespace moebound {

constexpr uint32_t kWindow = 16;

// Bytes of a row of codes of so many bits.
inline size_t row_bytes(size_t columns, uint32_t bits) { return (columns * bits + 7) / 8; }

// The first of the codes that are kept. zero: the code of 0.
inline uint32_t window_start(uint32_t zero) { return zero > kWindow / 2 ? zero - kWindow / 2 : 0; }

// Weights outside of the window: their places, ascending, and codes.
struct Outside {
  std::vector<uint64_t> places;
  std::vector<uint8_t> codes;
};

// Packs rows [first, last) of codes of a byte, [columns] each, into rows of whole bytes of `out`, which is the whole
// matrix's. What is outside goes to the end of `outside`.
void pack_rows(const uint8_t* codes, size_t columns, uint32_t start, uint8_t zero, size_t first, size_t last, uint8_t* out,
               Outside& outside);

// Packs runs of so many codes, up to one that has codes outside; returns how many.
constexpr size_t kPackedRun = 128;
size_t pack_runs_any(const uint8_t* codes, size_t n_runs, uint8_t start, uint8_t* out);
size_t pack_runs_avx2(const uint8_t* codes, size_t n_runs, uint8_t start, uint8_t* out);

// At most so many of n weights are outside, by the frequencies in the first bytes of a payload: what encode_bound
// makes of counts allows no more. Nothing where tables follow from a stretch, which says nothing of counts, or where
// codes have more than a byte. Throws Corrupt, too, where the tables are further behind.
std::optional<uint64_t> most_outside(const uint8_t* head, size_t head_bytes, size_t n, size_t payload_bytes);

}  // namespace moebound
