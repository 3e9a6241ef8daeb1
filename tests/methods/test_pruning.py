"""Experts that are left out: which, what is stored of the rest, and what is promised."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moebound.calibrate import search
from moebound.calibrate.search import Search
from moebound.checkpoint import open_checkpoint
from moebound.cli.main import main
from moebound.errors import CorruptionError, MethodError, MoeboundError
from moebound.files.formats.statistics import Statistics, read_statistics
from moebound.integrations.transformers.router_edits import left_out
from moebound.methods import GroupView, MatrixSpec, Routing, compress, get_method, method_class
from moebound.methods.calibrated import Calibrated
from moebound.methods.keeping import best
from moebound.methods.pruning.reap import Reap
from moebound.model.live import live_experts
from moebound.model.routers import router_of
from moebound.plan import Plan, PlannedExpert
from moebound.store import compress as compress_store
from moebound.store import open_store, verify
from moebound.store.recipe import Recipe
from moebound.types import ExpertKey
from tiny_models import MakeTiny

from .keeping import RATE, group, headers, loaded, statistics, stored
from .test_router_edits import source

SENT = np.array([4.0, 0, 9, 9, 2, 7])
NORMS = np.array([8.0, 0, 9, 1, 6, 7])


def edit_of(setting: str, given: Any) -> Any:
    method: Any = get_method(setting)
    return method.edit(given)


def test_the_most_frequent_are_kept() -> None:
    assert edit_of("frequency:keep3", group(6, sent=SENT)).keep == (2, 3, 5)
    assert edit_of("frequency:keep2", group(6, sent=SENT)).keep == (2, 3)
    assert edit_of("frequency:keep100%", group(6, sent=SENT)).is_empty
    assert edit_of("frequency:keep6", group(6, sent=SENT)).is_empty


def test_reap_is_the_mean_of_gate_times_norm() -> None:
    """S = 2, 0 (no token), 1, 1/9, 3, 1."""
    given = group(6, sent=SENT, norms=NORMS)
    np.testing.assert_allclose(Reap("3").scores(given), [2, 0, 1, 1 / 9, 3, 1])
    assert edit_of("reap_re:keep3", given).keep == (0, 2, 4)  # of equal scores the first
    assert edit_of("reap_re:keep50%", given).keep == (0, 2, 4)


def test_mone_puts_the_mean_output_in_the_place_of_the_least() -> None:
    """Score: norm of the standard deviation, times the sum of gates; mean and variance ungated."""
    rng = np.random.default_rng(1)
    outputs = [rng.normal(loc=e, scale=1 + e % 3, size=(20, 6)) for e in range(4)]
    gates = np.array([1.0, 8, 2, 0.1])
    plain = np.stack([np.stack([f.sum(0), (f * f).sum(0)]) for f in outputs])
    given = group(4, plain=plain, tokens=np.full(4, 20.0), sent_gates=gates)
    scores = [np.linalg.norm(f.std(axis=0)) * g for f, g in zip(outputs, gates, strict=True)]
    edit = edit_of("mone_re:keep2", given)
    assert edit.keep is None
    assert set(edit.constants) == set(np.argsort(scores)[:2])
    for expert, vector in edit.constants.items():
        np.testing.assert_allclose(vector, outputs[expert].mean(0), rtol=1e-5)
    unseen = group(2, plain=np.zeros((2, 2, 6)), tokens=np.zeros(2), sent_gates=np.zeros(2))
    assert not edit_of("mone_re:keep1", unseen).constants[1].any()


def test_groups_of_a_router_keep_equally_many() -> None:
    scores, routing = np.arange(12.0), Routing(12, top_k=3, groups=3, chosen_groups=2)
    assert best(scores, 6, routing) == [2, 3, 6, 7, 10, 11]
    assert best(scores, 7, routing, percent=True) == [2, 3, 6, 7, 10, 11]
    with pytest.raises(MethodError, match=r"3 groups, and as many of each .* nearest is keep9"):
        best(scores, 8, routing)
    with pytest.raises(MethodError, match="keep6 at least"):
        best(scores, 3, routing)
    with pytest.raises(MethodError, match=r"sends a token to 3 experts.*keep3 at least"):
        best(scores, 2, Routing(12, top_k=3))


@pytest.mark.parametrize(
    "setting",
    ["frequency", "frequency:keep0", "frequency:keep101%", "frequency:keep2:kmeans", "reap_re:2",
     "reap_re:keep2+m_smoe_re:keep2", "reap_re:keep2+nosuch", "mone_re:keep2+rtn:int9:g4"],
)  # fmt: skip
def test_a_setting_that_says_nothing_is_refused(setting: str) -> None:
    with pytest.raises(MethodError):
        get_method(setting)


def test_a_setting_says_itself() -> None:
    for setting in ("reap_re:keep6", "mone_re:keep75%", "frequency:keep2+rtn:int4:g64",
                    "hc_smoe_fixed:keep4:kmeans+bounded:bound"):  # fmt: skip
        assert get_method(setting).setting == setting
    assert get_method("reap_re:keep6+bound").setting == "reap_re:keep6+bounded:bound"
    assert get_method("reap_re:keep6+raw").setting == "reap_re:keep6"


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(MethodError, match="keep9: there are 6 experts"):
        compress(get_method("frequency:keep9"), group(6, sent=SENT))
    with pytest.raises(MethodError, match="needs statistics that were not gathered: sent"):
        compress(get_method("frequency:keep2"), group(6))


def test_some_experts_of_a_layer_leave_the_others_as_they_are() -> None:
    """Nobody has said that the unseen ones may not be chosen."""
    given = group(4, Routing(8, top_k=2), sent=SENT[:4])
    assert edit_of("frequency:keep2", given).keep == (2, 3, 4, 5, 6, 7)


def test_what_is_left_out_has_no_bytes_and_no_promise() -> None:
    artifact = compress(get_method("frequency:keep2+bound"), _bounded(group(6, sent=SENT)))
    for key, matrices in artifact.experts.items():
        for matrix in matrices.values():
            certificate = matrix.certificate
            if key.expert in (2, 3):
                assert certificate.guarantee == "max_abs"
                assert certificate.method == "bounded:bound"
            else:
                assert (certificate.guarantee, certificate.bound) == ("none", None)
                assert certificate.method == "frequency:keep2+bounded:bound"
                assert len(matrix.data) < 40
                assert not matrix.decoded.any()
                assert certificate.max_abs_error > 0
    assert artifact.guarantee == "none"
    with pytest.raises(CorruptionError, match="expected 0"):
        method_class("frequency").decode(memoryview(b"x"), MatrixSpec((2, 2), "F32"), ())


def _bounded(given: GroupView) -> GroupView:
    views = tuple(
        replace(expert, bounds=dict.fromkeys(expert.matrices, RATE)) for expert in given.experts
    )
    return replace(given, experts=views)


ROADS = [
    "frequency:keep3", "reap_re:keep2+rtn:int4:g16", "reap_re:keep50%+bound",
    "mone_re:keep2", "mone_re:keep3+bound", "lu_re:keep2+calibrated",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tiny: MakeTiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Statistics]:
    src = tiny("mixtral")
    return src, statistics(src, tmp_path_factory.mktemp("stats") / "s", search=True)


@pytest.mark.parametrize("method", ROADS)
def test_the_whole_road(method: str, made: tuple[Path, Statistics], tmp_path: Path) -> None:
    src, found = made
    summary = stored(src, tmp_path / "dst", method, found)
    store = open_store(tmp_path / "dst")
    assert set(store.router_edits()) == {0, 1}
    if "+" not in method:
        kept = 3 if method.startswith("freq") else 2
        weights = sum(m.size for m in open_checkpoint(src).experts()[0].matrices)
        constants = 2 * 2 * 4 * 32 if method.startswith("mone") else 0  # layers, novices, 4 d
        edits = sum(tensor.n_bytes for tensor, _ in store.routers)
        assert constants < edits < constants + 2 * 200
        formula = 2 * kept * 2 * weights
        assert summary.expert_bytes_after == formula + headers(tmp_path / "dst")


def test_lossless_coding_of_what_is_kept_says_so(
    made: tuple[Path, Statistics], tmp_path: Path
) -> None:
    stored(made[0], tmp_path / "dst", "reap_re:keep2+lossless", made[1])
    found = [
        {m.record.certificate.guarantee for m in expert.matrices}
        for expert in open_store(tmp_path / "dst").experts()
    ]
    assert found.count({"lossless"}) == 4
    assert found.count({"none"}) == 4


def test_too_few_for_a_token_are_refused_before_any_work(
    made: tuple[Path, Statistics], tmp_path: Path
) -> None:
    with pytest.raises(MethodError, match=r"sends a token to 2 experts.*keep2 at least"):
        compress_store(made[0], tmp_path / "dst", method="frequency:keep1", calibration=made[1])
    assert not (tmp_path / "dst").exists()


def test_a_router_with_groups_on_the_whole_road(tmp_path: Path) -> None:
    """12 experts in 4 groups, from 2 of which a token's are chosen: 2 of each group are kept."""
    src = source("sigmoid, groups, a correction, GLM", tmp_path / "src")
    found = statistics(src, tmp_path / "s", search=True, moments="diagonal")
    for method in ("reap_re:keep8", "lu_re:keep8", "frequency:keep60%"):
        stored(src, tmp_path / method, method, found)
        for edit in open_store(tmp_path / method).router_edits().values():
            assert edit.keep is not None
            assert [sum(e // 3 == group for e in edit.keep) for group in range(4)] == [2] * 4
    with pytest.raises(MethodError, match="nearest is keep8"):
        compress_store(src, tmp_path / "dst", method="reap_re:keep9", calibration=found)


def test_a_plan_keeps_another_number_in_each_layer(
    made: tuple[Path, Statistics], tmp_path: Path
) -> None:
    """With and without a bound for what is kept; verify compares with the plan."""
    checkpoint = open_checkpoint(made[0])

    def entry(expert: Any) -> PlannedExpert:
        if expert.key.layer == 0:
            return PlannedExpert(expert.key, {}, expert.size, 1, None, "frequency:keep3")
        bounds = {str(matrix.role): RATE for matrix in expert.matrices}
        return PlannedExpert(
            expert.key, bounds, expert.size, 1, None, "reap_re:keep2+bounded:bound"
        )

    plan = Plan("bounded:bound", "uniform", {"bpw": 4.0}, "tiny", 1,
                tuple(map(entry, checkpoint.experts())))  # fmt: skip
    summary = compress_store(checkpoint, tmp_path / "dst", bound=plan, calibration=made[1])
    assert str(summary.without_weights).startswith("3 left out; nothing is promised")
    report = verify(tmp_path / "dst", against=checkpoint)
    assert report.ok, report.problems
    assert report.without_weights == summary.without_weights
    kept = {layer: e.keep for layer, e in open_store(tmp_path / "dst").router_edits().items()}
    assert [len(keep or ()) for keep in kept.values()] == [3, 2]
    assert report.worst is not None  # of what is kept in layer 1
    assert 0 < report.worst <= 1


# The search of Lu et al.


def test_the_search_finds_the_set_that_changes_the_output_least(
    made: tuple[Path, Statistics], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against every set, by the model's own block with the others' logits at -inf."""
    src, found = made
    model = loaded(src)
    entry = live_experts(model).stacks[1]
    block = model.model.layers[1].mlp
    calls: list[torch.Tensor] = []
    hook = block.register_forward_pre_hook(lambda _, args: calls.append(args[0].detach()))
    rows = [tuple(range(3 + i, 20 + 2 * i)) for i in range(5)]
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row]))
        hook.remove()
        wanted = [block(x) for x in calls]
        router = router_of(model, entry.stack.name)
        assert router is not None
        for size in (2, 3):
            losses = {}
            for kept in combinations(range(4), size):
                with left_out(router, sorted({0, 1, 2, 3} - set(kept)), 4):
                    changed = [block(x) for x in calls]
                losses[kept] = sum(
                    float((a - b).norm()) for a, b in zip(changed, wanted, strict=True)
                )
            least = min(losses, key=lambda kept: losses[kept])
            best_of_size = found.array(ExpertKey(1, size - 1), "kept")
            assert tuple(np.flatnonzero(best_of_size)) == least
            assert edit_of(f"lu_re:keep{size}", _of(found, 1)).keep == least
    assert not found.array(ExpertKey(1, 0), "kept").any()  # a token needs two
    with pytest.raises(MethodError, match="no set of so many"):
        edit_of("lu_re:keep1", _of(found, 1))
    # One expert left out is the same by either way.
    monkeypatch.setattr(search, "MOST_ENUMERATED", 0)
    again = Search(model, entry, 1, 2)
    with again.listen():
        for row in rows:
            model(torch.tensor([row]))
    greedy = again.table()
    assert (greedy[2] == found.array(ExpertKey(1, 2), "kept")).all()
    assert greedy.sum(1).tolist() == [0, 2, 3, 4]
    assert set(np.flatnonzero(greedy[1])) < set(np.flatnonzero(greedy[2]))


def _of(found: Statistics, layer: int) -> Any:
    kept = np.stack([found.array(ExpertKey(layer, e), "kept") for e in range(4)])
    return group(4, Routing(4, top_k=2), kept=kept)


def test_a_search_keeps_groups_equal() -> None:
    tried: list[tuple[int, ...]] = []

    def loss(kept: Any) -> float:
        tried.append(tuple(kept))
        return float(sum(kept))

    assert list(search._enumerated(6, 2, 2, loss)) == [(0, 1, 3, 4)]
    assert list(search._eliminated(6, 2, 1, loss)) == [(0, 1, 3, 4), (0, 3)]
    assert all(sum(e < 3 for e in kept) == len(kept) / 2 for kept in tried if len(kept) % 2 == 0)


def test_statistics_without_a_search_say_how(tiny: MakeTiny, tmp_path: Path) -> None:
    src = tiny("mixtral")
    found = statistics(src, tmp_path / "s", moments="diagonal")
    with pytest.raises(MoeboundError, match=r"has no 'kept'.*calibrate --search"):
        compress_store(src, tmp_path / "dst", method="lu_re:keep2", calibration=found)


# Statistics again, after routing has moved


def test_statistics_after_experts_were_left_out(tmp_path: Path, capsys: Any) -> None:
    src = "builtin:wordmath-mixtral"
    first, second = tmp_path / "first", tmp_path / "second"
    asked = ["calibrate", src, "--task", "wordmath", "--limit", "2", "--diagonal", "--json"]
    assert main([*asked, "-o", str(first)]) == 0
    after = ["--after", "reap_re:keep5", "--calibration", str(first)]
    assert main([*asked, "-o", str(second), *after]) == 0
    capsys.readouterr()
    before, moved = read_statistics(first), read_statistics(second)
    assert moved.of.after == "reap_re:keep5"
    assert before.of.fingerprint == moved.of.fingerprint
    for layer in range(8):
        keys = [ExpertKey(layer, e) for e in range(8)]
        seen = {k.expert for k in keys if moved.array(k, "sent")}
        assert len(seen) <= 5
        total = [sum(s.array(k, "sent") for k in keys) for s in (before, moved)]
        assert total[0] == total[1]  # the others' tokens are theirs now
    # The same experts are kept by what was gathered then, and the compressed ones are of those.
    for name, folder in (("one", first), ("two", second)):
        command = ["compress", src, str(tmp_path / name), "--method", "reap_re:keep5",
                   "--calibration", str(folder), "--json"]  # fmt: skip
        assert main(command) == 0
    edits = [open_store(tmp_path / name).router_edits() for name in ("one", "two")]
    assert {k: e.keep for k, e in edits[0].items()} == {k: e.keep for k, e in edits[1].items()}
    assert main([*asked, "-o", str(tmp_path / "x"), "--after", "reap_re:keep5"]) == 2
    for command in (["inspect"], ["verify"]):
        capsys.readouterr()
        assert main([*command, str(tmp_path / "one"), "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["guarantee"] == "none"
        assert document["without_weights"] == {"left_out": 24, "replaced": 0, "constant": 0}
    card = (tmp_path / "one" / "README.md").read_text()
    assert "24 left out; nothing is promised of their weights" in card


# Memory


def test_second_moments_of_a_layer_are_not_all_in_memory(
    tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept experts are coded one at a time; what their outputs are certified by is read then."""
    src = tiny("mixtral")
    found = statistics(src, tmp_path / "s")
    at_once: list[int] = []
    encode = Calibrated.encode

    def counted(self: Calibrated, group: GroupView, *, threads: int = 1) -> Any:
        at_once.append(len(group.experts))
        return encode(self, group, threads=threads)

    monkeypatch.setattr(Calibrated, "encode", counted)
    recipe = Recipe.of(RATE, "reap_re:keep3+calibrated", found)
    experts = [e for e in open_checkpoint(src).experts() if e.key.layer == 0]
    method = get_method("reap_re:keep3+calibrated")
    with monkeypatch.context() as nothing:
        nothing.setattr(Statistics, "moments", lambda *_: pytest.fail("read too early"))
        view = recipe.seen(open_checkpoint(src), experts, method, certify=True)
        assert list(view.seen) == [e.key for e in experts]
    made = compress(method, view)
    assert at_once == [1, 1, 1]
    outputs = [m.certificate.outputs for m in made]
    assert sum(o is not None for o in outputs) == 9
