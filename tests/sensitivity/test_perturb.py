"""Perturbations: real while they last, as large as they say, and gone without a trace."""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from model_bits import all_bits, as_bits, changed, running_model
from moebound import decode, encode
from moebound.errors import BoundError, CodecError, MoeboundError
from moebound.model import live_experts, undo
from moebound.sensitivity.noise import matrix_stats, source_ids
from moebound.sensitivity.perturb import Realised, perturbation, perturbed
from moebound.types import ErrorBound, ExpertKey, TensorStats
from tiny_models import TINY, tiny_model

RATE = ErrorBound(0.5, "rate", "expert")
SOURCES = [*source_ids(), "codec:sz3:lorenzo"]
EXACT = ("codec:raw", "codec:lossless")
# Plain; transposed, interleaved, with biases; without gate; in linears; transposed alone.
LAYOUTS = ["deepseek_v3", "gpt_oss", "nemotron_h", "jetmoe", "llama4_text"]


def bound_for(source: str) -> ErrorBound | None:
    return None if source in (*EXACT, "randomise") else RATE


@pytest.fixture
def model() -> nn.Module:
    found: nn.Module = tiny_model("deepseek_v3", dtype=torch.float32)
    return found


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_family_is_perturbed_and_restored(name: str) -> None:
    model = tiny_model(name)
    experts = live_experts(model)
    before = all_bits(model)
    key = list(experts)[-1]
    others = {other: [as_bits(m) for m in experts[other].matrices.values()] for other in experts}
    own = others.pop(key)
    with perturbed(experts.pick([key]), "gaussian-sd", RATE, seed=3) as realised:
        inside = [as_bits(m) for m in experts[key].matrices.values()]
        assert not any(torch.equal(a, b) for a, b in zip(own, inside, strict=True))
        for other, bits in others.items():
            for matrix, was in zip(experts[other].matrices.values(), bits, strict=True):
                assert torch.equal(as_bits(matrix), was)
        # Only the parameters that hold experts, so no bias and no router.
        assert {name.split(".")[-1] for name in changed(before, model)} <= {
            "gate_up_proj", "up_proj", "down_proj", "weight"}  # fmt: skip
    assert not changed(before, model)
    assert realised.n_experts == 1
    assert realised.n_weights == experts[key].n_weights
    assert realised.relative_rmse > 0


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_source_is_undone(name: str, source: str) -> None:
    model = tiny_model(name)
    experts = live_experts(model)
    before = all_bits(model)
    with perturbed(experts, source, bound_for(source)) as realised:
        assert bool(changed(before, model)) == (source not in EXACT)
    assert not changed(before, model)
    assert realised.source == source
    assert (realised.n_bytes is None) == (not source.startswith("codec:"))
    assert (realised.beyond is None) == (bound_for(source) is None)
    if source.startswith("codec:"):
        assert realised.beyond in (0.0, None)


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "jetmoe", "mixtral", "nemotron_h"])
def test_the_model_computes_with_the_error(name: str) -> None:
    model = running_model(name)
    ids = torch.arange(3, 11).unsqueeze(0)
    with torch.inference_mode():
        clean = model(input_ids=ids).logits
        with perturbed(live_experts(model), "randomise", None):
            other = model(input_ids=ids).logits
        again = model(input_ids=ids).logits
    assert not torch.equal(clean, other)
    assert torch.equal(clean, again)


def test_a_codec_in_the_model_is_the_codec_of_the_store(model: nn.Module) -> None:
    """Both scopes: the matrices are what `encode` makes of them under the same absolute bound."""
    experts = live_experts(model)
    expert = experts[ExpertKey(1, 2)]
    old = {role: m.clone() for role, m in expert.matrices.items()}
    expert_stats = sum((matrix_stats(m) for m in old.values()), TensorStats())
    for scope in ("expert", "matrix"):
        bound = ErrorBound(0.3, "rate", scope)
        with perturbed([expert], "codec:bound", bound) as realised:
            new = {role: m.clone() for role, m in expert.matrices.items()}
        total = 0
        for role, matrix in old.items():
            # Loaded in float32 from values that bfloat16 has not, so it is stored in float32.
            stats = expert_stats if scope == "expert" else matrix_stats(matrix)
            data = encode(matrix, bound.absolute(stats))
            decoded = decode(data)
            assert isinstance(decoded, torch.Tensor)
            assert torch.equal(new[role], decoded)
            total += len(data)
        assert realised.n_bytes == total
        assert realised.bits_per_weight == pytest.approx(8 * total / expert.n_weights)


def test_noise_of_an_expert_does_not_depend_on_the_others(model: nn.Module) -> None:
    experts = live_experts(model)
    key = ExpertKey(2, 1)

    def weights(keys: list[ExpertKey], seed: int = 1) -> list[torch.Tensor]:
        with perturbed(experts.pick(keys), "gaussian-sd", RATE, seed=seed):
            return [m.clone() for m in experts[key].matrices.values()]

    alone = weights([key])
    among = weights(list(reversed(list(experts))))
    other = weights([key], seed=2)
    assert all(torch.equal(a, b) for a, b in zip(alone, among, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(alone, other, strict=True))


def test_what_is_realised(model: nn.Module) -> None:
    experts = live_experts(model)
    expert = experts[ExpertKey(1, 0)]
    old = torch.cat([m.clone().flatten() for m in expert.matrices.values()]).double()
    with perturbed([expert], "gaussian-sd", RATE) as realised:
        new = torch.cat([m.clone().flatten() for m in expert.matrices.values()]).double()
    error = new - old
    epsilon = 0.5 * float(old.abs().mean())
    assert realised.n_weights == len(old)
    assert realised.max_abs_error == pytest.approx(float(error.abs().max()))
    assert realised.rmse == pytest.approx(float(error.square().mean().sqrt()))
    assert realised.relative_rmse == pytest.approx(float(error.norm() / old.norm()))
    assert realised.beyond == pytest.approx(float((error.abs() > epsilon).double().mean()))
    assert realised.beyond == pytest.approx(0.32, abs=0.03)
    assert realised.unchanged == 0
    assert realised.bits_per_weight is None


def test_bfloat16_swallows_small_errors_and_this_is_said() -> None:
    experts = live_experts(tiny_model("deepseek_v3"))
    with perturbed(experts, "gaussian-sd", ErrorBound(0.001, "rate", "expert")) as realised:
        pass
    assert realised.unchanged > 0.7


def test_realised_as_json(model: nn.Module) -> None:
    for source in ("gaussian-sd", "codec:bound", "randomise"):
        with perturbed(live_experts(model), source, bound_for(source), seed=4) as realised:
            pass
        text = json.dumps(realised.to_json(), allow_nan=False)
        assert Realised.from_json(json.loads(text)) == realised


def test_a_perturbation_is_computed_once_and_applied_again_and_again(model: nn.Module) -> None:
    experts = live_experts(model)
    before = all_bits(model)
    chosen = experts.pick([ExpertKey(1, 0), ExpertKey(2, 3)])
    ready = perturbation(chosen, "codec:sz3", RATE)
    assert not changed(before, model)
    with perturbed(chosen, "codec:sz3", RATE) as wanted:
        inside = all_bits(model)
    for _ in range(3):
        with ready.applied() as realised:
            assert realised == wanted
            assert not changed(inside, model)
        assert not changed(before, model)


def test_nested_for_other_experts_only(model: nn.Module) -> None:
    experts = live_experts(model)
    before = all_bits(model)
    first, second = experts.pick([ExpertKey(1, 0), ExpertKey(1, 1)])
    ready = perturbation([second, first], "uniform", RATE)
    with perturbed([first], "randomise", None):
        with perturbed([second], "uniform", RATE):
            pass
        one = all_bits(model)
        taken = "layer 1 expert 0 is perturbed already"
        with pytest.raises(MoeboundError, match=taken), perturbed([second, first], "uniform", RATE):
            pass
        with pytest.raises(MoeboundError, match=taken):
            perturbation([second, first], "uniform", RATE)
        with pytest.raises(MoeboundError, match=taken), ready.applied():
            pass
        assert not changed(one, model)
        with perturbed([second], "uniform", RATE):  # the refusal left no mark on it
            pass
    assert not changed(before, model)
    with perturbed([first, first], "uniform", RATE) as realised:  # twice is once
        assert realised.n_experts == 1
    assert not changed(before, model)


class Surprise(Exception):
    pass


@pytest.mark.parametrize("error", [Surprise, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_undone_after_an_exception(model: nn.Module, error: type[BaseException]) -> None:
    before = all_bits(model)
    with (
        pytest.raises(error),
        perturbed(live_experts(model), "gaussian-sd", RATE),
    ):
        raise error
    assert not changed(before, model)


@pytest.mark.parametrize("bad", ["bound", "codec", "interrupt"])
def test_undone_when_the_source_fails_half_way(
    model: nn.Module, bad: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = live_experts(model)
    experts[ExpertKey(2, 2)].matrices["up"].fill_(0)
    before = all_bits(model)
    if bad == "interrupt":
        _interrupt_after(monkeypatch, "replace", calls=3)
        with pytest.raises(KeyboardInterrupt), perturbed(experts, "uniform", RATE):
            pass
        monkeypatch.undo()
    elif bad == "bound":
        with pytest.raises(BoundError), perturbed(experts, "uniform", None):
            pass
    else:  # float64 is no dtype of a checkpoint; found out at the fifth expert
        experts.modules[2].double()
        before = all_bits(model)
        with pytest.raises(CodecError, match="float64"), perturbed(experts, "codec:bound", RATE):
            pass
    assert not changed(before, model)
    with perturbed(experts.pick([ExpertKey(1, 0)]), "uniform", RATE):  # nothing is left marked
        pass


def _interrupt_after(monkeypatch: pytest.MonkeyPatch, name: str, *, calls: int) -> None:
    real: Callable[..., None] = getattr(undo.Undo, name)
    count = iter(range(calls))

    def counted(*args: Any) -> None:
        if next(count, None) is None:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(undo.Undo, name, counted)


@pytest.mark.parametrize("at", range(80))
def test_undone_by_ctrl_c_at_any_line_of_the_undoing(at: int) -> None:
    """SIGINT at each line that undo.py runs, while it marks, saves, writes and copies back."""
    model = tiny_model("mixtral", dtype=torch.float32)
    experts = live_experts(model)
    before = all_bits(model)
    chosen = experts.pick([ExpertKey(0, 1), ExpertKey(1, 3)])
    lines = 0

    def trace(frame: FrameType, event: str, _arg: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != undo.__file__:
            return None
        if event == "line":
            lines += 1
            if lines == at + 1:
                signal.raise_signal(signal.SIGINT)
        return trace

    # Where tests run in the background of a shell, SIGINT is ignored unless one says otherwise.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    old = sys.gettrace()
    interrupted = False
    sys.settrace(trace)
    try:
        with perturbed(chosen, "uniform", RATE):
            pass
    except KeyboardInterrupt:
        interrupted = True
    finally:
        sys.settrace(old)
        signal.signal(signal.SIGINT, handler)
    assert interrupted == (lines > at)
    assert not changed(before, model)
    with perturbed(chosen, "uniform", RATE):
        assert changed(before, model)
    assert not changed(before, model)


def test_only_the_experts_touched_are_copied(model: nn.Module) -> None:
    """No second copy of the model: what is kept is the weights of one expert, twice at most."""
    experts = live_experts(model)
    expert = experts[ExpertKey(1, 0)]
    kept: list[int] = []
    real = undo.Undo.replace

    def replace(self: undo.Undo, *args: Any) -> None:
        real(self, *args)
        saved = self._saved[-1][1]
        # Copies of the matrices alone, and not of the parameter of which they are a slice.
        kept.append(sum(m.untyped_storage().nbytes() for m in saved.values()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(undo.Undo, "replace", replace)
        with perturbed([expert], "gaussian-sd", RATE):
            pass
    assert kept == [4 * expert.n_weights]


def test_parameters_stay_the_same_objects(model: nn.Module) -> None:
    """Whoever holds a parameter (an optimizer, a compiled model) sees the error and its end."""
    held = dict(model.named_parameters())
    places = {name: p.data_ptr() for name, p in held.items()}
    with perturbed(live_experts(model), "gaussian-sd", RATE):
        now = dict(model.named_parameters())
        assert all(now[name] is p and p.data_ptr() == places[name] for name, p in held.items())


def test_training_state_is_left_alone() -> None:
    model = running_model("mixtral")
    ids = torch.arange(3, 11).unsqueeze(0)
    with perturbed(live_experts(model), "uniform", RATE):
        model(input_ids=ids).logits.sum().backward()
    assert all(p.requires_grad for p in model.parameters())
    assert all(
        m.requires_grad is False for m in live_experts(model)[ExpertKey(0, 0)].matrices.values()
    )


def test_weights_that_are_not_finite_come_back(model: nn.Module) -> None:
    experts = live_experts(model)
    expert = experts[ExpertKey(1, 1)]
    expert.matrices["gate"][0, :3] = torch.tensor([math.nan, math.inf, -0.0])
    before = all_bits(model)
    for source in ("gaussian-sd", "uniform", "codec:bound", "codec:sz3"):
        with perturbed([expert], source, RATE) as realised:
            assert math.isfinite(realised.rmse)
        assert not changed(before, model)
