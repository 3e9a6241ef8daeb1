// Attention's path for AVX-512; used only where the CPU has it.
#include "attend/path.h"
#include "base/lanes_avx512.h"

namespace moebound {
namespace {

struct Avx512 : LanesAvx512 {
  static constexpr size_t kRows = 4, kQueries = 4, kRowsOfOne = 8;
};

}  // namespace

const AttendPath attend_avx512 = path_of<Avx512>;

}  // namespace moebound
