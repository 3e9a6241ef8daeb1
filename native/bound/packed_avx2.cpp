#include <immintrin.h>

#include "bound/packed.h"

namespace moebound {

size_t pack_runs_avx2(const uint8_t* codes, size_t n_runs, uint8_t start, uint8_t* out) {
  const __m256i from = _mm256_set1_epi8(char(start)), low_then_high = _mm256_set1_epi16(0x1001);
  for (size_t run = 0; run < n_runs; ++run, codes += kPackedRun, out += kPackedRun / 2) {
    __m256i any = _mm256_setzero_si256();
    const auto pairs = [&](size_t at) {
      const __m256i some = _mm256_sub_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + at)), from);
      any = _mm256_or_si256(any, some);
      return _mm256_maddubs_epi16(some, low_then_high);
    };
#pragma GCC unroll 2
    for (size_t j = 0; j < kPackedRun; j += 64) {
      const __m256i mixed = _mm256_packus_epi16(pairs(j), pairs(j + 32));  // quarters 0 2 1 3
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + j / 2), _mm256_permute4x64_epi64(mixed, 0xD8));
    }
    if (!_mm256_testz_si256(any, _mm256_set1_epi8(char(0xF0)))) return run;
  }
  return n_runs;
}

}  // namespace moebound
