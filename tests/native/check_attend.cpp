// Holds every instruction set of attention against the scalar one, bit for bit, and texts together against texts alone.
//
//   check_attend CASES SEED
//
// CASES random sets of texts of any lengths, heads that share keys, widths that differ; then as many with latent keys
// and values. Prints the hashes of all results, which are the same on every machine, and the greatest relative error
// of exp_of, over one of 61 numbers between -87 and 0. Exit code 1 and a line on stderr at the first difference.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "attend/attend.h"
#include "base/cpu.h"
#include "base/exp.h"
#include "base/xxh64.h"
#include "bound/steps.h"

using namespace moebound;

namespace {

std::mt19937_64 rng;

uint64_t below(uint64_t n) { return rng() % n; }

std::vector<uint16_t> numbers(size_t n, float most) {
  std::vector<uint16_t> drawn(n);
  for (uint16_t& one : drawn) one = pattern_of<BF16>(float(int32_t(below(4096)) - 2048) * 0x1p-11f * most);
  return drawn;
}

size_t width() { return kAttendGroup * (1 + below(5)); }
size_t length() { return 1 + below(below(4) ? 40 : 700); }

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "check_attend: %s\n", what.c_str());
  std::exit(1);
}

// run(first text, number of texts, threads, out) computes them. Returns the hash of n texts of `size` patterns each.
template <class Run>
uint64_t check(size_t n, size_t size, size_t c, uint64_t hash, const Run& run) {
  use_isa("scalar");
  std::vector<uint16_t> expected(n * size);
  run(0, n, 1u, expected.data());
  for (const Isa isa : all_isas()) {
    if (!can_run(isa)) continue;
    use_isa(isa_name(isa));
    std::vector<uint16_t> found(n * size), alone(n * size);
    run(0, n, unsigned(1 + c % 3), found.data());
    for (size_t i = 0; i < n; ++i) run(i, 1, 2u, alone.data() + i * size);
    const std::string where = std::string(isa_name(isa)) + " in case " + std::to_string(c);
    if (found != expected) fail(where + ": not as scalar");
    if (alone != expected) fail(where + ": not as alone");
  }
  return xxh64(reinterpret_cast<const uint8_t*>(expected.data()), 2 * expected.size(), hash);
}

uint64_t plain_case(size_t c, uint64_t hash) {
  const size_t n = 1 + below(5), shared = 1 + below(3), heads = shared * (1 + below(11)), key = width(), value = width();
  const float scale = 1.0f / float(key);
  std::vector<std::vector<uint16_t>> kept;
  std::vector<Text> texts;
  for (size_t i = 0; i < n; ++i) {
    const size_t tokens = length(), room = tokens + below(3);
    const auto rows = [&](size_t w, float most) {
      kept.push_back(numbers(shared * room * w, most));
      return HeadRows{{kept.back().data(), ptrdiff_t(w), w}, ptrdiff_t(room * w)};
    };
    texts.push_back({rows(key, 8), rows(value, 1), tokens});
  }
  const auto drawn = numbers(n * heads * key, 8);
  return check(n, heads * value, c, hash, [&](size_t first, size_t some, unsigned threads, uint16_t* out) {
    const Queries queries{drawn.data() + first * heads * key, ptrdiff_t(heads * key), ptrdiff_t(key), some, heads};
    attend(queries, {texts.begin() + ptrdiff_t(first), texts.begin() + ptrdiff_t(first + some)}, shared, scale,
           DType::kBF16, out, threads);
  });
}

uint64_t latent_case(size_t c, uint64_t hash) {
  const size_t n = 1 + below(5), heads = 1 + below(11), rank = width(), turn = width();
  const size_t nope = kAttendGroup * below(3) + (turn % 64 ? 32 : 0) + 32, values = 1 + below(70);
  const float scale = 1.0f / float(nope + turn);
  std::vector<std::vector<uint16_t>> kept;
  std::vector<LatentText> texts;
  for (size_t i = 0; i < n; ++i) {
    const size_t tokens = length();
    const auto rows = [&](size_t w) {
      kept.push_back(numbers(tokens * w, 4));
      return PlainRows{kept.back().data(), ptrdiff_t(w), w};
    };
    texts.push_back({rows(rank), rows(turn), tokens});
  }
  const size_t key = nope + turn;
  const auto weights = numbers(heads * (nope + values) * rank, 0.25f), drawn = numbers(n * heads * key, 4);
  return check(n, heads * values, c, hash, [&](size_t first, size_t some, unsigned threads, uint16_t* out) {
    const Queries queries{drawn.data() + first * heads * key, ptrdiff_t(heads * key), ptrdiff_t(key), some, heads};
    attend_latent(queries, {texts.begin() + ptrdiff_t(first), texts.begin() + ptrdiff_t(first + some)}, weights.data(),
                  nope, values, scale, DType::kBF16, out, threads);
  });
}

double error_of_exp() {
  double worst = 0;
  if (exp_of(0.0f) != 1 || exp_of(-INFINITY) != 0 || exp_of(-87.5f) != 0 || !std::isnan(exp_of(NAN))) fail("exp_of");
  for (uint32_t bits = 0x80000000u; bits <= 0xC2AE0000u; bits += 61) {  // -0 .. -87
    const float x = std::bit_cast<float>(bits);
    worst = std::max(worst, std::abs(double(exp_of(x)) / std::exp(double(x)) - 1));
  }
  return worst;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) fail("usage: check_attend CASES SEED");
  const size_t n_cases = std::strtoull(argv[1], nullptr, 10);
  rng.seed(std::strtoull(argv[2], nullptr, 10));
  uint64_t plain = 0, latent = 0;
  for (size_t c = 0; c < n_cases; ++c) plain = plain_case(c, plain);
  for (size_t c = 0; c < n_cases; ++c) latent = latent_case(c, latent);
  std::printf("%zu of attention, %016llx, %016llx, exp within %.3g\n", n_cases, static_cast<unsigned long long>(plain),
              static_cast<unsigned long long>(latent), error_of_exp());
}
