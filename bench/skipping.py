"""What skipping policies skip, lose and save: shares, KL, time a token with experts offloaded.

    moebound thresholds builtin:wordmath-mixtral --task wordmath-hard --skip 500 --limit 96 \
        -o t.json
    OMP_WAIT_POLICY=PASSIVE python bench/skipping.py builtin:wordmath-mixtral --task wordmath-hard \
        --thresholds t.json --limit 100 > rows.json

KL is that to the model without a policy, over all tokens and over those of answers, of --limit
problems that are read with their solutions. Time is that of decoding: --texts of these problems are
fed token by token into a model from `moebound.load` at --budget (of --store, else of SRC), the same
tokens whatever the policy. All policies take turns with one model, text by text, --rounds times, so
that a busy machine slows all of them; a saving is of two times of the same text in the same round.
Beside the time on the clock stands that of the process on all CPUs, which others disturb less.
--coarse: a store under a wider bound, for the low precision of HOBBIT's rule, which is read here
for every expert that would be, as if none was ever in memory; time is not measured with it.
Rows go to stdout as JSON, a table and progress to stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

import moebound
from moebound.bench.environment import describe
from moebound.calibrate.text import solved
from moebound.evaluate.fidelity import Baseline
from moebound.evaluate.loading import Loaded, load
from moebound.evaluate.text import Rows
from moebound.model.coarse_copies import skipping_with_copies
from moebound.model.skip_policies import HobbitRe, Policy, get_policy
from moebound.model.skipping import Skipped, skipping
from moebound.tasks import get_task

NONE = "none"
POLICIES = ("lu_re", "odp_re", "modes_re:target0.2", "modes_re:target0.4", "hobbit_re",
            "hobbit_re:above0.7")  # fmt: skip


def policy_of(setting: str, thresholds: Path | None) -> Policy | None:
    if setting == NONE:
        return None
    return get_policy(setting, None if setting.startswith("hobbit_re") else thresholds)


def quality(
    loaded: Loaded, rows: Rows, policies: dict[str, Policy | None], coarse: str | None
) -> dict[str, dict[str, Any]]:
    """What each policy skips of the text's pairs, and how far its predictions are; of HOBBIT's also
    with the low precision of a store."""
    before, found = Baseline.of(loaded.model, rows), dict[str, dict[str, Any]]()
    copies = None if coarse is None else load(coarse).model
    for setting, policy in policies.items():
        say(f"reading with {setting}")
        chosen = nullcontext(Skipped()) if policy is None else skipping(loaded.model, policy)
        found[setting] = _compared(before, loaded.model, chosen)
        if copies is not None and isinstance(policy, HobbitRe):
            chosen = skipping_with_copies(loaded.model, policy, copies)
            found[setting]["copies"] = _compared(before, loaded.model, chosen)
    return found


def _compared(
    before: Baseline, model: Any, chosen: AbstractContextManager[Skipped]
) -> dict[str, Any]:
    with chosen as counts:
        score = before.compare(model)
    return {
        "pairs": counts.pairs,
        "share": counts.share,
        "share_coarse": counts.coarse / counts.pairs if counts.pairs else 0.0,
        "kl_nats": score.kl_nats,
        "kl_stderr": score.kl_stderr,
        "answer_kl_nats": score.answer_kl_nats,
        "answer_kl_stderr": score.answer_kl_stderr,
    }


def times(
    src: str, rows: Rows, policies: dict[str, Policy | None], *, budget: str, rounds: int
) -> dict[str, dict[str, Any]]:
    """Times, loads, bytes and skipped share of decoding, a token, by policy."""
    parts: dict[str, list[dict[str, Any]]] = {setting: [] for setting in policies}
    with moebound.load(src, ram_budget=budget) as offloaded, torch.inference_mode():
        for turn in range(rounds + 1):  # the first warms up
            say(f"decoding, round {turn} of {rounds}")
            for place, (prompt, solution) in enumerate(rows):
                shift = (turn + place) % len(policies)  # nobody always comes behind the same one
                order = [*policies][shift:] + [*policies][:shift]
                for setting in order:
                    offloaded.skip(policies[setting])
                    past = offloaded.model(torch.tensor([list(prompt)]), use_cache=True)
                    offloaded.meter.reset()
                    begun = time.process_time()
                    for token in solution:
                        past = offloaded.model(
                            torch.tensor([[token]]),
                            past_key_values=past.past_key_values,
                            use_cache=True,
                        )
                    cpu_s = time.process_time() - begun
                    if turn:
                        parts[setting].append(offloaded.stats() | {"cpu_s": cpu_s / len(solution)})
    return {setting: _decoded(stats, parts[NONE]) for setting, stats in parts.items()}


def _decoded(stats: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    steps = sum(part["steps"] for part in stats)
    pairs, skipped = (
        sum(part.get("skipping", {}).get(name, 0) for part in stats)
        for name in ("pairs", "skipped")
    )
    found: dict[str, Any] = {
        "share_decoding": skipped / pairs if pairs else 0.0,
        "loads_per_token": sum(part["loads"] for part in stats) / steps,
        "bytes_per_token": sum(part["bytes_moved"] for part in stats) / steps,
    }
    for name, key in (("wall", "seconds_per_step"), ("cpu", "cpu_s")):
        seconds, without = (np.array([part[key] for part in parts]) for parts in (stats, base))
        saved = 1 - seconds / without
        found[f"{name}_ms_per_token"] = 1e3 * float(np.median(seconds))
        found[f"{name}_saved"] = float(saved.mean())
        found[f"{name}_saved_stderr"] = float(saved.std(ddof=1) / len(saved) ** 0.5)
    return found


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """In 10⁻³ nats, ± one standard error."""
    lines = [
        "| policy | skipped | KL, all tokens | KL, answers | skipped, decoding | loads a token "
        "| CPU ms a token | saved | ms a token | saved |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| `{row['policy']}` | {_figures(row)} "
            f"| {row['share_decoding']:.1%} | {row['loads_per_token']:.2f} "
            + "".join(
                f"| {row[f'{name}_ms_per_token']:.1f} | {row[f'{name}_saved']:.1%} "
                f"± {row[f'{name}_saved_stderr']:.1%} "
                for name in ("cpu", "wall")
            )
            + "|"
        )
        if "copies" in row:
            coarse = row["copies"]["share_coarse"]
            lines.append(f"| the same, {coarse:.1%} coarse | {_figures(row['copies'])} | | | | |")
    return "\n".join(lines)


def _figures(row: dict[str, Any]) -> str:
    return (
        f"{row['share']:.1%} | {1e3 * row['kl_nats']:.2f} ± {1e3 * row['kl_stderr']:.2f} "
        f"| {1e3 * row['answer_kl_nats']:.3f} ± {1e3 * row['answer_kl_stderr']:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("src")
    parser.add_argument("--task", required=True)
    parser.add_argument("--thresholds", type=Path)
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--store")
    parser.add_argument("--coarse")
    parser.add_argument("--budget", default="25%")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    settings = [NONE, *asked.policies.split(",")]
    policies = {setting: policy_of(setting, asked.thresholds) for setting in settings}
    loaded = load(asked.src)
    rows = solved(loaded, get_task(asked.task), asked.limit, skip=asked.skip)
    read = quality(loaded, rows, policies, asked.coarse)
    decoded = times(
        asked.store or asked.src, rows[: asked.texts], policies,
        budget=asked.budget, rounds=asked.rounds,
    )  # fmt: skip
    found = [{"policy": setting, **read[setting], **decoded[setting]} for setting in policies]
    print(json.dumps({"environment": describe(), "arguments": vars(asked), "rows": found},
                     default=str))  # fmt: skip
    say(table(found))


if __name__ == "__main__":
    main()
