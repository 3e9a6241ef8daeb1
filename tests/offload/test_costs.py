"""The cost model: what overlapping and compressing can be worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moebound.offload.costs import Costs, measure_speeds
from moebound.offload.delivery import Arrival, Delivery
from moebound.offload.entries import open_entries
from moebound.offload.slots import Slot, SlotKind
from tiny_models import make_tiny

seconds = st.floats(0, 1)
costs = st.builds(Costs, seconds, seconds, seconds, seconds, st.integers(1, 64), st.integers(1, 8))


@given(costs, st.floats(0, 1))
def test_overlapping_never_costs(found: Costs, hits: float) -> None:
    assert found.overlapped_s(hits) <= found.serial_s(hits) * (1 + 1e-12)


@given(costs, st.floats(0, 1), st.floats(0, 1))
def test_hits_never_cost(found: Costs, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert found.overlapped_s(high) <= found.overlapped_s(low) + 1e-12
    assert found.serial_s(high) <= found.serial_s(low) + 1e-12


def test_by_hand() -> None:
    # 2 layers, 4 experts a token, half of them missing: two reads of 3 s each hide two decodes of
    # 1 s and four products of 0.5 s, beside 0.25 s for the rest of a layer.
    found = Costs(3.0, 1.0, 0.5, 0.25, 2, 4)
    assert found.overlapped_s(0.5) == pytest.approx(2 * (0.25 + 6.0))
    assert found.serial_s(0.5) == pytest.approx(2 * (0.25 + 2 * 4.0 + 4 * 0.5))
    assert found.overlapped_s(1.0) == pytest.approx(2 * (0.25 + 2.0))


def test_break_even() -> None:
    """Compression pays in a pipeline as soon as decoding and computing are faster than the link."""
    raw = Costs(12.0, 0.0, 1.0, 0.0, 1, 1)
    small = replace(raw, read_s=3.0, decode_s=10.0)
    slow = replace(small, decode_s=12.0)
    assert small.overlapped_s(0) < raw.overlapped_s(0) < slow.overlapped_s(0)


def test_decoding_is_timed_into_slots_that_were_used_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that is new costs more than decoding what it holds."""
    src = make_tiny("mixtral", tmp_path / "src")
    entries = list(open_entries(src))
    kind = SlotKind((("gate_up_proj", (4, 3)), ("down_proj", (3, 2))), torch.float32, True,
                    False, False)  # fmt: skip
    made, used = list[Slot](), list[Slot]()
    empty = SlotKind.empty

    def makes(self: SlotKind, device: torch.device) -> Slot:
        made.append(empty(self, device))
        return made[-1]

    monkeypatch.setattr(SlotKind, "empty", makes)

    class Fake(Delivery):
        threads, buffer_bytes, together = 1, 0, 2

        def workspace(self) -> Any:
            return None

        def bytes_of(self, entry: Any, workspace: Any) -> memoryview:
            raise AssertionError

        def bring(self, arrivals: Sequence[Arrival], workspace: Any) -> None:
            used.extend(arrival.slot for arrival in arrivals)

    measure_speeds(entries, Fake(), {e.key: kind for e in entries}, torch.device("cpu"))
    assert len(made) == 2
    assert len(used) == len(entries) + 2
    assert used == [made[i % 2] for i in range(len(used))]
