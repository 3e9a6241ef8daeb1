// Holds every instruction set of the product of codes against the scalar one, bit for bit.
//
//   check_product CASES SEED
//
// CASES random matrices: tables and steps, of every dtype, rows of any length, patches, one token or
// several. Then as many of plain bfloat16, as many whose steps of columns have factors, as many of codes of four
// bits, and as many pairs of experts with a gate, together and row by row. Prints the hashes of all results, which are the same on every machine: what is drawn has no function of the C
// library in it. Exit code 1 and a line on stderr at the first difference.
#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "base/cpu.h"
#include "base/xxh64.h"
#include "bound/steps.h"
#include "product/product.h"

using namespace moebound;

namespace {

std::mt19937_64 rng;

uint64_t below(uint64_t n) { return rng() % n; }
// Of 12 bits, at most 2^-4.
float number() { return float(int32_t(below(4096)) - 2048) * 0x1p-15f; }

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "check_product: %s\n", what.c_str());
  std::exit(1);
}

struct Drawn {
  CodeMatrix matrix{};
  std::vector<uint8_t> codes;
  std::vector<float> table, steps, factors, patch_weights;
  std::vector<uint32_t> patched;

  void draw(bool with_factors = false, uint32_t bits = 8) {
    const size_t rows = 1 + below(70);
    draw(with_factors, bits, rows, 1 + below(below(3) ? 200 : 700));
  }

  void draw(bool with_factors, uint32_t bits, size_t rows, size_t columns) {
    matrix.bits = bits;
    matrix.rows = rows;
    matrix.columns = columns;
    matrix.dtype = DType(below(3));
    matrix.n_codes = 1 + below(bits == 4 ? 16 : below(2) ? 40 : 256);
    matrix.zero = uint8_t(below(matrix.n_codes));
    codes.resize(matrix.rows * matrix.columns);
    for (uint8_t& code : codes) code = uint8_t(below(matrix.n_codes));
    with_dtype(matrix.dtype, [&](auto t) {
      using T = decltype(t);
      if (!with_factors && below(2)) {
        table.resize(kCodeTable);
        for (size_t c = 0; c < matrix.n_codes; ++c) table[c] = T::value(pattern_of<T>(number()));
        table[matrix.zero] = 0;
      } else {
        matrix.by_row = !with_factors && below(2);
        matrix.first = -int32_t(matrix.zero);
        steps.resize(matrix.by_row ? matrix.rows : matrix.columns);
        for (float& step : steps) step = float(1 + below(1000)) * 0x1p-20f;
        if (with_factors) factors.resize(matrix.rows);
        for (float& factor : factors) factor = float(1 + below(1 << 24)) * 0x1p-24f;
      }
      for (size_t at = below(200); at < codes.size() && below(8); at += 1 + below(300)) {
        codes[at] = matrix.zero;
        patched.push_back(uint32_t(at));
        patch_weights.push_back(T::value(pattern_of<T>(number() * 64)));
      }
    });
    if (bits == 4) pack();
    matrix.codes = codes.data();
    matrix.table = table.empty() ? nullptr : table.data();
    matrix.steps = steps.data();
    matrix.factors = factors.empty() ? nullptr : factors.data();
    matrix.patched = patched.data();
    matrix.patch_weights = patch_weights.data();
    matrix.n_patches = patched.size();
  }

  void pack() {
    std::vector<uint8_t> packed(matrix.rows * matrix.row_bytes());
    for (size_t row = 0; row < matrix.rows; ++row) {
      for (size_t j = 0; j < 2 * matrix.row_bytes(); ++j) {
        const uint8_t code = j < matrix.columns ? codes[row * matrix.columns + j] : matrix.zero;
        packed[row * matrix.row_bytes() + j / 2] |= uint8_t(code << j % 2 * 4);
      }
    }
    codes.swap(packed);
  }
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) fail("usage: check_product CASES SEED");
  const size_t n_cases = std::strtoull(argv[1], nullptr, 10);
  rng.seed(std::strtoull(argv[2], nullptr, 10));
  const auto check = [&](const CodeMatrix& matrix, size_t c, uint64_t hash) {
    const DType dtype = DType(below(3));
    const size_t n_tokens = 1 + below(below(2) ? 1 : 7), size = item_size(dtype);
    std::vector<uint8_t> x(n_tokens * matrix.columns * size);
    with_dtype(dtype, [&](auto t) {
      using T = decltype(t);
      for (size_t i = 0; i < n_tokens * matrix.columns; ++i) {
        const typename T::Bits bits = pattern_of<T>(number() * 16);
        std::copy_n(reinterpret_cast<const uint8_t*>(&bits), sizeof bits, x.data() + i * sizeof bits);
      }
    });
    const auto run = [&](Isa isa, unsigned threads) {
      use_isa(isa_name(isa));
      std::vector<uint8_t> y(n_tokens * matrix.rows * size);
      const Product product{&matrix, x.data(), n_tokens, y.data(), matrix.rows};
      multiply(&product, 1, dtype, threads);
      return y;
    };
    const std::vector<uint8_t> expected = run(Isa::kScalar, 1);
    for (const Isa isa : all_isas()) {
      if (can_run(isa) && run(isa, unsigned(1 + c % 2)) != expected) {
        fail(std::string(isa_name(isa)) + " differs in case " + std::to_string(c));
      }
    }
    return xxh64(expected.data(), expected.size(), hash);
  };
  // Two experts with the same rows of x, the second from its second row on.
  const auto check_gated = [&](size_t c, uint64_t hash) {
    const DType dtype = DType(below(3));
    const size_t size = item_size(dtype), columns = 1 + below(200), out_rows = 1 + below(70), n_tokens = 1 + below(6);
    Drawn drawn[2][3];
    GatedExpert experts[2];
    std::vector<uint8_t> x(n_tokens * columns * size), y;
    with_dtype(dtype, [&](auto t) {
      using T = decltype(t);
      for (size_t i = 0; i < n_tokens * columns; ++i) {
        const typename T::Bits bits = pattern_of<T>(number() * 4096);
        std::copy_n(reinterpret_cast<const uint8_t*>(&bits), sizeof bits, x.data() + i * sizeof bits);
      }
    });
    for (size_t e = 0; e < 2; ++e) {
      const size_t width = 1 + below(70), bits = below(2) ? 4 : 8;
      const bool apart = below(2);
      drawn[e][0].draw(below(2), bits, apart ? width : 2 * width, columns);
      drawn[e][1].draw(below(2), bits, width, columns);
      drawn[e][2].draw(below(2), bits, out_rows, width);
      experts[e] = {&drawn[e][0].matrix, apart ? &drawn[e][1].matrix : nullptr, &drawn[e][2].matrix,
                    x.data() + e * columns * size, n_tokens - e, nullptr};
    }
    const auto run = [&](Isa isa, unsigned threads, bool by_row) {
      use_isa(isa_name(isa));
      y.assign((2 * n_tokens - 1) * out_rows * size, 0);
      std::vector<GatedExpert> all;
      uint8_t* to = y.data();
      for (const GatedExpert& one : experts) {
        const size_t at_once = by_row ? 1 : one.n_tokens;
        for (size_t t = 0; t < one.n_tokens; t += at_once) {
          all.push_back({one.gate, one.up, one.down, static_cast<const uint8_t*>(one.x) + t * columns * size, at_once, to});
          to += at_once * out_rows * size;
        }
      }
      compute_gated(all.data(), all.size(), dtype, threads);
      return y;
    };
    const std::vector<uint8_t> expected = run(Isa::kScalar, 1, false);
    for (const Isa isa : all_isas()) {
      if (!can_run(isa)) continue;
      for (const bool by_row : {false, true}) {
        if (run(isa, unsigned(1 + c % 2), by_row) != expected) {
          fail(std::string(isa_name(isa)) + " differs in gated case " + std::to_string(c));
        }
      }
    }
    return xxh64(expected.data(), expected.size(), hash);
  };
  uint64_t of_codes = 0, of_plain = 0, of_factors = 0, of_packed = 0, of_gated = 0;
  for (size_t c = 0; c < n_cases; ++c) {
    Drawn drawn;
    drawn.draw();
    of_codes = check(drawn.matrix, c, of_codes);
  }
  for (size_t c = 0; c < n_cases; ++c) {
    const size_t rows = 1 + below(70), columns = 1 + below(below(3) ? 200 : 700);
    std::vector<uint16_t> weights(rows * columns);
    for (uint16_t& weight : weights) weight = pattern_of<BF16>(number());
    of_plain = check(plain_matrix(weights.data(), rows, columns), c, of_plain);
  }
  for (size_t c = 0; c < n_cases; ++c) {
    Drawn drawn;
    drawn.draw(true);
    of_factors = check(drawn.matrix, c, of_factors);
  }
  for (size_t c = 0; c < n_cases; ++c) {
    Drawn drawn;
    drawn.draw(below(3) == 0, 4);
    of_packed = check(drawn.matrix, c, of_packed);
  }
  for (size_t c = 0; c < n_cases; ++c) of_gated = check_gated(c, of_gated);
  std::printf("%zu products", n_cases);
  for (const uint64_t hash : {of_codes, of_plain, of_factors, of_packed, of_gated}) {
    std::printf(", %016llx", static_cast<unsigned long long>(hash));
  }
  std::printf("\n");
}
