"""Benchmark cases: `moebound bench codec` and root `bench/` call them. Verify, then measure."""
