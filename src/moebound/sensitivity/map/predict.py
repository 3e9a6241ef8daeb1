"""Predicted KL of every expert of a layer, at every rate, from one pass over the text.

For expert e with weight error dW, the layer's output changes by dy_t = w_t · (expert(x_t; W + dW) -
expert(x_t; W)) at the tokens t that are sent to it: computed exactly, with the codec's real error,
from the inputs that were stored. With g and h the gradients of `observe`, m and C the margins and
costs of `ties`,

    KL ≈ ( ½ · mean over probes of Σ over sequences (Σ over tokens g_t · dy_t)²
           + Σ over ties C · P(m + Σ over tokens h_t · dy_t < 0) ) / scored positions.

The first term is smooth, and grows with the square of the error; the second is what routers that
change their mind cost. Left out: what is beyond first order in the layers between, flips of
decisions that are not among the ties, and what two flips do together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from moebound.checkpoint.families import Role
from moebound.model.undo import Matrices, exactly_undone
from moebound.sensitivity.decoded import Original
from moebound.sensitivity.map.observe import Seen

Floats = npt.NDArray[np.float64]

_UNSURE = 0.1
"""Error of a predicted change of a margin, relative to it."""

_PAIR_VALUES = 1 << 24
"""Gradients are gathered for so many values at a time."""


@dataclass(frozen=True, eq=False)
class Change:
    """What one rate does to a layer. weights: of each expert, as changed. seen: the batches. by:
    [P, H] of each, the change of each pair's share of the output, float32."""

    weights: Sequence[Matrices]
    seen: Sequence[Seen]
    by: Sequence[torch.Tensor]


@contextmanager
def replaced(
    originals: Sequence[Original], weights: Sequence[Matrices], role: Role | None = None
) -> Iterator[None]:
    """Inside of the `with`, these experts have the other weights; role: in that projection only."""
    with exactly_undone([original.expert for original in originals]) as undo:
        for original, new in zip(originals, weights, strict=True):
            live = original.expert.matrices if role is not None else {}
            undo.replace(original.expert, new if role is None else {**live, role: new[role]})
        yield


class Layer:
    """The experts of one module, with what was seen of them."""

    def __init__(
        self, originals: Sequence[Original], seen: Sequence[Seen], n_gradients: int
    ) -> None:
        """n_gradients: G, of each of `seen`, which is empty for a module that was never called."""
        self.originals, self.seen, self.n_gradients = originals, seen, n_gradients
        self._before = [part.pairs.outputs().float() for part in seen]

    def change(self, weights: Sequence[Matrices], role: Role | None = None) -> Change:
        """What other weights do to each pair's share of the layer's output."""
        with replaced(self.originals, weights, role):
            after = [part.pairs.outputs().float() for part in self.seen]
        by = [new.sub_(old) for new, old in zip(after, self._before, strict=True)]
        return Change(weights, self.seen, by)

    def slopes(self, changes: Sequence[Change], n_sequences: int) -> torch.Tensor:
        """[C, G, E, N]: Σ over an expert's tokens of gradient · dy, of C changes, by gradient (S
        probes, then M margins), expert and sequence."""
        n_experts, n_gradients = len(self.originals), self.n_gradients
        total = torch.zeros(n_experts * n_sequences, n_gradients * len(changes))
        for place, part in enumerate(self.seen):
            gradients = part.gradients.transpose(0, 1).float()  # [T, G, H]
            moved = torch.stack([change.by[place] for change in changes], -1)  # [P, H, C]
            cell = part.pairs.expert * n_sequences + part.sequence
            size = max(1, _PAIR_VALUES // gradients[0].numel()) if len(gradients) else 1
            for start in range(0, len(cell), size):
                some = slice(start, start + size)
                slope = torch.bmm(gradients[part.pairs.token[some]], moved[some])  # [P', G, C]
                total.index_add_(0, cell[some].cpu(), slope.flatten(1).cpu())
        return total.view(n_experts, n_sequences, n_gradients, len(changes)).permute(3, 2, 0, 1)


@dataclass(frozen=True, eq=False)
class Response:
    """What slopes mean in KL. n_probes: S. margins, costs: [N, M] of each sequence's ties, in the
    order of its gradients. n_positions: scored ones."""

    n_probes: int
    margins: torch.Tensor
    costs: torch.Tensor
    n_positions: int

    def smooth(self, slopes: torch.Tensor) -> Floats:
        """[..., G, E, N] -> [..., E]: the first term, nats a position."""
        probes = slopes[..., : self.n_probes, :, :].double()
        found: Floats = (probes.square().sum(-1).mean(-2) / (2 * self.n_positions)).numpy()
        return found

    def flips(self, slopes: torch.Tensor) -> Floats:
        """[..., G, E, N] -> [..., E]: the second term, nats a position."""
        moved = slopes[..., self.n_probes :, :, :].double()  # [..., M, E, N]
        margins, costs = (x.double().T[:, None, :] for x in (self.margins, self.costs))
        # First order says where the margin goes to about a tenth.
        spread = _UNSURE * moved.abs() + torch.finfo(torch.float64).tiny
        likely = torch.special.ndtr(-(margins + moved) / spread)
        found: Floats = ((likely * costs).sum((-3, -1)) / self.n_positions).numpy()
        return found
