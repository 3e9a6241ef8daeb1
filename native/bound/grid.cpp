#include "bound/grid.h"

namespace moebound {
namespace {

// The largest pattern of T whose value is <= x, for x >= 0: a guess that is off by one at most,
// which the caller mends with exact comparisons.
template <class T>
uint32_t pattern_near(double x) {
  if (x >= double(T::value(T::kMaxFinite))) return T::kMaxFinite;
  if constexpr (T::kDType == DType::kF16) {
    if (x < 0x1p-14) return uint32_t(x * 0x1p24);
    return uint32_t(std::bit_cast<uint64_t>(x) >> 42) - (uint32_t(1023 - 15) << 10);
  } else {
    const uint32_t bits = std::bit_cast<uint32_t>(float(x));
    return T::kDType == DType::kBF16 ? bits >> 16 : bits;
  }
}

// The largest finite pattern v of T, not below `at_least`, with T(v) - from <= bound; at_least
// itself if none is larger.
template <class T>
uint32_t reach(double from, double bound, uint32_t at_least) {
  const auto within = [&](uint32_t bits) {
    return double(T::value(typename T::Bits(bits))) - from <= bound;
  };
  uint32_t bits = pattern_near<T>(from + bound);
  while (bits > at_least && !within(bits)) --bits;
  while (bits < T::kMaxFinite && within(bits + 1)) ++bits;
  return bits > at_least ? bits : at_least;
}

template <class S, class T>
Grid make(double bound, size_t n_cells, uint32_t up_to_source) {
  Grid grid;
  uint32_t value = 0, edge = reach<S>(0.0, bound, 0);
  while (true) {
    grid.values.push_back(value);
    grid.edges.push_back(edge);
    if (grid.values.size() >= n_cells || edge >= up_to_source || edge >= S::kMaxFinite) break;
    const double next = double(S::value(typename S::Bits(edge + 1)));
    const uint32_t reached = reach<T>(next, bound, value);
    const double middle = double(T::value(typename T::Bits(reached)));
    if (reached == value || !(next - middle <= bound)) break;
    value = reached;
    edge = reach<S>(middle, bound, edge + 1);
  }
  return grid;
}

}  // namespace

Grid make_grid(DType source, DType output, double bound, size_t n_cells, uint32_t up_to_source) {
  return with_dtype(source, [&](auto s) {
    return with_dtype(output, [&](auto t) {
      return make<decltype(s), decltype(t)>(bound, n_cells, up_to_source);
    });
  });
}

}  // namespace moebound
