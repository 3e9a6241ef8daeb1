"""Exit codes: a script can tell a broken promise from a typing error.

    0    good
    1    a negative verdict: a bound is violated, bytes are corrupt
    2    usage, configuration, or a failure of this program
    130  interrupted from the keyboard (the shell's own convention, 128 + SIGINT)
    141  whoever read our output went away (128 + SIGPIPE)

Click and Python both use 1 for ordinary failures, so everything is mapped here, in one place.
"""

from __future__ import annotations

import os
import traceback

import click

from moebound.errors import BoundViolatedError, CorruptionError, MoeboundError

OK = 0
NEGATIVE = 1
FAILURE = 2
INTERRUPTED = 130
BROKEN_PIPE = 141

TRACEBACK_VARIABLE = "MOEBOUND_TRACEBACK"


def wants_traceback() -> bool:
    return os.environ.get(TRACEBACK_VARIABLE, "") not in ("", "0")


def code_for(error: BaseException) -> int:
    """The exit code for an error that ended a command."""
    if isinstance(error, (BoundViolatedError, CorruptionError)):
        return NEGATIVE
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE
    return FAILURE


def message_for(error: BaseException) -> str:
    """What to tell the user: errors made on purpose speak for themselves, others are named."""
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return "interrupted"
    if isinstance(error, MoeboundError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        # str(OSError) opens with an errno number, which helps nobody.
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return f"{' -> '.join(names)}: {error.strerror}" if names else error.strerror
    if isinstance(error, MemoryError):
        return "out of memory; fewer --jobs need less of it"
    return (
        f"internal error: {type(error).__name__}: {error}. "
        f"{TRACEBACK_VARIABLE}=1 shows where; please report it"
    )


def hint_for(error: BaseException) -> str | None:
    """Where to look next, for usage errors."""
    if isinstance(error, click.UsageError) and error.ctx is not None:
        return f"Try '{error.ctx.command_path} --help'."
    return None


def print_traceback(error: BaseException) -> None:
    traceback.print_exception(error)
