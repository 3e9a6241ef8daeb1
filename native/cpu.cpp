#include "cpu.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace moebound {
namespace {

constexpr Isa kAll[] = {Isa::kAvx512, Isa::kAvx2, Isa::kScalar};

Isa by_name(const std::string& name) {
  for (const Isa isa : kAll) {
    if (name != isa_name(isa)) continue;
    if (!can_run(isa)) throw std::invalid_argument("this CPU cannot run " + name);
    return isa;
  }
  throw std::invalid_argument("instruction set '" + name + "': expected scalar, avx2 or avx512");
}

Isa choose() {
  if (const char* wanted = std::getenv("MOEBOUND_ISA"); wanted && *wanted) return by_name(wanted);
  for (const Isa isa : kAll) {
    if (can_run(isa)) return isa;
  }
  return Isa::kScalar;
}

std::atomic<int>& chosen() {
  static std::atomic<int> value{int(choose())};
  return value;
}

}  // namespace

bool can_run(Isa isa) {
#ifdef MOEBOUND_X86
  if (isa == Isa::kAvx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") &&
           __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("f16c");
  }
#ifdef MOEBOUND_EMULATE_AVX512
  if (isa == Isa::kAvx512) return true;
#endif
  if (isa == Isa::kAvx512) {
    return can_run(Isa::kAvx2) && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
  }
#endif
  return isa == Isa::kScalar;
}

const char* isa_name(Isa isa) {
  return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "scalar";
}

Isa isa() { return Isa(chosen().load(std::memory_order_relaxed)); }

void use_isa(const std::string& name) { chosen() = int(by_name(name)); }

}  // namespace moebound
