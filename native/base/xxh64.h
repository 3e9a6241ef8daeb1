// XXH64 (Yann Collet, github.com/Cyan4973/xxHash, doc/xxhash_spec.md), for the envelope's checksum.
#pragma once
#include <cstddef>
#include <cstdint>

namespace moebound {

uint64_t xxh64(const uint8_t* data, size_t n_bytes, uint64_t seed = 0);

}  // namespace moebound
