"""The recorder: real tokens and nothing else, whatever the family, the batch or the padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from model_bits import CANNOT_GENERATE, runnable, running_model
from moebound.cache.trace import Trace
from moebound.errors import MoeboundError, UnsupportedArchitectureError
from moebound.model import live_experts
from moebound.model.batched import NAME, register_batched
from moebound.profile.routing import Recorder
from tiny_models import TINY

GENERATE: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(1)


def prompts(*lengths: int) -> list[torch.Tensor]:
    return [torch.randint(5, 90, (1, length)) for length in lengths]


def left_padded(texts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    width = max(text.shape[1] for text in texts)
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, width - text.shape[1] :] = text
        mask[row, width - text.shape[1] :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def of_sequence(trace: Trace, sequence: int) -> dict[str, Any]:
    chosen = trace.sequence == sequence
    return {
        "token": trace.token[chosen],
        "position": trace.position[chosen],
        "decode": trace.decode[chosen],
        # In float32 the router's order may differ by a rounding; the set of experts is what counts.
        "experts": [np.sort(layer.index[chosen], axis=1) for layer in trace.layers],
        "weights": [np.sort(layer.weights[chosen], axis=1) for layer in trace.layers],
    }


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name in ("token", "position", "decode"):
        np.testing.assert_array_equal(one[name], other[name])
    for a, b in zip(one["experts"], other["experts"], strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(one["weights"], other["weights"], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("name", runnable(set(TINY) - CANNOT_GENERATE))
def test_a_batch_routes_as_its_sequences_alone(name: str) -> None:
    """Padding, and what is fed to sequences that have ended, leave no trace. Every family."""
    model = running_model(name)
    texts = prompts(5, 8)
    with torch.inference_mode(), Recorder(model) as recorder:
        model.generate(**left_padded(texts), **GENERATE)
        together = recorder.take()
        for sequence, text in enumerate(texts):
            mask = torch.ones_like(text)
            model.generate(input_ids=text, attention_mask=mask, **GENERATE)
            assert_same(of_sequence(together, sequence), of_sequence(recorder.take(), 0))
    experts = live_experts(model)
    assert [layer.layer for layer in together.layers] == list(experts.layers)
    for layer in together.layers:
        assert layer.index.shape == layer.weights.shape
        assert layer.index.max() < layer.n_experts
        assert ((layer.weights == 0) == (layer.index == -1)).all()


@pytest.mark.parametrize("name", [*sorted(CANNOT_GENERATE), "ernie4_5_vl_moe"])
def test_reading_at_once(name: str) -> None:
    model = running_model(name)
    with torch.inference_mode(), Recorder(model) as recorder:
        model(input_ids=torch.cat(prompts(7, 7)))
        model(input_ids=torch.cat(prompts(4)))
    trace = recorder.take()
    assert trace.sequence.tolist() == [0] * 7 + [1] * 7 + [2] * 4
    assert trace.step.tolist() == [0] * 14 + [1] * 4
    assert trace.position.tolist() == [*range(7), *range(7), *range(4)]
    assert not trace.decode.any()


@pytest.mark.parametrize("name", ["deepseek_v3", "llama4_text", "jetmoe", "gpt_oss", "mixtral"])
def test_the_recorded_choice_is_the_one_computed_with(name: str) -> None:
    """Putting zeros into all experts that the trace does not name changes nothing; into one that
    it names, something."""
    model = running_model(name)
    ids = torch.cat(prompts(6))
    with torch.inference_mode():
        with Recorder(model) as recorder:
            wanted = model(input_ids=ids).logits
        trace = recorder.take()
        experts = live_experts(model)
        used = {(e.layer, int(x)) for e in trace.layers for x in np.unique(e.index)}
        unused = [key for key in experts if (key.layer, key.expert) not in used]
        for key in unused:
            for matrix in experts[key].matrices.values():
                matrix.zero_()
        torch.testing.assert_close(model(input_ids=ids).logits, wanted)
        layer, expert = min(used)
        for key in experts:
            if (key.layer, key.expert) == (layer, expert):
                experts[key].matrices["down"].zero_()
        assert not torch.equal(model(input_ids=ids).logits, wanted)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", NAME])
def test_every_experts_implementation_is_heard(implementation: str) -> None:
    register_batched()
    model = running_model("deepseek_v3")
    ids = torch.cat(prompts(6, 6))
    traces = []
    for chosen in ("eager", implementation):
        model.set_experts_implementation(chosen)
        with torch.inference_mode(), Recorder(model) as recorder:
            model(input_ids=ids)
        traces.append(recorder.take())
    for sequence in (0, 1):
        assert_same(of_sequence(traces[0], sequence), of_sequence(traces[1], sequence))


def test_prefill_then_decode() -> None:
    model = running_model("deepseek_v3")
    with torch.inference_mode(), Recorder(model, end_ids=()) as recorder:
        out = model.generate(**left_padded(prompts(3, 5)), **GENERATE, eos_token_id=-1)
    trace = recorder.take()
    assert trace.n_sequences == 2
    # The last token of each answer is never fed.
    assert trace.n_tokens == 3 + 5 + 2 * 5
    assert trace.decode.sum() == 2 * 5
    assert trace.step.tolist() == [0] * 8 + sorted([*range(1, 6)] * 2)
    for sequence, start in ((0, 2), (1, 0)):
        chosen = trace.sequence == sequence
        assert trace.token[chosen].tolist() == out[sequence, start:-1].tolist()
        assert trace.position[chosen].tolist() == list(range(chosen.sum()))


def test_what_follows_the_end_mark_is_not_counted() -> None:
    """Also where padding and end mark are one token, as in many checkpoints."""
    model = running_model("deepseek_v3")
    batch = left_padded(prompts(5, 5))
    free = model.generate(**batch, **GENERATE, eos_token_id=-1)
    end = int(free[0, 7])  # what row 0 says third
    for pad in (0, end):
        with torch.inference_mode(), Recorder(model, end_ids=[end], pad_id=pad) as recorder:
            out = model.generate(**batch, **GENERATE, eos_token_id=end, pad_token_id=pad)
        trace = recorder.take()
        for row in range(2):
            fed = out[row, :-1].tolist()
            alone = fed[: fed.index(end)] if end in fed else fed
            assert trace.token[trace.sequence == row].tolist() == alone


def test_right_padding_is_told_by_the_mask() -> None:
    model = running_model("mixtral")
    ids = torch.cat(prompts(6, 6))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    with torch.inference_mode(), Recorder(model) as recorder:
        model(input_ids=ids, attention_mask=mask)
    trace = recorder.take()
    assert trace.position.tolist() == [*range(4), *range(6)]


def test_take_forgets_and_hooks_are_gone_after_the_with() -> None:
    model = running_model("mixtral")
    recorder = Recorder(model)
    with torch.inference_mode():
        with recorder:
            model(input_ids=torch.cat(prompts(6)))
            assert recorder.take().n_tokens == 6
            assert recorder.take().n_tokens == 0
            with pytest.raises(MoeboundError, match="recording already"), recorder:
                pass
        model(input_ids=torch.cat(prompts(6)))
        assert recorder.take().n_tokens == 0
        with recorder:
            model(input_ids=torch.cat(prompts(3)))
        assert recorder.take().n_tokens == 3
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert all(not module._forward_hooks for module in model.modules())


def test_recording_changes_no_logit() -> None:
    model = running_model("deepseek_v3")
    ids = torch.cat(prompts(9))
    with torch.inference_mode():
        wanted = model(input_ids=ids).logits
        with Recorder(model):
            assert torch.equal(model(input_ids=ids).logits, wanted)


def test_a_pass_that_fails_is_not_recorded() -> None:
    model = running_model("mixtral")
    bad = torch.full((1, 4), 10_000)
    with torch.inference_mode(), Recorder(model) as recorder:
        with pytest.raises(IndexError):
            model(input_ids=bad)
        model(input_ids=torch.cat(prompts(3)))
    trace = recorder.take()
    assert trace.n_tokens == 3
    assert trace.step.tolist() == [0, 0, 0]


def test_zaya_may_choose_nobody() -> None:
    model = running_model("zaya")
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("balancing_biases"):
                buffer[-1] = 10.0  # its last class is "no expert"
    with torch.inference_mode(), Recorder(model) as recorder:
        model(input_ids=torch.cat(prompts(5)))
    layer = recorder.take().layers[0]
    assert (layer.index == -1).all()
    assert (layer.weights == 0).all()


def test_beam_search_is_refused_where_rows_change() -> None:
    model = running_model("mixtral")
    with torch.inference_mode(), Recorder(model) as recorder:
        cache = model(input_ids=torch.cat(prompts(4, 4)), use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([0]))
        with pytest.raises(MoeboundError, match="2 sequences went on as 1"):
            model(input_ids=torch.cat(prompts(1)), past_key_values=cache)
    del recorder


def test_an_experts_module_that_is_called_twice_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.model = inner

        def forward(self, input_ids: torch.Tensor) -> None:
            self.model(input_ids=input_ids)
            self.model(input_ids=input_ids)

    model = Twice(running_model("mixtral").model)
    with torch.inference_mode(), Recorder(model), pytest.raises(MoeboundError, match="twice"):
        model(input_ids=torch.cat(prompts(4)))


def test_a_dense_model_is_refused() -> None:
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=96,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    with pytest.raises(UnsupportedArchitectureError):
        Recorder(LlamaForCausalLM(config))
