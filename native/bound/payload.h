// What a decoder that runs elsewhere, on a GPU, needs of a payload: checked, and nothing but numbers.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "bound/codec.h"
#include "bound/grid.h"
#include "bound/layout.h"

namespace moebound {

// The patterns of every bin the symbols can name, by symbol << low_bits | low.
std::vector<uint32_t> bin_values(const Layout& layout, const Grid& grid, uint32_t sign);

// The grid of all bins that the layout can name, for a bound above 0. Throws Corrupt if it names one
// that no encoder uses.
Grid grid_of(const ArrayInfo& info, const Layout& layout);

// The same where every bin is so many times one step.
std::vector<uint32_t> multiples(const Layout& layout, float step, DType output);

// The bin of symbol 0 with low bits of 0.
int32_t first_bin(const Layout& layout);

// Throws Corrupt if the layout names a bin that no encoder uses.
void check_bins(const Layout& layout);

// The steps of a scaled layout: [columns] or [rows]. Throws Corrupt.
std::vector<float> steps_of(const Layout& layout, double bound);

// Throws Corrupt unless bins can be patterns, as in an exact copy.
void check_exact(const Layout& layout);

struct ParsedPayload {
  Layout layout;
  std::vector<uint64_t> segments;  // where each begins, in bytes from the payload's first
  std::vector<uint32_t> values;    // bin_values; none of an exact copy, whose bins are patterns, ...
  std::vector<float> steps;        // ... and none where there are these instead,
  std::vector<float> factors;      // of version 3, of the other side, to multiply them by
};

// Every offset and length of a payload is checked here: states, words and planes of each segment lie
// inside it. Throws Corrupt.
ParsedPayload parse_payload(const ArrayInfo& info, const uint8_t* payload, size_t n_bytes);

}  // namespace moebound
