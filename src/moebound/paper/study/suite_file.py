"""A suite of one's own, as a JSON file:

    {
      "name": "first-layers",
      "problems": 200, "read": 64, "seeds": 2, "sources": ["gaussian-sd", "codec:bound"],
      "conditions": [
        {"selector": "most-used:@0", "rate": [0.3, 0.8]},
        {"selector": "layer:12", "rate": 0.5, "source": "uniform", "answers": false},
        {"selector": "1.0,1.7", "source": "randomise", "label": "two experts", "seeds": 5}
      ]
    }

Only "conditions" and each "selector" are required. A condition is measured for all its sources x
rates x seeds, on each task unless "task" says which: a name, or 0 for the first, 1 for the second.
"answers": false compares predictions only. Selectors are those of `selectors.py`, with decoder
indices or relative depths, `@0` for the first MoE layer to `@1` for the last.

Every error names the file, the condition by its place in the list (from 0), and the field.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from moebound.errors import FormatError, MoeboundError
from moebound.files.documents import load_json
from moebound.files.formats.study import EXTRA
from moebound.paper.study.builtin import builtin
from moebound.paper.study.suite import (
    TABLES,
    Entry,
    ModelFacts,
    Suite,
    all_sources,
    check_selector,
    with_layers,
)
from moebound.sensitivity.noise import parse_source
from moebound.sensitivity.selectors import parse_selector
from moebound.types import BoundScope, ErrorBound

_MOST = 1_000_000
_SUITE_FIELDS = ("name", "problems", "read", "seeds", "sources", "conditions")
_FIELDS = ("selector", "rate", "source", "seeds", "task", "answers", "label", "table", "scope",
           "paper")  # fmt: skip


def get_suite(text: str) -> Suite:
    """What --suite names: paper, quick, or a file.

    Raises MoeboundError for a name that is neither, FormatError for a file with something wrong.
    """
    found = builtin(text)
    if found is not None:
        return found
    path = Path(text)
    if not path.is_file():
        raise MoeboundError(f"suite {text!r}: expected paper, quick or a JSON file; no such file")
    return read_suite(path)


def read_suite(path: Path) -> Suite:
    """Read a file. Raises FormatError, naming file, condition and field."""
    suite = _Fields(load_json(path), f"{path}: ", _SUITE_FIELDS)
    name = suite.get("name", _text, path.stem)
    n_problems, n_read = suite.get("problems", _count, 500), suite.get("read", _count, 64)
    n_seeds = suite.get("seeds", _count, 1)
    sources = suite.get("sources", _sources, all_sources())
    listed = suite.get("conditions", _a_list, None)
    if not listed:
        raise FormatError(f"{path}: conditions: expected a list with at least one")
    entries = [_entry(item, f"{path}: conditions[{n}]: ") for n, item in enumerate(listed)]
    named = {source for entry in entries for source in entry.sources or ()}

    def placed(facts: ModelFacts) -> list[Entry]:
        for entry in entries:
            try:
                check_selector(with_layers(entry.selector, facts), facts)
            except MoeboundError as error:
                raise FormatError(f"{entry.where}selector: {error}") from error
        return [
            entry if entry.sources else Entry(**{**vars(entry), "sources": sources})
            for entry in entries
        ]

    every_source = (*sources, *sorted(named - set(sources)))
    return Suite(name, placed, every_source, n_seeds, n_problems, n_read)


def _entry(item: Any, where: str) -> Entry:
    fields = _Fields(item, where, _FIELDS)
    selector = fields.get("selector", _selector, "")
    if not selector:
        raise FormatError(f"{where}selector: is missing")
    rates = fields.get("rate", _rates, ())
    sources = fields.get("source", _sources, None)
    sized = [s for s in sources or all_sources() if parse_source(s).needs_bound]
    if not rates and (sources is None or sized):
        what = f"source {sized[0]!r} needs one" if sources else "is missing"
        raise FormatError(f"{where}rate: {what}")
    paper = fields.get("paper", _paper, None)
    return Entry(
        table=fields.get("table", _table, EXTRA),
        label=fields.get("label", _text, selector),
        selector=selector,
        rates=rates,
        sources=sources,
        n_seeds=fields.get("seeds", _count, None),
        task=fields.get("task", _task, None),
        answers=fields.get("answers", _yes_or_no, True),
        paper=None if paper is None else dict.fromkeys(rates or (0.0,), paper),
        bound_scope=fields.get("scope", _scope, "expert"),
        where=where,
    )


class _Fields:
    """A JSON object whose fields are known."""

    def __init__(self, item: Any, where: str, known: tuple[str, ...]) -> None:
        if not isinstance(item, Mapping):
            raise FormatError(f"{where}expected an object, found {type(item).__name__}")
        unknown = [name for name in item if name not in known]
        if unknown:
            raise FormatError(f"{where}{unknown[0]}: no such field; there are {', '.join(known)}")
        self._item, self._where = item, where

    def get(self, name: str, read: Callable[[Any], Any], default: Any) -> Any:
        """A field, read; the default where it is not given."""
        if name not in self._item:
            return default
        try:
            return read(self._item[name])
        except (MoeboundError, ValueError) as error:
            raise FormatError(f"{self._where}{name}: {error}") from error


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"expected a text, found {value!r}")
    return value


def _yes_or_no(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, found {value!r}")
    return value


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST:
        raise ValueError(f"expected a whole number from 1, found {value!r}")
    return value


def _a_list(value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"expected a list with at least one, found {str(value)[:60]!r}")
    return value


def _each(value: Any) -> list[Any]:
    return _a_list(value) if isinstance(value, list) else [value]


def _sources(value: Any) -> tuple[str, ...]:
    return tuple(str(parse_source(_text(item))) for item in _each(value))


def _rates(value: Any) -> tuple[float, ...]:
    return tuple(ErrorBound(item, "rate").value for item in _each(value))


def _selector(value: Any) -> str:
    # A depth stands for some layer; which one is known with the model.
    parse_selector(re.sub(r"@\d+(\.\d+)?", "1", _text(value)))
    return str(value)


def _table(value: Any) -> str:
    if value not in TABLES:
        raise ValueError(f"expected one of {', '.join(TABLES)}, found {value!r}")
    return str(value)


def _scope(value: Any) -> str:
    if value not in get_args(BoundScope):
        raise ValueError(f"expected one of {', '.join(get_args(BoundScope))}, found {value!r}")
    return str(value)


def _task(value: Any) -> int | str:
    if value in (0, 1) and not isinstance(value, bool):
        return int(value)
    return _text(value)


def _paper(value: Any) -> tuple[float | None, float | None]:
    fields = _Fields(value, "", ("ica", "pia"))
    return fields.get("ica", _share, None), fields.get("pia", _share, None)


def _share(value: Any) -> float | None:
    if value in (None, "/"):
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"expected a share from 0 to 1, found {value!r}")
    return float(value)
