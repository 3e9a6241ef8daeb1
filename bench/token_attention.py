"""Attention of one token: transformers' way, and ours; and a pass of eight texts.

    OMP_WAIT_POLICY=PASSIVE python bench/token_attention.py > bench/results/token_attention.json

bfloat16, one layer, behind a text of so many tokens; results are compared before they are timed.

- `latent`: Moonlight's, 16 heads, keys of 192 numbers, values of 128, made of 512 and 64. `torch`:
  made, then `sdpa` of transformers. `padded`: values made as wide as keys. `native`: made, then the
  kernel. `absorbed`: the kernel, with nothing made. `making` is the part of the first three.
- `plain`: 16 heads of 128, as OLMoE has them, and 32 that share 4, as Qwen3-MoE: `torch`, `native`.
- `texts`: four layers of Moonlight's shapes without experts, a pass of eight texts: each by itself,
  as one pass with attention called once a text (`apart`), and once for all (`together`).

CPU time in milliseconds of this process, in turns: medians. JSON, and a table on stderr.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from moebound.bench.environment import describe
from moebound.model.attention import Latents, attention, fuse_attention, padded_attention
from moebound.model.few_rows import multiply_few_rows
from moebound.model.joined import JoinedLinears
from moebound.model.strands import Strand, Strands
from moebound.text.growing_cache import GrowingCache
from moebound.text.one_pass import OnePass

LENGTHS = (32, 128, 512, 2048)
PLAIN = ((16, 16, 128), (32, 4, 128))
CLIENTS, TOKENS = 8, 10
MOONLIGHT: Any = {
    "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip


def medians(ways: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Milliseconds of CPU time."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(spent[next(iter(ways))]) < 4:
        for name, way in ways.items():
            begin = time.process_time()
            way()
            spent[name].append(1e3 * (time.process_time() - begin))
    return {name: statistics.median(some[1:]) for name, some in spent.items()}


def compared(ways: Mapping[str, Callable[[], Any]]) -> None:
    first, *others = (way()[0].float() for way in ways.values())
    if any((first - other).abs().max() > 2e-2 for other in others):
        raise ValueError("attention gives another result")


def latent(length: int, seconds: float) -> dict[str, Any]:
    from transformers import DeepseekV3Config
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    module = DeepseekV3Attention(DeepseekV3Config(**MOONLIGHT), 0).bfloat16()
    multiply_few_rows(module)
    query = torch.randn(1, 16, 1, 192).bfloat16()
    kept = torch.randn(1, 1, length, 512).bfloat16(), torch.randn(1, 1, length, 64).bfloat16()
    make = partial(module.expand_kv, *kept)
    ways: dict[str, Callable[[], Any]] = {
        "torch": lambda: sdpa_attention_forward(module, query, *make(), None),
        "padded": lambda: (padded_attention(module, query, *make(), None),),
        "native": lambda: attention(module, query, *make(), None),
        "absorbed": lambda: attention(module, query, Latents(module, *kept), None, None),
    }
    compared(ways)
    return {"length": length, "ms": medians(ways | {"making": make}, seconds)}


def plain(heads: int, shared: int, width: int, length: int, seconds: float) -> dict[str, Any]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module: Any = nn.Module()
    module.num_key_value_groups = heads // shared
    drawn = [
        torch.randn(1, n, t, width) for n, t in ((heads, 1), (shared, length), (shared, length))
    ]
    given = module, *(some.bfloat16() for some in drawn), None
    ways = {"torch": partial(sdpa_attention_forward, *given), "native": partial(attention, *given)}
    compared(ways)
    found = {"heads": heads, "shared": shared, "width": width, "length": length}
    return found | {"ms": medians(ways, seconds)}


def texts(length: int) -> dict[str, Any]:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        intermediate_size=1408, num_hidden_layers=4, first_k_dense_replace=4, vocab_size=4096,
        **MOONLIGHT,
    )  # fmt: skip
    model: Any = DeepseekV3ForCausalLM(config).bfloat16()
    model.eval().requires_grad_(False)
    multiply_few_rows(model)
    fuse_attention(model)

    def client(strands: Strands) -> Strand:
        def read() -> None:
            cache = GrowingCache(config).cache
            for n in (length, *(1 for _ in range(TOKENS))):
                strand.rest()
                ids = torch.randint(0, config.vocab_size, (1, n))
                model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

        strand = strands.start(read)
        return strand

    def passes(way: str) -> float:
        linears, one = JoinedLinears(model), None if way == "each" else OnePass(model)
        if one is not None:
            one.apart = way == "apart"
        strands, spent = Strands(), list[float]()
        clients = [client(strands) for _ in range(CLIENTS)]
        while alive := [strand for strand in clients if not strand.dead]:
            begin = time.process_time()
            strands.advance(alive)
            spent.append(1e3 * (time.process_time() - begin))
        if one is not None:
            if one.taken != TOKENS - 1:
                raise ValueError(f"{way}: {one.taken} of {TOKENS - 1} passes were one for all")
            one.remove()
        linears.remove()
        return statistics.median(spent[3:-1])  # not the prompts, nor what was tried out

    ways = ("each", "apart", "together")
    return {"length": length, "texts": CLIENTS, "ms": {way: passes(way) for way in ways}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="for each comparison")
    args = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        rows = {
            "latent": [latent(length, args.seconds) for length in LENGTHS],
            "plain": [plain(*of, length, args.seconds) for of in PLAIN for length in LENGTHS],
        }
    rows["texts"] = [texts(length) for length in (32, 512)]
    for name, some in rows.items():
        for one in some:
            what = ", ".join(f"{key} {value}" for key, value in one.items() if key != "ms")
            times = ", ".join(f"{way} {ms:.3g}" for way, ms in one["ms"].items())
            print(f"{name}: {what}: {times} ms", file=sys.stderr)
    print(json.dumps({"environment": describe(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
