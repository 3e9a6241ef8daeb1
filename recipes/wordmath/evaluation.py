"""How many held-out problems a model solves, answered greedily.

    python recipes/wordmath/evaluation.py src/moebound/wordmath/model --limit 500

The weights are computed with in float32, whatever they are stored in.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moebound.model.batched import NAME, register_batched
from moebound.model.pretrained import load_model
from moebound.wordmath.formats import Judgement
from moebound.wordmath.problems import LEVELS, WordProblem, test_problems
from moebound.wordmath.tokenizer import EOS, PAD, build_tokenizer

MAX_NEW_TOKENS = 112


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="a model folder")
    parser.add_argument("--limit", type=int, default=500, help="problems of each level")
    parser.add_argument("--json", action="store_true", help="every answer, as JSON lines")
    args = parser.parse_args()
    model = load_model(args.folder, dtype=torch.float32)
    for level in LEVELS:
        problems = test_problems(level, args.limit)
        texts = answers(model, problems)
        verdicts = [p.judge(text) for p, text in zip(problems, texts, strict=True)]
        if args.json:
            for problem, text, verdict in zip(problems, texts, verdicts, strict=True):
                print(json.dumps({**problem.to_json(), "text": text, **verdict._asdict()}))
        else:
            print(table(level, problems, verdicts))


def answers(model: Any, problems: Sequence[WordProblem], batch: int = 128) -> list[str]:
    """Greedy completions, in batches of prompts padded on the left to like length."""
    register_batched()
    model.set_experts_implementation(NAME)
    tokenizer = build_tokenizer()
    texts: list[str] = []
    for start in range(0, len(problems), batch):
        prompts = [tokenizer.encode(p.prompt).ids for p in problems[start : start + batch]]
        longest = max(map(len, prompts))
        ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts])
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=(ids != PAD).long(),
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                pad_token_id=PAD,
                eos_token_id=EOS,
            )
        texts += tokenizer.decode_batch(out[:, longest:].tolist(), skip_special_tokens=True)
    return texts


def table(level: str, problems: Sequence[WordProblem], verdicts: Sequence[Judgement]) -> str:
    """A Markdown table: percent of ICA and PIA, of all and of each kind."""
    kinds: list[tuple[str, Callable[[WordProblem], str]]] = [
        ("", lambda p: "all"),
        ("request", lambda p: "new wording" if p.request_is_new else "wording of training"),
        ("format", lambda p: p.format),
        ("steps", lambda p: str(p.n_steps)),
        ("template", lambda p: p.template),
    ]
    lines = [f"| {level} | problems | ICA | PIA |", "|---|---|---|---|"]
    for kind, name in kinds:
        groups: dict[str, list[Judgement]] = {}
        for problem, verdict in zip(problems, verdicts, strict=True):
            groups.setdefault(f"{kind} {name(problem)}".strip(), []).append(verdict)
        for label, found in sorted(groups.items()):
            ica = 100 * sum(v.ica for v in found) / len(found)
            pia = 100 * sum(v.pia for v in found) / len(found)
            lines.append(f"| {label} | {len(found)} | {ica:.1f} | {pia:.1f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
