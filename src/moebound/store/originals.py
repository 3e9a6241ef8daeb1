"""The original of a store: what the store lacks of it, or has otherwise; whose matrix is which."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from moebound.checkpoint import INDEX_FILE, Checkpoint, ExpertMatrix
from moebound.codec.certificate import sha256
from moebound.errors import MoeboundError
from moebound.store.beside import choose_files, is_document, read_pieces
from moebound.store.checks import differs
from moebound.store.format import CONFIG_FILE, PLAN_FILE, MatrixRecord
from moebound.store.reader import Store, StoredExpert, StoredMatrix
from moebound.store.summary import Problem, ProblemKind
from moebound.types import ExpertKey

_SAMPLE = 8
"""Experts that tell whether the original given is another model."""
_EXAMPLES = 5


class Originals:
    """The original checkpoint, by the names that a store knows. May be none."""

    def __init__(self, checkpoint: Checkpoint | None) -> None:
        self.checkpoint = checkpoint
        self.matrices: dict[tuple[str, int | None], ExpertMatrix] = {}
        self.keys: dict[tuple[str, int | None], ExpertKey] = {}
        if checkpoint is not None:
            for expert in checkpoint.experts(shared=True):
                for matrix in expert.matrices:
                    self.matrices[matrix.name, matrix.index] = matrix
                    self.keys[matrix.name, matrix.index] = expert.key

    def place(self, record: MatrixRecord) -> tuple[str, str, str, str]:
        """Whose matrix this is in the original, its role, dtype and shard."""
        matrix = self.matrices[record.name, record.index]
        key = str(self.keys[record.name, record.index])
        return key, matrix.role, matrix.dtype, matrix.source.file.name

    def another_model(self, experts: list[StoredExpert]) -> Problem | None:
        """The cause of all problems, where no expert is that of the original. Some are looked at,
        spread over the model."""
        if self.checkpoint is None:
            return None
        found: tuple[StoredMatrix, str] | None = None
        sample = experts[:: max(1, len(experts) // _SAMPLE)]
        for expert in sample:
            matrix = expert.matrices[0]
            record = matrix.record
            source = self.matrices.get((record.name, record.index))
            if source is None:
                found = matrix, "the original has no such expert"
                continue
            if source.shape != record.certificate.shape:
                found = matrix, f"its shape is {source.shape} there"
                continue
            try:
                digest = sha256(self.checkpoint.read(source).reshape(-1).view("u1"))
            except MoeboundError:
                return None
            if digest == record.certificate.sha256_original:
                return None
            found = matrix, differs(record.certificate.sha256_original, digest)
        if found is None:
            return None
        message = (
            f"this store was not made from {self.checkpoint.path}: of {len(sample)} experts looked "
            f"at, none is the one that was compressed ({found[1]}); give the one it was made from"
        )
        return Problem("original", found[0].tensor.name, message)

    def extra_problems(self, store: Store) -> Iterator[Problem]:
        """Tensors and other files of the original that the store lacks, or has others for; and
        where the config is another."""
        if self.checkpoint is None:
            return
        if self.checkpoint.family is not None:
            yield from _other_config(store.config, self.checkpoint.config)
        for name in self.checkpoint.tensors:
            if name not in store.tensors:
                yield Problem("original", name, "is in the original and not in the store")
        expected, left_out = choose_files(self.checkpoint, [shard.name for shard in store.shards])
        if store.settings.left_out and left_out != dict(store.settings.left_out):
            message = f"left_out: expected {left_out}, found {dict(store.settings.left_out)}"
            yield Problem("original", CONFIG_FILE, message)
        ours = {CONFIG_FILE, INDEX_FILE, PLAN_FILE, *expected}
        for record in store.files:
            if record.name not in ours:
                yield Problem("original", record.name, "is in the store and not in the original")
        stored = {file.name: file.sha256 for file in store.files}
        for name, file in expected.items():
            if is_document(name):
                continue  # people edit them
            digest = hashlib.sha256()
            try:
                for piece in read_pieces(file):
                    digest.update(piece)
            except OSError as error:
                message = f"original: cannot be read: {error.strerror or error}"
                yield Problem("original", name, message)
                continue
            if name not in stored:
                yield Problem("original", name, "is in the original and not in the store")
            elif stored[name] != digest.hexdigest():
                message = f"original: {differs(stored[name], digest.hexdigest())}"
                yield Problem("original", name, message)


def first_of_each_kind(problems: list[Problem]) -> Iterator[Problem]:
    """A few examples, where all have one cause."""
    counts: dict[ProblemKind, int] = {}
    for problem in problems:
        counts[problem.kind] = counts.get(problem.kind, 0) + 1
        if counts[problem.kind] <= _EXAMPLES:
            yield problem


def _other_config(stored: Mapping[str, Any], original: Mapping[str, Any]) -> Iterator[Problem]:
    """Where the model's config is not the original's, beside what says that this is a store."""
    for name in sorted((stored.keys() | original.keys()) - {"quantization_config"}):
        ours, theirs = (
            json.dumps(config[name], sort_keys=True) if name in config else "nothing"
            for config in (stored, original)
        )
        if ours != theirs:
            message = f"{name}: original has {theirs:.100}, store has {ours:.100}"
            yield Problem("original", CONFIG_FILE, message)
