"""What experts weigh: from a store or by hand, and the smallest budget that cannot get stuck."""

from __future__ import annotations

from pathlib import Path

import pytest

from moebound.cache import Catalog
from moebound.checkpoint import open_checkpoint
from moebound.errors import CacheError
from moebound.store import compress, open_store
from moebound.types import ErrorBound, ExpertKey
from tiny_models import make_tiny


def test_of_a_store(tmp_path: Path) -> None:
    source = make_tiny("deepseek_v3", tmp_path / "src")
    compress(open_checkpoint(source), tmp_path / "dst", bound=ErrorBound(0.1, "rate", "expert"),
             shared_experts=True)  # fmt: skip
    store = open_store(tmp_path / "dst")
    decoded, encoded = Catalog.of_store(store), Catalog.of_store(store, held="encoded")
    assert decoded.keys == encoded.keys
    assert not any(key.shared for key in decoded.keys)
    assert decoded.load_bytes == encoded.load_bytes == encoded.held_bytes
    for key, held in zip(decoded.keys, decoded.held_bytes, strict=True):
        assert held == sum(array.nbytes for array in store.decode_expert(key).values())
        assert encoded.load_bytes[decoded.number(key)] == store.expert(key).n_bytes
    assert decoded.equal_sizes
    assert not encoded.equal_sizes


def test_numbers_follow_the_model() -> None:
    catalog = Catalog.uniform({5: 2, 1: 3}, 10)
    assert catalog.layers == (1, 5)
    assert catalog.place_of == (0, 0, 0, 1, 1)
    assert catalog.number(ExpertKey(5, 0)) == 3
    assert catalog.total_bytes == 50


def test_the_smallest_budget() -> None:
    keys = Catalog.uniform({0: 3, 1: 3}, 1).keys
    catalog = Catalog(keys, (1, 2, 3, 10, 1, 1), (1,) * 6)
    assert catalog.smallest_budget(floor=0, working=2) == 11  # 10 + 1 at work in layer 1
    assert catalog.smallest_budget(floor=1, working=2) == 15  # 3 + 2 in layer 0, and the 10
    assert catalog.smallest_budget(floor=9, working=9) == 18  # everything
    catalog.check_budget(15, floor=1, working=2)
    with pytest.raises(
        CacheError, match=r"budget 14 bytes: .* smallest budget is 15 bytes \(83\.3"
    ):
        catalog.check_budget(14, floor=1, working=2)
    with pytest.raises(CacheError, match="floor -1"):
        catalog.check_budget(13, floor=-1, working=2)


def test_bad_catalogs() -> None:
    one, two = ExpertKey(0, 0), ExpertKey(0, 1)
    for keys, held, load in [
        ((), (), ()),
        ((one,), (1, 1), (1,)),
        ((two, one), (1, 1), (1, 1)),
        ((one, one), (1, 1), (1, 1)),
        ((one,), (0,), (1,)),
        ((one,), (1,), (0,)),
    ]:
        with pytest.raises(CacheError):
            Catalog(keys, held, load)
