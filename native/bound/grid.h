// The reconstruction grid: the fewest values of the output dtype that cover every source value.
//
// Rounding q·2ε to bf16 breaks the bound for some weights. So the decoder's values are not q·2ε:
// going up from 0, each is the largest output number whose cell [v - ε, v + ε] still reaches the
// first source number not covered yet. No source number falls between two cells, every cell is as
// wide as it can be, and where source and output are the same 16-bit dtype the cells use the
// lattice's own spacing: 2·floor(ε/u) + 1 numbers each, on average as wide as on the real line.
// Distances are float64 differences, the same rule that certificates are measured by.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/dtype.h"

namespace moebound {

constexpr size_t kMaxCells = 1u << 15;  // that an encoder uses of one sign: bins are within ±32767

// Cells of non-negative numbers; the grid is symmetric, cell -m is the mirror of cell m.
struct Grid {
  std::vector<uint32_t> values;  // patterns in the output dtype, values[0] = 0
  std::vector<uint32_t> edges;   // the largest source pattern in each cell
};

// Cells 0 .. up to n_cells - 1, fewer where the output dtype ends or can follow the source no
// further (its spacing beyond 2ε). With up_to_source: stops too once that pattern is covered.
Grid make_grid(DType source, DType output, double bound, size_t n_cells, uint32_t up_to_source = ~0u);

}  // namespace moebound
