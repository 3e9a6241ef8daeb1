// Holds every instruction set of codec `bound` against the scalar one, on good bytes and on bad.
//
//   check_bound CASES MUTATIONS SEED
//
// For each of CASES random arrays: the encoders agree byte for byte, the decoders bit for bit, and
// every value keeps its bound; where there are codes of a byte, they are the same, stand for those values, and so are
// products of them; half of the arrays are whole numbers of steps, versions 2 and 3. Then MUTATIONS damaged copies of the payload (truncated, flipped,
// overwritten, spliced): each decoder refuses it or gives what the scalar one gives. The same of an envelope around it. Buffers are
// exactly as large as they say, so that a sanitizer sees the first byte out of bounds. Exit code 1
// and a line on stderr at the first disagreement.
#include <array>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "base/cpu.h"
#include "base/status.h"
#include "base/xxh64.h"
#include "bound/codec.h"
#include "bound/envelope.h"
#include "bound/layout.h"
#include "product/product.h"

using namespace moebound;

namespace {

std::mt19937_64 rng;

uint64_t below(uint64_t n) { return rng() % n; }
double uniform() { return double(rng() >> 11) * 0x1p-53; }

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "check_bound: %s\n", what.c_str());
  std::exit(1);
}

std::vector<Isa> runnable() {
  std::vector<Isa> found;
  for (const Isa isa : all_isas()) {
    if (can_run(isa)) found.push_back(isa);
  }
  return found;
}

struct Array {
  ArrayInfo info;
  std::vector<uint8_t> bytes;  // patterns of info.source
  std::vector<int32_t> codes;  // of version 2
  Steps steps;
};

template <class T>
void put(std::vector<uint8_t>& bytes, size_t i, double value) {
  const float f = float(value);
  typename T::Bits bits;
  if constexpr (T::kDType == DType::kF32) bits = std::bit_cast<uint32_t>(f);
  else if constexpr (T::kDType == DType::kBF16) bits = uint16_t(std::bit_cast<uint32_t>(f) >> 16);
  else bits = uint16_t(std::isfinite(f) ? (std::signbit(f) ? 0x8000 : 0) | std::min(0x7BFFu, uint32_t(std::fabs(f) * 4096)) : 0x7E00);
  std::memcpy(bytes.data() + i * sizeof(bits), &bits, sizeof(bits));
}

Array random_array() {
  Array a;
  a.info.source = DType(below(3));
  a.info.output = a.info.source == DType::kF32 && below(4) == 0 ? DType::kBF16 : a.info.source;
  a.info.columns = uint32_t(below(3) ? 1 + below(200) : 32 * (1 + below(40)));
  a.info.n = 1 + below(below(4) ? 6000 : 60000);
  const double rate = std::exp(-7 * uniform()) * 1.5, spread = uniform() < 0.5 ? 0 : 0.6;
  std::normal_distribution<double> normal;
  std::vector<double> column_scale(a.info.columns);
  for (auto& s : column_scale) s = std::exp(spread * normal(rng));
  a.bytes.resize(a.info.n * item_size(a.info.source));
  double row_scale = 1;
  const double odd = below(3) ? 0 : 0.002;
  for (size_t i = 0; i < a.info.n; ++i) {
    if (i % a.info.columns == 0) row_scale = std::exp(spread * normal(rng));
    double value = 0.02 * normal(rng) * row_scale * column_scale[i % a.info.columns];
    if (uniform() < odd) value = std::numeric_limits<double>::quiet_NaN();
    else if (uniform() < odd) value *= 1000;
    with_dtype(a.info.source, [&](auto t) { put<decltype(t)>(a.bytes, i, value); });
  }
  a.info.bound = a.info.output == a.info.source && a.info.source != DType::kF32 && below(8) == 0 ? 0 : 0.016 * rate;
  if (a.info.output != a.info.source) a.info.bound = 0.016 * (0.3 + rate);
  return a;
}

double value_at(DType dtype, const std::vector<uint8_t>& bytes, size_t i) {
  return with_dtype(dtype, [&](auto t) {
    typename decltype(t)::Bits bits;
    std::memcpy(&bits, bytes.data() + i * sizeof(bits), sizeof(bits));
    return double(decltype(t)::value(bits));
  });
}

// Rounds an array to whole numbers of steps, most to the nearest.
void add_codes(Array& a) {
  a.steps.by_row = below(2);
  a.steps.kappa = uint16_t(below(2) ? 0x3C00 : 0x4000);
  a.steps.levels.resize(a.steps.by_row ? (a.info.n + a.info.columns - 1) / a.info.columns : a.info.columns);
  const uint64_t spread = 1 + below(below(3) ? 12 : 60);
  for (auto& level : a.steps.levels) level = uint8_t(below(spread));
  if (below(2)) {
    a.steps.factor_levels.resize(a.steps.by_row ? a.info.columns : (a.info.n + a.info.columns - 1) / a.info.columns);
    for (auto& level : a.steps.factor_levels) level = uint8_t(below(spread));
  }
  const std::vector<float> sizes = step_sizes(a.steps, a.info.bound), factors = step_factors(a.steps);
  a.codes.resize(a.info.n);
  for (size_t i = 0; i < a.info.n; ++i) {
    const size_t row = i / a.info.columns, column = i % a.info.columns;
    const double factor = factors.empty() ? 1.0 : double(factors[a.steps.by_row ? column : row]);
    const double step = double(sizes[a.steps.by_row ? row : column]) * factor;
    const double exact = value_at(a.info.source, a.bytes, i) / step;
    a.codes[i] = std::fabs(exact) < 1e9 ? int32_t(std::lround(exact)) + (below(500) ? 0 : 1) : 0;
  }
}

EncodedBound encode(const Array& a, const EncodeOptions& options) {
  return a.codes.empty() ? encode_bound(a.info, a.bytes.data(), options)
                         : encode_scaled(a.info, a.bytes.data(), a.codes.data(), a.steps, options);
}

// What a decoder makes of bytes: empty if it refuses them.
std::vector<uint8_t> decode(const ArrayInfo& info, const std::vector<uint8_t>& payload, Isa isa, unsigned threads) {
  use_isa(isa_name(isa));
  std::vector<uint8_t> out(info.n * item_size(info.output));
  try {
    decode_bound(info, payload.data(), payload.size(), out.data(), threads);
  } catch (const Corrupt&) {
    return {};
  }
  return out;
}

// The same bytes as codes: what they stand for, and products of them with some activations; empty if
// a decoder refuses them, or there are more codes than a byte has.
struct Made {
  std::vector<uint8_t> codes, weights, products;
  bool operator==(const Made&) const = default;
};

Made decode_to_codes(const ArrayInfo& info, const std::vector<uint8_t>& payload, Isa isa, size_t n_tokens) {
  use_isa(isa_name(isa));
  Made made;
  made.codes.resize(info.n);
  CodeValues found;
  try {
    found = decode_codes(info, payload.data(), payload.size(), made.codes.data(), 1);
  } catch (const Corrupt&) {
    return {};
  }
  const size_t columns = info.n % info.columns ? info.n : info.columns, rows = info.n / columns;
  const bool fits = (found.steps.empty() || found.steps.size() == (found.by_row ? rows : columns)) &&
                    (found.factors.empty() || found.factors.size() == rows);
  if (!fits || found.first > 0 || found.first <= -int32_t(kMostCodes)) return made;
  std::vector<float> table(found.steps.empty() ? kCodeTable : 0);
  for (size_t i = 0; i < found.values.size(); ++i) {
    with_dtype(info.output, [&](auto t) {
      using T = decltype(t);
      table[i] = T::value(typename T::Bits(found.values[i]));
    });
  }
  const std::vector<uint32_t> patched{0, uint32_t(info.n - 1)};
  const std::vector<float> patches{0.5f, -2.0f};
  const CodeMatrix matrix{made.codes.data(), 8, rows, columns, info.output, table.empty() ? nullptr : table.data(),
                          std::max<size_t>(found.n_codes, size_t(1 - found.first)), found.steps.data(), found.by_row,
                          found.factors.empty() ? nullptr : found.factors.data(), found.first, uint8_t(-found.first),
                          patched.data(), patches.data(), info.n > 1 ? 2u : 0u};
  made.weights.resize(info.n * item_size(info.output));
  weights_of_codes(matrix, 0, matrix.rows, made.weights.data(), 1);
  std::vector<float> x(n_tokens * columns);
  for (size_t i = 0; i < x.size(); ++i) x[i] = float(int(i * 37 % 101) - 50) / 64;
  made.products.resize(n_tokens * rows * 4);
  const Product product{&matrix, x.data(), n_tokens, made.products.data(), rows};
  multiply(&product, 1, DType::kF32, 2);
#ifdef MOEBOUND_EMULATE_AVX512
  made.products.clear();  // in plain C a fused multiply-add may not be one
#endif
  return made;
}

void check_values(const Array& a, const std::vector<uint8_t>& out, const std::vector<uint64_t>& misses) {
  size_t next = 0;
  for (size_t i = 0; i < a.info.n; ++i) {
    if (next < misses.size() && misses[next] == i) {
      ++next;
      continue;
    }
    const double w = value_at(a.info.source, a.bytes, i), d = value_at(a.info.output, out, i);
    const bool same = std::memcmp(&w, &d, sizeof w) == 0;
    if (!(std::fabs(w - d) <= a.info.bound) && !same) fail("a value breaks its bound");
  }
}

std::vector<uint8_t> mutated(std::vector<uint8_t> bytes) {
  const size_t n_edits = 1 + below(3);
  for (size_t e = 0; e < n_edits && !bytes.empty(); ++e) {
    // Half of the edits go to the header, where the lengths are.
    const size_t at = below(2) ? below(bytes.size()) : below(std::min<size_t>(bytes.size(), 64));
    switch (below(6)) {
      case 0: bytes[at] ^= uint8_t(1u << below(8)); break;
      case 1: bytes[at] = uint8_t(rng()); break;
      case 2: bytes[at] = below(2) ? 0xFF : 0; break;
      case 3: bytes.resize(at); break;
      case 4: bytes.insert(bytes.begin() + std::ptrdiff_t(at), uint8_t(rng())); break;
      default: {
        const size_t from = below(bytes.size());
        for (size_t i = 0; i < 8 && at + i < bytes.size() && from + i < bytes.size(); ++i) bytes[at + i] = bytes[from + i];
      }
    }
  }
  bytes.shrink_to_fit();
  return bytes;
}

void seal(std::vector<uint8_t>& envelope) {
  const auto checksum = uint32_t(xxh64(envelope.data(), envelope.size()));
  envelope.resize(envelope.size() + 4);
  store(envelope.data() + envelope.size() - 4, checksum);
}

// An envelope of this shape, patched with `values` at the positions that the payload does not carry.
std::vector<uint8_t> envelope_of(const ArrayInfo& info, const EncodedBound& encoded, const std::vector<uint8_t>& values,
                                 std::array<size_t, 2> shape) {
  std::vector<uint8_t> bytes{'M', 'O', 'E', 'B', 1, 0, uint8_t(info.output), uint8_t(info.source), 5, 'b', 'o', 'u', 'n', 'd', 3, 2};
  const auto put_varint = [&](uint64_t value) {
    for (; value >= 0x80; value >>= 7) bytes.push_back(uint8_t(value | 0x80));
    bytes.push_back(uint8_t(value));
  };
  for (const size_t extent : shape) put_varint(extent);
  bytes.resize(bytes.size() + 8);
  store(bytes.data() + bytes.size() - 8, info.bound);
  const size_t count = encoded.misses.size();
  put_varint(count);
  if (count) {
    const auto low = uint32_t(std::bit_width(info.n / count) - 1);
    std::vector<uint8_t> lows((count * low + 7) / 8), highs((count + (info.n >> low) + 8) / 8);
    for (size_t i = 0; i < count; ++i) {
      for (size_t bit = 0; bit < low; ++bit) {
        const size_t at = i * low + bit;
        lows[at / 8] = uint8_t(lows[at / 8] | (encoded.misses[i] >> bit & 1) << (at & 7));
      }
      const size_t at = (encoded.misses[i] >> low) + i;
      highs[at / 8] = uint8_t(highs[at / 8] | 1u << (at & 7));
    }
    bytes.insert(bytes.end(), lows.begin(), lows.end());
    bytes.insert(bytes.end(), highs.begin(), highs.end());
    bytes.insert(bytes.end(), values.begin(), values.end());
  }
  put_varint(encoded.payload.size());
  bytes.insert(bytes.end(), encoded.payload.begin(), encoded.payload.end());
  return bytes;
}

// The weights of a matrix in an envelope, by codes of so many bits; nothing where it has none.
std::vector<uint8_t> weights_by_codes(const std::vector<uint8_t>& envelope, const ArrayInfo& info, size_t rows,
                                      size_t columns, uint32_t bits, size_t* n_patches = nullptr) {
  EnvelopeCodes found;
  std::vector<uint8_t> codes(rows * row_bytes(columns, bits));
  if (!decode_envelope_codes({envelope.data(), envelope.size(), {rows, columns}, info.output}, bits, codes.data(), 1, found)) {
    return {};
  }
  found.table.resize(found.table.empty() ? 0 : kCodeTable);
  const CodeValues& values = found.values;
  const CodeMatrix matrix{codes.data(), bits, rows, columns, info.output, found.table.empty() ? nullptr : found.table.data(),
                          size_t(1) << bits, values.steps.data(), values.by_row,
                          values.factors.size() == rows ? values.factors.data() : nullptr, values.first,
                          uint8_t(-values.first), found.patched.data(), found.patch_weights.data(), found.patched.size()};
  std::vector<uint8_t> weights(info.n * item_size(info.output));
  weights_of_codes(matrix, 0, matrix.rows, weights.data(), 2);
  if (n_patches) *n_patches = found.patched.size();
  return weights;
}

// Four bits stand for the weights of a byte, and as many as are outside were to be expected.
void check_packed(const std::vector<uint8_t>& envelope, const ArrayInfo& info, size_t columns, const EncodedBound& encoded) {
  size_t n_patches = 0;
  const size_t rows = info.n / columns;
  const auto expected = weights_by_codes(envelope, info, rows, columns, 8);
  const auto found = weights_by_codes(envelope, info, rows, columns, 4, &n_patches);
  if (columns == info.columns ? found != expected : !found.empty() && found != expected) {
    fail("codes of four bits stand for other weights");
  }
  if (found.empty()) return;
  const auto most = most_outside(encoded.payload.data(), encoded.payload.size(), info.n, encoded.payload.size());
  if (most && n_patches > encoded.misses.size() + *most) fail("more weights are outside than tables allow");
}

void check_envelope(const ArrayInfo& info, const EncodedBound& encoded, std::vector<uint8_t> expected, size_t n_mutations) {
  const size_t size = item_size(info.output);
  std::vector<uint8_t> values(size * encoded.misses.size());
  for (uint8_t& byte : values) byte = uint8_t(rng());
  for (size_t i = 0; i < encoded.misses.size(); ++i) {
    std::memcpy(&expected[encoded.misses[i] * size], &values[i * size], size);
  }
  const auto body = envelope_of(info, encoded, values, {1, info.n});
  auto sealed = body;
  seal(sealed);
  std::vector<uint8_t> out(info.n * size);
  const bool decoded = decode_envelope({sealed.data(), sealed.size(), {1, info.n}, info.output}, out.data(), 1);
  if (decoded != (info.bound > 0) || (decoded && out != expected)) fail("an envelope decodes differently");
  const size_t columns = info.n % info.columns ? info.n : info.columns;
  const auto matrix_body = envelope_of(info, encoded, values, {info.n / columns, columns});
  auto matrix = matrix_body;
  seal(matrix);
  check_packed(matrix, info, columns, encoded);
  for (size_t m = 0; m < n_mutations; ++m) {
    auto bad = mutated(below(2) ? body : matrix_body);
    if (below(8)) seal(bad);
    const std::vector<uint8_t> exact(bad);  // as large as it says
    decode_envelope({exact.data(), exact.size(), {1, info.n}, info.output}, out.data(), 1);
    weights_by_codes(exact, info, 1, info.n, 8);
    const std::vector<uint8_t> two[] = {weights_by_codes(exact, info, info.n / columns, columns, 8),
                                        weights_by_codes(exact, info, info.n / columns, columns, 4)};
    if (!two[1].empty() && two[0] != two[1]) fail("codes of four bits stand for other weights");
    try {
      const size_t from = below(exact.size() + 1);
      most_outside(exact.data() + from, below(exact.size() - from + 1), info.n, exact.size());
    } catch (const Corrupt&) {
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) fail("usage: check_bound CASES MUTATIONS SEED");
  const size_t n_cases = std::strtoull(argv[1], nullptr, 10), n_mutations = std::strtoull(argv[2], nullptr, 10);
  rng.seed(std::strtoull(argv[3], nullptr, 10));
  const auto isas = runnable();
  size_t refused = 0, survived = 0;
  for (size_t c = 0; c < n_cases; ++c) {
    Array a = random_array();
    if (a.info.bound > 0 && below(2)) add_codes(a);
    EncodeOptions options;
    options.segment_weights = size_t(1) << (6 + below(12));
    use_isa("scalar");
    const EncodedBound encoded = encode(a, options);
    for (const Isa isa : isas) {
      use_isa(isa_name(isa));
      options.threads = unsigned(1 + below(2));
      const EncodedBound again = encode(a, options);
      if (again.payload != encoded.payload || again.misses != encoded.misses) fail("encoders disagree");
    }
    const auto good = decode(a.info, encoded.payload, Isa::kScalar, 1);
    if (good.empty()) fail("the decoder refuses what the encoder made");
    check_values(a, good, encoded.misses);
    for (const Isa isa : isas) {
      if (decode(a.info, encoded.payload, isa, 2) != good) fail(std::string(isa_name(isa)) + " decodes differently");
    }
    const size_t n_tokens = 1 + below(7);
    const Made made = decode_to_codes(a.info, encoded.payload, Isa::kScalar, n_tokens);
    for (size_t i = 1; !made.weights.empty() && i + 1 < a.info.n; ++i) {  // the ends are patched
      const size_t size = item_size(a.info.output);
      if (std::memcmp(&made.weights[i * size], &good[i * size], size) != 0) fail("a code stands for another value");
    }
    for (const Isa isa : isas) {
      if (decode_to_codes(a.info, encoded.payload, isa, n_tokens) != made) {
        fail(std::string(isa_name(isa)) + " makes other codes or products");
      }
    }
    check_envelope(a.info, encoded, good, n_mutations);
    for (size_t m = 0; m < n_mutations; ++m) {
      const auto bad = mutated(encoded.payload);
      const auto expected = decode(a.info, bad, Isa::kScalar, 1);
      const Made codes = decode_to_codes(a.info, bad, Isa::kScalar, 1);
      for (const Isa isa : isas) {
        if (isa != Isa::kScalar && decode(a.info, bad, isa, 1) != expected) {
          fail(std::string(isa_name(isa)) + " decodes damaged bytes differently");
        }
        if (isa != Isa::kScalar && decode_to_codes(a.info, bad, isa, 1).codes != codes.codes) {
          fail(std::string(isa_name(isa)) + " decodes damaged bytes to other codes");
        }
      }
      ++(expected.empty() ? refused : survived);
    }
  }
  std::printf("%zu arrays, %zu damaged payloads refused, %zu decoded to something; paths:", n_cases, refused, survived);
  for (const Isa isa : isas) std::printf(" %s", isa_name(isa));
  std::printf("\n");
}
