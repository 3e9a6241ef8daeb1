"""Are outputs on the text that experts were rounded by what certificates say? Bounds by input
channel are looked at here, too: they follow from the stored bytes alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from moebound.codec import Certificate, Envelope
from moebound.codec.certificate import Columns, Outputs
from moebound.errors import MoeboundError
from moebound.files.formats.statistics import Side, Statistics, read_statistics
from moebound.methods import Method
from moebound.methods.base import ColumnBounds
from moebound.methods.blob import MatrixBlob
from moebound.methods.geometry import Geometry
from moebound.methods.one_thread import one_thread
from moebound.methods.outputs import columns_kept, outputs_kept, promises, side_of
from moebound.methods.shrinkage import Shrinkage
from moebound.store.format import CONFIG_FILE
from moebound.store.reader import Store, StoredExpert, StoredMatrix
from moebound.store.summary import Problem
from moebound.types import Array

_TOLERANCE = 1e-5
"""Of sums that machines' matrix products add up in another order, with much that cancels out."""
_EXACT = 2.0**-22
"""Of bounds by channel: the first were of products of step and factor that were not rounded."""


class Text:
    """The statistics that a store was made by, where they were given and are those."""

    def __init__(self, store: Store, given: Statistics | Path | str | None) -> None:
        self.statistics: Statistics | None = None
        self.problems: list[Problem] = []
        if given is None:
            return
        try:
            found = read_statistics(Path(given)) if isinstance(given, (str, Path)) else given
        except MoeboundError as error:
            self.problems.append(Problem("calibration", CONFIG_FILE, str(error)))
            return
        certified = store.settings.calibration
        if certified is None:
            message = f"{found.folder}: this store was not made by statistics"
            self.problems.append(Problem("calibration", CONFIG_FILE, message))
            return
        there, here = certified.of.to_json(), found.of.to_json()
        differing = [
            f"{name} is {here.get(name)!r}, certified {there.get(name)!r}"
            for name in here | there if here.get(name) != there.get(name)
        ]  # fmt: skip
        if differing:
            message = (
                f"{found.folder}: not the statistics that this store was made by: "
                f"{'; '.join(differing)}"
            )
            self.problems.append(Problem("calibration", CONFIG_FILE, message))
        else:
            self.statistics = found
            self._shrunk = Shrinkage(found, certified.rule)

    def of(self, expert: StoredExpert) -> Expected | None:
        """Figures of one expert to compare with; None without statistics of it."""
        if self.statistics is None or expert.exact:
            return None
        return Expected(expert, self.statistics, self._shrunk)


class Expected:
    """One expert's moments and geometry, read when they are asked for."""

    def __init__(self, expert: StoredExpert, raw: Statistics, shrunk: Shrinkage) -> None:
        self._key, self._raw, self._shrunk = expert.key, raw, shrunk
        self._geometry: dict[Side, Geometry] = {}
        self._moments: dict[Side, Array] = {}

    def problems(
        self, matrix: StoredMatrix, bounds: ColumnBounds, decoded: Array, original: Array | None
    ) -> Iterator[str]:
        """Where `outputs` of a certificate is not so. Without the original, its error and power are
        not known, and its promise is one of two. Raises as reading the statistics does."""
        certified = matrix.record.certificate.outputs
        if certified is None:
            return
        side, tokens = side_of(matrix.record.role), self._raw.tokens_of(self._key)
        if side not in self._geometry:
            self._moments[side] = self._raw.moments(self._key, side)
            with one_thread():
                self._geometry[side] = Geometry.of(
                    self._shrunk.moments(self._key, side), self._shrunk.rule.least_damping
                )
        moments, geometry = self._moments[side], self._geometry[side]
        if len(moments) != len(bounds.steps):
            yield f"inputs of {len(bounds.steps)} channels, and statistics of {len(moments)}"
            return
        if original is not None:
            found = outputs_kept(original, decoded, bounds, moments, tokens, geometry)
        else:
            rows = decoded.shape[1 if bounds.transposed else 0]
            both = promises(moments, geometry, bounds, rows)
            nearest = min(both, key=lambda value: abs(value - certified.promised))
            found = Outputs(tokens, certified.error, nearest, certified.power)
        for name, value in asdict(found).items():
            says = getattr(certified, name)
            if not math.isclose(says, value, rel_tol=0 if name == "tokens" else _TOLERANCE):
                yield f"outputs on the text: {name} is {value:g}, certified {says:g}"


def column_bounds(method: Method, found: Envelope | MatrixBlob) -> ColumnBounds | None:
    """What these bytes say of bounds by input channel. Raises as decoding them."""
    if method.coder is not None:  # of what it keeps as it was
        return None if method.merges else column_bounds(method.coder, found)
    if isinstance(found, MatrixBlob) and found.method != method.id:
        return None
    return method.column_bounds(found) if method.statistics else None


def column_problems(
    certificate: Certificate,
    bounds: ColumnBounds | None,
    decoded: Array,
    original: Array | None,
) -> Iterator[str]:
    """Where `columns` of a certificate is not what the bytes say; with the original, whether all
    bounds were kept."""
    certified = certificate.columns
    if bounds is None or certified is None:
        if (bounds is None) != (certified is None):
            there = "none" if bounds is None else "some"
            yield f"bounds by channel: {there}, certified {certified}"
        return
    if original is None:
        kept = certified.kept
        if kept * certified.widest < certificate.max_abs_error * (1 - _EXACT):
            yield f"bounds by channel: kept {kept:g} is too little for the largest error"
        found = Columns(*bounds.ends, kept)
    else:
        found = columns_kept(original, decoded, bounds)
    if found.kept > 1:
        yield f"a weight is off by {found.kept:g} times its channel's bound"
    for name, value in asdict(found).items():
        if not math.isclose(getattr(certified, name), value, rel_tol=_EXACT):
            yield f"bounds by channel: {name} is {value:g}, certified {getattr(certified, name):g}"
