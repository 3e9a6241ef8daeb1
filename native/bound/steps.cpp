#include "bound/steps.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace moebound {
namespace {

// 2^(i/4): each of its neighbours is farther from the power.
constexpr double kQuarter[4] = {1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429};

// The largest float32 that is kappa/2 times no more than the bound.
float widest_step(double kappa, double bound) {
  const double exact = 2 * bound / kappa;
  float widest = exact < double(F32::value(F32::kMaxFinite)) ? float(exact) : F32::value(F32::kMaxFinite);
  while (widest > 0 && double(widest) * kappa / 2 > bound) widest = std::nextafter(widest, 0.0f);
  return widest;
}

double quarters_down(int level) {
  const int down = -level;
  return std::ldexp(kQuarter[down & 3], (down - (down & 3)) / 4);
}

}  // namespace

std::vector<float> step_sizes(const Steps& steps, double bound) {
  const double kappa = double(half_to_float(steps.kappa));
  if (!(kappa >= 1 && kappa <= 16)) throw std::invalid_argument("half steps: expected 1 to 16");
  const double widest = double(widest_step(kappa, bound));
  float sizes[kMostLevel + 1];
  for (int level = 0; level <= int(kMostLevel); ++level) {
    sizes[level] = float(widest * quarters_down(level));
  }
  float least = 1;
  for (const float factor : step_factors(steps)) least = std::min(least, factor);
  std::vector<float> found(steps.levels.size());
  for (size_t i = 0; i < found.size(); ++i) {
    found[i] = sizes[steps.levels[i]];
    if (!(found[i] * least >= 0x1p-126f)) throw std::invalid_argument("a step is below the normal float32");
  }
  return found;
}

std::vector<float> step_factors(const Steps& steps) {
  std::vector<float> found(steps.factor_levels.size());
  for (size_t i = 0; i < found.size(); ++i) found[i] = float(quarters_down(steps.factor_levels[i]));
  return found;
}

}  // namespace moebound
