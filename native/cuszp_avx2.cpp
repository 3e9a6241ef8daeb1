#include "cuszp_chunks.h"

namespace moebound {

CuszpPath cuszp_avx2() { return {measure_chunk<AnyLanes>, write_chunk<AnyLanes>, decode_chunk<AnyLanes>}; }

}  // namespace moebound
