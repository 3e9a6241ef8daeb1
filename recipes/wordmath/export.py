"""Write a trained model as a folder that transformers loads, with sample prompts.

    python recipes/wordmath/export.py runs/wordmath src/moebound/wordmath/model
    python recipes/wordmath/export.py runs/mixtral somewhere --checkpoint weights-1200.pt

Weights are rounded to bfloat16. The model card (README.md) is written by hand and left alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from architecture import ARCHITECTURES, new_model
from moebound.wordmath.problems import LEVELS, Level, WordProblem, test_problems
from moebound.wordmath.tokenizer import BOS, CHAT_TEMPLATE, EOS, PAD, SPECIAL, build_tokenizer

MAX_NEW_TOKENS = 112
N_SAMPLES = 200
SAMPLE_SEED = 1
SAMPLES = {"wordmath": "sample_prompts.jsonl", "wordmath-hard": "sample_prompts_hard.jsonl"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of train.py")
    parser.add_argument("folder", type=Path, help="where the model goes")
    parser.add_argument("--checkpoint", default="checkpoint.pt", help="a file of that folder")
    args = parser.parse_args()
    export(args.run, args.folder, args.checkpoint)


def export(run: Path, folder: Path, checkpoint: str = "checkpoint.pt") -> None:
    state = torch.load(run / checkpoint, weights_only=True)["model"]
    vocabulary, _ = state["model.embed_tokens.weight"].shape
    n_layers = 1 + max(int(name.split(".")[2]) for name in state if ".layers." in name)
    n_experts = len(state["model.layers.1.mlp.gate.weight"])
    biased = "model.layers.1.mlp.gate.e_score_correction_bias" in state
    architecture = ARCHITECTURES["deepseek" if biased else "mixtral"]
    model = new_model(architecture.config(vocabulary, layers=n_layers, experts=n_experts))
    model.load_state_dict(state)
    model.to(torch.bfloat16)
    model.generation_config.max_new_tokens = MAX_NEW_TOKENS
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # else for its owner alone, in a package too
    tokenizer_class: Any = PreTrainedTokenizerFast  # which has no types
    tokenizer = tokenizer_class(
        tokenizer_object=build_tokenizer(),
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
        pad_token=SPECIAL[PAD],
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(folder)
    for level in LEVELS:
        lines = [json.dumps(row(problem)) + "\n" for problem in samples(level)]
        (folder / SAMPLES[level]).write_text("".join(lines), encoding="utf-8")


def samples(level: Level) -> list[WordProblem]:
    """Held-out problems that are not among the first 1000, which are there to evaluate on."""
    evaluated = {problem.prompt for problem in test_problems(level)}
    fresh = test_problems(level, 2 * N_SAMPLES, seed=SAMPLE_SEED)
    return [problem for problem in fresh if problem.prompt not in evaluated][:N_SAMPLES]


def row(problem: WordProblem) -> dict[str, object]:
    return {
        "prompt": problem.prompt,
        "answer": int(problem.answer),
        "format": problem.format,
        "reference": problem.reference,
    }


if __name__ == "__main__":
    main()
