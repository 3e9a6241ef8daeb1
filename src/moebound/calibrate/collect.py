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

import numpy as np
import torch

from moebound.calibrate.edited import edit_model
from moebound.calibrate.fisher import READ_TOKENS as FISHER_TOKENS
from moebound.calibrate.fisher import Labels, told_of_gradients, with_gradients
from moebound.calibrate.search import TOKENS, Search
from moebound.calibrate.self_sampling import KEPT
from moebound.calibrate.text import Text
from moebound.checkpoint import Role, top_k_of
from moebound.checkpoint.families import router_groups_of
from moebound.errors import MoeboundError
from moebound.evaluate.loading import Loaded, load
from moebound.evaluate.text import batches, pad
from moebound.files.documents import load_json, save_json
from moebound.files.formats.statistics import (
    FILE,
    RATIOS,
    Chunk,
    Moments,
    Of,
    Part,
    Statistics,
    packed_size,
    read_statistics,
    save_statistics,
)
from moebound.jobs.workers import Workers
from moebound.model.calls import Pairs, listen_early
from moebound.model.fingerprint import of_corners
from moebound.model.gradients import check_differentiable, pair_gradients
from moebound.model.inner import inner
from moebound.model.live import ExpertsModule, live_experts
from moebound.model.routers import router_of

UNFINISHED = "unfinished.json"
MEMORY = 1 << 30
READ_TOKENS = 4096
"""Tokens read at once, padding counted."""
_BLOCK = 512
"""Rows of H that are added to at once; what is left of them below the diagonal is not."""

Say = Callable[[str, int, int], None]
"""Called with what is done, sequences read, and sequences to be read in all passes."""


@dataclass(frozen=True)
class Settings:
    """routed: experts see the tokens sent to them, else all. moments: all of H, or its diagonal.
    memory: bytes of H that are held at once; one expert's at least. search: also for the sets of
    experts that can be left out (`search.py`). after: the setting of the method that has edited the
    model (`edited.py`); fingerprint: of the experts before that, None where nothing was done.
    affinity: sum up g x xᵀ, too. fisher: weighted by what the loss feels (`fisher.py`), in the
    place of g²."""

    routed: bool = True
    moments: Moments = "full"
    memory: int = MEMORY
    search: bool = False
    after: str | None = None
    affinity: bool = False
    fisher: bool = False
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


@dataclass(frozen=True)
class Span:
    """Some experts of one layer: those from `first` on, counted within its module."""

    entry: ExpertsModule
    first: int
    n: int

    @property
    def part(self) -> Part:
        return Part.of(self.entry.layer, self.entry.first + self.first, self.n)


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
        sums = [_Sums(span, self.of, self.loaded.device) for span in spans]
        model = self.loaded.model
        mask = torch.zeros(0, dtype=torch.bool)
        with torch.no_grad(), ExitStack() as hooks:
            for at, some in enumerate(sums):
                last = at == len(sums) - 1
                if (router := router_of(model, some.span.entry.stack.name)) is not None:
                    hooks.callback(router.register_forward_hook(some.hear_router).remove)

                def heard(pairs: Pairs, output: torch.Tensor | None, some: _Sums = some,
                          last: bool = last) -> None:  # fmt: skip
                    some.add(pairs, output, mask)
                    if last and not self.of.fisher:
                        raise _Stop

                def early(some: _Sums = some, last: bool = last) -> bool:
                    # Nobody needs what it gives, unless the loss does.
                    return last and some.checked and not self.of.fisher

                handle = listen_early(some.span.entry.stack, lambda: mask.numel(), heard, early)
                hooks.callback(handle.remove)
                if self.of.fisher:
                    hooks.enter_context(
                        told_of_gradients(some.span.entry.module, some.add_gradient)
                    )
            labels = Labels(self.text) if self.of.fisher else None
            if labels is not None:
                hooks.enter_context(with_gradients(model))
            n, rows = 0, [(row, ()) for row in self.text.rows]
            for indices in batches(rows, READ_TOKENS if labels is None else FISHER_TOKENS):
                batch = pad([rows[index] for index in indices], 0)
                mask = batch.attention_mask.bool()
                with suppress(_Stop):
                    logits = model(
                        input_ids=batch.input_ids.to(self.loaded.device),
                        attention_mask=batch.attention_mask.to(self.loaded.device),
                        use_cache=False,
                    ).logits
                    if labels is not None:
                        torch.autograd.backward(labels.loss(logits, batch, indices))
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


class _Sums:
    """Of some experts of one layer, while the text is read. On the model's device."""

    def __init__(self, span: Span, of: Of, device: torch.device) -> None:
        # Whose experts put out constants cannot be checked; the model was, before it was edited.
        self.span, self.of, self.checked = span, of, of.after is not None
        full = of.moments == "full"

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.tokens = zeros(span.n, dtype=torch.int64)
        self.gates = zeros(span.n, dtype=torch.float64)
        # One by one, so that each can go when it is packed. Of a whole H, only the upper half.
        # By what g, or its square root, multiplies: H of g², and that of g if it is asked for.
        self.moments = [
            tuple(
                [zeros(n, *([n] if full else [])) for _ in range(span.n)]
                for n in (of.width, of.inner)
            )
            for _ in range(1 + of.affinity)
        ]
        self.outputs = zeros(span.n, 2, of.width)
        self.sent = zeros(span.n, dtype=torch.int64)
        self.sent_gates = zeros(span.n, dtype=torch.float64)
        self.norms = zeros(span.n, dtype=torch.float64)
        self.plain = zeros(span.n, 2, of.width, dtype=torch.float64)
        self.ratios = zeros(span.n, RATIOS, dtype=torch.int64)
        # Of --fisher: a call whose gradient has not come yet, and sums of squares by row.
        self.open: Pairs | None = None
        self.rows: dict[Role, torch.Tensor] = {}
        if of.fisher:
            self.rows = {
                role: zeros(span.n, of.width if role == "down" else of.inner, dtype=torch.float64)
                for role in span.entry.stack.places
            }
        self.logits: torch.Tensor | None = None
        self.heard: torch.Tensor | None = None

    def hear_router(self, _router: Any, _args: Any, output: Any) -> None:
        """Keep the logits of the call that comes next: the first part that has one an expert."""
        for part in output if isinstance(output, tuple) else (output,):
            floats = isinstance(part, torch.Tensor) and part.is_floating_point()
            if floats and part.shape[-1] == self.span.entry.stack.n_experts:
                self.heard = part.detach().reshape(-1, part.shape[-1]).double()
                return

    @torch.no_grad()
    def add_gradient(self, gradient: torch.Tensor) -> None:
        """gradient: [T, H], of the loss by the output of the call that `add` heard last."""
        pairs, self.open = self.open, None
        if pairs is None:
            return  # a call outside of the text
        found = pair_gradients(pairs, gradient)
        loads = [found.routed.loads[expert] for expert in found.routed.used]
        into = tuple(role for role in found.gradients if role != "down")
        squares = {role: g.float().square() for role, g in found.gradients.items()}
        sides = (
            (self.moments[0][0], found.inputs, sum(squares[role].sum(1) for role in into)),
            (self.moments[0][1], found.hidden, squares["down"].sum(1)),
        )
        for sums, values, weights in sides:
            parts = zip(torch.split(values, loads), torch.split(weights, loads), strict=True)  # type: ignore[arg-type]
            for expert, (x, s) in zip(found.routed.used, parts, strict=True):
                self._add_moments(sums[expert - self.span.first], s.sqrt()[:, None] * x.float())
        for role, of_role in squares.items():
            for expert, some in zip(found.routed.used, torch.split(of_role, loads), strict=True):
                self.rows[role][expert - self.span.first] += some.double().sum(0)

    def _add_moments(self, into: torch.Tensor, values: torch.Tensor) -> None:
        if self.of.moments == "full":
            _add_moments(into, values)
        else:
            into += values.square().sum(0)

    @torch.no_grad()
    def add(self, pairs: Pairs, output: torch.Tensor | None, mask: torch.Tensor) -> None:
        """pairs: all of a call. output: of the call, None once it was compared. mask: [B, T] bool,
        tokens that are no padding."""
        if output is not None and not self.checked:
            inner(pairs).check(pairs.stack, output)
            self.checked = True
        real = mask.flatten().to(pairs.token.device)
        first, n = self.span.first, self.span.n
        sent = pairs.among(real)
        some = sent if self.of.routed else _everywhere(pairs, real)
        mine = (some.expert >= first) & (some.expert < first + n)
        found = inner(some.where(mine))
        if self.of.fisher:
            self.open = some.where(mine)
        gates = torch.zeros(len(real), pairs.stack.n_experts, device=real.device)
        gates[sent.token, sent.expert] = 1 if sent.weights is None else sent.weights.float()
        loads = [found.routed.loads[expert] for expert in found.routed.used]
        columns = (found.weights, found.inputs, found.hidden, found.outputs, found.token)
        self.sent += torch.bincount(sent.expert, minlength=first + n)[first : first + n]
        self.sent_gates += gates[:, first : first + n].double().sum(0)
        self._add_ratios(gates[real])
        self._add_logits(real)
        for expert, *some_of, token in zip(
            found.routed.used, *(torch.split(c, loads) for c in columns), strict=True
        ):
            g, x, h, y = (part.float() for part in some_of)  # one expert's at a time
            at = expert - first
            self.norms[at] += (gates[token, expert] * y.norm(dim=1)).double().sum()
            self.plain[at, 0] += y.double().sum(0)
            self.plain[at, 1] += y.double().square().sum(0)
            self.tokens[at] += len(g)
            self.gates[at] += g.double().sum()
            root = g.clamp_min(0).sqrt()
            for which, (weights, sums) in enumerate(zip((g, root), self.moments, strict=False)):
                if which == 0 and self.of.fisher:
                    continue  # weighted when the gradient has come
                for into, values in ((sums[0][at], x), (sums[1][at], h)):
                    self._add_moments(into, weights[:, None] * values)
            share = g[:, None] * y
            self.outputs[at, 0] += share.sum(0)
            self.outputs[at, 1] += share.square().sum(0)

    def _add_ratios(self, gates: torch.Tensor) -> None:
        """gates: [T, E], of real tokens; 0 for experts that are not chosen."""
        if gates.shape[1] < 2:
            return
        largest, place = gates.topk(2, dim=1)
        leading = place[:, 0] - self.span.first
        mine = (leading >= 0) & (leading < self.span.n) & (largest[:, 0] > 0)
        ratio = largest[mine, 1] / largest[mine, 0]
        step = (ratio * RATIOS).long().clamp_max(RATIOS - 1)
        counted = torch.bincount(leading[mine] * RATIOS + step, minlength=self.ratios.numel())
        self.ratios += counted.view_as(self.ratios)

    def _add_logits(self, real: torch.Tensor) -> None:
        heard, self.heard = self.heard, None
        if heard is None or len(heard) != len(real):
            return
        heard = heard[real.to(heard.device)].nan_to_num(0.0, 0.0, 0.0)  # never chosen: -inf
        mine = heard[:, self.span.first : self.span.first + self.span.n]
        added = mine.T @ heard
        self.logits = added if self.logits is None else self.logits + added

    def chunk(self) -> Chunk:
        inputs, hidden, *affinity = (_packed(sums) for pair in self.moments for sums in pair)
        return Chunk(
            self.span.part,
            tokens=self.tokens.cpu().numpy(),
            gates=self.gates.cpu().numpy(),
            inputs=inputs,
            hidden=hidden,
            outputs=self.outputs.cpu().numpy(),
            sent=self.sent.cpu().numpy(),
            sent_gates=self.sent_gates.cpu().numpy(),
            norms=self.norms.cpu().numpy(),
            plain=self.plain.cpu().numpy(),
            ratios=self.ratios.cpu().numpy(),
            logits=None if self.logits is None else self.logits.cpu().numpy(),
            **dict(zip(("inputs_affinity", "hidden_affinity"), affinity, strict=False)),
            **{f"{role}_rows": sums.cpu().numpy() for role, sums in self.rows.items()},
        )


def _add_moments(into: torch.Tensor, values: torch.Tensor) -> None:
    """Xᵀ X of values X [T, N] onto the upper half of `into` [N, N], and some of the lower; or its
    diagonal onto `into` [N]."""
    if into.dim() == 1:
        into += values.square().sum(0)
        return
    n = len(into)
    for start in range(0, n, _BLOCK):
        some = slice(start, min(start + _BLOCK, n))
        into[some, start:].addmm_(values[:, some].T, values[:, start:])


def _packed(sums: list[torch.Tensor]) -> Any:
    """[N, N] of each expert -> [E, N(N+1)/2]; diagonals as they are. Empties the list."""
    n, full = sums[0].shape[-1], sums[0].dim() == 2
    found = np.empty((len(sums), packed_size(n) if full else n), np.float32)
    rows = np.triu_indices(n) if full else (np.arange(n),)
    for at in range(len(sums)):
        found[at] = sums.pop(0).cpu().numpy()[rows]
    return found


def _everywhere(pairs: Pairs, real: torch.Tensor) -> Pairs:
    """Every real token, sent to every expert with weight 1."""
    if pairs.weights is None:
        raise MoeboundError(
            f"{pairs.stack.name}: its experts get their inputs scaled by the routing, so there are "
            "no inputs of tokens that were not sent to them; leave --all-tokens out"
        )
    tokens, n = real.nonzero()[:, 0], pairs.stack.n_experts
    expert = torch.arange(n, device=tokens.device).repeat_interleave(len(tokens))
    weights = torch.ones(len(expert), dtype=pairs.weights.dtype, device=tokens.device)
    return replace(pairs, token=tokens.repeat(n), expert=expert, weights=weights)
