"""All experts of one module at all rates: from what was seen of them to lines of the map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moebound.checkpoint.families import Role
from moebound.files.formats.sensitivity_map import ExpertLine, RoleLine
from moebound.model.live import ExpertsModule, LiveExperts
from moebound.sensitivity.decoded import Original
from moebound.sensitivity.map.observe import Seen
from moebound.sensitivity.map.predict import Change, Floats, Layer, Response
from moebound.types import ExpertKey


@dataclass(frozen=True, eq=False)
class LayerPrediction:
    """E experts at R rates, perturbed as a whole, and projection by projection: V variants.

    changes: R, of the whole experts. smooth, flips: [R, V, E], the two terms of KL. slopes:
    [R, G, N], of all experts together. n_bytes: by rate, by expert. n_tokens: sent to each expert.
    """

    entry: ExpertsModule
    originals: Sequence[Original]
    roles: Sequence[Role]
    changes: Sequence[Change]
    smooth: Floats
    flips: Floats
    slopes: torch.Tensor
    n_bytes: Sequence[Sequence[Mapping[Role, int]]]
    n_tokens: Sequence[int]

    def lines(self, measured: Mapping[int, Sequence[float]]) -> list[ExpertLine]:
        """measured: KL at each rate, by place of the expert in the module."""
        kl = self.smooth + self.flips
        lines = []
        for index, original in enumerate(self.originals):
            found = measured.get(index)
            by_role = {
                str(role): RoleLine(
                    original.stats[role].mean_abs,
                    tuple(sizes[index][role] for sizes in self.n_bytes),
                    _floats(kl[:, variant, index]),
                    _floats(self.flips[:, variant, index]),
                )
                for variant, role in enumerate(self.roles, start=1)
            }
            line = ExpertLine(
                key=ExpertKey(self.entry.layer, self.entry.first + index),
                mean_abs=original.whole.mean_abs,
                n_weights=original.whole.count,
                n_tokens=self.n_tokens[index],
                n_bytes=tuple(sum(sizes[index].values()) for sizes in self.n_bytes),
                predicted_kl=_floats(kl[:, 0, index]),
                flips_kl=_floats(self.flips[:, 0, index]),
                measured_kl=None if found is None else tuple(map(float, found)),
                by_role=by_role,
            )
            lines.append(line)
        return lines


def predict_layer(
    live: LiveExperts,
    entry: ExpertsModule,
    seen: Sequence[Seen],
    response: Response,
    *,
    rates: Sequence[float],
    codec: str,
) -> LayerPrediction:
    """seen: by batch, with the gradients that `response` is of. Raises as `moebound.encode`."""
    originals = [
        Original.of(live[ExpertKey(entry.layer, entry.first + index)])
        for index in range(entry.stack.n_experts)
    ]
    roles = list(originals[0].arrays)
    n_sequences, n_ties = response.margins.shape
    layer = Layer(originals, seen, response.n_probes + n_ties)
    changes: list[Change] = []
    smooth: list[Floats] = []
    flips: list[Floats] = []
    together: list[torch.Tensor] = []
    n_bytes: list[list[dict[Role, int]]] = []
    for rate in rates:
        coded = [original.decoded_at(rate, codec) for original in originals]
        weights = [new for new, _ in coded]
        whole = layer.change(weights)
        parts = [layer.change(weights, role) for role in roles]
        slopes = layer.slopes([whole, *parts], n_sequences)
        smooth.append(response.smooth(slopes))
        flips.append(response.flips(slopes))
        together.append(slopes[0].sum(1))
        changes.append(whole)
        n_bytes.append([sizes for _, sizes in coded])
    n_tokens = torch.zeros(len(originals), dtype=torch.long)
    for part in seen:
        n_tokens += torch.bincount(part.pairs.expert.cpu(), minlength=len(originals))
    return LayerPrediction(
        entry, originals, roles, changes, np.stack(smooth), np.stack(flips),
        torch.stack(together), n_bytes, n_tokens.tolist(),
    )  # fmt: skip


def _floats(values: Floats) -> tuple[float, ...]:
    return tuple(map(float, values))
