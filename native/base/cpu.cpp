#include "base/cpu.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace moebound {
namespace {

struct Named {
  Isa isa;
  const char* name;
};
constexpr Named kNames[] = {
    {Isa::kScalar, "scalar"}, {Isa::kAvx2, "avx2"}, {Isa::kAvx512, "avx512"}, {Isa::kAvx512Search, "avx512-search"},
    {Isa::kNeon, "neon"}};

Isa by_name(const std::string& name) {
  std::string names;
  for (const Named& named : kNames) {
    names += (names.empty() ? "" : ", ") + std::string(named.name);
    if (name != named.name) continue;
    if (!can_run(named.isa)) throw std::invalid_argument("this CPU cannot run " + name);
    return named.isa;
  }
  throw std::invalid_argument("instruction set '" + name + "': expected one of " + names);
}

bool gathers_are_slow() {
#ifdef MOEBOUND_X86
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

Isa choose() {
  if (const char* wanted = std::getenv("MOEBOUND_ISA"); wanted && *wanted) return by_name(wanted);
  if (can_run(Isa::kNeon)) return Isa::kNeon;
  if (can_run(Isa::kAvx512)) return gathers_are_slow() ? Isa::kAvx512Search : Isa::kAvx512;
  return can_run(Isa::kAvx2) ? Isa::kAvx2 : Isa::kScalar;
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
  if (isa == Isa::kAvx512 || isa == Isa::kAvx512Search) return true;
#endif
  if (isa == Isa::kAvx512 || isa == Isa::kAvx512Search) {
    return can_run(Isa::kAvx2) && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
  }
#endif
#ifdef MOEBOUND_NEON
  if (isa == Isa::kNeon) return true;
#endif
  return isa == Isa::kScalar;
}

const char* isa_name(Isa isa) { return kNames[int(isa)].name; }

const std::vector<Isa>& all_isas() {
  static const std::vector<Isa> all{Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Search,
                                    Isa::kNeon};
  return all;
}

Isa isa() { return Isa(chosen().load(std::memory_order_relaxed)); }

void use_isa(const std::string& name) { chosen() = int(by_name(name)); }

}  // namespace moebound
