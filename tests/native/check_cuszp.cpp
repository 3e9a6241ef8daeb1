// Holds every instruction set of codec `cuszp` against the scalar one, on good bytes and on bad.
//
//   check_cuszp CASES MUTATIONS SEED
//
// For each of CASES random arrays, of weights or of any bits at all: the encoders agree byte for
// byte, the decoders bit for bit. Then MUTATIONS damaged copies of the stream: each decoder refuses
// it or gives what the scalar one gives. Buffers are exactly as large as they say, so that a
// sanitizer sees the first byte out of bounds. Exit code 1 and a line on stderr at the first
// disagreement.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "base/cpu.h"
#include "base/status.h"
#include "cuszp/codec.h"

using namespace moebound;

namespace {

std::mt19937_64 rng;

uint64_t below(uint64_t n) { return rng() % n; }

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "check_cuszp: %s\n", what.c_str());
  std::exit(1);
}

struct Array {
  DType source, output;
  size_t n;
  float bound;
  CuszpMode mode;
  CuszpTable table;
  std::vector<uint8_t> bytes;  // patterns of source
};

Array random_array() {
  Array a;
  a.source = DType(below(3));
  a.output = DType(below(3));
  a.mode = CuszpMode(below(3));
  a.table = CuszpTable(below(2) == 1);
  a.n = below(below(4) ? 3000 : 70000);
  a.bound = std::ldexp(1.0f + float(below(1000)) / 1000, below(8) ? -int(below(20)) : int(below(250)) - 125);
  a.bytes.resize(a.n * item_size(a.source));
  if (below(3) == 0) {
    for (uint8_t& byte : a.bytes) byte = uint8_t(rng());
    return a;
  }
  // A walk or noise, with zeros in between. A float's upper half is a bfloat16; of a float16 any will do.
  std::normal_distribution<float> normal(0, 0.1f);
  const bool walk = below(2);
  const uint64_t zeros = below(2) ? 0 : below(100);
  float x = 0;
  for (size_t i = 0; i < a.n; ++i) {
    x = normal(rng) + (walk ? x : 0);
    const uint32_t bits = below(100) < zeros ? 0 : std::bit_cast<uint32_t>(x);
    const uint16_t half = uint16_t(a.source == DType::kF16 ? bits >> 13 : bits >> 16);
    if (a.source == DType::kF32) std::memcpy(&a.bytes[4 * i], &bits, 4);
    else std::memcpy(&a.bytes[2 * i], &half, 2);
  }
  return a;
}

// What a decoder makes of bytes: refused, or n values.
struct Decoded {
  bool refused;
  std::vector<uint8_t> bytes;
  bool operator==(const Decoded&) const = default;
};

Decoded decode(const Array& a, const std::vector<uint8_t>& stream, Isa isa) {
  use_isa(isa_name(isa));
  std::vector<uint8_t> out(a.n * item_size(a.output));
  try {
    const unsigned threads = unsigned(1 + below(2));
    decode_cuszp(stream.data(), stream.size(), a.output, out.data(), a.n, a.bound, a.mode, a.table, threads);
  } catch (const Corrupt&) {
    return {true, {}};
  }
  return {false, out};
}

std::vector<uint8_t> mutated(std::vector<uint8_t> bytes) {
  for (size_t edits = 1 + below(3); edits && !bytes.empty(); --edits) {
    const size_t at = below(2) ? below(bytes.size()) : below(std::min<size_t>(bytes.size(), 64));
    switch (below(5)) {
      case 0: bytes[at] ^= uint8_t(1u << below(8)); break;
      case 1: bytes[at] = uint8_t(rng()); break;
      case 2: std::swap(bytes[at], bytes[below(std::min<size_t>(bytes.size(), 64))]); break;  // the sum stays
      case 3: bytes.resize(at); break;
      default: bytes.insert(bytes.begin() + std::ptrdiff_t(at), uint8_t(rng()));
    }
  }
  bytes.shrink_to_fit();
  return bytes;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) fail("usage: check_cuszp CASES MUTATIONS SEED");
  const size_t n_cases = std::strtoull(argv[1], nullptr, 10), n_mutations = std::strtoull(argv[2], nullptr, 10);
  rng.seed(std::strtoull(argv[3], nullptr, 10));
  size_t refused = 0, survived = 0;
  for (size_t c = 0; c < n_cases; ++c) {
    const Array a = random_array();
    const auto encode = [&](Isa isa) {
      use_isa(isa_name(isa));
      return encode_cuszp(a.source, a.bytes.data(), a.n, a.bound, a.mode, a.table, unsigned(1 + below(2)));
    };
    std::vector<uint8_t> stream = encode(Isa::kScalar);
    stream.shrink_to_fit();
    const Decoded decoded = decode(a, stream, Isa::kScalar);
    if (decoded.refused) fail("an encoder's stream is refused");
    for (const Isa isa : all_isas()) {
      if (!can_run(isa)) continue;
      if (encode(isa) != stream) fail(std::string("other bytes from ") + isa_name(isa));
      if (decode(a, stream, isa) != decoded) fail(std::string("other values from ") + isa_name(isa));
    }
    for (size_t m = 0; m < n_mutations; ++m) {
      const auto damaged = mutated(stream);
      const Decoded expected = decode(a, damaged, Isa::kScalar);
      ++(expected.refused ? refused : survived);
      for (const Isa isa : all_isas()) {
        if (!can_run(isa) || decode(a, damaged, isa) == expected) continue;
        fail(std::string("damage differs on ") + isa_name(isa));
      }
    }
  }
  std::printf("%zu arrays, %zu damaged streams refused, %zu read\n", n_cases, refused, survived);
}
