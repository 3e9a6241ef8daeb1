"""Passes over the calibration text with gradients: what moves the model's predictions, and what
moves its routers.

Predictions. For the distribution p of the next token at one position, with logits s, the Fisher
information is F = diag(p) - p pᵀ, and for a small change ds

    KL(p || p') = ½ dsᵀ F ds + O(ds³).

A random vector v = √p ∘ z - p (√p · z), with independent signs z, has E[v vᵀ] = F. So one backward
pass of v, at all scored positions at once, gives for each layer's output y the gradient g = Jᵀ v,
J = ds/dy, and for any change dy of that output

    E[(g · dy)²] = Σ over positions dsᵀ F ds = 2 · Σ over positions KL,

g · dy taken over all tokens of a sequence: that a change at one token is felt at later ones is in
it, and positions do not mix on average, since their signs are independent. (Sampled labels would
do too, v = onehot(y) - p, but a confident model's rare labels then make or break the estimate.)
The trick is Hutchinson's (1990); Fisher information for the cost of compressed weights goes back to
Optimal Brain Damage (LeCun et al., 1990).

Routers. The gradient of one decision's margin (`margins`), one of each sequence in one backward
pass, says for any dy whether that decision will flip.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from moebound.errors import MoeboundError
from moebound.evaluate.calibration import Calibration
from moebound.model.calls import Heard, Pairs, listen
from moebound.model.live import ExpertsModule
from moebound.sensitivity.map.margins import Choices, Margin


@dataclass(eq=False)
class Pass:
    """One batch, forward, with a graph behind it.

    rows: its sequences. length: its padded tokens a sequence. By experts module (its place in the
    list asked for): pairs, margins, and a leaf of zeros [T, H] that was added to its output.
    """

    rows: slice
    length: int
    logits: torch.Tensor
    scored: torch.Tensor
    real: torch.Tensor
    pairs: dict[int, Pairs]
    margins: dict[int, Margin]
    leaves: dict[int, torch.Tensor]

    def gradients(
        self, output: torch.Tensor, weights: torch.Tensor | None, keep: Collection[int]
    ) -> dict[int, torch.Tensor]:
        """Of (output · weights), by the leaves of `keep`: [T, H] each. The graph stays."""
        places = [place for place in self.leaves if place in keep]
        if not places or output.grad_fn is None:
            return {place: torch.zeros_like(self.leaves[place]) for place in places}
        parts = torch.autograd.grad(
            output, [self.leaves[p] for p in places], weights, retain_graph=True, allow_unused=True
        )
        return {
            place: torch.zeros_like(self.leaves[place]) if part is None else part
            for place, part in zip(places, parts, strict=True)
        }

    def fisher_probes(
        self, n_probes: int, generator: torch.Generator, keep: Collection[int]
    ) -> dict[int, torch.Tensor]:
        """[S, T, H] for each module of `keep`: gradients g as above."""
        with torch.no_grad():
            p = torch.softmax(self.logits.detach()[self.scored].float(), -1)  # [positions, V]
            root = p.sqrt()
        found: dict[int, list[torch.Tensor]] = {}
        for _ in range(n_probes):
            signs = torch.randint(0, 2, p.shape, generator=generator).to(p) * 2 - 1
            weighted = root * signs
            v = torch.zeros_like(self.logits)
            v[self.scored] = (weighted - p * (root * weighted).sum(-1, keepdim=True)).to(v.dtype)
            for place, part in self.gradients(self.logits, v, keep).items():
                found.setdefault(place, []).append(part)
        return {place: torch.stack(parts) for place, parts in found.items()}


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """No gradients of parameters: only what is asked for is differentiated."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def forward(
    model: Any,
    calibration: Calibration,
    entries: Sequence[ExpertsModule],
    rows: slice,
    *,
    check: bool = False,
) -> Pass:
    """Read a batch.

    check: that the experts' shares add up to each module's output. Raises
    UnsupportedArchitectureError for a family whose experts cannot be looked at one by one,
    MoeboundError for a module that is called twice in a pass.
    """
    inputs = calibration.inputs(rows, model.device)
    n_tokens = inputs["input_ids"].numel()
    pairs: dict[int, Pairs] = {}
    margins: dict[int, Margin] = {}
    leaves: dict[int, torch.Tensor] = {}
    outputs: dict[int, torch.Tensor] = {}
    choices = Choices()

    def hear(place: int) -> Heard:
        def heard(found: Pairs, output: torch.Tensor) -> torch.Tensor:
            if place in pairs:
                raise MoeboundError(
                    f"{found.stack.name}: called twice in one pass (by a layer that is used "
                    "again, or in chunks); a map needs one call"
                )
            pairs[place], outputs[place] = found, output.detach()
            margin = choices.take(n_tokens, found.stack.n_experts)
            if margin is not None and found.weights is not None:
                margins[place] = margin
            leaves[place] = torch.zeros_like(output, requires_grad=True)
            return output + leaves[place]

        return heard

    with ExitStack() as hooks, torch.enable_grad(), choices:
        for place, entry in enumerate(entries):
            hooks.callback(listen(entry.stack, lambda: n_tokens, hear(place)).remove)
        logits = model(**inputs).logits
    for place, found in pairs.items():
        if check:
            found.check(outputs[place])
    length = logits.shape[1]
    scored = calibration.scored[rows, :length].to(logits.device)
    real = inputs["attention_mask"].reshape(-1).bool()
    return Pass(rows, length, logits, scored, real, pairs, margins, leaves)


def probe_generator(seed: int, rows: slice) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + rows.start)


@dataclass(frozen=True, eq=False)
class Seen:
    """What one batch showed of one experts module.

    rows: the batch's sequences. length: its padded tokens a sequence. pairs: of tokens that are no
    padding. gradients: [G, T, H], of the S probes, then of the M margins of each sequence.
    """

    rows: slice
    length: int
    pairs: Pairs
    gradients: torch.Tensor

    @property
    def sequence(self) -> torch.Tensor:
        """[P] index of each pair's sequence."""
        first: int = self.rows.start
        return self.pairs.token // self.length + first

    @property
    def position(self) -> torch.Tensor:
        """[P] place of each pair's token in its sequence."""
        return self.pairs.token % self.length


Ties = Sequence[Sequence[tuple[int, int]]]
"""For each sequence, decisions: (place of the experts module, position of the token)."""


def observe(
    model: Any,
    calibration: Calibration,
    entries: Sequence[ExpertsModule],
    keep: Sequence[int],
    *,
    ties: Ties,
    n_probes: int,
    seed: int,
    tokens: int,
    done: Callable[[int], None] = lambda _: None,
) -> dict[int, list[Seen]]:
    """By place of the experts modules of `keep`: what each batch of so many tokens showed.

    ties: the decisions whose margins' gradients are wanted; the same number for each sequence.
    done: called with the number of sequences after each batch. Raises as `forward`.
    """
    found: dict[int, list[Seen]] = {place: [] for place in keep}
    with frozen(model):
        for rows in calibration.batches(tokens):
            now = forward(model, calibration, entries, rows)
            gradients = {
                place: [part]
                for place, part in now.fisher_probes(
                    n_probes, probe_generator(seed, rows), keep
                ).items()
            }
            for decisions in zip(*ties[rows], strict=True):
                total = torch.stack(
                    [
                        now.margins[place].values[row * now.length + position]
                        for row, (place, position) in enumerate(decisions)
                    ]
                ).sum()
                for place, part in now.gradients(total, None, keep).items():
                    gradients[place].append(part[None])
            for place, parts in gradients.items():
                pairs = now.pairs[place].among(now.real)
                found[place].append(Seen(rows, now.length, pairs, torch.cat(parts)))
            done(rows.stop - rows.start)
    return found
