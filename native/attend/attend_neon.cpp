// Attention's path for AArch64; used only where the CPU has it.
#include "attend/path.h"
#include "base/lanes_neon.h"

namespace moebound {
namespace {

struct Neon : LanesNeon {
  static constexpr size_t kRows = 2, kQueries = 2, kRowsOfOne = 4;
};

}  // namespace

const AttendPath attend_neon = path_of<Neon>;

}  // namespace moebound
