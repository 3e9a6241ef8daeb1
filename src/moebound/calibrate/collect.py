"""Read a text, and sum up what every expert gets: a folder of statistics, in bounded memory.

H of all experts does not fit: 64 experts of 2048 and 1408 channels take 1.6 GB a layer. So the text
is read several times, each time for as many experts as `memory` allows, in the order of the model,
and no further than their last layer. What is finished is on disk; a run that was interrupted goes
on behind it, and a run with another model, text or setting begins anew.

H = Σ g² x xᵀ over the tokens sent to an expert: then tr((W - Ŵ) H (W - Ŵ)ᵀ) is the squared error of
what the layer adds to the residual stream, summed over the text (GPTQ, 2210.17323, section 3, with
the routing weight g in it). With fisher, tokens are weighted by what the loss feels of them in the
place of g² (`fisher.py`); the text is then read forward and backward. With routed=False every
expert gets every token with g = 1: experts that a text seldom uses are seen as well, at E/K times
the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from moebound.calibrate.edited import edit_model
from moebound.calibrate.fisher import READ_TOKENS as FISHER_TOKENS
from moebound.calibrate.fisher import (
    Labels,
    Recomputing,
    predicted,
    told_of_gradients,
    with_gradients,
)
from moebound.calibrate.search import TOKENS, Search
from moebound.calibrate.self_sampling import KEPT
from moebound.calibrate.sums import Span, Sums
from moebound.calibrate.text import Text
from moebound.checkpoint import top_k_of
from moebound.checkpoint.families import router_groups_of
from moebound.errors import MoeboundError
from moebound.evaluate.loading import Loaded, load
from moebound.evaluate.replay import decoder_layers
from moebound.evaluate.text import batches, pad
from moebound.files.documents import load_json, save_json
from moebound.files.formats.statistics import (
    FILE,
    Moments,
    Of,
    Statistics,
    read_statistics,
    save_statistics,
)
from moebound.jobs.workers import Workers
from moebound.model.calls import Pairs, listen_early
from moebound.model.fingerprint import of_corners
from moebound.model.gradients import check_differentiable
from moebound.model.live import ExpertsModule, live_experts
from moebound.model.routers import router_of

UNFINISHED = "unfinished.json"
MEMORY = 1 << 30
READ_TOKENS = 4096
"""Tokens read at once, padding counted."""

Say = Callable[[str, int, int], None]
"""Called with what is done, sequences read, and sequences to be read in all passes."""


@dataclass(frozen=True)
class Settings:
    """routed: experts see the tokens sent to them, else all. moments: all of H, or its diagonal.
    memory: bytes of H that are held at once; one expert's at least. search: also for the sets of
    experts that can be left out (`search.py`). after: the setting of the method that has edited the
    model (`edited.py`); fingerprint: of the experts before that, None where nothing was done.
    affinity: sum up g x xᵀ, too. fisher: weighted by what the loss feels (`fisher.py`), in the
    place of g²; answer_weight: how many times an answer's tokens count there."""

    routed: bool = True
    moments: Moments = "full"
    memory: int = MEMORY
    search: bool = False
    after: str | None = None
    affinity: bool = False
    fisher: bool = False
    answer_weight: float = 1.0
    fingerprint: str | None = None


def collect(
    loaded: Loaded,
    text: Text,
    out: Path,
    settings: Settings = Settings(),
    say: Say = lambda *_: None,
    workers: Workers | None = None,
) -> Statistics:
    """Write the statistics of a model's routed experts on a text to the folder `out`.

    workers: of `reader`, one for this model, text, folder and settings; None for this process. Each
    reads the text for some of the experts, and writes their files. One file is one worker's, with
    sums in the order of the text: with as many threads, the bytes are those of one process.

    Raises MoeboundError for a folder that holds something else, UnsupportedArchitectureError for a
    dense model or a family whose experts cannot be heard, StoreError for a full disk.
    """
    of = _of(loaded, text, settings)
    run = _Run(loaded, text, out, of, _begin(out, of, settings.memory))
    if (out / FILE).is_file():
        return read_statistics(out)
    live = live_experts(loaded.model)
    spans, n = list(_spans(live.stacks, of, settings.memory)), len(text.rows)
    if workers is not None:
        missing = [at for at, some in enumerate(spans) if not run.has(some)]
        finished = len(spans) - len(missing)
        for at in workers.run(missing, {}):
            finished += 1
            say(_named(spans[at]), finished * n, len(spans) * n)
        return run.finish(spans)
    for at, some in enumerate(spans):

        def done(sequences: int, at: int = at) -> None:
            say(_named(spans[at]), at * n + sequences, len(spans) * n)

        run.read(some, done)
    return run.finish(spans)


def _of(loaded: Loaded, text: Text, settings: Settings) -> Of:
    live = live_experts(loaded.model)
    shapes = {tuple(entry.stack.view("down", 0).shape) for entry in live.stacks}
    if len(shapes) > 1:
        raise MoeboundError(
            f"{loaded.source.name}: layers with experts of different sizes {sorted(shapes)}; "
            "statistics are of one size"
        )
    width, hidden = shapes.pop()
    if settings.fisher:
        if not settings.routed:
            raise MoeboundError(
                "the loss feels nothing of tokens that are not sent to an expert: --fisher and "
                "--all-tokens do not go together"
            )
        for entry in live.stacks:
            check_differentiable(entry.stack)
    if settings.answer_weight != 1 and not (settings.fisher and text.prompts):
        raise MoeboundError(
            f"answers count {settings.answer_weight:g} times (--answer-weight): expected --fisher, "
            f"and a task, which says what an answer is; {text.name} has {len(text.prompts)} prompts"
        )
    return Of(
        model=loaded.source.name,
        fingerprint=settings.fingerprint or of_corners(live),
        text=text.name,
        text_sha256=text.sha256,
        n_sequences=len(text.rows),
        n_tokens=text.n_tokens,
        routed=settings.routed,
        moments=settings.moments,
        width=width,
        inner=hidden,
        searched=settings.search,
        after=settings.after,
        affinity=settings.affinity,
        fisher=settings.fisher,
        answer_weight=settings.answer_weight,
    )


class Reader:
    """What a worker has: the model, and the passes over the text that it may be told to make."""

    def __init__(self, loaded: Loaded, text: Text, out: Path, settings: Settings) -> None:
        of = _of(loaded, text, settings)
        self._run = _Run(loaded, text, out, of, set())
        self._spans = list(_spans(live_experts(loaded.model).stacks, of, settings.memory))

    def use(self, known: Mapping[str, Any]) -> None:
        """Passes need to know nothing of each other."""

    def run(self, at: int) -> int:
        self._run.read(self._spans[at], lambda _: None)
        return at


def reader(
    src: str,
    dtype: str,
    device: str,
    text: Text,
    out: Path,
    settings: Settings,
    edited_by: Path | None,
    fingerprint: str,
    threads: int | None,
) -> Reader:
    """A worker's. edited_by: statistics that `settings.after` chooses by. fingerprint: of the
    experts that the process which asked has; MoeboundError where src has others here."""
    if threads is not None:
        torch.set_num_threads(threads)
    loaded = load(src, dtype=dtype, device=device)
    if of_corners(live_experts(loaded.model)) != fingerprint:
        raise MoeboundError(
            f"{src}: a worker finds other weights there than the process that asked; all machines "
            "must see the same files"
        )
    if settings.after is not None and edited_by is not None:
        edit_model(loaded.model, settings.after, read_statistics(edited_by))
    return Reader(loaded, text, out, settings)


def _spans(stacks: Sequence[ExpertsModule], of: Of, memory: int) -> Iterator[tuple[Span, ...]]:
    """What each pass sums up: as many experts as fit, in the order of the model."""
    # While it is summed up, H is a whole matrix.
    power = 2 if of.moments == "full" else 1
    room = max(1, memory // ((8 if of.affinity else 4) * (of.width**power + of.inner**power)))
    taken: list[Span] = []
    left = room
    for entry in stacks:
        first = 0
        while first < entry.stack.n_experts:
            n = min(left, entry.stack.n_experts - first)
            taken.append(Span(entry, first, n))
            first, left = first + n, left - n
            if left == 0:
                yield tuple(taken)
                taken, left = [], room
    if taken:
        yield tuple(taken)


def _named(spans: Sequence[Span]) -> str:
    first, last = spans[0].entry.layer, spans[-1].entry.layer
    return f"layer {first}" if first == last else f"layers {first} to {last}"


def _begin(out: Path, of: Of, memory: int) -> set[str]:
    """Make the folder, or look what is finished in it. Returns the names of finished files."""
    if out.exists() and not out.is_dir():
        raise MoeboundError(f"{out}: exists and is no folder; statistics are a folder")
    out.mkdir(parents=True, exist_ok=True)
    # Which experts a file has depends on the memory: what is unfinished goes on with the same.
    said = of.to_json() | {
        "after": of.after,
        "affinity": of.affinity or None,
        "fisher": of.fisher or None,
        "answer_weight": of.to_json().get("answer_weight"),
    }
    wanted = {FILE: said, UNFINISHED: said | {"memory": memory}}
    marks = [name for name in wanted if (out / name).is_file()]
    if not marks and any(path.name != KEPT for path in out.iterdir()):
        raise MoeboundError(
            f"{out}: not empty, and not of `moebound calibrate`; give a folder of its own"
        )
    for mark in marks:
        found = load_json(out / mark)
        for name, value in wanted[mark].items():
            there = found.get(name) if isinstance(found, dict) else None
            if there != value:
                raise MoeboundError(
                    f"{out / mark}: of another run ({name} is {there!r}, asked is {value!r}); "
                    "give another folder, or remove this one"
                )
    if FILE in marks:
        return set()
    save_json(out / UNFINISHED, wanted[UNFINISHED])
    return {path.name for path in out.glob("layer-*.safetensors")}


class _Stop(Exception):
    """Nothing behind this layer is needed."""


@dataclass
class _Run:
    loaded: Loaded
    text: Text
    out: Path
    of: Of
    finished: set[str]
    tables: dict[int, Any] = field(default_factory=dict)

    def has(self, spans: Sequence[Span]) -> bool:
        return all(span.part.file in self.finished for span in spans)

    def read(self, spans: Sequence[Span], done: Callable[[int], None]) -> None:
        """Read the text once for these experts, and write their files."""
        if self.has(spans):
            done(len(self.text.rows))
            return
        sums = [Sums(span, self.of, self.loaded.device) for span in spans]
        model = self.loaded.model
        mask = torch.zeros(0, dtype=torch.bool)
        recomputing = Recomputing(decoder_layers(model, spans[0].entry) if self.of.fisher else ())
        with torch.no_grad(), ExitStack() as hooks:
            hooks.enter_context(recomputing)
            for at, some in enumerate(sums):
                last = at == len(sums) - 1
                if (router := router_of(model, some.span.entry.stack.name)) is not None:
                    hooks.callback(router.register_forward_hook(some.hear_router).remove)

                def heard(pairs: Pairs, output: torch.Tensor | None, some: Sums = some,
                          last: bool = last) -> None:  # fmt: skip
                    if recomputing.now:
                        return
                    some.add(pairs, output, mask)
                    if last and not self.of.fisher:
                        raise _Stop

                def early(some: Sums = some, last: bool = last) -> bool:
                    # Nobody needs what it gives, unless the loss does.
                    return last and some.checked and not self.of.fisher

                handle = listen_early(some.span.entry.stack, lambda: mask.numel(), heard, early)
                hooks.callback(handle.remove)
                if self.of.fisher:
                    hooks.enter_context(
                        told_of_gradients(some.span.entry.module, some.add_gradient, recomputing)
                    )
            labels = Labels(self.text, self.of.answer_weight) if self.of.fisher else None
            if labels is not None:
                hooks.enter_context(with_gradients(model))
            n, rows = 0, [(row, ()) for row in self.text.rows]
            for indices in batches(rows, READ_TOKENS if labels is None else FISHER_TOKENS):
                batch = pad([rows[index] for index in indices], 0)
                mask = batch.attention_mask.bool()
                with suppress(_Stop):
                    found = model(
                        input_ids=batch.input_ids.to(self.loaded.device),
                        attention_mask=batch.attention_mask.to(self.loaded.device),
                        use_cache=False,
                    )
                    if labels is not None:
                        logits = predicted(found, self.loaded.source.name)
                        torch.autograd.backward(labels.loss(logits, batch, indices))
                        del found, logits
                n += len(indices)
                done(n)
        for some in sums:
            span, chunk = some.span, some.chunk()
            if self.of.searched:
                table = self._searched(span.entry)
                chunk = replace(chunk, kept=table[span.first : span.first + span.n])
            chunk.save(self.out)

    @torch.no_grad()
    def _searched(self, entry: ExpertsModule) -> Any:
        """The best sets of a layer. The text is read as far as it is searched on, to that layer."""
        if entry.layer not in self.tables:
            config = self.loaded.model.config.to_dict()
            groups, chosen = router_groups_of(config)
            least = max(-(-top_k_of(config) // chosen), 1 if groups == 1 else 2)
            search = Search(self.loaded.model, entry, groups, least)
            with search.listen():
                for row in self.text.rows:
                    self.loaded.model(
                        input_ids=torch.tensor([row], device=self.loaded.device), use_cache=False
                    )
                    if search.n_tokens >= TOKENS:
                        break
            self.tables = {entry.layer: search.table()}  # of one layer at a time
        return self.tables[entry.layer]

    def finish(self, spans: Sequence[Sequence[Span]]) -> Statistics:
        save_statistics(self.out, self.of, [span.part for some in spans for span in some])
        (self.out / UNFINISHED).unlink(missing_ok=True)
        return read_statistics(self.out)
