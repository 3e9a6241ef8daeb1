"""Train a built-in model. The same command starts a run and goes on with one.

    python recipes/wordmath/train.py runs/wordmath
    python recipes/wordmath/train.py runs/mixtral --architecture mixtral

The schedule is in steps: warm-up, then half a cosine down to zero at the last step. `--steps` may
be changed when a run goes on; the learning rate then follows the new cosine. Checkpoints (model,
optimizers, step) are written every few minutes and when the process is told to stop, whole or not
at all. Batches depend on seed and step alone, so a run that was stopped and goes on ends with the
same weights as one that was not.
"""

from __future__ import annotations

import os

if __name__ == "__main__" and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
    # Each step frees and takes back hundreds of megabytes: keep them, a tenth of the time is page
    # faults otherwise. glibc reads these only when a process starts.
    import sys

    keep = {"MALLOC_MMAP_THRESHOLD_": 1 << 32, "MALLOC_TRIM_THRESHOLD_": 1 << 33}
    os.environ.update({name: str(value) for name, value in keep.items()})
    os.execv(sys.executable, [sys.executable, *sys.argv])

import argparse
import json
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from architecture import ARCHITECTURES, compile_parts, new_model
from batches import Batch, batch
from evaluation import answers
from moebound.wordmath.problems import LEVELS, test_problems
from moebound.wordmath.tokenizer import vocabulary
from optimizer import optimizers
from routing import overflow

WARM_UP = 100


def main() -> None:
    args = arguments().parse_args()
    torch.set_num_threads(args.threads)
    with stop_on_signal() as stopped:
        train(args, stopped)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="checkpoint and log, written and gone on with")
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), default="deepseek")
    parser.add_argument("--steps", type=int, default=2450)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens a step")
    parser.add_argument("--easy-share", type=float, default=0.5, help="of the tokens")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--layers", type=int, help="of a small model, for tests")
    parser.add_argument("--experts", type=int, help="of a small model, for tests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint-seconds", type=float, default=300)
    parser.add_argument("--evaluate-seconds", type=float, default=1200)
    parser.add_argument("--evaluate-problems", type=int, default=100, help="of each level")
    parser.add_argument(
        "--keep-steps", type=int, default=0, help="keep the weights of every so many steps"
    )
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--stop-at", type=int, help="stop after this step, schedule unchanged")
    return parser


def train(args: argparse.Namespace, stopped: Sequence[int] = ()) -> Any:
    """Runs to the last step, or `stop_at`, or until `stopped` is not empty. Returns the model."""
    torch.manual_seed(args.seed)
    architecture = ARCHITECTURES[args.architecture]
    given = {"layers": args.layers, "experts": args.experts}
    small = {name: value for name, value in given.items() if value}
    model = new_model(architecture.config(len(vocabulary()), **small))
    optims = optimizers(model, args.lr, args.optimizer)
    args.folder.mkdir(parents=True, exist_ok=True)
    step = restore(args.folder, model, optims)
    if not args.no_compile:
        compile_parts(architecture)
    log = Log(args.folder / "log.jsonl")
    saved = evaluated = marked = time.monotonic()
    marked_step = step
    last = min(args.steps, args.stop_at or args.steps)
    while step < last and not stopped:
        data = batch(args.seed, step, args.tokens, args.easy_share)
        rate = args.lr * schedule(step, args.steps)
        loss, loads = learn(architecture, model, optims, data, rate)
        architecture.balance(model, loads, step)
        step += 1
        now = time.monotonic()
        if step % 20 == 0:
            dropped = sum(map(overflow, loads)) / len(loads)
            speed = (step - marked_step) * args.tokens / (now - marked)
            log(step=step, loss=loss, tokens_per_s=speed, dropped=dropped)
            marked, marked_step = now, step
        if args.keep_steps and step % args.keep_steps == 0:
            torch.save({"model": model.state_dict()}, args.folder / f"weights-{step}.pt")
        if now - saved > args.checkpoint_seconds:
            save(args.folder, model, optims, step)
            saved = time.monotonic()
        if args.evaluate_problems and now - evaluated > args.evaluate_seconds:
            evaluate(model, args.evaluate_problems, step, log)
            evaluated = marked = time.monotonic()
            marked_step = step
    save(args.folder, model, optims, step)
    if args.evaluate_problems and not stopped:
        evaluate(model, args.evaluate_problems, step, log)
    return model


def learn(
    architecture: ModuleType,
    model: Any,
    optims: list[torch.optim.Optimizer],
    data: Batch,
    rate: float,
) -> tuple[float, list[torch.Tensor]]:
    """One step. Returns the cross entropy before it, and the loads of each layer's experts."""
    for optim in optims:
        for group in optim.param_groups:
            group["lr"] = rate
    loss, entropy, loads = architecture.loss(model, data)
    torch.autograd.backward([loss])
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optim in optims:
        optim.step()
        optim.zero_grad()
    return entropy.item(), loads


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """A list that is empty until SIGTERM or SIGINT comes."""
    got: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda number, frame: got.append(number)) for number in numbers]
    try:
        yield got
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def schedule(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def save(folder: Path, model: Any, optims: list[Any], step: int) -> None:
    state = {"model": model.state_dict(), "optims": [o.state_dict() for o in optims], "step": step}
    unfinished = folder / "checkpoint.pt.unfinished"
    torch.save(state, unfinished)
    os.replace(unfinished, folder / "checkpoint.pt")


def restore(folder: Path, model: Any, optims: list[Any]) -> int:
    path = folder / "checkpoint.pt"
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optim, saved in zip(optims, state["optims"], strict=True):
        optim.load_state_dict(saved)
    return int(state["step"])


def evaluate(model: Any, n: int, step: int, log: Log) -> None:
    model.eval()
    for level in LEVELS:
        problems = test_problems(level, n)
        texts = answers(model, problems)
        verdicts = [p.judge(text) for p, text in zip(problems, texts, strict=True)]
        ica, pia = sum(v.ica for v in verdicts) / n, sum(v.pia for v in verdicts) / n
        log(step=step, level=level, n=n, ica=ica, pia=pia)
    model.train()


class Log:
    """One JSON object a line, in a file and on standard output."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.start = time.time()

    def __call__(self, **row: Any) -> None:
        line = json.dumps({"s": round(time.time() - self.start), **row})
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
