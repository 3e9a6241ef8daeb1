// Which instruction sets this machine has, asked once; MOEBOUND_ISA can ask for less.
#pragma once
#include <string>
#include <vector>

namespace moebound {

// kAvx512Search is AVX-512 without gathers where that is possible: AMD's Zen makes each of them of
// dozens of microcode steps, and is twice as quick without; Intel's cores are quicker with them.
// kNeon is AArch64's, which every CPU of that kind has.
enum class Isa { kScalar, kAvx2, kAvx512, kAvx512Search, kNeon };

// The best path for this machine, or the one MOEBOUND_ISA names (scalar, avx2, avx512,
// avx512-search, neon) if it can run that. Throws std::invalid_argument on a name that is unknown or cannot run here.
Isa isa();
const char* isa_name(Isa);
const std::vector<Isa>& all_isas();
bool can_run(Isa);
// For tests: use this path from now on.
void use_isa(const std::string& name);

}  // namespace moebound
