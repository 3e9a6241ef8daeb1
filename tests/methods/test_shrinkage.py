"""Moments of few tokens lean on their layer's, those of many hardly; all damped by tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moebound.files.formats.statistics import (
    Chunk,
    Moments,
    Of,
    Part,
    Statistics,
    packed_size,
    read_statistics,
    save_statistics,
)
from moebound.methods.shrinkage import RULE, Rule, Shrinkage
from moebound.types import Array, ExpertKey

from .made import routed

N, TOKENS = 6, (0, 3, 5000)


def made(folder: Path, moments: Moments = "full", layers: int = 3) -> Statistics:
    """Two files a layer; what each token puts in is drawn."""
    folder.mkdir(exist_ok=True)
    of = Of("m", "f", "t", "h", 1, sum(TOKENS), True, moments, N, N)
    parts = []
    for layer in range(layers):
        for first, counts in ((0, TOKENS[:1]), (1, TOKENS[1:])):
            rng = np.random.default_rng([layer, first])
            x = [rng.standard_normal((n, N)) * (1 + layer) for n in counts]
            whole = np.stack([a.T @ a for a in x])
            rows = np.triu_indices(N)
            packed = np.stack([h[rows] if moments == "full" else np.diag(h) for h in whole])
            part = Part.of(layer, first, len(counts))
            parts.append(part)
            Chunk(
                part, np.array(counts, np.int64), np.ones(len(counts)),
                packed.astype(np.float32), packed.astype(np.float32),
                np.zeros((len(counts), 2, N), np.float32), *routed(len(counts), N),
            ).save(folder)  # fmt: skip
    save_statistics(folder, of, parts)
    return read_statistics(folder)


def mean(found: Statistics, layer: int) -> Array:
    total = sum(found.moments(ExpertKey(layer, e), "inputs") for e in range(3))
    return np.asarray(total) / sum(TOKENS)


@pytest.mark.parametrize("layer", [0, 2])
def test_few_tokens_lean_on_the_layer(layer: int, tmp_path: Path) -> None:
    found = made(tmp_path)
    shrunk = Shrinkage(found)
    for expert, tokens in enumerate(TOKENS):
        key = ExpertKey(layer, expert)
        raw = found.moments(key, "inputs")
        share = min(N / (RULE.tokens_a_channel * max(tokens, 1)), RULE.most_damping)
        share -= RULE.least_damping
        wanted = raw + RULE.pseudo_tokens * mean(found, layer)
        wanted = wanted + max(share, 0) * np.diag(wanted).mean() * np.eye(N)
        np.testing.assert_allclose(shrunk.moments(key, "inputs"), wanted, rtol=1e-6)
        # What is added is positive semidefinite: promises for outputs rest on that.
        assert np.linalg.eigvalsh(shrunk.moments(key, "inputs") - raw).min() >= -1e-9
    many = ExpertKey(layer, 2)
    ratio = shrunk.moments(many, "inputs") / found.moments(many, "inputs")
    assert abs(np.diag(ratio) - 1).max() < 0.01


def test_diagonals_alone(tmp_path: Path) -> None:
    whole, diagonal = made(tmp_path / "a"), made(tmp_path / "b", "diagonal")
    for expert in range(3):
        key = ExpertKey(1, expert)
        np.testing.assert_allclose(
            Shrinkage(diagonal).moments(key, "hidden"),
            np.diag(Shrinkage(whole).moments(key, "hidden")), rtol=1e-6,
        )  # fmt: skip


def test_a_layer_is_read_once_and_not_all_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = made(tmp_path, layers=6)
    read: list[ExpertKey] = []
    packed = Statistics.packed

    def counted(self: Statistics, key: ExpertKey, side: str) -> Array:
        read.append(key)
        return packed(self, key, side)  # type: ignore[arg-type]

    monkeypatch.setattr(Statistics, "packed", counted)
    shrunk = Shrinkage(found)
    for key in found.keys:
        shrunk.moments(key, "inputs")
    assert len(read) == 2 * len(found.keys)
    assert len(shrunk._means) == 4  # those of the layers before are gone


def test_what_is_unpacked_is_symmetric(tmp_path: Path) -> None:
    n = 600  # more than a block
    found = Statistics(tmp_path, Of("m", "f", "t", "h", 1, 1, True, "full", n, n), ())
    packed = np.random.default_rng(0).standard_normal(packed_size(n))
    whole = found.whole(packed, "inputs")
    assert (whole == whole.T).all()
    assert (whole[np.triu_indices(n)] == packed).all()


def test_another_rule(tmp_path: Path) -> None:
    found, key = made(tmp_path), ExpertKey(0, 0)
    none = Rule(pseudo_tokens=0, most_damping=0)
    assert (Shrinkage(found, none).moments(key, "inputs") == 0).all()  # it saw no token
    assert Rule.from_json(none.to_json()) == none
