#include <immintrin.h>

#include <bit>

#include "bound/packed.h"

namespace moebound {

void pack_runs_avx2(const uint8_t* codes, size_t n_runs, const Window& window, uint64_t place, uint8_t* out,
                    Outside& outside) {
  const __m256i start = _mm256_set1_epi8(char(window.start)), zero = _mm256_set1_epi8(char(window.zero));
  const __m256i least = _mm256_set1_epi8(char(kWindow)), low_then_high = _mm256_set1_epi16(0x1001);
  const size_t n = n_runs * kPackedRun;
  const auto pairs = [&](size_t at) __attribute__((always_inline)) {
    __m256i some = _mm256_sub_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + at)), start);
    const __m256i beyond = _mm256_cmpeq_epi8(_mm256_max_epu8(some, least), some);
    auto mask = uint32_t(_mm256_movemask_epi8(beyond));
    if (mask) [[unlikely]] {
      for (; mask; mask &= mask - 1) {
        const size_t i = at + size_t(std::countr_zero(mask));
        outside.add(place + i, codes[i]);
      }
      some = _mm256_blendv_epi8(some, zero, beyond);
    }
    return _mm256_maddubs_epi16(some, low_then_high);
  };
  for (size_t j = 0; j < n; j += 64) {
    const __m256i low = pairs(j), high = pairs(j + 32);
    const __m256i mixed = _mm256_packus_epi16(low, high);  // quarters 0 2 1 3
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + j / 2), _mm256_permute4x64_epi64(mixed, 0xD8));
  }
}

}  // namespace moebound
