"""The rules, on gates that are easily followed by hand; settings; files that lack something."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moebound.errors import MoeboundError
from moebound.files.formats.skipping import LayerLine, Point, Thresholds
from moebound.model.skip_policies import HobbitRe, ModesRe, OdpRe, get_policy

GATES = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.25, 0.25, 0.25, 0.25], [0.05, 0.02, 0.0, 0.93]])
FOUND = Thresholds(
    "m", "t", "0" * 64, 3, 40,
    (LayerLine(0, 0.5, 1.0, 0.6), LayerLine(2, 0.7, 0.5, 0.1), LayerLine(3, 0.2, 0.1, 0.3)),
    (Point(0.01, 0.1, 0.0, 0.0), Point(0.02, 0.3, 0.1, 0.1), Point(0.05, 0.48, 0.2, 0.1)),
)  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    FOUND.save(tmp_path / "thresholds.json")
    return tmp_path / "thresholds.json"


def test_hobbit_skips_what_stands_behind_a_share_of_the_larger_gates() -> None:
    """Shares before: 0 .5 .8 .95; 0 .25 .5 .75; by size .98 .93 1 and 0 of the largest."""
    no, yes = False, True
    assert HobbitRe().skips(0, GATES).tolist() == [
        [no, no, no, yes], [no, no, no, no], [yes, yes, yes, no],
    ]  # fmt: skip
    assert HobbitRe(above=0.75).skips(0, GATES).tolist()[:2] == [
        [no, no, yes, yes], [no, no, no, no],  # .75 is not above .75
    ]  # fmt: skip
    assert HobbitRe().coarser(GATES).tolist()[:2] == [
        [no, no, yes, yes], [no, no, no, yes],
    ]  # fmt: skip
    # Shares, so sums other than 1 are judged alike.
    assert torch.equal(HobbitRe().skips(0, 3 * GATES), HobbitRe().skips(0, GATES))


def test_modes_compares_the_layers_share_times_the_gate() -> None:
    policy = ModesRe("modes_re", {0: 0.6, 1: 0.4, 2: 0.0}, 0.1)
    assert policy.skips(0, GATES[:1]).tolist() == [[False, False, True, True]]  # .3 .18 .09 .03
    assert policy.skips(1, GATES[:1]).tolist() == [[False, False, True, True]]  # .2 .12 .06 .02
    assert policy.skips(2, GATES[:1]).all()  # the largest is kept by `skipping`
    assert not policy.rescales


def test_odp_is_lus_rule_in_the_layers_that_matter_least() -> None:
    policy = OdpRe("odp_re", {0: 0.5, 1: 0.5}, frozenset({1}), 0.02)
    assert not policy.skips(0, GATES).any()
    assert policy.skips(1, GATES[:1]).tolist() == [[False, False, True, True]]


def test_thresholds_of_a_file(file: Path) -> None:
    assert Thresholds.load(file) == FOUND
    odp = get_policy("odp_re", file)
    assert isinstance(odp, OdpRe)
    assert (odp.layers, odp.protect, odp.betas) == (frozenset({2}), 0.02, {0: 0.5, 2: 0.7, 3: 0.2})
    odp = get_policy("odp_re:layers2:protect0", file)
    assert isinstance(odp, OdpRe)
    assert (odp.layers, odp.protect) == (frozenset({2, 3}), 0.0)
    modes = get_policy("modes_re:target0.2", file)
    assert isinstance(modes, ModesRe)
    assert modes.alphas == pytest.approx({0: 0.6, 2: 0.1, 3: 0.3})
    assert modes.tau == 0.02  # the least that skipped as much
    modes = get_policy("modes_re:tau1e-3", file)
    assert isinstance(modes, ModesRe)
    assert modes.tau == 1e-3
    hobbit = get_policy("hobbit_re:above0.8:renorm")
    assert isinstance(hobbit, HobbitRe)
    assert hobbit.above == 0.8
    assert hobbit.rescales
    assert not get_policy("hobbit_re").rescales
    with pytest.raises(MoeboundError, match=r"no threshold of layer 1.*layers 0, 2, 3"):
        modes.check_layers((0, 1, 2))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lu", "expected one of lu_re, odp_re, modes_re, hobbit_re"),
        ("lu_re:layers2", "lu_re takes no options"),
        ("odp_re:layers4", "layers4: expected 1 to 3"),
        ("odp_re:layers1.5", "layers1.5: expected 1 to 3"),
        ("odp_re:protect2", "protect2: expected 0 to 1"),
        ("odp_re:protect0.1:protect0.2", "each once"),
        ("modes_re", "0.8 was not reached; the nearest is modes_re:target0.48 "),
        ("modes_re:target1", "target1: expected 0 to 1, and less"),
        ("modes_re:target0.1:tau0.2", "expected target or tau, found both"),
        ("modes_re:target1.2.3", "'1.2.3' is no number"),
        ("hobbit_re", "needs no --calibration"),
    ],
)
def test_settings_that_cannot_be(file: Path, setting: str, message: str) -> None:
    with pytest.raises(MoeboundError, match=message):
        get_policy(setting, file)


def test_files_that_are_missing_or_lack_something(file: Path, tmp_path: Path) -> None:
    with pytest.raises(MoeboundError, match="needs --calibration: statistics, or what `moebound"):
        get_policy("lu_re")
    with pytest.raises(MoeboundError, match="needs --calibration: what `moebound thresholds`"):
        get_policy("modes_re")
    with pytest.raises(MoeboundError, match=r"other\.json: no such file; `moebound thresholds SRC"):
        get_policy("odp_re", tmp_path / "other.json")
    with pytest.raises(MoeboundError, match="has statistics, which do not say how much a layer"):
        get_policy("odp_re", tmp_path)
    with pytest.raises(MoeboundError, match=r"statistics\.json: not found"):
        get_policy("lu_re", tmp_path)
    lines = tuple(replace(line, answer_kl=0.0) for line in FOUND.layers)
    replace(FOUND, layers=lines, points=()).save(file)
    with pytest.raises(MoeboundError, match="no layer changes an answer"):
        get_policy("modes_re:tau0.1", file)
    for wrong in ('{"format": "moebound.plan", "version": 1}', "{}", "["):
        file.write_text(wrong, encoding="utf-8")
        with pytest.raises(MoeboundError, match=r"thresholds\.json"):
            get_policy("lu_re", file)
    replace(FOUND, points=FOUND.points[::-1]).save(file)
    with pytest.raises(MoeboundError, match="expected ascending tau"):
        get_policy("lu_re", file)
