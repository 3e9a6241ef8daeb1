#!/usr/bin/env bash
# Everything that needs a real GPU, in one go: build, check, measure, profile.
#
#   bench/gpu.sh OUT [--quick]
#
# Writes OUT/gpu.json (the rows), OUT/gpu.txt (the tables, also on stdout), OUT/cuszp.json and .txt
# (cuSZp's stream) and, where ncu is there, OUT/ncu.txt. Needs a CUDA torch, triton, a C++20 compiler
# and what builds the package; no network. About four minutes on an H200; --quick makes every comparison, few figures and no profile: one.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:?folder for results}" && cd "$1" && pwd)
python=${PYTHON:-python3}
site=$(mktemp -d)
"$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --target "$site" .
export PYTHONPATH="$site" PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,pcie.link.gen.current,pcie.link.width.current --format=csv,noheader || true
cd "$site"
"$python" -m moebound.bench.gpu "$out" ${2:+"$2"}
[ -n "${2:-}" ] || "$python" -m moebound.bench.gpu.cuszp "$out/cuszp.json" > "$out/cuszp.txt"
if [ -z "${2:-}" ] && command -v ncu > /dev/null; then
  timeout 100 ncu --clock-control none --kernel-name decode_segments --launch-count 4 \
    --section SpeedOfLight --section WarpStateStats --section Occupancy --section LaunchStats \
    --section MemoryWorkloadAnalysis --section SourceCounters --section ComputeWorkloadAnalysis \
    "$python" -m moebound.bench.gpu "$out" --profile > "$out/ncu.txt" 2>&1 || echo "ncu: see $out/ncu.txt"
fi
# The end of what is printed is what a caller with little room keeps.
tail -c 11000 "$out/gpu.txt"
