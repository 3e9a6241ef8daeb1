// Products of a matrix of codes with activations: what an expert computes whose weights are not decoded.
//
// A weight is what its code stands for: an entry of a table of 256 numbers, or (code + first) · step
// rounded to the dtype of the weights. Where rows have factors, the step is its column's times its row's
// factor, rounded to float32 first. That is to the bit the number that decode_bound writes. Exact
// patches stand beside the codes; a patched place has the code of 0. Codes of four bits are two in a byte,
// that of the even column in its lower half; a row begins with a byte of its own.
//
// y = W x is summed in float32, always in one order, which depends on nothing but the number of columns:
//   columns go in groups of 32, the last filled up with weights and activations of 0;
//   lane i of 16 adds w[2i] · x[2i], then w[2i + 1] · x[2i + 1] of each group, by fused multiply-add;
//   lanes i and i + 8 are added, then i and i + 4, i + 2, i + 1;
//   the row's patches are added by fused multiply-add, as they stand, and a bias by addition.
// So threads, the number of tokens and the instruction set do not show in a result.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/dtype.h"

namespace moebound {

constexpr size_t kCodeTable = 256;
constexpr size_t kProductLanes = 16, kProductGroup = 2 * kProductLanes;
constexpr uint32_t kPlainBits = 16;

struct CodeMatrix {
  const uint8_t* codes;  // [rows][row_bytes()]
  uint32_t bits;         // of a code: 8, 4, or kPlainBits where it is the weight itself, a pattern of bfloat16
  size_t rows, columns;
  DType dtype;             // of the weights
  const float* table;      // [kCodeTable], of numbers that dtype has; nullptr where there are steps
  size_t n_codes;          // codes are below this
  const float* steps;      // [columns], or [rows] if by_row
  bool by_row;
  const float* factors;  // [rows], which steps of columns are multiplied by; nullptr for none
  int32_t first;
  uint8_t zero;                // the code of 0
  const uint32_t* patched;     // [n_patches], ascending flat places ...
  const float* patch_weights;  // ... and what belongs there
  size_t n_patches;

  bool plain() const { return bits == kPlainBits; }
  size_t row_bytes() const { return (columns * bits + 7) / 8; }  // of codes
};

// A matrix of plain bfloat16 weights, patterns in [rows][columns].
CodeMatrix plain_matrix(const uint16_t* weights, size_t rows, size_t columns);

// y[t][r] = row r of the matrix times x[t], plus bias[r] if there is one. x: [n_tokens][columns] of the
// products' dtype, y of the same dtype, its tokens y_stride values apart, bias: [rows] of the matrix's.
struct Product {
  const CodeMatrix* matrix;
  const void* x;
  size_t n_tokens;
  void* y;
  size_t y_stride;
  const void* bias = nullptr;
};

// All of them at once: threads share the rows of all, so that many small ones keep them busy.
void multiply(const Product* products, size_t n, DType dtype, unsigned threads);

// An expert with a gate: y[t] = down (silu(gate x[t]) · up x[t]). Each product, silu and what it is multiplied to are
// rounded to the dtype, as torch does it operation by operation. gate: with the rows of up behind its own where up is
// nullptr. x: [n_tokens][gate's columns], y: [n_tokens][down's rows].
struct GatedExpert {
  const CodeMatrix *gate, *up, *down;
  const void* x;
  size_t n_tokens;
  void* y;
};

// All of them at once. A row of y depends on its row of x and on its expert alone.
void compute_gated(const GatedExpert* experts, size_t n, DType dtype, unsigned threads);

// The weights themselves, of rows [begin, end): patterns of matrix.dtype, [end - begin][columns].
void weights_of_codes(const CodeMatrix& matrix, size_t begin, size_t end, void* out, unsigned threads);

// What the step of a weight is made of: that of its column, that of its row, or its column's times its row's factor.
enum class StepsOf { kColumns, kRows, kBoth };

// What all rows of one product share.
struct ProductSetup {
  const CodeMatrix* matrix;
  // [n_tokens][groups][32]: of each group the 16 even columns, then the 16 odd ones.
  const float* x;
  size_t n_tokens, groups;
  const float* steps;  // of columns in the same order, or nullptr
  uint16_t words[kCodeTable];  // the table's upper halves: the patterns of bfloat16
  float* y;                    // [n_tokens][rows]
};

// What an instruction set brings.
struct ProductPath {
  // Rows [begin, end) of all tokens, without patches.
  void (*rows)(const ProductSetup&, size_t begin, size_t end);
  // silu(gate) times up of n values, patterns: gate.h. `out` may be neither.
  void (*gate)(DType, const void* gate, const void* up, size_t n, void* out);
};
extern const ProductPath product_scalar, product_avx2, product_avx512, product_neon;

}  // namespace moebound
