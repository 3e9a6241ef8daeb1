"""`AutoModelForCausalLM.from_pretrained(store)`: an ordinary model with the decoded experts.

In transformers a checkpoint's tensors are first renamed, then collected by `WeightConverter`s,
whose operations stack and join the experts of a layer into one parameter. A store adds three
things to that, and leaves the rest to transformers, so every family that it knows works:

1. a renaming that takes the end off `...gate_up_proj.moebound.3`, so that all slices of a 3-D
   tensor are collected in one place, in order;
2. `Decode` as the first operation of every converter that collects compressed tensors;
3. converters that only decode, for compressed tensors that the family collects by none.

A method's shared parts are opened when the first matrix needs them. Router edits are applied to the
model at the end (`router_edits.py`).

After loading, the converters are swapped for the family's own and the quantization config is
dropped: the model is like one loaded from the decompressed checkpoint, and saves as one.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from moebound.checkpoint import TensorInfo
from moebound.codec import thread_count
from moebound.codec.arrays import to_torch
from moebound.errors import CorruptionError, FormatError, StoreError
from moebound.integrations.transformers.router_edits import apply_router_edits
from moebound.integrations.transformers.tables import OrdinaryQuantizer, enter
from moebound.jobs.ordered import in_order
from moebound.methods import FindPart, RouterEdit, Stored, shared_name
from moebound.methods.blob import MatrixBlob, blob_checksum, parse_shared
from moebound.methods.reading import ROUTER_NAME, SHARED_NAME, PartsFrom
from moebound.store import Settings, compressed_tensors, open_store
from moebound.store.checks import check_read, hashes_are_checked, hub_blobs
from moebound.store.format import CERTIFICATES_FILE, OWN_PREFIX, QUANT_METHOD, SLICE_MARK
from moebound.store.reader import read_router_edits
from moebound.store.stored import read_tensor_bytes

logger = logging.getLogger(__name__)


class MoeboundStoreConfig(QuantizationConfigMixin):
    """The `quantization_config` of a store. Raises FormatError for a newer version.

    transformers compares the names of classes: `MoeboundConfig`, which asks for an ordinary
    checkpoint to be compressed (`compressing.py`), is refused for a store because this is another.
    """

    # postprocess_model then drops the config from the model, which has nothing quantized.
    dequantize = True

    def __init__(self, **fields: Any) -> None:
        Settings.from_json(fields)
        for name, value in fields.items():
            setattr(self, name, value)


class Decode(ConversionOps):
    """Compressed matrices to weights, in the dtype that the model wants; other tensors pass.

    What a converter collects is, per pattern, a list: one tensor per expert, or (for a 3-D tensor)
    an empty stand-in and then one per slice. The first stay a list, the others are stacked.
    """

    supports_many_to_many = True

    def __init__(self, parts: FindPart, *, alone: bool = False) -> None:
        self._parts = parts
        self._alone = alone  # the only operation: its result goes by the target's name
        self.dtype: torch.dtype | None = None

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **context: Any,
    ) -> dict[str, Any]:
        name = context.get("full_layer_name", target_patterns[0])
        decoded = {pattern: self._convert(found, name) for pattern, found in input_dict.items()}
        if self._alone:
            (tensors,) = decoded.values()
            return {target_patterns[0]: tensors}
        return decoded

    def _convert(self, tensors: Any, name: str) -> Any:
        if not isinstance(tensors, list):
            return tensors
        sliced = bool(tensors) and tensors[0].dtype == torch.uint8 and tensors[0].numel() == 0
        envelopes = tensors[1:] if sliced else tensors
        threads = thread_count()
        if len(envelopes) == 1 and not sliced:
            return [self._decode(envelopes[0], name, threads)]
        with ThreadPoolExecutor(threads) as pool:
            # Few large tensors share the threads, many small ones take one each.
            each = max(1, threads // max(1, len(envelopes)))
            decoded = list(pool.map(lambda t: self._decode(t, name, each), envelopes))
        return [torch.stack(decoded)] if sliced else decoded

    def _decode(self, tensor: torch.Tensor, name: str, threads: int) -> torch.Tensor:
        if tensor.dtype != torch.uint8:
            return tensor
        try:
            data = tensor.cpu().contiguous().numpy().data
            out = Stored.of(data).decode(self._parts, threads=threads)
        except FormatError as error:
            raise type(error)(f"a tensor that goes into {name!r}: {error}") from error
        weights = to_torch(out).to(tensor.device)
        return weights if self.dtype is None else weights.to(self.dtype)

    @property
    def reverse_op(self) -> ConversionOps:
        # Never asked: after loading, the family's own converters are put back.
        raise NotImplementedError("a loaded model saves ordinary weights")


class MoeboundQuantizer(OrdinaryQuantizer):
    """Takes part in one from_pretrained. Raises StoreError, FormatError and CorruptionError that
    name file and tensor, before any weight is loaded, for shards that are not whole."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise StoreError(
                "quantization_config of a store given for an ordinary checkpoint: give "
                "moebound.MoeboundConfig(rate=...), which compresses it while it loads, or "
                "compress it first (`moebound compress`), then load the store"
            )
        self._compressed: list[TensorInfo] = []
        self._own = OwnTensors([])
        self._model: Any = None
        # Conversion, by id -> what the family has in its place, None where nothing.
        self._familys_own: dict[int, Any] = {}

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._model = model
        files = [Path(file) for file in kwargs.get("checkpoint_files") or ()]
        if any(file.suffix != ".safetensors" for file in files):
            raise StoreError(f"{files[0].parent}: a store has safetensors shards only")
        self._take(compressed_tensors(files), model)
        if files and not self._compressed:
            raise StoreError(
                f"{files[0].parent}: config.json says this is a store, but no shard has "
                "compressed tensors"
            )
        if not check_certified(files):
            check_whole(self._compressed, self._own)
        return model

    def _take(self, tensors: list[TensorInfo], model: Any) -> None:
        """Matrices on one side, what belongs to the store itself on the other."""
        self._own = OwnTensors([t for t in tensors if t.name.startswith(OWN_PREFIX)])
        self._compressed = [t for t in tensors if not t.name.startswith(OWN_PREFIX)]
        if self._own.tensors:  # they are no weights of the model: no report about them
            ignored = set(model._keys_to_ignore_on_load_unexpected or ())
            own = re.escape(OWN_PREFIX) + r"(shared|router)\..*"
            model._keys_to_ignore_on_load_unexpected = ignored | {own}

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: Any = None
    ) -> list[Any]:
        if model is None:  # not every version hands it over
            model = self._model
        ways = _find_ways(self._compressed, weight_conversions, model)
        updated = list[Any]()

        def add(entry: Any, familys_own: Any) -> None:
            self._familys_own[id(entry)] = familys_own
            updated.append(entry)

        add(_strip_slice_number(), None)
        for position, entry in enumerate(weight_conversions):
            collects = position in ways.collecting
            add(_with_decode(entry, self._own.part) if collects else entry, entry)
        for wrong, right in sorted(ways.undo.items()):
            add(WeightRenaming(f"{re.escape(wrong)}$", right), None)
        for tail in sorted(ways.alone):
            decode: list[ConversionOps] = [Decode(self._own.part, alone=True)]
            add(WeightConverter(f"{re.escape(tail)}$", tail, decode, force_cpu=True), None)
        return updated

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """The dtype to load a checkpoint tensor in. Envelopes stay; their weights get it later."""
        for operation in getattr(converter, "operations", ()):
            if isinstance(operation, Decode):
                operation.dtype = dtype
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._model = None
        apply_router_edits(model, self._own.router_edits())
        used = getattr(model, "_weight_conversions", None) or []
        own = [self._familys_own.get(id(entry), entry) for entry in used]
        model._weight_conversions = [entry for entry in own if entry is not None]
        return model


@dataclass
class _Ways:
    """How the compressed tensors travel through a family's conversions.

    collecting: positions of the converters that collect some of them. alone: final names of those
    that none collects. undo: names that renaming spoils -> what they were; transformers undoes
    that for a key that is a parameter's name, but then passes over all converters. Names are
    without what stands before their last number: `.mlp.up_proj.weight`.
    """

    collecting: set[int] = field(default_factory=set)
    alone: set[str] = field(default_factory=set)
    undo: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Renamed:
    """What a tensor is called in the model. undone: what renaming had made of it, where its own
    name is a parameter's. collected: whether a converter takes it."""

    final: str
    undone: str | None
    collected: bool


def _renamed(names: Collection[str], tried: list[Any], model: Any) -> dict[str, _Renamed]:
    """By name. tried: copies of a family's conversions."""
    renamings = [_strip_slice_number()]
    renamings += [entry for entry in tried if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in tried if isinstance(entry, WeightConverter)]
    prefix, parameters = model.base_model_prefix, model.state_dict()
    found = dict[str, _Renamed]()
    for name in sorted(names):
        final, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
        found[name] = _Renamed(final, None, pattern is not None)
        if final not in parameters:
            plain, _ = rename_source_key(name, [], [], prefix, parameters)
            if plain in parameters:
                found[name] = _Renamed(plain, final, False)
    return found


def final_names(names: Collection[str], conversions: list[Any], model: Any) -> dict[str, str]:
    """The parameter that each of these tensors is all of, of those that are."""
    renamed = _renamed(names, [deepcopy(entry) for entry in conversions], model)
    parameters = model.state_dict()
    return {
        name: one.final
        for name, one in renamed.items()
        if not one.collected and one.final in parameters
    }


def _find_ways(tensors: list[TensorInfo], conversions: list[Any], model: Any) -> _Ways:
    # Matching leaves marks on a transform, and the originals' must tell what loading has matched.
    tried = [deepcopy(entry) for entry in conversions]
    strip = _strip_slice_number()
    ways = _Ways()
    names = {strip.rename_source_key(tensor.name)[0] for tensor in tensors}
    for one in _renamed(names, tried, model).values():
        if one.undone is not None:
            ways.undo[_tail(one.undone)] = _tail(one.final)
        if not one.collected:
            ways.alone.add(_tail(one.final))
    ways.collecting = {
        position
        for position, entry in enumerate(tried)
        if isinstance(entry, WeightConverter) and entry.was_used()
    }
    return ways


def _tail(name: str) -> str:
    return re.split(r"(?<=\.)\d+(?=\.)", name)[-1]


def _strip_slice_number() -> Any:
    return WeightRenaming(re.escape(SLICE_MARK) + r"\d+$", "")


def _with_decode(converter: Any, parts: FindPart) -> Any:
    """The same converter with decoding in front; on the CPU, where decoding is."""
    copy = WeightConverter(
        list(converter._original_source_patterns),
        list(converter._original_target_patterns),
        [Decode(parts), *converter.operations],
        force_cpu=True,
    )
    copy.scope_prefix, copy.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
    return copy


class OwnTensors:
    """A store's shared parts and router edits, found in its shards. part: a `FindPart`."""

    def __init__(self, tensors: list[TensorInfo]) -> None:
        self.tensors = {tensor.name: tensor for tensor in tensors}
        self.part: FindPart = PartsFrom(self._read)

    def _read(self, group: int, number: int) -> memoryview:
        name = shared_name(group, number)
        if name not in self.tensors:
            raise CorruptionError(f"tensor {name!r} is in no shard")
        return read_tensor_bytes(self.tensors[name])

    def router_edits(self) -> dict[int, RouterEdit]:
        """By layer. Raises as `store.reader.read_router_edits`."""
        found = [t for name, t in self.tensors.items() if name.startswith(ROUTER_NAME)]
        return read_router_edits(found)


def check_certified(files: list[Path], *, unread: Collection[str] = ()) -> bool:
    """Check the shards that a loader was handed against the store's certificates: names, places,
    the hashes of all tensors but those in `unread`, and of the files beside the shards. Whether
    that was done.

    A loader that fetches from a hub takes weights and config only; the certificates are fetched
    then, and where they cannot be, a warning says what was not checked.
    Raises as `open_store` and `check_read`.
    """
    if not files or not hashes_are_checked():
        return False
    folder = files[0].parent
    if not fetch_certificates(folder):
        warnings.warn(
            f"{folder}: {CERTIFICATES_FILE} was not downloaded, and cannot be fetched now: the "
            "weights' own checksums were checked, but not whether they are the ones that belong "
            "there",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    check_read(open_store(folder), unread=unread)
    return True


def fetch_certificates(folder: Path) -> bool:
    """Whether a store's certificates are there. Of a snapshot in a hub's cache they are fetched
    if they are not."""
    blobs = hub_blobs(folder)
    if blobs is None or (folder / CERTIFICATES_FILE).exists():
        return True  # if they are not, opening says so
    from huggingface_hub import hf_hub_download

    kind, _, name = blobs.parent.name.partition("--")
    parts = folder.absolute().parts
    revision, *inner = parts[len(parts) - parts[::-1].index("snapshots") :]
    try:
        if kind == "models":
            hf_hub_download(
                name.replace("--", "/"), "/".join([*inner, CERTIFICATES_FILE]), revision=revision,
                cache_dir=blobs.parent.parent,
            )  # fmt: skip
    except Exception as error:  # the hub client raises its own, its HTTP library's, and OSError
        logger.debug("moebound: %s: %s", folder, error)
    return (folder / CERTIFICATES_FILE).exists()


def check_whole(tensors: list[TensorInfo], own: OwnTensors) -> None:
    """Read these matrices and check that they are whole, and their shared parts there, the right
    ones and whole. Raises FormatError or CorruptionError, naming file and tensor."""
    own.router_edits()
    parts: dict[tuple[int, int], int] = {}
    for tensor in own.tensors.values():
        if tensor.name.startswith(SHARED_NAME):
            data = read_tensor_bytes(tensor)
            try:
                blob = parse_shared(data)
                if shared_name(blob.group, blob.number) != tensor.name:
                    raise CorruptionError(f"holds part {blob.number} of group {blob.group}")
            except FormatError as error:
                raise type(error)(f"{tensor.file}: tensor {tensor.name!r}: {error}") from error
            parts[blob.group, blob.number] = blob_checksum(data)

    def check(tensor: TensorInfo) -> None:
        if tensor.n_bytes == 0:
            return
        try:
            found = Stored.of(read_tensor_bytes(tensor)).found
            if isinstance(found, MatrixBlob):
                for use in found.uses:
                    name = shared_name(found.group, use.number)
                    if (found.group, use.number) not in parts:
                        raise CorruptionError(f"needs tensor {name!r}, which is in no shard")
                    if parts[found.group, use.number] != use.checksum:
                        raise CorruptionError(f"tensor {name!r} is not the one it was encoded with")
        except FormatError as error:
            raise type(error)(f"{tensor.file}: tensor {tensor.name!r}: {error}") from error

    for _ in in_order(check, tensors, jobs=thread_count()):
        pass


def register() -> None:
    """Enter config and quantizer into transformers' tables. Idempotent."""
    enter(QUANT_METHOD, MoeboundStoreConfig, MoeboundQuantizer)


# Also for those who import this module themselves: then it is half loaded when the tables appear,
# and `register.py` leaves the entering to this line.
register()
