"""The paper's figures 1 to 5 from a routing profile, and one more for the routing weights.

  figure1-first-layer    how often each expert of the first MoE layer is chosen (Figure 1)
  figure2-last-layer     the same for the last (Figure 2)
  figure3-heatmap        every expert of every layer, for the first task (Figure 3)
  figure4-balance        Table 2's four measures, layer by layer (Figure 4)
  figure5-heatmap        every expert of every layer, for a second task (Figure 5), if there is one
  weights                the weights that chosen experts get, layer by layer (not in the paper)

The paper plots counts. Here it is the share of a layer's tokens that chose an expert: it says the
same, and can be compared across tasks of other length. Layers are decoder indices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

from moebound.errors import MoeboundError
from moebound.extras import need
from moebound.files.durable import disk_errors
from moebound.profile.balance import by_chance
from moebound.profile.profile import Profile, TaskUse, balance_of
from moebound.profile.usage import LayerUse
from moebound.types import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, FAINT, EVEN = "#1c1e21", "#dfe2e6", "#8a9099"
SERIES = ("#2f6db5", "#d1702c", "#3f8f5b", "#8a5aa8")
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10.5,
    "figure.facecolor": "white",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "moebound",  # the same file for the same figures
}
FORMATS = ("png", "svg")
PAGE_COLORS = {
    INK: "var(--ink)",
    FAINT: "var(--line)",
    EVEN: "var(--soft)",
    **{color: f"var(--series-{index})" for index, color in enumerate(SERIES)},
}
"""What the colours are called on a page: see `page.inline`."""

P = ParamSpec("P")


def _styled(make: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draws in the style of this project, whatever the caller's is, and leaves that alone."""

    @wraps(make)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        # Heavy, and not needed by anyone who only imports this module.
        mpl = need("matplotlib", "drawing")

        with mpl.rc_context(_STYLE):
            return make(*args, **kwargs)

    return styled


def draw(profile: Profile, folder: Path, *, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write all figures that the profile has data for into a folder, made if need be.

    formats: endings that matplotlib knows. Returns the files. Raises StoreError if the disk
    refuses, MoeboundError for a profile in which nothing was routed.
    """
    mpl = need("matplotlib", "drawing")
    folder = Path(folder)
    written: list[Path] = []
    with mpl.rc_context(_STYLE), disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, make in figures(profile).items():
            figure = make()
            for ending in formats:
                path = folder / f"{name}.{ending}"
                metadata = {"Date": None} if ending == "svg" else None
                figure.savefig(path, dpi=160, metadata=metadata)
                written.append(path)
    return written


def figures(profile: Profile) -> dict[str, Callable[[], Figure]]:
    """Name -> what draws it."""
    task = profile.tasks[0]
    if not task.n_tokens:
        raise MoeboundError(f"the profile of {profile.model} has no tokens: nothing to draw")
    first, last = task.layers[0], task.layers[-1]
    made = {
        "figure1-first-layer": lambda: activation(first, task),
        "figure2-last-layer": lambda: activation(last, task),
        "figure3-heatmap": lambda: heatmap(task, _most(profile)),
        "figure4-balance": lambda: balance_by_layer(task),
        "weights": lambda: weights_by_layer(task),
    }
    if len(profile.tasks) > 1:
        made["figure5-heatmap"] = lambda: heatmap(profile.tasks[1], _most(profile))
    return made


@_styled
def activation(layer: LayerUse, task: TaskUse) -> Figure:
    """Bars: the share of tokens that chose each expert, with the even share as a line."""
    figure, axes = _axes(8.6, 3.5)
    shares = 100 * layer.frequencies
    even = 100 * layer.top_k / layer.n_experts
    top = layer.ranking[: min(3, layer.n_experts)]
    colors = [SERIES[1] if expert in top else SERIES[0] for expert in range(layer.n_experts)]
    axes.bar(np.arange(layer.n_experts), shares, width=0.8, color=colors)
    axes.axhline(even, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    # Notes stand beside the bars, where nothing can be in the way.
    note = {"textcoords": "offset points", "xytext": (6, 0), "annotation_clip": False}
    axes.annotate(f"even use\n{even:.2g} %", (1, even), xycoords=("axes fraction", "data"),
                  va="center", **note)  # fmt: skip
    axes.annotate("most used\n" + ", ".join(map(str, top)), (1, 1), xycoords="axes fraction",
                  va="top", color=SERIES[1], **note)  # fmt: skip
    axes.set_xlim(-0.7, layer.n_experts - 0.3)
    # Even use stays below the note on top.
    axes.set_ylim(0, max(1.08 * float(shares.max()), 1.5 * even))
    axes.set_xlabel("expert")
    axes.set_ylabel("tokens that chose it, %")
    axes.grid(True, axis="y", linewidth=0.7)
    axes.set_title(f"Layer {layer.layer}: use of each expert on {_said(task)}")
    return figure


@_styled
def heatmap(task: TaskUse, most: float | None = None) -> Figure:
    """Layers down, experts across: the share of tokens that chose each. most: top of the scale, so
    that two tasks can be compared; the largest share if None. What is above it is as dark as it."""
    shares = _shares(task)
    largest = float(np.nanmax(shares))
    most = most or largest
    rows, columns = shares.shape
    width = min(max(5.0, 0.15 * columns + 2.2), 14.0)
    figure, axes = _axes(width, min(max(2.6, 0.2 * rows + 1.5), 13.0))
    image = axes.imshow(
        np.ma.masked_invalid(shares), aspect="auto", interpolation="nearest", cmap=_color_map(),
        vmin=0, vmax=most,
    )  # fmt: skip
    layers = [layer.layer for layer in task.layers]
    _index_ticks(axes.yaxis, layers, 40)
    _index_ticks(axes.xaxis, list(range(columns)), 17)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_title(f"Use of experts on {_said(task)}")
    bar = figure.colorbar(
        image, ax=axes, pad=0.015, fraction=0.05, extend="max" if largest > most else "neither"
    )
    bar.outline.set_visible(False)
    bar.set_label("tokens that chose it, %")
    return figure


@_styled
def balance_by_layer(task: TaskUse) -> Figure:
    """Table 2's measures as lines over the layers; imbalance has a scale of its own above."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.8, 5.0), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.25])
    found = [(layer.layer, balance_of(layer)) for layer in task.layers]
    known = [(layer, measured) for layer, measured in found if measured is not None]
    layers = [layer for layer, _ in known]
    upper.plot(layers, [b.imbalance for _, b in known], label="imbalance score", color=SERIES[1],
               marker="o", markersize=4)  # fmt: skip
    upper.plot(
        layers,
        [by_chance(use.n_experts, use.top_k, use.n_tokens) for use in task.layers
         if use.counts.any()],
        label="imbalance if drawn evenly", color=EVEN, linewidth=1.2, linestyle=(0, (4, 3)),
    )  # fmt: skip
    upper.set_ylim(0, 1.15 * max(b.imbalance for _, b in known) or 1)
    upper.set_ylabel("imbalance score")
    upper.set_title(f"How evenly experts are used on {_said(task)}")
    lines = (
        ("expert utilisation", [b.utilisation for _, b in known], SERIES[0], "s"),
        ("normalised entropy", [b.entropy for _, b in known], SERIES[2], "^"),
        ("Gini coefficient", [b.gini for _, b in known], SERIES[3], "D"),
    )
    for label, values, color, marker in lines:
        lower.plot(layers, values, label=label, color=color, marker=marker, markersize=4)
    lower.set_ylim(0, 1.04)
    lower.set_ylabel("share")
    lower.set_xlabel("layer")
    _layer_axis(lower, layers)
    for axes in (upper, lower):
        axes.grid(True, linewidth=0.7)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


@_styled
def weights_by_layer(task: TaskUse) -> Figure:
    """The weights of chosen experts: median, and where the middle 50 and 90 % are, by layer."""
    figure, axes = _axes(8.0, 3.6)
    used = [layer for layer in task.layers if layer.counts.any()]
    layers = [layer.layer for layer in used]
    low, lower, middle, upper, high = (
        [layer.weight_quantile(share) for layer in used] for share in (0.05, 0.25, 0.5, 0.75, 0.95)
    )
    axes.fill_between(layers, low, high, color=SERIES[0], alpha=0.18, linewidth=0,
                      label="middle 90 %")  # fmt: skip
    axes.fill_between(layers, lower, upper, color=SERIES[0], alpha=0.4, linewidth=0,
                      label="middle 50 %")  # fmt: skip
    axes.plot(layers, middle, color=SERIES[0], marker="o", markersize=4, label="median")
    axes.set_ylim(0, 1.08 * max(high))
    axes.set_xlabel("layer")
    axes.set_ylabel("weight of a chosen expert")
    _layer_axis(axes, layers)
    axes.grid(True, linewidth=0.7)
    axes.set_title(f"Routing weights on {_said(task)}")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _axes(width: float, height: float) -> tuple[Figure, Any]:
    # A Figure of its own, not pyplot's: no display, nothing kept behind.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _color_map() -> Any:
    """White (never chosen) to the plots' blue, as the other figures of this project."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list(
        "use", ["#f7f9fc", "#bcd3ec", "#6fa3d8", "#2f6db5", "#123f78", "#071f40"]
    ).with_extremes(bad="white")


def _shares(task: TaskUse) -> Array:
    """[layers, experts], percent; NaN where a layer has fewer experts than the widest."""
    widest = max(layer.n_experts for layer in task.layers)
    shares = np.full((len(task.layers), widest), np.nan)
    for row, layer in enumerate(task.layers):
        shares[row, : layer.n_experts] = 100 * layer.frequencies
    return shares


def _most(profile: Profile) -> float:
    """One scale for the heat maps of both tasks: up to the share that one expert in 200 is above,
    so that a single hot one does not make all others pale."""
    shares = np.concatenate([_shares(task).reshape(-1) for task in profile.tasks[:2]])
    return float(np.nanquantile(shares, 0.995)) or 1.0


def _index_ticks(axis: Any, labels: Sequence[int], at_most: int) -> None:
    step = -(-len(labels) // at_most)
    # Steps of 1, 2, 4, 8, ...: experts come in powers of two.
    step = 1 << (step - 1).bit_length()
    places = list(range(0, len(labels), step))
    axis.set_ticks(places, [str(labels[place]) for place in places])


def _layer_axis(axes: Any, layers: Sequence[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=14, integer=True, min_n_ticks=1))
    axes.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)


def _said(task: TaskUse) -> str:
    kind = "answers" if task.text == "answers" else "reference texts"
    return f"{task.task} ({task.n_sequences:,} {kind}, {task.n_tokens:,} tokens)"
