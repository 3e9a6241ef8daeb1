"""Statistics of what experts get: right for every family, resumable, and refused where damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig

from moebound.calibrate import Settings, Statistics, Text, collect, of_file, read_statistics
from moebound.checkpoint import experts_name, open_checkpoint
from moebound.cli.main import main
from moebound.errors import FormatError, MoeboundError, TaskError, UnsupportedArchitectureError
from moebound.evaluate.loading import Loaded, Source, load
from moebound.model import live_experts
from moebound.types import ExpertKey
from tiny_models import TINY, MakeTiny, model_class

TEXT = Text("rows", tuple(tuple(range(3 + i, 20 + 2 * i)) for i in range(5)))
MIXTRAL = "builtin:wordmath-mixtral"


NOT_RUN = {
    "axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32",
    "glm4_moe_lite", "glm4v_moe", "glm4v_moe_text", "glm_moe_dsa", "mistral4",
    "mistral_large4_text",
}  # fmt: skip
"""Tiny configs whose attention transformers cannot run; their experts are those of others."""


def loaded(folder: Path) -> Loaded:
    model = model_class(AutoConfig.from_pretrained(folder)).from_pretrained(
        folder, dtype=torch.float32
    )
    return Loaded(model.train(False), None, Source(folder.name, "checkpoint", "float32", "its own"))


@pytest.fixture(scope="module")
def qwen(tiny: MakeTiny) -> Path:
    return tiny("qwen3_moe")


def arrays(found: Statistics) -> dict[Any, np.ndarray[Any, Any]]:
    return {
        (key, side): found.moments(key, side)
        for key in found.keys for side in ("inputs", "hidden")
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(TINY) - NOT_RUN))
def test_every_family_is_heard_or_refused(name: str, tiny: MakeTiny, tmp_path: Path) -> None:
    """What experts compute on the way is compared with what their module gives (Inner.check)."""
    folder = tiny(name)
    model = loaded(folder)
    live = live_experts(model.model)
    if name == "jetmoe":  # its experts get rows that are sorted already
        with pytest.raises(UnsupportedArchitectureError, match="one by one"):
            collect(model, TEXT, tmp_path / "s")
        return
    if len({tuple(e.stack.view("down", 0).shape) for e in live.stacks}) > 1:
        with pytest.raises(MoeboundError, match="different sizes"):
            collect(model, TEXT, tmp_path / "s")
        return
    found = collect(model, TEXT, tmp_path / "s")
    assert set(found.keys) == set(live)
    tokens = found.tokens()
    assert sum(tokens.values()) >= TEXT.n_tokens  # at least one expert a token, in some layer
    for key, seen in tokens.items():
        for side in ("inputs", "hidden"):
            h = found.moments(key, side)
            assert (h == h.T).all()
            assert (np.trace(h) > 0) == (seen > 0)
    checkpoint = open_checkpoint(folder)
    found.check_model(experts_name(checkpoint), name)


def heard_of_the_first(model: Loaded) -> tuple[ExpertKey, list[tuple[torch.Tensor, ...]]]:
    """The first expert of the first layer, and what its experts module is called with."""
    live = live_experts(model.model)
    entry = live.stacks[0]
    heard: list[tuple[torch.Tensor, ...]] = []
    hook = entry.module.register_forward_pre_hook(lambda _, args: heard.append(args))
    for row in TEXT.rows:
        model.model(input_ids=torch.tensor([row]), use_cache=False)
    hook.remove()
    return next(key for key in live if key.layer == entry.layer), heard


def test_sums_are_those_of_a_loop(qwen: Path, tmp_path: Path) -> None:
    """Token by token, from what the experts module is called with."""
    model = loaded(qwen)
    live = live_experts(model.model)
    key, heard = heard_of_the_first(model)
    wanted, hidden, n = np.zeros((32, 32)), np.zeros((24, 24)), 0
    gate, up = live[key].matrices["gate"].double(), live[key].matrices["up"].double()
    for states, index, weights in heard:
        of = zip(states.detach().double(), index, weights.detach().double(), strict=True)
        for x, chosen, gates in of:
            for expert, g in zip(chosen.tolist(), gates, strict=True):
                if expert == key.expert:
                    inner = g * torch.nn.functional.silu(gate @ x) * (up @ x)
                    wanted += torch.outer(g * x, g * x).numpy()
                    hidden += torch.outer(inner, inner).numpy()
                    n += 1
    found = collect(model, TEXT, tmp_path / "s")
    assert found.tokens()[key] == n > 0
    np.testing.assert_allclose(found.moments(key, "inputs"), wanted, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.moments(key, "hidden"), hidden, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("moments", ["full", "diagonal"])
def test_moments_by_affinity_are_those_of_a_loop(moments: Any, qwen: Path, tmp_path: Path) -> None:
    """g x xᵀ beside g² x xᵀ, which stays what it is; in half the room, so in more passes."""
    model = loaded(qwen)
    live = live_experts(model.model)
    key, heard = heard_of_the_first(model)
    wanted, hidden = np.zeros((32, 32)), np.zeros((24, 24))
    gate, up = live[key].matrices["gate"].double(), live[key].matrices["up"].double()
    for states, index, weights in heard:
        for x, chosen, gates in zip(
            states.detach().double(), index, weights.detach().double(), strict=True
        ):
            g = float(gates[chosen == key.expert].sum())
            inner = torch.nn.functional.silu(gate @ x) * (up @ x)
            wanted += g * torch.outer(x, x).numpy()
            hidden += g * torch.outer(inner, inner).numpy()
    if moments == "diagonal":
        wanted, hidden = wanted.diagonal(), hidden.diagonal()
    memory = 3 * 4 * (32**2 + 24**2)
    plain = collect(model, TEXT, tmp_path / "plain", Settings(moments=moments, memory=memory))
    settings = Settings(moments=moments, memory=memory, affinity=True)
    found = collect(model, TEXT, tmp_path / "s", settings)
    assert len(found.parts) > len(plain.parts) or moments == "diagonal"
    np.testing.assert_allclose(found.array(key, "inputs_affinity"), wanted, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.array(key, "hidden_affinity"), hidden, rtol=1e-4, atol=1e-9)
    for name, array in arrays(plain).items():
        np.testing.assert_allclose(arrays(found)[name], array, rtol=1e-5, atol=1e-9)
    for folder, asked in (("plain", settings), ("s", Settings(moments=moments))):
        with pytest.raises(MoeboundError, match="affinity is"):
            collect(model, TEXT, tmp_path / folder, asked)


def test_rounding_by_affinity(qwen: Path, tmp_path: Path) -> None:
    """Other weights than by g², the same by statistics of all tokens, where g is 1; and statistics
    without it are named."""
    from moebound.store import compress, open_store

    model = loaded(qwen)
    setting = "moequant_re:int3:g16"

    def stored(name: str, method: str, settings: Settings) -> list[bytes]:
        if not (tmp_path / name).exists():
            collect(model, TEXT, tmp_path / name, settings)
        at = tmp_path / f"{name}-{len(method)}"
        compress(qwen, at, method=method, calibration=tmp_path / name)
        store = open_store(at)
        every = (store.decode_expert(expert.key) for expert in store.experts())
        return [matrix.tobytes() for found in every for matrix in found.values()]

    both = Settings(affinity=True)
    assert stored("s", setting, both) != stored("s", f"{setting}:affinity", both)
    every = Settings(affinity=True, routed=False)
    assert stored("all", setting, every) == stored("all", f"{setting}:affinity", every)
    with pytest.raises(MoeboundError, match=r"has no 'hidden_affinity'.*calibrate --affinity|"
                       r"has no 'inputs_affinity'.*calibrate --affinity"):  # fmt: skip
        stored("without", f"{setting}:affinity", Settings())


@pytest.mark.parametrize("routed", [True, False])
def test_what_the_router_sends_is_that_of_a_loop(routed: bool, qwen: Path, tmp_path: Path) -> None:
    """Tokens, gates and norms of those that were sent; outputs without g; products of logits."""
    model = loaded(qwen)
    live = live_experts(model.model)
    entry = live.stacks[0]
    heard: list[tuple[torch.Tensor, ...]] = []
    logits: list[torch.Tensor] = []
    hooks = [
        entry.module.register_forward_pre_hook(lambda _, args: heard.append(args)),
        model.model.model.layers[entry.layer].mlp.gate.register_forward_hook(
            lambda _module, _args, output: logits.append(output[0].detach().double())
        ),
    ]
    for row in TEXT.rows:
        model.model.model(input_ids=torch.tensor([row]), use_cache=False)
    for hook in hooks:
        hook.remove()
    found = collect(model, TEXT, tmp_path / "s", Settings(routed=routed))
    every = torch.cat(logits)
    for key in live.in_layer(entry.layer):
        gate, up, down = (live[key].matrices[role].double() for role in ("gate", "up", "down"))
        sent, gates, norms, plain = 0, 0.0, 0.0, torch.zeros(2, 32, dtype=torch.float64)
        for states, index, weights in heard:
            of = zip(states.detach().double(), index, weights.detach().double(), strict=True)
            for x, chosen, g in of:
                own = float(g[chosen == key.expert].sum())
                output = down @ (torch.nn.functional.silu(gate @ x) * (up @ x))
                sent += own > 0
                gates += own
                norms += own * float(output.norm())
                if own or not routed:
                    plain += torch.stack([output, output.square()])
        assert found.array(key, "sent") == sent
        np.testing.assert_allclose(found.array(key, "sent_gates"), gates, rtol=1e-5)
        np.testing.assert_allclose(found.array(key, "norms"), norms, rtol=1e-4)
        np.testing.assert_allclose(found.array(key, "plain"), plain, rtol=1e-3, atol=1e-8)
        wanted = every.T[key.expert] @ every
        np.testing.assert_allclose(found.array(key, "logits"), wanted, rtol=1e-4, atol=1e-8)
        diagonal = found.array(key, "inputs_diagonal")
        np.testing.assert_array_equal(diagonal, np.diag(found.moments(key, "inputs")))


def test_statistics_of_version_1_are_read(qwen: Path, tmp_path: Path) -> None:
    """And say what they lack."""
    found = collect(loaded(qwen), TEXT, tmp_path / "s")
    document = json.loads((found.folder / "statistics.json").read_text())
    assert document["version"] == 2
    assert "searched" not in document
    (found.folder / "statistics.json").write_text(json.dumps(document | {"version": 1}))
    later = {"sent", "sent_gates", "norms", "plain", "ratios", "logits"}
    for file in found.folder.glob("*.safetensors"):
        save_file({n: a for n, a in load_file(file).items() if n not in later}, file)
    old, key = read_statistics(found.folder), found.keys[0]
    np.testing.assert_array_equal(old.moments(key, "inputs"), found.moments(key, "inputs"))
    assert old.array(key, "tokens") == found.tokens()[key]
    for name in later:
        with pytest.raises(MoeboundError, match=rf"has no '{name}'.*anew with `moebound calibrate"):
            old.array(key, name)
    with pytest.raises(MoeboundError, match=r"has no 'kept'.*--search"):
        found.array(key, "kept")


def test_little_memory_means_more_passes_and_the_same_sums(qwen: Path, tmp_path: Path) -> None:
    model = loaded(qwen)
    steps: list[tuple[str, int, int]] = []
    whole = collect(model, TEXT, tmp_path / "whole")
    parts = collect(
        model, TEXT, tmp_path / "parts", Settings(memory=3 * 4 * (32**2 + 24**2)),
        lambda *step: steps.append(step),
    )  # fmt: skip
    assert len(parts.parts) > len(whole.parts)
    assert {step[2] for step in steps} == {3 * len(TEXT.rows)}
    assert steps[-1][1] == steps[-1][2]
    for name, array in arrays(whole).items():
        np.testing.assert_allclose(arrays(parts)[name], array, rtol=1e-5, atol=1e-9)


def test_a_diagonal_is_that_of_the_whole(qwen: Path, tmp_path: Path) -> None:
    model = loaded(qwen)
    whole = collect(model, TEXT, tmp_path / "whole")
    diagonal = collect(model, TEXT, tmp_path / "diagonal", Settings(moments="diagonal"))
    assert diagonal.n_bytes < whole.n_bytes
    for name, array in arrays(diagonal).items():
        np.testing.assert_allclose(array, np.diag(arrays(whole)[name]), rtol=1e-5, atol=1e-9)


def test_all_tokens_reach_all_experts(qwen: Path, tmp_path: Path) -> None:
    found = collect(loaded(qwen), TEXT, tmp_path / "s", Settings(routed=False))
    assert set(found.tokens().values()) == {TEXT.n_tokens}
    first, second = (found.moments(key, "inputs") for key in found.keys[:2])
    np.testing.assert_allclose(first, second, rtol=1e-5)


def test_an_interrupted_run_goes_on(qwen: Path, tmp_path: Path) -> None:
    model, settings = loaded(qwen), Settings(memory=1)
    wanted = collect(model, TEXT, tmp_path / "whole", settings)

    class Stop(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        if done > 3 * len(TEXT.rows):
            raise Stop

    with pytest.raises(Stop):
        collect(model, TEXT, tmp_path / "s", settings, stop)
    with pytest.raises(MoeboundError, match="the same `moebound calibrate` command finishes it"):
        read_statistics(tmp_path / "s")
    there = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("*.safetensors")}
    assert len(there) == 3
    found = collect(model, TEXT, tmp_path / "s", settings)
    assert all(path.stat().st_mtime_ns == at for path, at in there.items())
    for part in wanted.parts:
        data = (tmp_path / "whole" / part.file).read_bytes()
        assert (found.folder / part.file).read_bytes() == data
    assert sorted(p.name for p in found.folder.iterdir()) == sorted(
        p.name for p in wanted.folder.iterdir()
    )


def test_another_run_is_not_mixed_in(qwen: Path, tmp_path: Path) -> None:
    model = loaded(qwen)
    collect(model, TEXT, tmp_path / "s")
    assert collect(model, TEXT, tmp_path / "s").of.text == "rows"  # finished before
    with pytest.raises(MoeboundError, match="text_sha256"):
        collect(model, Text("rows", TEXT.rows[:3]), tmp_path / "s")
    with pytest.raises(MoeboundError, match="moments is 'full', asked is 'diagonal'"):
        collect(model, TEXT, tmp_path / "s", Settings(moments="diagonal"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(MoeboundError, match="not empty"):
        collect(model, TEXT, tmp_path / "mine")


@pytest.fixture
def made(qwen: Path, tmp_path: Path) -> Statistics:
    return collect(loaded(qwen), TEXT, tmp_path / "made")


def test_statistics_of_another_model(made: Statistics) -> None:
    with pytest.raises(MoeboundError, match="has other weights"):
        made.check_model("0" * 16, "another")


@pytest.mark.parametrize(
    "damage", ["cut", "gone", "nan", "shape", "dtype", "tokens", "json", "path"]
)
def test_damage_is_named(made: Statistics, damage: str) -> None:
    from safetensors.numpy import load_file, save_file

    file = made.folder / made.parts[0].file
    path = made.folder / "statistics.json"
    document = json.loads(path.read_text())
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "gone":
        file.unlink()
    elif damage in ("nan", "shape"):
        content = load_file(file)
        content["inputs"] = content["inputs"][:, :-1] if damage == "shape" else np.where(
            content["inputs"] > 0, np.nan, content["inputs"]
        ).astype(np.float32)  # fmt: skip
        save_file(content, file)
    elif damage == "dtype":
        content = load_file(file)
        save_file(content | {"inputs": content["inputs"].astype(np.float64)}, file)
    elif damage == "tokens":
        content = load_file(file)
        save_file(content | {"tokens": -1 - content["tokens"]}, file)
    elif damage == "json":
        path.write_text(json.dumps(document | {"width": "many"}))
    else:
        document["parts"][0]["file"] = "../elsewhere.safetensors"
        path.write_text(json.dumps(document))

    def read() -> None:
        found = read_statistics(made.folder)
        found.tokens()
        found.moments(made.keys[0], "inputs")

    with pytest.raises(FormatError, match=str(made.folder)):
        read()


def test_compressing_by_damaged_statistics(qwen: Path, made: Statistics, tmp_path: Path) -> None:
    """Named, and nothing is left in the place of the store."""
    from moebound import store
    from moebound.types import ErrorBound

    file = made.folder / made.parts[-1].file
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    asked: Any = {"bound": ErrorBound(0.5, "rate", "expert"), "method": "calibrated"}
    with pytest.raises(FormatError, match=str(file)):
        store.compress(qwen, tmp_path / "dst", calibration=made.folder, **asked)
    assert not (tmp_path / "dst").exists()
    file.write_bytes(whole)
    assert store.compress(qwen, tmp_path / "dst", calibration=made.folder, **asked).worst


def test_statistics_computed_in_a_coarser_dtype(qwen: Path, tmp_path: Path) -> None:
    """The weights were others: what they are of is said, and they are refused."""
    model = model_class(AutoConfig.from_pretrained(qwen)).from_pretrained(qwen, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = (parameter.data / 3).to(torch.float8_e5m2).float() * 3
    rounded = Loaded(model.train(False), None, Source("q", "checkpoint", "float8", "its own"))
    found = collect(rounded, TEXT, tmp_path / "s")
    checkpoint = open_checkpoint(qwen)
    with pytest.raises(MoeboundError, match="in float32 or the checkpoint's dtype"):
        found.check_model(experts_name(checkpoint), "q")


def test_what_is_no_folder_of_statistics(tmp_path: Path) -> None:
    with pytest.raises(MoeboundError, match="no such folder"):
        read_statistics(tmp_path / "none")
    with pytest.raises(MoeboundError, match="expected what `moebound calibrate` writes"):
        read_statistics(tmp_path)


def test_a_dense_model_has_none(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    dense = Loaded(
        LlamaForCausalLM(config).train(False), None, Source("d", "checkpoint", "float32", "")
    )
    with pytest.raises(UnsupportedArchitectureError):
        collect(dense, TEXT, tmp_path / "s")


def test_windows_of_a_file(tmp_path: Path) -> None:
    model = load(MIXTRAL)
    (tmp_path / "t.txt").write_text("Tom has 3 apples. " * 40)
    text = of_file(model, tmp_path / "t.txt", 2, window=50)
    assert [len(row) for row in text.rows] == [50, 50]
    (tmp_path / "short.txt").write_text("Tom")
    with pytest.raises(TaskError, match=r"a window is .*--window"):
        of_file(model, tmp_path / "short.txt")
    with pytest.raises(MoeboundError, match="--window 100000: the model has positions"):
        of_file(model, tmp_path / "t.txt", window=100_000)
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(TaskError, match="cannot be read as text"):
        of_file(model, tmp_path / "latin.txt")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "stats"
    asked = ["calibrate", MIXTRAL, "--task", "wordmath", "--limit", "4", "-o", str(out), "--json"]
    assert main(asked) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["experts"] == 64
    assert document["n_sequences"] == 4
    assert document["tokens_an_expert"]["most"] > 0
    assert read_statistics(out).of.model == MIXTRAL
    # The first 500 problems are left for measuring.
    assert main([*asked[:-2], str(tmp_path / "own"), "--json", "--skip", "500"]) == 0
    skipped = json.loads(capsys.readouterr().out)
    assert skipped["text_sha256"] == document["text_sha256"]


@pytest.mark.parametrize(
    "options",
    [[], ["--task", "wordmath", "--text", __file__], ["--text", __file__, "--skip", "3"],
     ["--task", "wordmath", "--window", "9"], ["--task", "wordmath", "--memory", "much"]],
)  # fmt: skip
def test_what_does_not_go_together(options: list[str], tmp_path: Path) -> None:
    assert main(["calibrate", MIXTRAL, "-o", str(tmp_path / "s"), *options]) == 2
    assert not (tmp_path / "s").exists()
