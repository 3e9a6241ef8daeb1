#include "base/xxh64.h"

#include "base/bytes.h"

namespace moebound {
namespace {

constexpr uint64_t kPrime1 = 0x9E3779B185EBCA87ull;
constexpr uint64_t kPrime2 = 0xC2B2AE3D27D4EB4Full;
constexpr uint64_t kPrime3 = 0x165667B19E3779F9ull;
constexpr uint64_t kPrime4 = 0x85EBCA77C2B2AE63ull;
constexpr uint64_t kPrime5 = 0x27D4EB2F165667C5ull;

uint64_t rotate(uint64_t x, int by) { return (x << by) | (x >> (64 - by)); }
uint64_t mix(uint64_t lane, uint64_t input) {
  return rotate(lane + input * kPrime2, 31) * kPrime1;
}
uint64_t merge(uint64_t hash, uint64_t lane) {
  return (hash ^ mix(0, lane)) * kPrime1 + kPrime4;
}

}  // namespace

uint64_t xxh64(const uint8_t* p, size_t n_bytes, uint64_t seed) {
  const uint8_t* const end = p + n_bytes;
  uint64_t hash;
  if (n_bytes >= 32) {
    uint64_t a = seed + kPrime1 + kPrime2, b = seed + kPrime2, c = seed, d = seed - kPrime1;
    for (; end - p >= 32; p += 32) {
      a = mix(a, load<uint64_t>(p));
      b = mix(b, load<uint64_t>(p + 8));
      c = mix(c, load<uint64_t>(p + 16));
      d = mix(d, load<uint64_t>(p + 24));
    }
    hash = rotate(a, 1) + rotate(b, 7) + rotate(c, 12) + rotate(d, 18);
    hash = merge(merge(merge(merge(hash, a), b), c), d);
  } else {
    hash = seed + kPrime5;
  }
  hash += n_bytes;
  for (; end - p >= 8; p += 8) {
    hash = rotate(hash ^ mix(0, load<uint64_t>(p)), 27) * kPrime1 + kPrime4;
  }
  for (; end - p >= 4; p += 4) {
    hash = rotate(hash ^ load<uint32_t>(p) * kPrime1, 23) * kPrime2 + kPrime3;
  }
  for (; p < end; ++p) hash = rotate(hash ^ *p * kPrime5, 11) * kPrime1;
  hash = (hash ^ (hash >> 33)) * kPrime2;
  hash = (hash ^ (hash >> 29)) * kPrime3;
  return hash ^ (hash >> 32);
}

}  // namespace moebound
