"""Answers of a real vLLM, for test_answers.py; imports nothing of ours.

    ENGINE/bin/python tests/integrations/engines/answer.py JOBS.json ANSWERS.json

JOBS: a list of {"options": of vllm.LLM, "prompts": lists of token ids, "tokens": how many}.
ANSWERS: for each job a list; for each prompt {"tokens": ids, "logprobs": at each step [id, logprob]
of the likeliest, "prompt": logprob of each token of the prompt but the first}. Greedy.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any


def answer(options: dict[str, Any], prompts: list[list[int]], tokens: int) -> list[Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    engine = LLM(**options)
    asked = SamplingParams(
        temperature=0, max_tokens=tokens, logprobs=5, prompt_logprobs=0, ignore_eos=True
    )
    made = engine.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)
    answers = []
    for ids, of in zip(prompts, made, strict=True):
        best, before = of.outputs[0], of.prompt_logprobs[1:]
        answers.append(
            {
                "tokens": list(best.token_ids),
                "logprobs": [
                    sorted([i, found.logprob] for i, found in step.items())
                    for step in best.logprobs
                ],
                "prompt": [step[i].logprob for i, step in zip(ids[1:], before, strict=True)],
            }
        )
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()
    return answers


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    Path(sys.argv[2]).write_text(json.dumps([answer(**job) for job in jobs]), "utf-8")
