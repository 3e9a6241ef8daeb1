#include "base/bit_matrix.h"
#include "cuszp/chunks.h"

namespace moebound {
namespace {

// The bin of a value. NaN and ±Inf have none and count as 0.
int32_t bin_of(float x, float reciprocal) {
  const float finite = (std::bit_cast<uint32_t>(x) & 0x7FFFFFFFu) < 0x7F800000u ? x : 0.0f;
  const float y = finite * reciprocal;
  return int32_t(std::clamp(y + 0.5f, -kSaturated, kSaturated)) - int32_t(y < -0.5f);
}

// The pattern of the nearest number, ties to even. x is not NaN.
uint32_t nearest(F32, float x) { return std::bit_cast<uint32_t>(x); }
uint16_t nearest(BF16, float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return uint16_t((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}
uint16_t nearest(F16, float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  if (magnitude >= 0x47800000u) return uint16_t(sign | 0x7C00u);  // from 2^16
  if (magnitude < 0x38800000u) {  // below 2^-14: whole multiples of 2^-24, as the floats from 0.5 to 1 are
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return uint16_t(sign | (std::bit_cast<uint32_t>(shifted) - 0x3F000000u));
  }
  return uint16_t(sign | (magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13);
}

// Bit p of value i is bit 7 - i % 8 of byte i / 8 of plane p.
void put_planes(const uint32_t* values, uint32_t n_planes, uint8_t* planes) {
  for (uint32_t base = 0; base < n_planes; base += 8) {
    for (size_t byte = 0; byte < 4; ++byte) {
      uint64_t rows = 0;
      for (size_t i = 0; i < 8; ++i) rows |= uint64_t(uint8_t(values[8 * byte + i] >> base)) << (8 * (7 - i));
      const uint64_t columns = transpose_bits(rows);
      for (uint32_t p = base; p < std::min(n_planes, base + 8); ++p) {
        planes[4 * p + byte] = uint8_t(columns >> (8 * (p - base)));
      }
    }
  }
}

void get_planes(const uint8_t* planes, uint32_t n_planes, uint32_t* values) {
  std::fill_n(values, kCuszpBlock, 0u);
  for (uint32_t base = 0; base < n_planes; base += 8) {
    for (size_t byte = 0; byte < 4; ++byte) {
      uint64_t columns = 0;
      for (uint32_t p = base; p < std::min(n_planes, base + 8); ++p) {
        columns |= uint64_t(planes[4 * p + byte]) << (8 * (p - base));
      }
      const uint64_t rows = transpose_bits(columns);
      for (size_t i = 0; i < 8; ++i) values[8 * byte + i] |= uint32_t(uint8_t(rows >> (8 * (7 - i)))) << base;
    }
  }
}

struct ScalarLanes {
  struct Block {
    uint32_t magnitude[kCuszpBlock], negative[kCuszpBlock];

    uint32_t others() const {
      uint32_t bits = 0;
      for (size_t i = 1; i < kCuszpBlock; ++i) bits |= magnitude[i];
      return bits;
    }
    uint32_t all() const { return others() | magnitude[0]; }
    uint32_t first() const { return magnitude[0]; }
    void drop_first() { magnitude[0] = 0; }
    void put(uint32_t n_planes, uint8_t* to) const {
      put_planes(negative, 1, to);
      put_planes(magnitude, n_planes, to + 4);
    }
  };

  template <class T>
  static Block read(T, const typename T::Bits* values, const CuszpCoding& coding, size_t keep) {
    Block block;
    int32_t before = 0;
    for (size_t i = 0; i < kCuszpBlock; ++i) {
      const int32_t bin = bin_of(T::value(values[i]), coding.reciprocal);
      const int32_t difference = i < keep ? bin - before : 0;
      if (coding.mode != CuszpMode::kFixed) before = bin;
      block.negative[i] = difference < 0;
      block.magnitude[i] = uint32_t(difference < 0 ? -difference : difference);
    }
    return block;
  }

  template <class T>
  static void decode(T, const uint8_t* payload, CuszpRate rate, const CuszpCoding& coding, typename T::Bits* out) {
    uint32_t magnitude[kCuszpBlock], negative[kCuszpBlock];
    get_planes(payload + rate.outlier_bytes, 1, negative);
    get_planes(payload + rate.outlier_bytes + 4, rate.planes, magnitude);
    if (rate.outlier_bytes) magnitude[0] = outlier_of(payload, rate);
    uint32_t bin = 0;  // sums of an encoder's differences fit; those of other bytes wrap
    for (size_t i = 0; i < kCuszpBlock; ++i) {
      const uint32_t difference = (magnitude[i] ^ (0 - negative[i])) + negative[i];
      bin = coding.mode == CuszpMode::kFixed ? difference : bin + difference;
      out[i] = nearest(T{}, float(int32_t(bin)) * coding.step);
    }
  }
};

}  // namespace

CuszpPath cuszp_scalar() { return path_with<ScalarLanes>(); }

}  // namespace moebound
