"""Traces on disk: what goes in comes out, and damaged files are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drawn_trace import drawn_trace
from moebound.cache import trace as trace_module
from moebound.cache.trace import Trace, join, load_trace
from moebound.errors import CorruptionError, FormatError, MoeboundError, StoreError

FIELDS = ("token", "position", "sequence", "step", "decode")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "trace.npz"
    drawn_trace(skip=True).save(path)
    return path


def assert_equal(one: Trace, other: Trace) -> None:
    assert (one.model, one.task) == (other.model, other.task)
    for name in FIELDS:
        a, b = getattr(one, name), getattr(other, name)
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    for x, y in zip(one.layers, other.layers, strict=True):
        assert (x.layer, x.n_experts) == (y.layer, y.n_experts)
        np.testing.assert_array_equal(x.index, y.index)
        np.testing.assert_allclose(x.weights, y.weights, rtol=1e-3, atol=1e-7)


def test_round_trip(saved: Path) -> None:
    assert_equal(load_trace(saved), drawn_trace(skip=True))
    assert [path.name for path in saved.parent.iterdir()] == ["trace.npz"]


def test_an_empty_trace(tmp_path: Path) -> None:
    drawn = drawn_trace()
    layers = tuple(
        trace_module.LayerTrace(e.layer, e.n_experts, e.index[:0], e.weights[:0])
        for e in drawn.layers
    )
    empty = Trace(layers, *(getattr(drawn, name)[:0] for name in FIELDS))
    empty.save(tmp_path / "empty.npz")
    assert load_trace(tmp_path / "empty.npz").n_tokens == 0


def test_any_reader_of_npz_can_read_it(saved: Path) -> None:
    with np.load(saved, allow_pickle=False) as arrays:
        meta = json.loads(str(arrays["meta"]))
        assert meta["format"] == "moebound.trace"
        assert meta["layers"] == [1, 2, 5]
        for layer in meta["layers"]:
            assert arrays[f"index_{layer}"].dtype == np.int16
            assert arrays[f"weights_{layer}"].dtype == np.float16


def test_joined_traces_are_numbered_on() -> None:
    first, second = drawn_trace(seed=0), drawn_trace(seed=1)
    both = join([first, second])
    assert both.n_tokens == 80
    assert both.n_sequences == first.n_sequences + second.n_sequences
    assert (np.diff(both.step) >= 0).all()
    np.testing.assert_array_equal(both.layer(2).index[40:], second.layer(2).index)
    np.testing.assert_array_equal(both.sequence[:40], first.sequence)
    assert both.sequence[40:].min() == first.sequence.max() + 1 + second.sequence.min()


def test_what_cannot_be_joined() -> None:
    with pytest.raises(MoeboundError, match="no traces"):
        join([])
    with pytest.raises(MoeboundError, match="different models"):
        join([drawn_trace(), drawn_trace(n_experts=4)])


def test_a_layer_that_is_not_there() -> None:
    with pytest.raises(MoeboundError, match=r"layer 3: not in this trace, which has \[1, 2, 5\]"):
        drawn_trace().layer(3)


def rewritten(path: Path, **changes: Any) -> Path:
    with np.load(path, allow_pickle=False) as arrays:
        kept = {name: arrays[name] for name in arrays.files}
    kept.update(changes)
    np.savez(path, **{name: value for name, value in kept.items() if value is not None})
    return path


def meta(**changes: Any) -> Any:
    document = {"format": "moebound.trace", "version": 1, "model": "m", "task": "t",
                "layers": [1, 2, 5], "n_experts": [8, 8, 8]}  # fmt: skip
    return np.array(json.dumps({**document, **changes}))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"meta": None}, FormatError),
        ({"meta": np.array("[]")}, FormatError),
        ({"meta": np.array("{")}, CorruptionError),
        ({"meta": meta(format="other")}, FormatError),
        ({"meta": meta(version=2)}, FormatError),
        ({"meta": meta(layers=[1, 2, 6])}, CorruptionError),
        ({"meta": meta(layers=[1, 2])}, CorruptionError),
        ({"meta": meta(n_experts=[8, 8, 3])}, CorruptionError),
        ({"meta": meta(n_experts=[8, 8, "8"])}, CorruptionError),
        ({"step": None}, CorruptionError),
        ({"step": np.zeros(39, np.int32)}, CorruptionError),
        ({"step": np.zeros(40, np.float32)}, CorruptionError),
        ({"index_2": np.zeros((40, 3), np.int16)}, CorruptionError),
        ({"index_2": np.full((40, 2), -2, np.int16)}, CorruptionError),
        ({"index_2": np.full((40, 2), 8, np.int16)}, CorruptionError),
        ({"index_2": np.zeros((40, 2), np.int64)}, CorruptionError),
        ({"index_2": None}, CorruptionError),
    ],
)
def test_damaged(saved: Path, changes: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=r"trace\.npz"):
        load_trace(rewritten(saved, **changes))


def test_pickles_are_not_opened(saved: Path) -> None:
    with pytest.raises(CorruptionError, match="allow_pickle"):
        load_trace(rewritten(saved, token=np.array([print] * 40, dtype=object)))


def test_torn_and_foreign_files(saved: Path, tmp_path: Path) -> None:
    whole = saved.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:size])
        with pytest.raises(FormatError, match=r"trace\.npz"):
            load_trace(saved)
    damaged = bytearray(whole)
    for place in range(60, len(whole), len(whole) // 40):
        damaged[place] ^= 0xFF
    saved.write_bytes(damaged)
    with pytest.raises(FormatError, match=r"trace\.npz"):
        load_trace(saved)
    with pytest.raises(MoeboundError, match="No such file"):
        load_trace(tmp_path / "nowhere.npz")


def test_what_would_unpack_too_large_is_refused(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_module, "MAX_FILE_BYTES", 1000)
    with pytest.raises(FormatError, match="unpacks to"):
        load_trace(saved)


def test_a_disk_that_refuses(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nowhere"):
        drawn_trace().save(tmp_path / "nowhere" / "trace.npz")
