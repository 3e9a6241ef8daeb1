// Attention's path for every CPU, lane by lane.
#include "attend/path.h"
#include "base/bytes.h"

namespace moebound {
namespace {

struct Scalar {
  static constexpr size_t kRows = 1, kQueries = 1, kRowsOfOne = 1;
  struct F {
    float lane[kLanes];
  };

  template <class Number>
  static F made(const Number& number) {
    F f;
    for (size_t i = 0; i < kLanes; ++i) f.lane[i] = number(i);
    return f;
  }
  static F zero() { return all(0); }
  static F all(float x) { return made([&](size_t) { return x; }); }
  static F load(const float* p) { return made([&](size_t i) { return p[i]; }); }
  static void store(float* p, const F& f) { std::copy_n(f.lane, kLanes, p); }
  static F fma(const F& a, const F& b, const F& c) {
    return made([&](size_t i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); });
  }
  static float sum(F f) {
    for (size_t half = kLanes / 2; half > 0; half /= 2) {
      for (size_t i = 0; i < half; ++i) f.lane[i] += f.lane[i + half];
    }
    return f.lane[0];
  }
  static void widen(const uint16_t* p, F& even, F& odd) {
    even = made([&](size_t i) { return BF16::value(p[2 * i]); });
    odd = made([&](size_t i) { return BF16::value(p[2 * i + 1]); });
  }
};

}  // namespace

const AttendPath attend_scalar = path_of<Scalar>;

}  // namespace moebound
