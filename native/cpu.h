// Which instruction sets this machine has, asked once; MOEBOUND_ISA can ask for less.
#pragma once
#include <string>

namespace moebound {

enum class Isa { kScalar, kAvx2, kAvx512 };

// The best path this machine can run, or the one MOEBOUND_ISA names (scalar, avx2, avx512) if it
// can run that. Throws std::invalid_argument on a name that is unknown or cannot run here.
Isa isa();
const char* isa_name(Isa);
bool can_run(Isa);
// For tests: use this path from now on.
void use_isa(const std::string& name);

}  // namespace moebound
