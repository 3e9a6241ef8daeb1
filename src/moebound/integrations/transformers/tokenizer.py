"""The tokenizer of a checkpoint, and the one place where the errors of its library are named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moebound.errors import CheckpointError, MoeboundError

_NOT_ERRORS = (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError)


def load_tokenizer(path: Any, *, name: str, local: bool = True) -> Any:
    """As transformers loads it, without code of the checkpoint's. name: of the checkpoint, for
    messages. local: nothing is fetched. Raises CheckpointError for one that cannot be loaded."""
    from transformers import AutoTokenizer

    with named(f"{name}: its tokenizer cannot be loaded"):
        return AutoTokenizer.from_pretrained(path, local_files_only=local, trust_remote_code=False)


@contextmanager
def named(what: str) -> Iterator[None]:
    """Whatever is raised inside, as CheckpointError. `tokenizers` raises bare Exception for a file
    of another version and for a text that it has no token for, and it panics on some files: a
    panic is a BaseException."""
    try:
        yield
    except (MoeboundError, *_NOT_ERRORS):
        raise
    except BaseException as error:
        raise CheckpointError(f"{what}: {type(error).__name__}: {error}") from error
