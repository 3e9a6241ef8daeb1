// How the kernel says no. Bindings turn these into moebound.errors.
#pragma once
#include <stdexcept>

namespace moebound {

struct Corrupt : std::runtime_error {  // bytes that no encoder made
  using std::runtime_error::runtime_error;
};

}  // namespace moebound
