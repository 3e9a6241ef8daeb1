"""What a command says, and where.

stdout carries the result and nothing else: tables for people, or with --json exactly one JSON
document. Notes, warnings and progress go to stderr. While a command runs under --json, anything
that a library prints is sent to stderr too, so that the document stands alone.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, TypeVar

import click
from rich.console import Console, RenderableType

F = TypeVar("F", bound=Callable[..., int])

# In a pipe, a file or a narrow window a table keeps its columns: figures cut short say nothing.
LEAST_WIDTH, WIDEST = 100, 240


@dataclass(frozen=True)
class Output:
    """The two ways of saying something: `result` once, `note` as often as useful."""

    as_json: bool
    quiet: bool
    stdout: IO[str]

    @property
    def shows_progress(self) -> bool:
        return not (self.as_json or self.quiet) and sys.stderr.isatty()

    def result(self, document: dict[str, Any], *human: RenderableType) -> None:
        """The command's result: the document under --json, else what is for people."""
        if self.as_json:
            write_json(document, self.stdout)
            return
        console = Console(file=self.stdout, highlight=False)
        terminal = console.width if self.stdout.isatty() else 0
        console.width = WIDEST
        needed = max((console.measure(part).maximum for part in human), default=0)
        console.width = max(terminal, LEAST_WIDTH, needed)
        for renderable in human:
            console.print(renderable)

    def note(self, text: str) -> None:
        """A line on stderr; nothing under -q."""
        if not self.quiet:
            click.echo(text, err=True)


def output_options(command: F) -> Callable[..., int]:
    """Adds --json and -q, and passes an `Output` as the first argument."""

    @click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
    @click.option("-q", "--quiet", is_flag=True, help="No progress and no notes.")
    @click.pass_context
    @functools.wraps(command)
    def wrapped(
        context: click.Context, /, *args: Any, as_json: bool, quiet: bool, **options: Any
    ) -> int:
        output = Output(as_json, quiet, sys.stdout)
        if as_json:
            context.with_resource(contextlib.redirect_stdout(sys.stderr))
        return command(output, *args, **options)

    return wrapped


def write_json(document: dict[str, Any], stdout: IO[str]) -> None:
    json.dump(finite(document), stdout, indent=2, allow_nan=False)
    stdout.write("\n")
    stdout.flush()


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null says that there is no number."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
