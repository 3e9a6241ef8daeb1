"""Everything moebound raises on purpose.

MoeboundError
├── BoundError           the bound asked is no bound, or cannot be met in the dtype asked
│   └── BoundViolatedError   a codec claimed to keep a bound, and measuring says it did not
├── FormatError          these bytes are not in a format (or version) that is known here
│   └── CorruptionError  they are in a known format, and are damaged
├── CheckpointError      a source checkpoint is missing, unreadable or inconsistent
│   └── UnsupportedArchitectureError   its architecture is not in the table of families
├── PlanError            a plan cannot be made, read, or carried out on this checkpoint
├── TaskError            a task that is not known, or whose problems cannot be read
├── StoreError           a store cannot be written, resumed or read as asked
├── CacheError           a budget that experts do not fit into, or an expert that was not loaded
├── CodecError           no such codec, or it cannot take this array
├── MethodError          no such method, or it cannot make these experts smaller
│   └── SizeError        it cannot make them as small, or as large, as was asked
└── BackendUnavailable   an optional dependency is not installed; the message has the command

A message names the file, tensor or option, what was expected and what was found. The command
line maps `CorruptionError` and broken bounds to exit code 1, everything else to 2.
"""

from __future__ import annotations


class MoeboundError(Exception):
    """Base of every error that moebound raises on purpose."""


class BoundError(MoeboundError, ValueError):
    """The bound is not a positive finite number, or the dtype asked cannot meet it."""


class BoundViolatedError(BoundError):
    """Decoded values are farther from the original than a codec promised. Nothing was written."""


class FormatError(MoeboundError, ValueError):
    """Bytes that are not in a known format or version."""


class CorruptionError(FormatError):
    """Bytes of a known format that contradict themselves or their checksum."""


class CheckpointError(MoeboundError):
    """A source checkpoint that is missing, unreadable or inconsistent."""


class UnsupportedArchitectureError(CheckpointError):
    """The checkpoint's architecture is dense or not in the table of families."""


class PlanError(MoeboundError):
    """A plan that cannot be made as asked, or does not fit the checkpoint."""


class TaskError(MoeboundError):
    """A task that is not known, or a file of problems that cannot be read as such."""


class StoreError(MoeboundError):
    """A store that cannot be written, resumed or read as asked."""


class CacheError(MoeboundError):
    """A budget that the experts needed at a time do not fit into, or one that never arrived."""


class CodecError(MoeboundError, ValueError):
    """An unknown codec, or an array that the codec cannot take."""


class MethodError(MoeboundError, ValueError):
    """An unknown method or option, or a method that failed; the message names it."""


class SizeError(MethodError):
    """A size that a method cannot come to. nearest: the nearest that it can, in bits a weight;
    None where that is not known."""

    def __init__(self, message: str, nearest: float | None = None) -> None:
        super().__init__(message)
        self.nearest = nearest


class BackendUnavailable(MoeboundError, ImportError):
    """An optional dependency is missing. The message has the command that installs it."""
