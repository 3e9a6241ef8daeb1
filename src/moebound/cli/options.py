"""Option types that several commands share: bounds, index lists, counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from moebound.cli.wording import EXACT
from moebound.errors import MoeboundError
from moebound.types import BoundMode, BoundScope, ErrorBound

MAX_INDEX = 100_000
"""No model has as many layers or experts; keeps a typing error from building a huge set."""


class BoundValue(click.ParamType):  # type: ignore[type-arg]  # generic since Click 8.5 only
    """A finite number above 0."""

    name = "number"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            self.fail(f"{value!r} is not a number", param, ctx)
        if not (math.isfinite(number) and number > 0):
            self.fail(f"{value} is no bound: expected a finite number above 0", param, ctx)
        return number


class IndexSet(click.ParamType):  # type: ignore[type-arg]  # generic since Click 8.5 only
    """Indices and ranges, both ends included: "0-3,7" -> {0, 1, 2, 3, 7}."""

    name = "list"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> set[int]:
        if isinstance(value, set):
            return value
        indices: set[int] = set()
        for part in str(value).split(","):
            first, dash, last = part.strip().partition("-")
            last = last if dash else first
            if not (first.isdecimal() and last.isdecimal()):
                self.fail(f"{part!r} in {value!r} is neither an index nor a range", param, ctx)
            if int(last) < int(first) or int(last) > MAX_INDEX:
                self.fail(f"{part!r} in {value!r} is an empty or too large range", param, ctx)
            indices.update(range(int(first), int(last) + 1))
        return indices


class Numbers(click.ParamType):  # type: ignore[type-arg]  # generic since Click 8.5 only
    """Bounds, separated by commas: "0.05,0.3"."""

    name = "list"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[float]:
        if isinstance(value, (list, tuple)):
            return [float(number) for number in value]
        return [BoundValue().convert(part, param, ctx) for part in str(value).split(",")]


class Counts(click.ParamType):  # type: ignore[type-arg]  # generic since Click 8.5 only
    """Whole numbers above 0, separated by commas: "1,6,64"."""

    name = "list"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[int]:
        if isinstance(value, (list, tuple)):
            return [int(number) for number in value]
        parts = [part.strip() for part in str(value).split(",")]
        for part in parts:
            if not part.isdecimal() or int(part) < 1:
                self.fail(f"{part!r} in {value!r} is no whole number above 0", param, ctx)
        return [int(part) for part in parts]


class OthersValue(BoundValue):
    """keep, lossless, or a rate."""

    name = "keep|lossless|rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value in ("keep", "lossless") else super().convert(value, param, ctx)


class CodecId(click.ParamType):  # type: ignore[type-arg]  # generic since Click 8.5 only
    """A codec's id, with options behind a colon: "bound", "sz3:interp"."""

    name = "id"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from moebound.codec import get_codec

        try:
            get_codec(value).check_installed()
        except MoeboundError as error:
            self.fail(str(error), param, ctx)
        return str(value)


class MethodSetting(click.ParamType):  # type: ignore[type-arg]  # generic since Click 8.5 only
    """A method's id, with options behind a colon: "rtn:int4:g64"; a codec's id is one, too."""

    name = "id"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from moebound.methods import get_method

        try:
            chosen = get_method(value)
            chosen.check_installed()
            return chosen.setting
        except MoeboundError as error:
            self.fail(str(error), param, ctx)


class PlannedMethod(MethodSetting):
    """A method's setting, or that of one with integers without their bits: "rtn:g128"."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from moebound.plan import Family

        try:
            Family.of(str(value))
        except MoeboundError:
            return super().convert(value, param, ctx)
        return str(value)


class CodecIds(CodecId):
    """Several of them, separated by commas."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        parts = value if isinstance(value, (list, tuple)) else str(value).split(",")
        return [super(CodecIds, self).convert(part.strip(), param, ctx) for part in parts]


def chosen_bound(
    values: dict[BoundMode, float | None], scope: BoundScope | None, *, method: str
) -> ErrorBound | None:
    """The one bound that was asked for; None for a method that knows none.

    A codec that is exact needs none; its bound is then the smallest there is.
    Raises click.UsageError if there is none or more than one, or if scope or the method do not go
    with it.
    """
    from moebound.methods import get_method

    given = {mode: value for mode, value in values.items() if value is not None}
    names = ", ".join(f"--{mode}" for mode in values)
    if len(given) > 1:
        found = " and ".join(f"--{mode}" for mode in given)
        raise click.UsageError(f"one bound at a time: found {found}, expected one of {names}")
    if scope is not None and "rate" not in given:
        raise click.UsageError("--scope goes with --rate")
    chosen = get_method(method)
    if given and not chosen.bounded:
        raise click.UsageError(
            f"--method {method} knows no bound, so it goes without --{next(iter(given))}; to keep "
            "one, take a codec's id as the method"
        )
    if not given:
        if not chosen.bounded:
            return None
        if not chosen.needs_bound:
            return EXACT
        raise click.UsageError(
            f"which bound? Expected one of {names}. --rate 0.3, for example, lets no weight move "
            "by more than 0.3 times the mean absolute weight of its expert; smaller is closer to "
            "the original, and larger to store"
        )
    [(mode, value)] = given.items()
    if mode == "rate":
        return ErrorBound(value, "rate", scope or "expert")
    return ErrorBound(value, mode)


F = TypeVar("F", bound=Callable[..., Any])


def reads_a_text(least_window: int) -> Callable[[F], F]:
    """Adds --task and --text, with how much of them to read: see `check_text`."""
    options = (
        click.option("--task", metavar="TASK",
                     help="Read its problems with their solutions: wordmath, wordmath-hard, gsm8k, "
                     "math, or a file of problems."),
        click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path),
                     metavar="FILE", help="Read this file, UTF-8, window by window; or a text.json "
                     "of `calibrate --self-sample`."),
        click.option("--limit", type=click.IntRange(min=1), metavar="N",
                     help="N problems of the task, or N windows of the file."),
        click.option("--window", type=click.IntRange(min=least_window), metavar="TOKENS",
                     help="Tokens of a window of --text.  [default: 512]"),
    )  # fmt: skip

    def add(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def check_text(
    task: str | None,
    text: Path | None,
    *,
    skip: int | None,
    window: int | None,
    sampled: bool | None = None,
) -> None:
    """Raises UsageError unless one of task and text was given, each with what goes with it.
    sampled: whether --self-sample was; None where there is no such option."""
    if (task is not None) + (text is not None) + bool(sampled) != 1:
        more = "" if sampled is None else ", --self-sample"
        raise click.UsageError(f"give one of --task{more} and --text")
    if task is None and skip is not None:
        raise click.UsageError("--skip goes with --task")
    if text is None and window is not None and not sampled:
        more = "" if sampled is None else " and --self-sample"
        raise click.UsageError(f"--window goes with --text{more}")
