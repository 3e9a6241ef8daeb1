"""Record which experts a model chooses, and with what weights, while it reads or generates.

    with Recorder(model) as recorder:
        model.generate(**prompts, max_new_tokens=64)
    trace = recorder.take()

Only real tokens are recorded. Padding is told by the attention mask. In a batch, `generate` goes on
feeding rows that have ended, until the last has: from the end mark on (which alone would never
have been fed) they are left out, so the trace does not depend on what was batched together. A row
that ended by a stop string is noticed one token late, when padding is fed.

Batches may be whole texts (each forward pass reads new sequences) or a generation with a cache
(a prefill, then one token a row). Left out: beam search, which moves rows about; generation without
a cache, which reads everything again at each step; encoder-decoder models.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moebound.cache.trace import MAX_EXPERTS, LayerTrace, Trace
from moebound.errors import MoeboundError
from moebound.model.live import ExpertsModule, live_experts
from moebound.model.taps import tap
from moebound.types import Array


@dataclass
class _Pass:
    """One forward pass under way. keep: [B · q], which places hold real tokens. columns: of those,
    token, position, sequence, step and decode, as in a trace."""

    keep: torch.Tensor
    columns: tuple[Array, ...]
    heard: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


@dataclass
class _Rows:
    """The sequences of the batch at hand. ids, seen: [B]; ended: [B], no longer counted."""

    ids: Array
    seen: Array
    ended: Array


class Recorder:
    """Records the routing of a loaded model between `with` and its end.

    model: what is called (its forward pass gets input_ids), of any family. end_ids: end marks;
    pad_id: the padding id. Both from the model's generation config where not given.

    Raises UnsupportedArchitectureError for a dense model or one whose routing cannot be heard.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        end_ids: Iterable[int] | None = None,
        pad_id: int | None = None,
    ) -> None:
        self._model = model
        # Of several experts modules in a layer, the language model's stands first.
        self._stacks = [stack for stack in live_experts(model).stacks if stack.first == 0]
        for stack in self._stacks:
            if stack.stack.n_experts > MAX_EXPERTS:
                raise MoeboundError(
                    f"{stack.stack.name}: {stack.stack.n_experts} experts, at most {MAX_EXPERTS}"
                )
        config = getattr(model, "generation_config", None)
        self._ends = _ids(getattr(config, "eos_token_id", None) if end_ids is None else end_ids)
        self._pads = _ids(getattr(config, "pad_token_id", None) if pad_id is None else pad_id)
        self._hooks: list[RemovableHandle] = []
        self._forget()

    def _forget(self) -> None:
        self._pass: _Pass | None = None
        self._rows: _Rows | None = None
        self._cache: Any = None
        self._sequences = self._steps = 0
        self._tokens: list[tuple[Array, ...]] = []
        self._choices: dict[int, list[tuple[Array, Array]]] = {s.layer: [] for s in self._stacks}

    def __enter__(self) -> Self:
        if self._hooks:
            raise MoeboundError("this recorder is recording already")
        self._hooks = [
            self._model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._model.register_forward_hook(self._end),
        ]
        try:
            for stack in self._stacks:
                self._hooks.append(tap(self._model, stack.stack, self._hear(stack)))
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._pass = None

    def take(self, *, model: str = "", task: str = "") -> Trace:
        """What was recorded since the last take, and forget it. Sequences and steps count from 0.

        A forward pass that ended in an exception is not in it. Call it between generations.
        """
        # [()] + ...: concatenating nothing must give empty arrays of the right type.
        columns = [
            np.concatenate([np.empty(0, dtype), *(entry[at] for entry in self._tokens)])
            for at, dtype in enumerate((np.int32, np.int32, np.int32, np.int32, np.bool_))
        ]
        layers = []
        for stack in self._stacks:
            heard = self._choices[stack.layer]
            index = np.concatenate([i for i, _ in heard]) if heard else np.empty((0, 1), np.int16)
            weights = np.concatenate([w for _, w in heard]) if heard else index.astype(np.float32)
            layers.append(LayerTrace(stack.layer, stack.stack.n_experts, index, weights))
        self._forget()
        token, position, sequence, step, decode = columns
        return Trace(tuple(layers), token, position, sequence, step, decode, model, task)

    def _begin(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        shape_of = ids if ids is not None else kwargs.get("inputs_embeds")
        if shape_of is None:
            raise MoeboundError("a forward pass without input_ids or inputs_embeds")
        rows, width = int(shape_of.shape[0]), int(shape_of.shape[1])
        known: Array = np.full((rows, width), -1, np.int32)
        if ids is not None:
            known = ids.detach().cpu().numpy().astype(np.int32)
        keep = np.ones((rows, width), np.bool_)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            keep &= mask[:, -width:].detach().cpu().numpy() != 0

        cache = kwargs.get("past_key_values", kwargs.get("cache_params"))
        goes_on = self._goes_on(cache, rows, width)
        if goes_on:
            assert self._rows is not None
        else:
            ids_of_rows = np.arange(self._sequences, self._sequences + rows, dtype=np.int32)
            self._rows = _Rows(ids_of_rows, np.zeros(rows, np.int32), np.zeros(rows, np.bool_))
            self._sequences += rows
        self._cache = _weak(cache)
        decode = goes_on and width == 1
        if decode:
            self._rows.ended |= np.isin(known[:, 0], [*self._ends, *self._pads])
        keep &= ~self._rows.ended[:, None]

        position = self._rows.seen[:, None] + keep.cumsum(1, dtype=np.int32) - 1
        self._rows.seen = self._rows.seen + keep.sum(1, dtype=np.int32)
        sequence = np.broadcast_to(self._rows.ids[:, None], keep.shape)
        n_kept = int(keep.sum())
        columns = (
            known[keep],
            position[keep],
            sequence[keep],
            np.full(n_kept, self._steps, np.int32),
            np.full(n_kept, decode, np.bool_),
        )
        self._pass = _Pass(torch.from_numpy(keep.reshape(-1)), columns)

    def _goes_on(self, cache: Any, rows: int, width: int) -> bool:
        """Whether this pass continues the sequences of the one before."""
        if cache is None or self._rows is None:
            return False
        length = _length(cache)
        same = self._cache is not None and self._cache() is cache
        goes_on = (width == 1 or length != 0) if same else length not in (0, None)
        if goes_on and rows != len(self._rows.ids):
            raise MoeboundError(
                f"a batch of {len(self._rows.ids)} sequences went on as {rows}: rows that are "
                "dropped or added meanwhile (beam search, compaction) cannot be told apart"
            )
        return goes_on

    def _hear(self, stack: ExpertsModule) -> Any:
        def hear(index: torch.Tensor, weights: torch.Tensor) -> None:
            now = self._pass
            if now is None:
                return  # the inner model was called without its head: nothing to attribute it to
            if stack.layer in now.heard:
                raise MoeboundError(f"{stack.stack.name}: called twice in one forward pass")
            if len(index) != len(now.keep):
                raise MoeboundError(
                    f"{stack.stack.name}: {len(index)} tokens were routed, the batch has "
                    f"{len(now.keep)} places; only whole batches can be recorded"
                )
            now.heard[stack.layer] = (index, weights)

        return hear

    def _end(self, _model: nn.Module, _args: Any, _output: Any) -> None:
        now, self._pass = self._pass, None
        if now is None:
            return
        missing = [stack.stack.name for stack in self._stacks if stack.layer not in now.heard]
        if missing:
            raise MoeboundError(f"{missing[0]}: was not called in this forward pass")
        if not len(now.columns[0]):
            return  # all rows had ended
        for stack in self._stacks:
            self._choices[stack.layer].append(_kept(*now.heard[stack.layer], now.keep, stack))
        self._tokens.append(now.columns)
        self._steps += 1


def _kept(
    index: torch.Tensor, weights: torch.Tensor, keep: torch.Tensor, stack: ExpertsModule
) -> tuple[Array, Array]:
    """The choices for real tokens: int16 and float32, [T, K]."""
    on_device = keep.to(index.device)
    chosen = index.reshape(len(index), -1)[on_device].cpu().numpy()
    gates = weights.reshape(len(index), -1)[on_device].float().cpu().numpy()
    # A weight of exactly 0 is how a router that may choose nobody says so (ZAYA).
    none = (chosen < 0) | (chosen >= stack.stack.n_experts) | (gates == 0)
    return np.where(none, -1, chosen).astype(np.int16), np.where(none, 0, gates)


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(int(one) for one in value)


def _length(cache: Any) -> int | None:
    """Tokens in a cache; None where it does not say."""
    try:
        return int(cache.get_seq_length())
    except (AttributeError, TypeError, ValueError, NotImplementedError):
        return None


def _weak(cache: Any) -> Any:
    try:
        return None if cache is None else weakref.ref(cache)
    except TypeError:  # a plain tuple: never the same object twice
        return None
