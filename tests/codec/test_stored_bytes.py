"""Bytes that were written once: read for ever, to the bit, and written the same today."""

from __future__ import annotations

import numpy as np
import pytest

from moebound import decode
from moebound.codec import envelope
from moebound.codec.reference import decode as reference_decode
from moebound.codec.reference import decode_lossless

from . import make_fixtures
from .weights import bits

stored = pytest.mark.parametrize("case", make_fixtures.CASES, ids=lambda case: case.name)


@stored
def test_stored_bytes_decode_for_ever(case: make_fixtures.Case) -> None:
    case.skip_without_its_library()
    fixture = case.load()
    decoded = decode(fixture.encoded)
    assert isinstance(decoded, np.ndarray)
    assert decoded.shape == fixture.decoded.shape
    assert decoded.dtype == fixture.decoded.dtype
    np.testing.assert_array_equal(bits(decoded), bits(fixture.decoded))


@pytest.mark.parametrize("case", make_fixtures.own_bytes(), ids=lambda case: case.name)
def test_the_same_bytes_today(case: make_fixtures.Case) -> None:
    fixture = case.load()
    assert case.encode(fixture.original) == fixture.encoded


@stored
def test_stored_arrays_keep_the_bound(case: make_fixtures.Case) -> None:
    fixture = case.load()
    assert not len(make_fixtures.broken(fixture, case.bound))


@pytest.mark.parametrize("case", make_fixtures.own_codecs(), ids=lambda case: case.name)
def test_the_reference_reads_stored_bytes(case: make_fixtures.Case) -> None:
    fixture = case.load()
    parsed = envelope.parse(fixture.encoded)
    spec, payload = parsed.spec, bytes(parsed.payload)
    if parsed.codec == "lossless":
        patterns = decode_lossless(payload, spec.size, dtype=spec.dtype)
    else:
        patterns = reference_decode(
            payload, spec.size, source=spec.source_dtype, output=spec.dtype, bound=spec.abs_bound
        )
    patterns[parsed.misses.astype(np.intp)] = bits(parsed.values)
    np.testing.assert_array_equal(patterns, bits(fixture.decoded))


def test_no_stored_bytes_without_a_case() -> None:
    assert {*make_fixtures.FOLDER.rglob("*.npz")} == {case.path for case in make_fixtures.CASES}
