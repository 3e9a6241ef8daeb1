"""Figures: which there are, that they say what the profile says, and that nothing overlaps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drawn_trace import drawn_trace
from moebound.errors import MoeboundError, StoreError
from moebound.profile.figures import activation, draw, figures, heatmap
from moebound.profile.profile import Profile, TaskUse


def profile(n_tasks: int = 1, **options: Any) -> Profile:
    tasks = [TaskUse.of(drawn_trace(seed=seed, **options), task=f"task{seed}", text="answers")
             for seed in range(n_tasks)]  # fmt: skip
    return Profile("builtin:none", tuple(tasks))


def test_files(tmp_path: Path) -> None:
    written = draw(profile(2), tmp_path / "new" / "folder")
    names = {path.stem for path in written}
    assert names == {"figure1-first-layer", "figure2-last-layer", "figure3-heatmap",
                     "figure4-balance", "figure5-heatmap", "weights"}  # fmt: skip
    assert {path.suffix for path in written} == {".png", ".svg"}
    assert all(path.stat().st_size > 1000 for path in written)


def test_figure_5_is_of_a_second_task() -> None:
    assert "figure5-heatmap" not in figures(profile(1))


def test_the_same_profile_gives_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        draw(profile(2), tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_bars_are_the_shares() -> None:
    layer, task = profile().tasks[0].layers[1], profile().tasks[0]
    [axes] = activation(layer, task).axes
    bars: Any = axes.patches
    heights = [bar.get_height() for bar in bars]
    np.testing.assert_allclose(heights, 100 * layer.counts / task.n_tokens)
    assert "Layer 2" in axes.get_title(loc="left")


def test_the_heat_map_is_the_shares() -> None:
    task = profile().tasks[0]
    image: Any = heatmap(task).axes[0].images[0]
    wanted = [100 * layer.frequencies for layer in task.layers]
    np.testing.assert_allclose(image.get_array(), wanted)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers": (0,), "n_experts": 2, "top_k": 1},
        {"layers": tuple(range(3, 61)), "n_experts": 64, "top_k": 6},
        {"layers": (1, 2), "n_experts": 256, "top_k": 8},
    ],
)
def test_labels_do_not_overlap(options: dict[str, Any]) -> None:
    """Ticks, notes, titles and legends keep apart, on small models and large."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for name, make in figures(profile(2, **options)).items():
        figure = make()
        canvas: Any = FigureCanvasAgg(figure)
        canvas.draw()
        boxes = []
        for axes in figure.axes:
            texts: list[Any] = [*axes.texts, axes.xaxis.label, axes.yaxis.label,
                                axes._left_title]  # type: ignore[attr-defined]  # fmt: skip
            for axis in (axes.xaxis, axes.yaxis):
                low, high = sorted(axis.get_view_interval())
                texts += [tick.label1 for tick in axis.get_major_ticks()
                          if low <= tick.get_loc() <= high]  # fmt: skip
            boxes += [(t.get_text(), t.get_window_extent()) for t in texts
                      if t.get_text() and t.get_visible()]  # fmt: skip
        for legend in figure.legends:
            boxes += [(t.get_text(), t.get_window_extent()) for t in legend.get_texts()]
        for place, (text, box) in enumerate(boxes):
            assert box.x0 >= -1, (name, text)
            assert box.x1 <= figure.bbox.x1 + 1, (name, text)
            for other, other_box in boxes[:place]:
                assert not box.overlaps(other_box), (name, text, other)


def test_nothing_to_draw(tmp_path: Path) -> None:
    trace = drawn_trace(n_tokens=1)
    empty = TaskUse.of(trace, task="t", text="answers")
    nothing = TaskUse("t", "answers", 0, 0, 0, empty.layers)
    with pytest.raises(MoeboundError, match="nothing to draw"):
        draw(Profile("m", (nothing,)), tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"):
        draw(profile(), tmp_path / "file" / "folder")
