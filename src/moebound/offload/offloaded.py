"""A model whose experts stay compressed: what `moebound.load` returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

import torch

from moebound.cache import ExpertCache
from moebound.errors import CheckpointError
from moebound.model.skip_policies import Policy
from moebound.model.skipping import Skipped, skip_in
from moebound.model.strands import current
from moebound.offload.choose import LoadPath
from moebound.offload.codes import SlotsName
from moebound.offload.costs import Costs, Speeds
from moebound.offload.device_tier import DeviceTier
from moebound.offload.fetcher import Fetcher
from moebound.offload.linears import HeldLinears
from moebound.offload.loader import Held
from moebound.offload.meter import Meter, clock
from moebound.offload.tiers import Tier, TierName


@dataclass(frozen=True)
class Choice:
    """What was chosen at load, and from what.

    Bytes: cache for decoded experts, held for those in RAM or in a GPU's memory as they are on
    disk, buffers for reading, expert all experts as they are on disk. on_device: how many wait in a
    GPU's memory; rest: where the others do, if there are any. slots: what they hold; not_codes: how
    many experts are values where others are codes, or none is, by why. linears: how many linear
    layers that are no expert's are what; not_code_linears: how many coded matrices are values, or
    codes of a byte where four bits were asked for, by why; other_bytes: memory of all that is no
    expert's, which the budget does not count. predicted_s: seconds a token
    by way (source, tier and slots), overlapped, at the hit ratio that is expected.
    """

    source: str
    tier: TierName
    policy: str
    predictor: str
    cache_bytes: int
    held_bytes: int
    buffer_bytes: int
    expert_bytes: int
    expected_hit_ratio: float
    slots: SlotsName
    not_codes: dict[str, int]
    linears: dict[SlotsName, int]
    not_code_linears: dict[str, int]
    other_bytes: int
    predicted_s: dict[str, float]
    speeds: Speeds
    costs: Costs
    on_device: int = 0
    rest: TierName | None = None

    @classmethod
    def of(
        cls,
        load_paths: list[LoadPath],
        *,
        policy: str,
        predictor: str,
        buffer_bytes: int,
        not_codes: Mapping[str, int],
        linears: HeldLinears,
        waiting: Tier,
    ) -> Choice:
        """The first of them, and what was predicted of all."""
        chosen, on_device = load_paths[0], 0
        rest: TierName | None = None
        if isinstance(waiting, DeviceTier):
            on_device = len(waiting.keys)
            rest = waiting.rest.name if len(waiting.keys) < len(chosen.entries.by_key) else None
        return cls(
            source=chosen.name,
            tier=chosen.tier,
            policy=policy,
            predictor=predictor,
            cache_bytes=chosen.cache_bytes,
            held_bytes=chosen.held_bytes,
            buffer_bytes=buffer_bytes,
            expert_bytes=chosen.entries.n_bytes,
            expected_hit_ratio=chosen.hit_ratio,
            slots=chosen.slots,
            not_codes=dict(not_codes),
            linears=dict(linears.kinds),
            not_code_linears=dict(linears.refused),
            other_bytes=linears.n_bytes,
            predicted_s={path.title: path.seconds for path in load_paths},
            speeds=chosen.speeds,
            costs=chosen.costs,
            on_device=on_device,
            rest=rest,
        )


class Offloaded:
    """A stock transformers model that fetches its experts; its tokenizer; its numbers.

    Use `model` as any other (`generate`, forward, `backward`), for one batch at a time, or for
    several sequences in strands (`model/strands.py`). Close it,
    or use it as a context: its threads end, and the model can no longer be called. The same happens
    once both are dropped and collected. What needs all experts is in `whole.py`.
    """

    def __init__(self, model: Any, tokenizer: Any, fetcher: Fetcher, choice: Choice) -> None:
        self.model, self.choice = model, choice
        self._tokenizer = tokenizer
        self._fetcher = fetcher
        self._hooks = [
            # Before anything is computed: torch's own threads hang in a forked child, too.
            model.base_model.register_forward_pre_hook(lambda *_: fetcher.check_process()),
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]
        self._begun = 0.0
        self._round: object = None
        self._policy, self._skipping = "", ExitStack()

    def __iter__(self) -> Iterator[Any]:
        """model, tokenizer = moebound.load(...)"""
        return iter((self.model, self.tokenizer))

    def __getattr__(self, name: str) -> Any:
        # What is no attribute of this object: most often meant for the model.
        raise AttributeError(
            f"{type(self).__name__!r} object has no attribute {name!r}: the model of transformers "
            f"is its .model, so use .model.{name}, or `model, tokenizer = moebound.load(...)`"
        )

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            f"{type(self).__name__!r} object is not callable: the model of transformers is its "
            ".model, so use .model(...), or `model, tokenizer = moebound.load(...)`"
        )

    @property
    def tokenizer(self) -> Any:
        """None for a model without one. Raises CheckpointError for one that cannot be loaded."""
        if isinstance(self._tokenizer, CheckpointError):
            raise self._tokenizer
        return self._tokenizer

    @property
    def cache(self) -> ExpertCache[Held]:
        return self._fetcher.cache

    @property
    def meter(self) -> Meter:
        return self._fetcher.meter

    @property
    def pool_bytes(self) -> int:
        """Memory that decoded experts have, in use or not."""
        return self._fetcher.loader.pool_bytes

    def begin_sequence(self) -> None:
        """A new text begins. Noticed by itself where a forward pass starts without a past."""
        self._fetcher.begin_sequence()

    def skip(self, policy: Policy | None) -> None:
        """Skip experts from now on (`model/skipping.py`), in the place of what was skipped before;
        None skips nothing. Raises as `skip_in`, and nothing is skipped then."""
        self._skipping.close()
        self._policy = ""
        if policy is not None:
            self._skipping = skip_in(self.model, policy, self._count)
            self._policy = policy.setting

    def _count(self, _layer: int, weights: torch.Tensor, skipped: torch.Tensor) -> None:
        self.meter.add(pairs=weights.numel(), pairs_skipped=int(skipped.sum()))

    def stats(self) -> dict[str, Any]:
        """Everything counted since loading, or since `meter.reset()`, as one JSON-able document."""
        self._fetcher.check_process()
        found = self.meter.to_json()
        accesses, hits = found["accesses"], found["hits"]
        cache = self.cache.stats
        return {
            "choice": asdict(self.choice),
            "hit_ratio": hits / accesses if accesses else None,
            "tiers": self._tiers(hits, accesses - hits, found["on_device"]),
            "bytes_moved": found["loaded_bytes"],
            "evictions": cache.evictions,
            "prefetch": {
                "predictor": self.choice.predictor,
                "active": self._fetcher.foresight.active,
                "loads": found["prefetched"],
                "precision": _share(found["predicted_right"], found["predicted"]),
                "recall": _share(
                    found["predicted_right"], found["predicted_right"] + accesses - hits
                ),
            },
            "fallback": {"coarse": found["coarse"], "skipped": found["skipped"]},
            **(
                {"skipping": Skipped(found["pairs"], found["pairs_skipped"]).to_json(self._policy)}
                if self._policy
                else {}
            ),
            "seconds_per_step": found["step_s"] / found["steps"] if found["steps"] else None,
            "stall_s": found["stall_s"],
            **{
                name: found[name]
                for name in ("loads", "read_s", "decode_s", "compute_s", "experts_s", "step_s",
                             "steps", "tokens")
            },
        }  # fmt: skip

    def _tiers(self, hits: int, misses: int, on_device: int) -> dict[str, int]:
        """Accesses by where the expert was."""
        if self.choice.tier != "device":
            return {"decoded": hits, self.choice.tier: misses}
        found = {"decoded": hits, "device": on_device}
        return found if self.choice.rest is None else found | {self.choice.rest: misses - on_device}

    def close(self) -> None:
        self._skipping.close()
        for hook in self._hooks:
            hook.remove()
        self._fetcher.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._fetcher.check_process()
        inputs = kwargs.get("input_ids", args[0] if args else kwargs.get("inputs_embeds"))
        past = kwargs.get("past_key_values")
        n_past = past.get_seq_length() if past is not None else 0
        if n_past == 0:
            self.begin_sequence()
        n_tokens = inputs.shape[1] if isinstance(inputs, torch.Tensor) else 1
        self.meter.add(tokens=inputs.shape[0] * n_tokens if inputs is not None else 0)
        strand = current()
        if strand is not None and strand.joins:
            # One pass of several sequences is one step, which lasts from the first to begin to the
            # last to end.
            if self._round is not strand.round:
                self._round, self._begun = strand.round, clock()
                self.meter.add(steps=1)
            return
        self._fetcher.decoding = n_tokens == 1
        self._begun = clock()

    def _end(self, module: Any, args: Any, output: Any) -> None:
        if self._fetcher.forked:
            return
        strand, now = current(), clock()
        if strand is not None and strand.joins:
            self.meter.add(step_s=now - self._begun)
            self._begun = now
            return
        self.meter.add(steps=1, step_s=now - self._begun)


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
