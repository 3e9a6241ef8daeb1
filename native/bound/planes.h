// Low bits of bins, as they are stored: by groups of 32 weights, in one 32-bit word for each bit.
#pragma once
#include <cstddef>
#include <cstdint>

namespace moebound {

// Writes low_bits words for `count` weights, at most kGroup: bit i of word b is bit b of low[i].
using PutPlanes = void (*)(const uint8_t* low, size_t count, uint32_t low_bits, uint8_t* planes);

void put_planes_any(const uint8_t*, size_t, uint32_t, uint8_t*);
void put_planes_avx2(const uint8_t*, size_t, uint32_t, uint8_t*);
void put_planes_neon(const uint8_t*, size_t, uint32_t, uint8_t*);

}  // namespace moebound
