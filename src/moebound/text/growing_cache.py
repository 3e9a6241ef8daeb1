"""Keys and values that grow in place.

transformers' own dynamic cache copies all it holds for every new token: for a small model with a
large batch that is most of the time. Here a layer keeps room to spare, writes the new token into
it, and hands out a view.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

FIRST_ROOM = 64
GROWTH = 1.5


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Plain attention. keys, values: views [batch, heads, length, width] of larger tensors.

    Equal to DynamicLayer in all that it returns. Cropping is not needed here.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._room: tuple[torch.Tensor, torch.Tensor] | None = None
        self._length = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self._length = self._length, self._length + key_states.shape[-2]
        if self._room is None or self._room[0].shape[-2] < self._length:
            self._grow(key_states, value_states, start)
        assert self._room is not None
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, start : self._length] = new
        return self._show()

    def keep(self, rows: torch.Tensor) -> None:
        """These rows of the batch, in this order; one may be there twice."""
        if self._room is not None:
            self._room = (self._room[0].index_select(0, rows), self._room[1].index_select(0, rows))
            self._show()

    def get_seq_length(self) -> int:
        return self._length

    def shorten(self, length: int) -> None:
        """Forget what came behind the first `length` tokens."""
        if self._length > length:
            self._length = length
            self._show()

    def _show(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._room is not None
        keys, values = (_tight(room[:, :, : self._length]) for room in self._room)
        self.keys, self.values = keys, values
        return keys, values

    def _grow(self, keys: torch.Tensor, values: torch.Tensor, filled: int) -> None:
        size = max(int(self._length * GROWTH), self._length + FIRST_ROOM)
        grown = []
        for index, like in enumerate((keys, values)):
            room = like.new_empty((*like.shape[:2], size, like.shape[3]))
            if self._room is not None:
                room[:, :, :filled] = self._room[index][:, :, :filled]
            grown.append(room)
        self._room = (grown[0], grown[1])


def _tight(view: torch.Tensor) -> torch.Tensor:
    """Of one head of one text: with strides that do not tell of the room behind it, by which torch
    2.13's product of latents in bfloat16 takes a way that is 40 times as long."""
    return view.view(view.shape) if view.is_contiguous() else view


class GrowingCache:
    """The cache of one batch. cache: what the model is called with."""

    def __init__(self, config: Any) -> None:
        self.cache: Any = DynamicCache(config=config)
        self.cache.layers = [
            GrowingLayer() if type(layer) is DynamicLayer else layer for layer in self.cache.layers
        ]

    def can_drop(self) -> bool:
        """Whether rows can be dropped, and change places: in caches with other state than keys and
        values, not."""
        known = (GrowingLayer, DynamicLayer, DynamicSlidingWindowLayer)
        return all(type(layer) in known for layer in self.cache.layers)

    def keep(self, rows: torch.Tensor) -> None:
        """These rows of the batch, in this order; one may be there twice. Asks for `can_drop()`."""
        for layer in self.cache.layers:
            if isinstance(layer, GrowingLayer):
                layer.keep(rows)
            elif layer.is_initialized:
                layer.reorder_cache(rows)


def shorten(cache: DynamicCache, length: int) -> None:
    """Have a cache of plain attention forget what came behind the first `length` tokens."""
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer):
            layer.shorten(length)
        elif isinstance(layer, DynamicLayer) and layer.get_seq_length() > length:
            assert layer.keys is not None
            assert layer.values is not None
            layer.keys = layer.keys[..., :length, :]
            layer.values = layer.values[..., :length, :]


def supports_cache(model: Any) -> bool:
    """Whether the model takes transformers' ordinary cache; a few families have their own."""
    return bool(
        "past_key_values" in arguments(model)
        and hasattr(model, "_supports_default_dynamic_cache")
        and model._supports_default_dynamic_cache()
        and not model.config.is_encoder_decoder
    )


def arguments(model: Any) -> frozenset[str]:
    """Names of what the model's forward takes."""
    return frozenset(inspect.signature(type(model).forward).parameters)
