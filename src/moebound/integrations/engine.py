"""What loaders of serving engines have in common: which store a name stands for, its weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from moebound.checkpoint.source import local_folder
from moebound.errors import UnsupportedArchitectureError
from moebound.store.checks import check_files, hashes_are_checked
from moebound.store.reader import open_store
from moebound.store.weights import decoded_weights

if TYPE_CHECKING:
    import torch

QUANT_METHOD = "moebound"
"""How engines call the quantization of a store: what its config.json says. Nothing is quantized in
the engine: layers are the plain ones, and get decoded weights."""


def fetch_store(model: str, revision: str | None, cache_dir: str | None) -> Path:
    """The folder of a store: a path's, or of a hub id, fetched now. Raises CheckpointError."""
    return local_folder(model, revision=revision, cache_dir=cache_dir)


def store_weights(
    model: str,
    revision: str | None = None,
    cache_dir: str | None = None,
    *,
    experts: Collection[int] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) by the names of the source's checkpoint, on the CPU; see `decoded_weights`.

    Raises CheckpointError and StoreError where there is no store, CorruptionError where it is
    damaged.
    """
    store = open_store(fetch_store(model, revision, cache_dir))
    if hashes_are_checked():
        check_files(store)
    yield from decoded_weights(store, experts=experts)


def refuse_more_sources(model: Any) -> None:
    """Raises UnsupportedArchitectureError for a model that asks for other checkpoints beside."""
    if tuple(getattr(model, "secondary_weights", ())):
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} loads weights from other checkpoints beside its own, which a "
            "store does not have: `moebound decompress` makes an ordinary checkpoint of it"
        )


class PlainLayers:
    """What an engine finds for `quant_method: moebound`, but for its own layers: nothing is
    quantized once it is loaded. To stand before the engine's `QuantizationConfig`."""

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        import torch

        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # no kernel of its own

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # it is in config.json

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls()
