// Attention's path for AVX2 and FMA; used only where the CPU has it.
#include "attend/path.h"
#include "base/lanes_avx2.h"

namespace moebound {
namespace {

struct Avx2 : LanesAvx2 {
  static constexpr size_t kRows = 2, kQueries = 2, kRowsOfOne = 4;
};

}  // namespace

const AttendPath attend_avx2 = path_of<Avx2>;

}  // namespace moebound
