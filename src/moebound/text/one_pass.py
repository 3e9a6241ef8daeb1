"""One forward pass for texts that are one token long each, in place of one for each of them.

Strands (`model/strands.py`) leave the model's code as it is and run it once a text: of eight texts,
eight times, and for each token that is Python's time, several milliseconds a text, however much is
shared of weights. Here the tokens of all texts are the rows of one pass, [1, n, H]. An attention
module gets all of them, with a cache that puts each row's keys and values into that text's own
(`_Caches`), and the attention function finds those of all texts (`model/attention.py`). Linear
layers and experts get rows as strands would bring them (`model/joined.py`, `offload/joint.py`);
routers get ROWS at a time, or, as small linear layers do, one after the other
(`model/native_routers.py`). Everything else in a decoder works on
each row by itself: norms, activations, residual sums.

**It changes no bit, or it is not used.** The first pass of each number of texts is computed both
ways, the new one on copies of the caches, and the texts go on from the old one. Only if all logits
are the same, to the bit, is the new way taken for that number from then on: kernels choose their
way by shape, not by content. Where a family's attention fails with such a cache, attention modules
are called once a row instead, in strands of their own, and that is tried. Passes in which somebody
reads a prompt are as before.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from moebound.errors import MoeboundError
from moebound.model.attention import NAME, OfTexts
from moebound.model.joined import ROWS, Forwards
from moebound.model.native_routers import NativeRouter
from moebound.model.strands import Rows, Strand, Strands, current, passing, rows
from moebound.text.growing_cache import GrowingLayer, shorten

_TAKEN = frozenset({"input_ids", "past_key_values", "use_cache", "logits_to_keep"})
"""What a pass may be called with."""


@dataclass(frozen=True, eq=False)
class _Call:
    strand: Strand
    given: dict[str, Any]

    @property
    def cache(self) -> DynamicCache:
        found: DynamicCache = self.given["past_key_values"]
        return found


@dataclass
class _Verdict:
    waiting: int = 0
    same: bool = True


@dataclass(eq=False)
class _Trial:
    """What one text is to get, by the pass that is tried out."""

    verdict: _Verdict
    logits: torch.Tensor


@dataclass(frozen=True, eq=False)
class _Caches:
    """What an attention module of a pass takes for its cache. each: those of the texts."""

    each: Sequence[DynamicCache]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args: Any, **given: Any
    ) -> tuple[OfTexts, OfTexts]:
        """keys, values: [1, heads, n, width], a row for each text."""
        found = [
            cache.update(keys[:, :, i : i + 1], values[:, :, i : i + 1], layer, *args, **given)
            for i, cache in enumerate(self.each)
        ]
        return OfTexts([keys for keys, _ in found]), OfTexts([values for _, values in found])


class OnePass(Forwards):
    """Installs itself in a model until `remove`. Outside of strands that join nothing changes.

    usable: whether this model's passes can be so; why_not says why they cannot. taken: passes that
    were, so far. apart: whether attention modules are called once a row; why_apart says how all
    rows at once have failed.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.taken = 0
        self._verdicts = dict[int, _Verdict]()
        self.why_not, self.why_apart = _why_not(model), ""
        self.apart = not _takes_texts(model)
        self.usable = not self.why_not
        if not self.usable:
            return
        mixers = [module for module in model.modules() if _mixes(module)]
        inside = {id(part) for mixer in mixers for part in mixer.modules()}
        for mixer in mixers:
            self.put(mixer, partial(self._mix, mixer.forward))
        for module in model.modules():
            if (id(module) not in inside or type(module) is nn.Linear) and _by_rows(module):
                step = ROWS if isinstance(module.forward, NativeRouter) else 1
                self.put(module, partial(_some_rows, module.forward, step))
        self._whole = model.forward
        self.put(model, self._forward)

    def remove(self) -> None:
        super().remove()
        self.usable = False

    def _forward(self, *args: Any, **given: Any) -> Any:
        strand = current()
        if strand is None or not strand.joins or not self.usable or not _fits(args, given):
            return self._whole(*args, **given)
        found = strand.meet(self, _Call(strand, given), self._serve)
        if isinstance(found, CausalLMOutputWithPast):
            return found
        output = self._whole(**given)
        if isinstance(found, _Trial):
            self._judge(found, output.logits)
        return output

    def _serve(self, calls: Sequence[_Call]) -> list[Any]:
        n, together = len(calls), calls[0].strand.together
        if n < 2 or n != together or not self.usable:
            return [None] * n  # others read prompts: experts are shared with those
        if n not in self._verdicts:
            return self._try(calls)
        verdict = self._verdicts[n]
        if verdict.waiting or not verdict.same:
            return [None] * n
        caches = [call.cache for call in calls]
        places = [cache.get_seq_length() for cache in caches]
        try:
            logits = self._pass(calls, caches, trial=False)
        except BaseException:  # each will try by itself, from where it was
            for cache, place in zip(caches, places, strict=True):
                shorten(cache, place)
            raise
        self.taken += 1
        return [
            CausalLMOutputWithPast(logits=logits[:, i : i + 1], past_key_values=call.cache)
            for i, call in enumerate(calls)
        ]

    def _try(self, calls: Sequence[_Call]) -> list[Any]:
        n = len(calls)
        try:
            logits = self._pass(calls, [copy.deepcopy(call.cache) for call in calls], trial=True)
        except MoeboundError:  # as of an expert that cannot be read: each will meet it by itself
            return [None] * n
        except Exception as error:  # whatever a family does with rows that it does not expect
            why = f"{type(error).__name__}: {error}"
            if self.apart:
                self.usable, self.why_not = False, why
            self.apart, self.why_apart = True, why  # which the next pass tries
            return [None] * n
        verdict = self._verdicts[n] = _Verdict(waiting=n)
        return [_Trial(verdict, logits[:, i : i + 1]) for i in range(n)]

    def _judge(self, trial: _Trial, logits: torch.Tensor) -> None:
        verdict = trial.verdict
        verdict.waiting -= 1
        verdict.same &= torch.equal(trial.logits, logits)

    def _mix(self, before: Callable[..., Any], *args: Any, **given: Any) -> Any:
        some = rows()
        if some is None:
            return before(*args, **given)
        return (_mix_apart if self.apart else _mix)(before, some, *args, **given)

    def _pass(
        self, calls: Sequence[_Call], caches: Sequence[DynamicCache], *, trial: bool
    ) -> torch.Tensor:
        """[1, n, vocabulary]."""
        ids = torch.cat([call.given["input_ids"] for call in calls], dim=1)
        places = [cache.get_seq_length() for cache in caches]
        given = {name: value for name, value in calls[0].given.items() if name in _TAKEN}
        given |= {
            "input_ids": ids,
            "position_ids": torch.tensor([places], device=ids.device),
            "past_key_values": caches[0],  # of masks alone: `_mix` takes each row's own
        }
        if "logits_to_keep" in given:
            given["logits_to_keep"] = len(calls)
        with passing(Rows(tuple(call.strand for call in calls), tuple(caches), trial)):
            found: torch.Tensor = self._whole(**given).logits
        return found


def _why_not(model: nn.Module) -> str:
    """Why a model's tokens cannot be rows of one pass; empty if they may."""
    found = set(inspect.signature(type(model).forward).parameters)
    config = getattr(model, "config", None)
    if not {"input_ids", "position_ids", "past_key_values"} <= found or config is None:
        return "its forward pass takes no positions, or no cache"
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(text, "sliding_window", None):
        return "some of its layers see a window, or have other states than keys and values"
    if getattr(text, "_attn_implementation", None) not in ("sdpa", NAME):
        return "its attention is not torch's"
    return ""


def _takes_texts(model: nn.Module) -> bool:
    """Whether attention functions of this model know keys and values of several texts."""
    config: Any = getattr(model, "config", None)
    return config is not None and config.get_text_config(decoder=True)._attn_implementation == NAME


def _fits(args: tuple[Any, ...], given: dict[str, Any]) -> bool:
    """Whether a pass reads one token of a text behind others, and asks for nothing unusual."""
    if args or not {"input_ids", "past_key_values"} <= given.keys() <= _TAKEN:
        return False
    cache, ids = given["past_key_values"], given["input_ids"]
    return (
        type(cache) is DynamicCache
        and ids.shape == (1, 1)
        and cache.get_seq_length() > 0
        and all(type(layer) in (DynamicLayer, GrowingLayer) for layer in cache.layers)
    )


def _mixes(module: nn.Module) -> bool:
    """Whether this module has keys and values, and nothing in it has."""
    return _takes_cache(module) and not any(
        _takes_cache(part) for part in module.modules() if part is not module
    )


def _takes_cache(module: nn.Module) -> bool:
    return "past_key_values" in inspect.signature(type(module).forward).parameters


def _by_rows(module: nn.Module) -> bool:
    """Whether torch's product in it may depend on how many rows there are: a router, or a linear
    layer that does not meet others'."""
    if type(module) is nn.Linear:
        return not isinstance(vars(module).get("forward"), partial)  # `joined.py` splits its own
    own = [some for some in module.parameters(recurse=False) if some.dim() == 2]
    return bool(own) and not isinstance(module, nn.Embedding)


def _mix(before: Callable[..., Any], some: Rows, *args: Any, **given: Any) -> Any:
    """All rows at once, each with its own cache."""
    given |= {"past_key_values": _Caches(some.caches)}
    if "attention_mask" in given:
        given["attention_mask"] = None
    return before(*args, **given)


def _mix_apart(before: Callable[..., Any], some: Rows, *args: Any, **given: Any) -> Any:
    """Each row by itself, with its own cache."""
    n = len(some.owners)
    results: list[Any] = [None] * n

    def work(i: int) -> None:
        own = {name: _row(value, i, n) for name, value in given.items()}
        own |= {"past_key_values": some.caches[i]}
        if "attention_mask" in own:
            own["attention_mask"] = None
        results[i] = before(*(_row(value, i, n) for value in args), **own)

    strands = Strands()
    begun = [strands.start(partial(work, i)) for i in range(n)]
    strands.advance(begun)
    for strand in begun:
        if strand.error is not None:
            raise strand.error
    found = [result[0] if isinstance(result, tuple) else result for result in results]
    joined = torch.cat(found, dim=1)
    if not isinstance(results[0], tuple):
        return joined
    return (joined, *(None for _ in results[0][1:]))


def _row(value: Any, i: int, n: int) -> Any:
    """The i-th of [1, n, ...] tensors, whatever they are in."""
    if isinstance(value, tuple):
        return tuple(_row(part, i, n) for part in value)
    if isinstance(value, torch.Tensor) and value.dim() >= 2 and value.shape[1] == n:
        return value[:, i : i + 1]
    return value


def _some_rows(
    before: Callable[..., Any], step: int, x: torch.Tensor, *args: Any, **given: Any
) -> Any:
    """So many rows at a time. x: [..., n, H]."""
    some = rows()
    n = x.shape[-2]
    if some is None or n != len(some.owners) or x.numel() <= step * x.shape[-1]:
        return before(x, *args, **given)
    found = [before(x[..., i : i + step, :], *args, **given) for i in range(0, n, step)]
    if not isinstance(found[0], tuple):
        return torch.cat(found, dim=-2)
    return tuple(torch.cat(parts, dim=-2) for parts in zip(*found, strict=True))
