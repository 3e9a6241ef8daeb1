"""What lies where a file should be: the usual leftovers of a download, in words.

They are said in every error about the file, because "header of 2336927755366622582 bytes" tells
nobody that `git lfs pull` is missing.
"""

from __future__ import annotations

from pathlib import Path

HEAD_BYTES = 512
"""So much of a file's beginning tells."""

LFS_POINTER = b"version https://git-lfs"

_AGAIN = "download it again"
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (LFS_POINTER,
     f"a Git LFS pointer instead of the file; run `git lfs pull` in its folder, or {_AGAIN}"),
    (b"<!doctype html", f"a web page (of an error, or a login) instead of the file; {_AGAIN}"),
    (b"<html", f"a web page (of an error, or a login) instead of the file; {_AGAIN}"),
    (b"<?xml", f"an XML document (a server's error) instead of the file; {_AGAIN}"),
    (b'{"error"', f"a server's error instead of the file; {_AGAIN}"),
    (b"access to model", f"a server's refusal instead of the file; log in, and {_AGAIN}"),
    (b"entry not found", f"a server's error instead of the file; {_AGAIN}"),
    (b"pk\x03\x04", "a zip archive, as PyTorch's .bin files are; save the model as safetensors"),
    (b"gguf", "a GGUF file; only safetensors weights are read"),
)  # fmt: skip
UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".aria2")
"""How names of unfinished downloads end, whatever else is in the folder."""


def leftover(head: bytes) -> str | None:
    """What a file is instead of itself, by its first bytes, and what to do; None if they say
    nothing."""
    if not head:
        return f"an empty file; its download did not finish, {_AGAIN}"
    text = head.lstrip().lower()
    for beginning, what in _BEGINNINGS:
        if text.startswith(beginning):
            return what
    if len(head) == HEAD_BYTES and not any(head):
        return f"a file of zeros; its download did not finish, {_AGAIN}"
    return None


def why_missing(path: Path) -> str:
    """Why there is no such file, as far as its folder tells; begins with a verb."""
    if path.is_symlink() and not path.exists():
        return f"is a link to {path.readlink()}, which is not there; download it again"
    if path.exists():
        return "is no ordinary file"
    unfinished = [path.with_name(path.name + end) for end in (*UNFINISHED, ".download", ".tmp")]
    unfinished += sorted((path.parent / ".cache/huggingface/download").glob("*.incomplete"))
    for found in unfinished:
        if found.is_file():
            part = found.relative_to(path.parent)
            return f"is missing, and {part} is there: a download did not finish, run it again"
    return "is missing"
