"""Decide before the first byte: which experts are compressed, which of them a method sees together,
and which shard holds what.

Shards are cut by the size of the *source*, since compressed sizes are not known yet. So their
number and contents are the same for every codec, thread count and interruption.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from moebound.checkpoint import Checkpoint, Expert, TensorInfo, read_into
from moebound.errors import StoreError
from moebound.methods import BOUNDED, Method, get_method, router_name, shared_name
from moebound.store.format import EXPERTS_ONLY, OWN_PREFIX, SLICE_MARK, VERSION, Others
from moebound.store.others import coder_versions, may_be_coded
from moebound.store.recipe import Recipe
from moebound.types import ExpertKey

SHARD_BYTES = 2_000_000_000
EXACT = "bounded:raw"
"""What experts get that were not chosen."""
_SAMPLE_BYTES = 64

Part = TypeVar("Part")


@dataclass(frozen=True)
class ExpertTask:
    """One expert to be written. exact: keep it bit for bit."""

    expert: Expert
    exact: bool


@dataclass(frozen=True, eq=False)
class Group:
    """Experts that one method sees together. number: among all groups; it names shared parts."""

    number: int
    method: Method
    tasks: tuple[ExpertTask, ...]

    @property
    def n_bytes(self) -> int:
        """Of the source."""
        return sum(task.expert.n_bytes for task in self.tasks)

    @property
    def own_names(self) -> list[str]:
        """Tensors of the store that belong to no single expert: shared parts, a router edit."""
        roles = tuple(matrix.role for matrix in self.tasks[0].expert.matrices)
        n_parts = self.method.n_parts(roles, len(self.tasks))
        names = [shared_name(self.number, i) for i in range(n_parts)]
        return names + ([router_name(self.number)] if self.method.edits_router else [])


@dataclass(frozen=True)
class TensorShard:
    """A shard of tensors that are kept as they are."""

    name: str
    tensors: tuple[TensorInfo, ...]


@dataclass(frozen=True)
class CodedShard:
    """A shard of tensors that are no expert's, and are coded."""

    name: str
    tensors: tuple[TensorInfo, ...]


@dataclass(frozen=True)
class ExpertShard:
    """A shard of groups of experts, compressed or exact."""

    name: str
    groups: tuple[Group, ...]

    @property
    def n_experts(self) -> int:
        return sum(len(group.tasks) for group in self.groups)

    @property
    def version(self) -> int:
        """The version that reading it takes: 1 where all is envelopes."""
        return 1 if all(g.method.id == BOUNDED and not g.own_names for g in self.groups) else 2


@dataclass(frozen=True)
class StoreLayout:
    """All shards of a store, in order; names are final."""

    tensor_shards: tuple[TensorShard, ...]
    coded_shards: tuple[CodedShard, ...]
    expert_shards: tuple[ExpertShard, ...]

    @property
    def names(self) -> list[str]:
        """File names of all shards, in order."""
        names = [shard.name for shard in self.tensor_shards]
        names += [shard.name for shard in self.coded_shards]
        return names + [shard.name for shard in self.expert_shards]

    @property
    def version(self) -> int:
        """The version of the store."""
        return VERSION if self.coded_shards else EXPERTS_ONLY


def select(
    checkpoint: Checkpoint,
    *,
    layers: set[int] | None,
    experts: set[int] | None,
    shared_experts: bool,
) -> list[ExpertTask]:
    """The experts to write, in the order of the model.

    `experts` chooses among routed experts only. An expert that was not chosen, but is a slice of a
    tensor of which others were, is among them as `exact`: a 3-D tensor is taken apart as a whole
    or not at all, so that each expert still is one read.

    Raises StoreError for a layer or expert number that is not in the checkpoint.
    """
    every = checkpoint.experts(shared=shared_experts)
    _check_numbers("--layers", layers, {e.key.layer for e in every})
    _check_numbers("--experts", experts, {e.key.expert for e in every if not e.key.shared})

    def chosen(key: ExpertKey) -> bool:
        return (layers is None or key.layer in layers) and (
            key.shared or experts is None or key.expert in experts
        )

    picked = {expert.key for expert in every if chosen(expert.key)}
    if not picked:
        raise StoreError(
            f"{checkpoint.path}: no expert is in layers {sorted(layers or ())} and has a number "
            f"among {sorted(experts or ())}"
        )
    taken_apart = {m.name for e in every if e.key in picked for m in e.matrices}
    return [
        ExpertTask(expert, exact=expert.key not in picked)
        for expert in every
        if any(matrix.name in taken_apart for matrix in expert.matrices)
    ]


def _check_numbers(option: str, asked: set[int] | None, present: set[int]) -> None:
    if asked is None:
        return
    missing = sorted(asked - present)
    if missing or not asked:
        raise StoreError(
            f"{option}: {', '.join(map(str, missing)) or 'nothing'} asked; experts are in "
            f"{', '.join(map(str, sorted(present)))}"
        )


def group(tasks: list[ExpertTask], recipe: Recipe) -> list[Group]:
    """Which experts are seen together. Groups stand in the order of their first experts."""
    exact = get_method(EXACT)
    found: dict[tuple[object, ...], tuple[Method, list[ExpertTask]]] = {}
    for task in tasks:
        key = task.expert.key
        if task.exact:
            found["exact", *key] = (exact, [task])
        else:
            _, members = found.setdefault(recipe.group_of(key), (recipe.method_of(key), []))
            members.append(task)
    return [
        Group(number, method, tuple(members))
        for number, (method, members) in enumerate(found.values())
    ]


def lay_out(
    checkpoint: Checkpoint, groups: list[Group], *, shard_bytes: int, others: Others = "keep"
) -> StoreLayout:
    """Cut everything into shards of at most shard_bytes of source (or one tensor or group each)."""
    taken = {m.name for group in groups for task in group.tasks for m in task.expert.matrices}
    for name in checkpoint.tensors:
        if SLICE_MARK in name or name.startswith(OWN_PREFIX):
            raise StoreError(
                f"{checkpoint.path}: tensor {name!r}: names with {SLICE_MARK!r}, and those that "
                f"begin with {OWN_PREFIX!r}, are taken"
            )
    left = [tensor for name, tensor in checkpoint.tensors.items() if name not in taken]
    coded = (
        set()
        if others == "keep"
        else {tensor.name for tensor in left if may_be_coded(tensor, checkpoint.family)}
    )

    def cut(tensors: Iterable[TensorInfo]) -> list[tuple[TensorInfo, ...]]:
        return list(_cut(tensors, lambda tensor: tensor.n_bytes, shard_bytes))

    tensor_parts = cut(tensor for tensor in left if tensor.name not in coded)
    coded_parts = cut(tensor for tensor in left if tensor.name in coded)
    expert_parts = list(_cut(groups, lambda group: group.n_bytes, shard_bytes))
    count = len(tensor_parts) + len(coded_parts) + len(expert_parts)
    names = (f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1))
    return StoreLayout(
        tuple(TensorShard(next(names), part) for part in tensor_parts),
        tuple(CodedShard(next(names), part) for part in coded_parts),
        tuple(ExpertShard(next(names), part) for part in expert_parts),
    )


def _cut(
    items: Iterable[Part], size: Callable[[Part], int], limit: int
) -> Iterable[tuple[Part, ...]]:
    part, filled = list[Part](), 0
    for item in items:
        if part and filled + size(item) > limit:
            yield tuple(part)
            part, filled = [], 0
        part.append(item)
        filled += size(item)
    if part:
        yield tuple(part)


def describe_run(
    checkpoint: Checkpoint,
    tasks: list[ExpertTask],
    *,
    recipe: Recipe,
    shard_bytes: int,
    others: Others = "keep",
) -> dict[str, Any]:
    """Everything that decides the bytes of a store, as JSON; equal runs write equal stores.

    The source stands in it as a hash of its config, of every tensor's name, dtype and shape, and
    of 64 bytes from the middle of each matrix: another fine-tune of the same model is another
    source, a moved or copied one is the same. Not every byte is read.
    """
    selection = [[*task.expert.key, task.exact] for task in tasks]
    return {
        "version": EXPERTS_ONLY if others == "keep" else VERSION,
        "source": _fingerprint(checkpoint),
        **recipe.describe(),
        "experts": hashlib.sha256(json.dumps(selection).encode()).hexdigest(),
        "shard_bytes": shard_bytes,
        **({} if others == "keep" else {"others": others, "codecs": coder_versions()}),
    }


def run_id(run: dict[str, Any]) -> str:
    """A short name for a run."""
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:32]


def _fingerprint(checkpoint: Checkpoint) -> str:
    digest = hashlib.sha256(json.dumps(dict(checkpoint.config), sort_keys=True).encode())
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tensor.shape} {tensor.file.name} ".encode())
        slices = tensor.shape[0] if len(tensor.shape) == 3 else 1
        for part in range(slices):
            middle = (2 * part + 1) * tensor.n_bytes // (2 * slices)
            sample = bytearray(min(_SAMPLE_BYTES, tensor.n_bytes - middle))
            if sample:
                read_into(tensor, memoryview(sample), start=middle)
            digest.update(sample)
    return digest.hexdigest()
