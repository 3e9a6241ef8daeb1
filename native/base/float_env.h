// The default floating-point environment for the length of a call. A caller may have set
// flush-to-zero (torch.set_flush_denormal) or another rounding mode; grids, sums and errors must
// not depend on it.
#pragma once
#include <cfenv>

namespace moebound {

class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment() {
    std::fegetenv(&callers_);
    std::fesetenv(FE_DFL_ENV);
  }
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;
  ~DefaultFloatEnvironment() { std::fesetenv(&callers_); }

 private:
  std::fenv_t callers_;
};

}  // namespace moebound
