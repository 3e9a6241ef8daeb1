"""Text that a model makes itself: the search against every text there is, and what is kept."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from calibrate.test_collect import MIXTRAL, NOT_RUN, loaded
from moebound.bench.peers.text import text_of
from moebound.calibrate import Sampling, Settings, collect, of_file, self_sample
from moebound.calibrate import beams as beams_module
from moebound.calibrate.beams import Search, beam_search
from moebound.calibrate.self_sampling import KEPT, beginnings
from moebound.calibrate.text import Text, read_text, save_text
from moebound.checkpoint import open_checkpoint
from moebound.cli.main import main
from moebound.errors import (
    CheckpointError,
    FormatError,
    MoeboundError,
    UnsupportedArchitectureError,
)
from moebound.evaluate.loading import Loaded, load
from moebound.model import live_experts
from tiny_models import TINY, MakeTiny, model_class

NOBODY = frozenset[int]()
HEADLESS = {"glm5_next_text", "muse_spark_text", "openai_privacy_filter"}
SMALL = Sampling(5, 3, Search(14, beams=2))


@pytest.fixture(scope="module")
def mixtral() -> Loaded:
    return load(MIXTRAL)


@pytest.fixture(scope="module")
def qwen(tiny: MakeTiny) -> Path:
    return tiny("qwen3_moe")


@torch.no_grad()
def scored(model: Any, text: tuple[int, ...], tau: float, ends: frozenset[int]) -> float:
    """The score of a text that begins with one token: what is read is all but its last token."""
    read = torch.tensor([text[:-1]])
    used: dict[int, torch.Tensor] = {}
    hooks = []
    for entry in live_experts(model).stacks:

        def count(_m: Any, args: Any, layer: int = entry.layer, n: int = entry.stack.n_experts,
                  ) -> None:  # fmt: skip
            used[layer] = torch.bincount(args[1].flatten(), minlength=n).double()

        hooks.append(entry.module.register_forward_pre_hook(count))
    logs = model(input_ids=read, use_cache=False).logits[0].log_softmax(-1)
    for hook in hooks:
        hook.remove()
    spread = np.mean([float(u.std(correction=0) / u.mean()) for u in used.values()])
    chosen = [float(logs[at, token]) for at, token in enumerate(text[1:])]
    return float(spread) / tau - math.fsum(chosen) / len(chosen)


def test_a_search_that_keeps_everything_finds_the_best_text(qwen: Path) -> None:
    """Among all texts of three tokens, and those of two that end."""
    model, ends = loaded(qwen).model, frozenset({3, 9})
    n = model.config.vocab_size
    small = sorted({*range(0, n, max(1, n // 12)), 3, 9})
    original = model.forward

    def only(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        kept = torch.full_like(out.logits, -torch.inf)
        kept[..., small] = out.logits[..., small]
        out.logits = kept
        return out

    model.forward = only
    model.config.use_cache = True
    search = Search(3, beams=len(small) ** 2, candidates=len(small), tau=0.7)
    (found,) = beam_search(model, [[5]], search, ends)
    texts: list[tuple[int, ...]] = [(5, a) for a in ends]
    texts += [(5, a, b) for a, b in product(small, repeat=2) if a not in ends]
    scores = {text: scored(model, text, 0.7, ends) for text in texts}
    best = min(scores, key=scores.__getitem__)
    assert scores[found] == pytest.approx(scores[best], abs=1e-6)


# kimi_linear takes nearly a minute, in plain torch.
@pytest.mark.parametrize("name", sorted(set(TINY) - NOT_RUN - {"jetmoe", "kimi_linear"}))
def test_every_family_that_statistics_are_of(
    name: str, tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a cache that changes places, and with everything read again for every token."""
    model = loaded(tiny(name)).model
    begins, search = [[7], [11], [2]], Search(7, beams=3, candidates=5)
    if name in HEADLESS:
        with pytest.raises(UnsupportedArchitectureError, match="gives no scores"):
            beam_search(model, begins, search, NOBODY)
        return
    found = beam_search(model, begins, search, frozenset({4}))
    assert [text[0] for text in found] == [7, 11, 2]
    assert all(len(text) == 7 or text[-1] == 4 for text in found)
    monkeypatch.setattr(beams_module, "supports_cache", lambda model: False)
    again = beam_search(model, begins, search, frozenset({4}))
    same = sum(a == b for a, b in zip(found, again, strict=True))
    assert same >= 2  # float rounding may tip a choice


def test_evenness_counts_the_more_the_smaller_tau(mixtral: Loaded) -> None:
    begins = beginnings(mixtral, Sampling(16, 0, Search(24)))

    def spread(tau: float) -> float:
        texts = beam_search(mixtral.model, begins, Search(24, tau=tau), NOBODY)
        rows = [scored(mixtral.model, text, 1.0, NOBODY) for text in texts]
        logs = [scored(mixtral.model, text, math.inf, NOBODY) for text in texts]
        return float(np.mean(rows) - np.mean(logs))

    assert spread(0.2) < 0.97 * spread(math.inf)


def test_the_same_seed_gives_the_same_text(mixtral: Loaded, tmp_path: Path) -> None:
    first, second = (self_sample(mixtral, SMALL, tmp_path / at) for at in "ab")
    assert first == second
    assert (tmp_path / "a" / KEPT).read_bytes() == (tmp_path / "b" / KEPT).read_bytes()
    other = self_sample(mixtral, Sampling(5, 4, SMALL.search), tmp_path / "c")
    assert first.sha256 != other.sha256
    special = set(mixtral.tokenizer.all_special_ids)
    bos = mixtral.tokenizer.bos_token_id
    assert all(row[0] == bos and row[1] not in special and len(row) <= 14 for row in first.rows)
    assert len({row[1] for row in first.rows}) == 5


def test_beginnings_come_again_when_all_were_drawn(mixtral: Loaded) -> None:
    n = len(mixtral.tokenizer)
    drawn = [ids[-1] for ids in beginnings(mixtral, Sampling(n + 3, 0, SMALL.search))]
    known = n - len(set(mixtral.tokenizer.all_special_ids))
    assert len(set(drawn[:known])) == known
    assert len(drawn) == n + 3


def test_an_interrupted_run_goes_on(
    mixtral: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moebound.calibrate.self_sampling.MOST_SEQUENCES", 2)
    wanted = self_sample(mixtral, SMALL, tmp_path / "whole")
    calls = []

    def counted(*args: Any) -> Any:
        calls.append(args[1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return beam_search(*args)

    monkeypatch.setattr("moebound.calibrate.self_sampling.beam_search", counted)
    with pytest.raises(KeyboardInterrupt):
        self_sample(mixtral, SMALL, tmp_path / "s")
    assert len(read_text(tmp_path / "s" / KEPT)[0].rows) == 2
    assert of_file(mixtral, tmp_path / "s" / KEPT, 2).rows == wanted.rows[:2]
    for limit in (None, 3):
        with pytest.raises(MoeboundError, match=r"2 of 5 sequences, so its .* take --limit 2"):
            of_file(mixtral, tmp_path / "s" / KEPT, limit)
    assert self_sample(mixtral, SMALL, tmp_path / "s") == wanted
    assert len(calls) == 4  # two of three were left
    assert self_sample(mixtral, SMALL, tmp_path / "s") == wanted
    assert len(calls) == 4
    with pytest.raises(MoeboundError, match=r"of another run \(sampling is"):
        self_sample(mixtral, Sampling(5, 9, SMALL.search), tmp_path / "s")


def test_statistics_of_it_and_of_the_text_that_was_kept(mixtral: Loaded, tmp_path: Path) -> None:
    out = tmp_path / "s"
    text = self_sample(mixtral, SMALL, out)
    settings = Settings(moments="diagonal")
    found = collect(mixtral, text, out, settings)
    assert (found.of.text, found.of.text_sha256) == (text.name, text.sha256)
    assert "2 beams, tau 1.2, seed 3" in text.name
    read = of_file(mixtral, out / KEPT)
    assert read == text
    again = collect(mixtral, read, tmp_path / "again", settings)
    assert again.of == found.of
    assert of_file(mixtral, out / KEPT, 2).rows == text.rows[:2]
    peers = text_of(mixtral, open_checkpoint(MIXTRAL), found)
    assert peers.rows == text.rows
    # Finished, the same command does nothing again, and folders of others stay refused.
    assert collect(mixtral, self_sample(mixtral, SMALL, out), out, settings).of == found.of


def test_a_kept_text_that_is_damaged_or_anothers(mixtral: Loaded, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    save_text(Text("mine", ((3, 5), (7,))), path, mixtral.tokenizer, {})
    assert of_file(mixtral, path).rows == ((3, 5), (7,))
    with pytest.raises(MoeboundError, match="sequences of its own"):
        of_file(mixtral, path, window=8)
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"tokens": [[3, 6], [7]]}))
    with pytest.raises(FormatError, match=f"{path}.*sha256"):
        of_file(mixtral, path)
    for tokens in ("x", [3], [[-1]], [["a"]]):
        path.write_text(json.dumps(document | {"tokens": tokens}))
        with pytest.raises(FormatError, match=str(path)):
            of_file(mixtral, path)
    path.write_text(json.dumps(document | {"version": 2}))
    with pytest.raises(FormatError, match="version 2"):
        of_file(mixtral, path)
    save_text(Text("mine", ((1 << 20,),)), path, _Any(), {})
    with pytest.raises(CheckpointError, match="has embeddings for"):
        of_file(mixtral, path)


class _Any:
    """A tokenizer that knows every token."""

    @staticmethod
    def decode(ids: Any) -> str:
        return str(ids)


def test_what_gives_no_text(qwen: Path, mixtral: Loaded) -> None:
    model = model_class(AutoConfig.from_pretrained(qwen)).from_pretrained(qwen, dtype=torch.float32)
    model.train(False).lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(MoeboundError, match="no number any more"):
        beam_search(model, [[5]], Search(4), NOBODY)
    with pytest.raises(MoeboundError, match="begins with 2 tokens"):
        beginnings(mixtral, Sampling(2, 0, Search(2)))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "s"
    told = ["calibrate", MIXTRAL, "-o", str(out), "--diagonal", "--json"]
    sampled = ["--self-sample", "--limit", "3", "--window", "12", "--beams", "2", "--tau", "2"]
    assert main([*told, *sampled]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["text"] == "self-sampled (2 beams, tau 2, seed 0)"
    assert document["n_sequences"] == 3
    text, kept = read_text(out / KEPT)
    assert document["text_sha256"] == text.sha256
    assert len(kept["texts"]) == 3
    assert main([*told, *sampled, "--seed", "1"]) == 2
    assert "of another run" in capsys.readouterr().err
    again = [*told[:2], "-o", str(tmp_path / "t"), "--diagonal", "--json"]
    assert main([*again, "--text", str(out / KEPT)]) == 0
    assert json.loads(capsys.readouterr().out)["text_sha256"] == text.sha256
    for wrong, why in (
        (["--self-sample", "--task", "wordmath"], "one of --task, --self-sample and --text"),
        ([], "one of --task, --self-sample and --text"),
        (["--task", "wordmath", "--beams", "3"], "go with --self-sample"),
        (["--task", "wordmath", "--seed", "0"], "go with --self-sample"),
        (["--task", "wordmath", "--window", "9"], "--window goes with --text and --self-sample"),
        (["--self-sample", "--skip", "9"], "--skip goes with --task"),
        (["--self-sample", "--window", "100000"], "positions for"),
    ):
        assert main([*told[:2], "-o", str(tmp_path / "u"), *wrong]) != 0
        assert why in " ".join(capsys.readouterr().err.split())
