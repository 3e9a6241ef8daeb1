#include "bound/stretched.h"

#include <cmath>
#include <cstdlib>

namespace moebound {
namespace {

// round(2^24 · erf(i / (8 √2))): how much of a Gaussian is within i/8 standard deviations.
constexpr uint32_t kWithin[48] = {
    0, 1668938, 3312035, 4904643, 6424414, 7852223, 9172864, 10375468,
    11453629, 12405257, 13232198, 13939661, 14535538, 15029658, 15433054, 15757283,
    16013848, 16213726, 16367031, 16482793, 16568854, 16631843, 16677232, 16709431,
    16731921, 16747385, 16757854, 16764832, 16769410, 16772368, 16774249, 16775427,
    16776153, 16776594, 16776857, 16777012, 16777102, 16777153, 16777182, 16777198,
    16777206, 16777211, 16777213, 16777215, 16777215, 16777216, 16777216, 16777216,
};
constexpr double kEighth[8] = {0x1.0000000000000p+0, 0x1.172b83c7d517bp+0, 0x1.306fe0a31b715p+0,
                               0x1.4bfdad5362a27p+0, 0x1.6a09e667f3bcdp+0, 0x1.8ace5422aa0dbp+0,
                               0x1.ae89f995ad3adp+0, 0x1.d5818dcfba487p+0};  // 2^(i/8)

}  // namespace

void stretched_table(uint32_t stretch, int32_t symbol_low, uint32_t n_symbols, uint32_t low_bits,
                     uint32_t table_log, uint16_t* frequencies) {
  const int eighths = int(stretch) - 32;
  const double deviation = std::ldexp(kEighth[eighths & 7], (eighths - (eighths & 7)) / 8);
  const uint64_t whole = 1u << table_log;
  uint64_t before = 0;
  for (uint32_t s = 0; s < n_symbols; ++s) {
    uint64_t upto = whole;
    if (s + 1 < n_symbols) {
      // Twice the lower edge of the next symbol's bins, half a bin below the first.
      const int64_t edge = ((int64_t(symbol_low) + s + 1) << (low_bits + 1)) - 1;
      const double position = double(std::llabs(edge)) * 1024.0 / deviation;  // in 1/2048 deviations
      const uint32_t at = position < 12031.0 ? uint32_t(position) : 12031;
      const uint32_t i = at >> 8;
      const uint64_t within = kWithin[i] + ((uint64_t(kWithin[i + 1] - kWithin[i]) * (at & 255)) >> 8);
      const uint64_t below = edge < 0 ? (1u << 24) - within : (1u << 24) + within;
      upto = s + 1 + (((whole - n_symbols) * below) >> 25);
    }
    frequencies[s] = uint16_t(upto - before);
    before = upto;
  }
}

}  // namespace moebound
