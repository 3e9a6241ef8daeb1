"""Merging: experts in clusters, one set of weights a cluster, the router unchanged.

Stored: the weights of each cluster as their coder writes them, once, under the number of the
member that got the most tokens; for each layer a router edit, in which the other members are its
aliases (docs/format-method.md, section 2). In bytes, with `bounded:raw` and experts of w weights
in 2 bytes: 2 w for each cluster.

The merged weights are a mean weighted by the tokens that the router sent to each member (a plain
one in a cluster that got none), of the weights in float64, rounded once to their dtype. A bound
that the coder keeps is one on the merged weights: of the experts' own nothing is promised.

Second moments that the coder needs are the members' sums: a cluster sees the tokens of all.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from moebound.checkpoint import Role
from moebound.errors import MethodError
from moebound.methods.base import ExpertView, GroupView
from moebound.methods.keeping import Keeping, column, numbers
from moebound.methods.router_edit import RouterEdit
from moebound.types import Array, ExpertKey


class Merged(Keeping):
    merges: ClassVar[bool] = True
    statistics: ClassVar[frozenset[str]] = frozenset({"sent"})

    def edit(self, group: GroupView) -> RouterEdit:
        here, sent = numbers(group), column(group, "sent")
        n = self.count(len(here))
        alias: dict[int, int] = {}
        for members in self.clusters(group, n) if n < len(here) else []:
            first = max(members, key=lambda place: (sent[place], -place))
            alias |= {here[place]: here[first] for place in members if place != first}
        return RouterEdit(group.layer, alias=dict(sorted(alias.items())))

    def kept(self, group: GroupView, edit: RouterEdit) -> GroupView:
        by_number = {expert.key.expert: expert for expert in group.experts}
        kept, clusters = [], dict[ExpertKey, list[ExpertKey]]()
        for number, expert in by_number.items():
            if number in edit.alias:
                continue
            members = [expert, *(by_number[a] for a, to in edit.alias.items() if to == number)]
            kept.append(self._one(members, group) if len(members) > 1 else expert)
            clusters[expert.key] = [member.key for member in members]
        found = group.coded_by(self.coder.wanted_statistics())
        statistics = {name: _Summed(each, clusters) for name, each in found.items()}
        return GroupView(tuple(kept), statistics, routing=group.routing)

    def _one(self, members: Sequence[ExpertView], group: GroupView) -> ExpertView:
        sent = np.array([float(group.statistics["sent"][m.key]) for m in members])
        share = sent / sent.sum() if sent.sum() else np.full(len(members), 1 / len(members))
        first = members[0]
        matrices: dict[Role, Array] = {}
        for role, own in first.matrices.items():
            weights = [member.matrices[role] for member in members]
            if not all(np.isfinite(w).all() for w in weights):
                raise MethodError(f"{first.key}, {role}: a weight of its cluster is not finite")
            transposed = role in first.transposed
            oriented = [w.T if transposed else w for w in weights]
            found = self.mixed(oriented, share).astype(own.dtype)
            matrices[role] = np.ascontiguousarray(found.T if transposed else found)
        return replace(first, matrices=matrices)

    def mixed(self, weights: Sequence[Array], share: Array) -> Array:
        """One matrix of a cluster, float64. weights: the members', [out, in]. share: of each, in
        all 1."""
        total = np.zeros(weights[0].shape)
        for matrix, part in zip(weights, share, strict=True):
            total += part * matrix.astype(np.float64)
        return total

    @abstractmethod
    def clusters(self, group: GroupView, n: int) -> list[list[int]]:
        """The experts' places in n clusters, each in one. The same on every machine."""


@dataclass(frozen=True, eq=False)
class _Summed(Mapping[ExpertKey, Array]):
    """Statistics of clusters: their members' sums, each made when it is asked for."""

    of: Mapping[ExpertKey, Array]
    clusters: Mapping[ExpertKey, Sequence[ExpertKey]]

    def __getitem__(self, key: ExpertKey) -> Array:
        first, *others = self.clusters[key]
        total = np.array(self.of[first], np.float64)
        for member in others:
            total += self.of[member]
        return total

    def __iter__(self) -> Iterator[ExpertKey]:
        return iter(self.clusters)

    def __len__(self) -> int:
        return len(self.clusters)


def mean_outputs(group: GroupView) -> Array:
    """[E, N] float64: the mean output of each expert over the tokens that it saw; zeros without."""
    seen = np.maximum(column(group, "tokens"), 1)[:, None]
    found: Array = column(group, "plain")[:, 0] / seen
    return found


def unit(rows: Array) -> Array:
    """Each row over its norm; zeros stay zeros."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    found: Array = rows / np.where(norms > 0, norms, 1)
    return found


def k_means(rows: Array, n: int) -> list[list[int]]:
    """n clusters of [E, N] by Lloyd's algorithm, none of them empty. It begins with the row of the
    largest norm and then always the one farthest from those taken (in the place of a draw: the same
    rows give the same clusters)."""
    taken = [int(np.argmax(np.linalg.norm(rows, axis=1)))]
    away = np.linalg.norm(rows - rows[taken[0]], axis=1)
    while len(taken) < n:
        away[taken] = -1
        taken.append(int(np.argmax(away)))
        away = np.minimum(away, np.linalg.norm(rows - rows[taken[-1]], axis=1))
    centers, labels = rows[taken].copy(), np.full(len(rows), -1)
    for _ in range(100):
        distances = np.linalg.norm(rows[:, None] - centers[None], axis=2)
        found = distances.argmin(axis=1)
        for cluster in range(n):
            if not (found == cluster).any():  # takes the row that fits worst where others remain
                worst = np.argsort(-distances[np.arange(len(rows)), found], kind="stable")
                found[next(r for r in worst if (found == found[r]).sum() > 1)] = cluster
        if (found == labels).all():
            break
        labels = found
        centers = np.stack([rows[labels == cluster].mean(axis=0) for cluster in range(n)])
    return [np.flatnonzero(labels == cluster).tolist() for cluster in range(n)]


def average_linkage(rows: Array, n: int) -> list[list[int]]:
    """n clusters of [E, N]: two are joined whose members are nearest on average (Euclidean), until
    n are left; of equally near ones the first (UPGMA)."""
    clusters = [[place] for place in range(len(rows))]
    between = np.linalg.norm(rows[:, None] - rows[None], axis=2)
    np.fill_diagonal(between, np.inf)
    while len(clusters) > n:
        a, b = divmod(int(np.argmin(between)), len(clusters))
        a, b = min(a, b), max(a, b)
        na, nb = len(clusters[a]), len(clusters[b])
        joined = (na * between[a] + nb * between[b]) / (na + nb)
        joined[a] = np.inf
        between[a], between[:, a] = joined, joined
        between = np.delete(np.delete(between, b, axis=0), b, axis=1)
        clusters[a] = sorted(clusters[a] + clusters.pop(b))
    return clusters
