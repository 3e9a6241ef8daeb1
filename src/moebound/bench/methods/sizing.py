"""How each method is brought to a size: which of its parameters is searched, and how.

What is asked for is a setting of a method without what says its size:

    bound, calibrated, sz3, residual:svd:r2:f8    keep a bound: the rate is searched, on a sample
                                                  of experts, then on the whole
    svd, mobe_fixed:f8, rfid_re, milo_fixed, ...  take a size (`bN`): the ranks, or what is kept,
                                                  follow from it
    rtn, rtn:coded, hqq, gptq_re, awq_re,         integers of 2 to 8 bits, groups of any number of
    moequant_re                                   weights: of the pairs that come to the size, the
                                                  one with the least error on a sample
    reap_re, hc_smoe_fixed:kmeans, ...            keep whole experts: so many as the bytes allow,
                                                  in some layers one more than in others
    reap_re+rtn, reap_re+bound, mone_re+...       keep experts coded: so many that each has 3 to 4
                                                  bits a weight, 3.5 if it can be, and what is
                                                  behind the + is searched as it is by itself
    puzzle_moe_re:seed0+rtn                       pairs of experts share weights of 2 (bits - 2)
                                                  bits
    plan:fisher                                   the plan of scheme `fisher` for so many bits, by
                                                  statistics of its own
    plan:FOLDER                                   files of `moebound plan`, of any planner and any
                                                  method: the one whose size is the nearest
    again:reap_re+calibrated, ...                 as without again:, and what is kept is coded by
                                                  statistics gathered again (`again.py`)
    whatever is a whole setting, as svd:r64       is made as it is

A method that cannot come to a size raises SizeError, with the nearest that it can.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from moebound.bench.methods.making import Candidate
from moebound.bench.methods.place import ABOUT, WITHIN, Place, Search, Sizing
from moebound.bench.methods.planned import FISHER, PLAN, ByFisher, OfPlans
from moebound.errors import MethodError, MoeboundError, SizeError
from moebound.methods import get_method, method_class, method_ids

AGAIN = "again:"
"""What a method stands behind whose coder is to have statistics of what it keeps."""
CODED_BITS = (3.0, 3.5, 4.0)
"""Bits a weight of kept experts, where they are coded: the least, what is aimed at, the most."""
_SMALLEST_GROUP, _LARGEST_GROUP = 8, 1 << 16
_EXAMPLES = {"by size": ":b4", "grid": ":int4:g64", "kept": ":keep50%"}


@dataclass(frozen=True, eq=False)
class ByRate(Sizing):
    """Keeps a bound: halving its rate costs a bit a weight."""

    setting: str
    place: Place

    def search(self, bits: float) -> Search:
        rate = self.place.rate(self.setting, bits)
        return lambda asked: Candidate(self.setting, rate * 2 ** (bits - asked))


@dataclass(frozen=True, eq=False)
class BySize(Sizing):
    """Takes a size itself. name, options: what stands before and behind it."""

    name: str
    options: str

    def search(self, bits: float) -> Search:
        return lambda asked: Candidate(f"{self.name}:b{round(asked, 4):.8g}{self.options}")


@dataclass(frozen=True, eq=False)
class ByGrid(Sizing):
    """Integers of so many bits, and groups of so many weights that share a scale."""

    name: str
    options: str
    place: Place

    def setting(self, width: int, group: int) -> str:
        return f"{self.name}:int{width}:g{group}{self.options}"

    def search(self, bits: float) -> Search:
        found: list[tuple[float, int, int, float]] = []
        near: list[float] = []
        for width in range(2, 9):
            lengths = self._lengths(width)
            for group in self._next_to(bits, width, lengths) if lengths else ():
                size, error = self.place.measured(self.setting(width, group))
                near.append(size)
                if abs(size - bits) <= WITHIN * bits:
                    found.append((error, width, group, size))
        if not near:
            self._bits(4, 64)  # which says why
        if not found:
            nearest = min(near, key=lambda size: abs(size - bits))
            raise SizeError(
                f"{bits:g} bits a weight: no integers of 2 to 8 bits in groups come to that; the "
                f"nearest is {nearest:.4g} bits",
                nearest,
            )
        _, width, group, size = min(found)
        a_group = (16 + width) / group
        # What a group's own numbers cost is what its length changes.
        fixed = size - a_group

        def at(asked: float) -> Candidate:
            length = round((16 + width) / max(asked - fixed, 1e-9)) if asked != bits else group
            length = min(max(length, 2), _LARGEST_GROUP)
            return Candidate(self.setting(width, length))

        return at

    def _next_to(self, bits: float, width: int, lengths: list[int]) -> list[int]:
        """The two of these lengths of a group whose sizes are next to these bits, of a width; one
        where all are on one side."""
        low, high = 0, len(lengths) - 1
        if self._bits(width, lengths[low]) < bits:
            return [lengths[low]]
        if self._bits(width, lengths[high]) > bits:
            return [lengths[high]]
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (
                (middle, high) if self._bits(width, lengths[middle]) >= bits else (low, middle)
            )
        return [lengths[low], lengths[high]]

    def _bits(self, width: int, length: int) -> float:
        return self.place.measured(self.setting(width, length))[0]

    def _lengths(self, width: int) -> list[int]:
        """All, or powers of 2 of a method that does not take all; none of a width it has not."""
        try:
            self._bits(width, _SMALLEST_GROUP + 1)
        except MethodError:
            powers = [1 << at for at in range(3, 17)]
            return [length for length in powers if self._takes(width, length)]
        return list(range(_SMALLEST_GROUP, 513)) + [
            round(512 * 2 ** (step / 8)) for step in range(1, 57)
        ]

    def _takes(self, width: int, length: int) -> bool:
        try:
            self._bits(width, length)
        except MethodError:
            return False
        return True


@dataclass(frozen=True, eq=False)
class ByCount(Sizing):
    """Keeps experts of a layer, as they are or coded. name, options: as of `BySize`. coder: how
    what is kept is brought to a size; None where it stays as it is."""

    name: str
    options: str
    coder: Sizing | None
    place: Place

    def search(self, bits: float) -> Search:
        n, counts = self.place.n_experts, self.place.counts()
        if not counts:
            raise SizeError(f"{n} experts in a layer, all of which the router needs")
        if self.coder is None:
            return self._alone(bits, counts)
        least, aim, most = CODED_BITS
        kept = min(counts, key=lambda count: abs(count * aim - bits * n))
        each = bits * n / kept
        if not least * (1 - WITHIN) <= each <= most * (1 + WITHIN):
            size = kept * (least if each < least else most) / n
            raise SizeError(
                f"{bits:g} bits a weight: experts that are kept have {least:g} to {most:g} bits a "
                f"weight here, of {n} a layer; the nearest is keep{kept}, {size:.4g} bits",
                size,
            )
        coded = self.coder.search(each)

        def at(asked: float) -> Candidate:
            found = coded(asked * n / kept)
            own = f"{self.name}:keep{kept}{self.options}+{found.setting}"
            return Candidate(own, found.rate)

        return at

    def _alone(self, bits: float, counts: list[int]) -> Search:
        """One more in some layers than in others, spread evenly, where one number does not do."""
        layers, n, raw = self.place.layers, self.place.n_experts, self.place.raw_bits
        step = counts[1] - counts[0] if len(counts) > 1 else 1
        least, most = counts[0] * len(layers), counts[-1] * len(layers)

        def total(asked: float) -> int:
            """Experts that are kept, of all layers together."""
            wanted = asked * n * len(layers) / raw
            return min(max(least + round((wanted - least) / step) * step, least), most)

        def at(asked: float) -> Candidate:
            # By layer, steps above the fewest: what one has more than those before it.
            steps, here = (total(asked) - least) // step, range(len(layers))
            above = [steps * (i + 1) // len(layers) - steps * i // len(layers) for i in here]
            kept = [counts[0] + step * more for more in above]
            settings = [f"{self.name}:keep{count}{self.options}" for count in kept]
            mixed = tuple(zip(layers, settings, strict=True)) if len(set(kept)) > 1 else ()
            return Candidate(settings[0], layers=mixed)

        size = total(bits) * raw / n / len(layers)
        if abs(size - bits) > ABOUT * bits:
            raise SizeError(
                f"{bits:g} bits a weight: with {raw:g} bits for each weight of an expert that is "
                f"kept, {counts[0]} to {counts[-1]} of {n} a layer, the nearest is {size:.4g} bits",
                size,
            )
        return at


@dataclass(frozen=True, eq=False)
class OfPairs(Sizing):
    """Pairs of experts share their weights, coded. name: what stands before the +."""

    name: str
    coder: Sizing

    def search(self, bits: float) -> Search:
        if bits <= 2:
            raise SizeError(f"{bits:g} bits a weight: signs and masks alone take 2", None)
        try:
            coded = self.coder.search(self._inner(bits))
        except SizeError as error:
            nearest = None if error.nearest is None else error.nearest / 2 + 2
            raise SizeError(f"of what pairs share, {error}", nearest) from None
        return lambda asked: Candidate(f"{self.name}+{coded(self._inner(asked)).setting}")

    @staticmethod
    def _inner(bits: float) -> float:
        return 2 * bits - 4


@dataclass(frozen=True, eq=False)
class AsItIs(Sizing):
    """A whole setting."""

    setting: str
    place: Place

    def search(self, bits: float) -> Search:
        size, _ = self.place.measured(self.setting)
        if abs(size - bits) > ABOUT * bits:
            raise SizeError(
                f"{bits:g} bits a weight: nothing of it is searched, and it takes {size:.4g} bits",
                size,
            )
        return lambda asked: Candidate(self.setting)


@dataclass(frozen=True, eq=False)
class Recalibrated(Sizing):
    """As another, with statistics gathered again before what is kept is coded. The size is searched
    by the first ones, and set right by the store."""

    inner: Sizing

    def search(self, bits: float) -> Search:
        found = self.inner.search(bits)
        return lambda asked: replace(found(asked), again=True)


def sizing_of(asked: str, place: Place) -> Sizing:
    """How a method that was asked for comes to a size.

    Raises MethodError for what is none, BackendUnavailable where its library is missing.
    """
    if asked == FISHER:
        return ByFisher.of(place)
    if asked.startswith(PLAN):
        return OfPlans.of(Path(asked.removeprefix(PLAN)))
    if asked.startswith(AGAIN):
        asked = asked.removeprefix(AGAIN)
        own, _, inner = asked.partition("+")
        ids = [part.partition(":")[0] for part in (own, inner)]
        if not (set(ids) <= set(method_ids()) and method_class(ids[0]).keeps
                and method_class(ids[1]).statistics):  # fmt: skip
            raise MethodError(
                f"method {AGAIN}{asked!r}: expected one that leaves something out, and one behind "
                "a + that codes the rest by inputs, as in again:reap_re+calibrated"
            )
        return Recalibrated(sizing_of(asked, place))
    if not _is_known(asked):
        own, plus, inner = asked.partition("+")
        name, colon, options = own.partition(":")
        options = colon + options
        for kind, example in _EXAMPLES.items():
            whole = f"{name}{example}{options}"
            if not _is_known(whole) or (plus and kind != "kept"):
                continue
            get_method(whole).check_installed()
            if kind == "by size":
                return BySize(name, options)
            if kind == "grid":
                return ByGrid(name, options, place)
            return ByCount(name, options, sizing_of(inner, place) if plus else None, place)
        own += "" if colon else ":"
        example = f"{own}+rtn:int4:g64"
        if plus and _is_known(example) and not get_method(example).edits_router:
            return OfPairs(own, sizing_of(inner, place))
    method = get_method(asked)
    method.check_installed()
    return ByRate(method.setting, place) if method.needs_bound else AsItIs(method.setting, place)


def _is_known(setting: str) -> bool:
    try:
        get_method(setting)
    except MoeboundError:
        return False
    return True
