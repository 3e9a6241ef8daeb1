"""Thresholds that are measured: what they are of, and that policies do by them what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import moebound
from moebound.calibrate.thresholds import measure_thresholds
from moebound.cli.main import main
from moebound.errors import MoeboundError
from moebound.evaluate.fidelity import Baseline
from moebound.evaluate.loading import load
from moebound.evaluate.text import solved_rows
from moebound.files.formats.skipping import Thresholds
from moebound.model import batched
from moebound.model.live import live_experts
from moebound.model.skip_policies import get_policy
from moebound.model.skipping import skipping
from moebound.tasks import get_task
from moebound.text.encoding import encode
from moebound.text.generation import GenerationSettings
from moebound.text.together import generate_together

SRC = "builtin:wordmath-mixtral"
PROMPTS = ("Eli has 42 coins. Eli gives 17 coins to Ava.", "Mia has 3 boxes of 12 pens.")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("thresholds") / "thresholds.json"
    asked = ["--task", "wordmath", "--limit", "3", "--skip", "2", "--quiet", "-o", str(path)]
    assert main(["thresholds", SRC, *asked]) == 0
    return path


def test_what_is_in_them(file: Path) -> None:
    """Medians as sorted, KL as with weights of zeros, shares as they come out again."""
    found = Thresholds.load(file)
    loaded, task = load(SRC), get_task("wordmath")
    rows = solved_rows(loaded.tokenizer, task, task.problems(5)[2:])
    assert found.n_tokens == sum(len(p) + len(s) for p, s in rows)
    assert [line.layer for line in found.layers] == list(range(8))
    before = Baseline.of(loaded.model, rows)
    with skipping(loaded.model, get_policy("lu_re", file)) as counts:
        before.compare(loaded.model)
    assert counts.pairs == 8 * 2 * found.n_tokens
    assert 0.2 < counts.share < 0.3  # a quarter, but for the layers behind that are routed anew
    point = found.points[9]
    with skipping(loaded.model, get_policy(f"modes_re:tau{point.tau:.12f}", file)) as counts:
        score = before.compare(loaded.model)
    assert counts.share == pytest.approx(point.share, abs=1e-3)
    assert score.kl_nats == pytest.approx(point.kl, rel=0.05)
    assert [p.share for p in found.points] == pytest.approx(
        [i / 40 for i in range(1, 21)], abs=0.03
    )
    with torch.no_grad():
        live_experts(loaded.model).modules[3].down_proj.zero_()  # type: ignore[operator]
    score = before.compare(loaded.model)
    assert score.answer_kl_nats == pytest.approx(found.layers[3].answer_kl, rel=1e-6)
    assert score.kl_nats == pytest.approx(found.layers[3].kl, rel=1e-6)


def test_a_task_without_solutions_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "2 + 2 =", "answer": "4"}\n', encoding="utf-8")
    with pytest.raises(MoeboundError, match="reference"):
        measure_thresholds(load("builtin:wordmath"), get_task(str(path)))


def run(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """A prompt, and some tokens behind it."""
    out = model(ids, use_cache=True)
    parts = [out.logits]
    for _ in range(4):
        best = parts[-1][:, -1:].argmax(-1)
        out = model(best, past_key_values=out.past_key_values, use_cache=True)
        parts.append(out.logits)
    return torch.cat(parts, 1)


POLICIES = ["lu_re", "odp_re:layers8:protect0.3", "modes_re:target0.4", "hobbit_re:above0.7",
            "hobbit_re:above0.7:renorm"]  # fmt: skip


@pytest.mark.parametrize("setting", POLICIES)
def test_offloaded_it_is_the_same_to_the_bit(
    setting: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in memory, computed one by one; whatever the budget; and less is loaded."""
    monkeypatch.setattr(batched, "_together_is_cheaper", lambda *_: False)
    calibration = None if setting.startswith("hobbit") else file
    loaded = load(SRC)
    ids = torch.tensor([encode(loaded.tokenizer, PROMPTS[0])])
    with torch.inference_mode():
        with skipping(loaded.model, get_policy(setting, calibration)) as counts:
            wanted = run(loaded.model, ids)
        assert not torch.equal(wanted, run(loaded.model, ids))  # it does something, then no more
        loads = {}
        for budget in ("25%", "100%"):
            with moebound.load(
                SRC, dtype="float32", ram_budget=budget, skip=setting, calibration=calibration
            ) as offloaded:
                assert torch.equal(run(offloaded.model, ids), wanted)
                stats = offloaded.stats()
                loads[budget] = stats["loads"]
                assert stats["skipping"] == counts.to_json(setting)
                assert counts.skipped > 0
        with moebound.load(SRC, dtype="float32", ram_budget="25%") as offloaded:
            run(offloaded.model, ids)
            assert "skipping" not in offloaded.stats()
            assert offloaded.stats()["loads"] > loads["25%"]


def test_together_each_text_is_what_it_is_alone(file: Path) -> None:
    with moebound.load(
        SRC, dtype="float32", ram_budget="25%", skip="odp_re:layers8:protect0.3", calibration=file
    ) as offloaded:
        ids = [encode(offloaded.tokenizer, prompt) for prompt in PROMPTS]
        settings = GenerationSettings(12, logprobs=0)

        def texts(prompts: list[list[int]]) -> list[list[Any]]:
            found: list[list[Any]] = [[] for _ in prompts]
            for index, piece in generate_together(
                offloaded.model, offloaded.tokenizer, prompts, settings
            ):
                found[index] += [(token.text, token.logprob) for token in piece.tokens]
            return found

        both = texts(ids)
        assert both == [texts([prompt])[0] for prompt in ids]
        assert all(both)


def test_the_commands(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--task", "wordmath", "--limit", "2", "--json", "--skip", "modes_re:target0.4"]
    assert main(["eval", SRC, *asked, "--calibration", str(file)]) == 0
    found = json.loads(capsys.readouterr().out)["skipping"]
    assert found["policy"] == "modes_re:target0.4"
    assert found["share"] == found["skipped"] / found["pairs"] > 0.2
    text = ["generate", SRC, "--prompt", PROMPTS[0], "--max-new-tokens", "4", "--stats"]
    skip = ["--skip", "lu_re", "--calibration", str(file)]
    assert main([*text, *skip, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stats"]["skipping"]["skipped"] > 0
    assert main([*text, "--skip", "hobbit_re:above0.5"]) == 0
    assert "pairs of a token and an expert, by hobbit_re:above0.5" in capsys.readouterr().out
    for wrong in (["--skip", "odp_re"], ["--calibration", str(file)], ["--skip", "no"]):
        assert main([*text, *wrong]) == 2
        assert main(["serve", SRC, *wrong]) == 2
    with pytest.raises(MoeboundError, match="give skip, too"):
        moebound.load(SRC, calibration=file)


def test_a_model_of_other_layers_is_refused(file: Path) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    content["layers"] = content["layers"][:3]
    other = file.with_name("other.json")
    other.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(MoeboundError, match="no threshold of layer 3"):
        moebound.load(SRC, skip="lu_re", calibration=other)
