#include "measure/compare.h"

#include <algorithm>
#include <limits>

#include "base/cpu.h"

namespace moebound {
namespace {

// Eight sums side by side, value i into sum i mod 8: quick, and the same order on every machine.
constexpr size_t kLanes = 8;

struct LaneSums {
  double lane[kLanes] = {};
  double total() const {
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
  }
};

bool same_non_finite(float w, float d) {
  return std::bit_cast<uint32_t>(w) == std::bit_cast<uint32_t>(d);
}

template <class W, class D>
bool breaks(typename W::Bits wb, typename D::Bits db, double bound) {
  const float w = W::value(wb), d = D::value(db);
  if (!std::isfinite(w)) return !same_non_finite(w, d);
  return !(std::fabs(double(w) - double(d)) <= bound);
}

template <class W, class D>
Comparison compare_as(const typename W::Bits* w, const typename D::Bits* d, size_t n, double bound) {
  Comparison result;
  LaneSums squares;
  double worst[kLanes] = {};
  uint64_t finite[kLanes] = {}, broken[kLanes] = {};
  const auto one = [&](size_t i, size_t lane) {
    const float a = W::value(w[i]), b = D::value(d[i]);
    const bool is_finite = std::fabs(a) <= std::numeric_limits<float>::max();
    const double error = std::fabs(double(a) - double(b));
    squares.lane[lane] += is_finite ? error * error : 0.0;
    // A NaN or Inf that took a finite weight's place is the worst there is.
    const double counted = error <= std::numeric_limits<double>::max() ? error
                                                                       : std::numeric_limits<double>::infinity();
    worst[lane] = is_finite && counted > worst[lane] ? counted : worst[lane];
    finite[lane] += is_finite;
    broken[lane] += is_finite ? !(error <= bound) : !same_non_finite(a, b);
  };
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) one(i + lane, lane);
  }
  for (; i < n; ++i) one(i, i % kLanes);
  result.square_sum = squares.total();
  for (size_t lane = 0; lane < kLanes; ++lane) {
    result.max_abs_error = std::max(result.max_abs_error, worst[lane]);
    result.n_finite += finite[lane];
    result.n_broken += broken[lane];
  }
  return result;
}

template <class F>
decltype(auto) with_dtypes(DType a, DType b, F&& f) {
  return with_dtype(a, [&](auto w) { return with_dtype(b, [&](auto d) { return f(w, d); }); });
}

}  // namespace

#ifdef MOEBOUND_X86
Comparison compare_avx2(DType, const void*, DType, const void*, size_t, double);
Stats stats_avx2(DType, const void*, size_t);
#endif

Comparison compare(DType dtype_w, const void* w, DType dtype_d, const void* d, size_t n, double bound) {
#ifdef MOEBOUND_X86
  if (isa() != Isa::kScalar) return compare_avx2(dtype_w, w, dtype_d, d, n, bound);
#endif
  return with_dtypes(dtype_w, dtype_d, [&](auto wt, auto dt) {
    using W = decltype(wt);
    using D = decltype(dt);
    return compare_as<W, D>(static_cast<const typename W::Bits*>(w),
                            static_cast<const typename D::Bits*>(d), n, bound);
  });
}

std::vector<uint64_t> violations(DType dtype_w, const void* w, DType dtype_d, const void* d, size_t n,
                                 double bound) {
  return with_dtypes(dtype_w, dtype_d, [&](auto wt, auto dt) {
    using W = decltype(wt);
    using D = decltype(dt);
    const auto* wb = static_cast<const typename W::Bits*>(w);
    const auto* db = static_cast<const typename D::Bits*>(d);
    std::vector<uint64_t> found;
    for (size_t i = 0; i < n; ++i) {
      if (breaks<W, D>(wb[i], db[i], bound)) found.push_back(i);
    }
    return found;
  });
}

Stats stats(DType dtype, const void* w, size_t n) {
#ifdef MOEBOUND_X86
  if (isa() != Isa::kScalar) return stats_avx2(dtype, w, n);
#endif
  return with_dtype(dtype, [&](auto t) {
    using W = decltype(t);
    const auto* bits = static_cast<const typename W::Bits*>(w);
    constexpr float kInf = std::numeric_limits<float>::infinity();
    LaneSums abs_sums, squares;
    uint64_t finite[kLanes] = {};
    float low[kLanes], high[kLanes];
    std::fill_n(low, kLanes, kInf);
    std::fill_n(high, kLanes, -kInf);
    const auto one = [&](size_t i, size_t lane) {
      const float x = W::value(bits[i]);
      const bool is_finite = std::fabs(x) <= std::numeric_limits<float>::max();
      const double magnitude = is_finite ? std::fabs(double(x)) : 0.0;
      abs_sums.lane[lane] += magnitude;
      squares.lane[lane] += magnitude * magnitude;
      finite[lane] += is_finite;
      low[lane] = is_finite && x < low[lane] ? x : low[lane];
      high[lane] = is_finite && x > high[lane] ? x : high[lane];
    };
    size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      for (size_t lane = 0; lane < kLanes; ++lane) one(i + lane, lane);
    }
    for (; i < n; ++i) one(i, i % kLanes);
    Stats result{0, abs_sums.total(), squares.total(), kInf, -kInf};
    for (size_t lane = 0; lane < kLanes; ++lane) {
      result.n_finite += finite[lane];
      result.lowest = std::min<double>(result.lowest, low[lane]);
      result.highest = std::max<double>(result.highest, high[lane]);
    }
    return result;
  });
}

}  // namespace moebound
