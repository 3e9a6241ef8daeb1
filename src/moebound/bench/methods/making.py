"""One candidate, made by a process of its own: how long that takes, and the most memory it holds.

    python -m moebound.bench.methods.making < what to make, as JSON

The process reads the checkpoint, compresses it with one group at a time, writes the store, and only
then verifies it. `seconds` is the time of the first three on the clock, `cpu_seconds` that of
all threads. `peak_bytes` is the most that the process had in memory until then, as the system
counts it; `base_bytes` is what it had before it began, Python and its libraries.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebound.checkpoint import Checkpoint, open_checkpoint
from moebound.errors import BoundViolatedError, MoeboundError, SizeError
from moebound.files.formats.statistics import read_statistics
from moebound.methods import get_method
from moebound.plan import Plan, PlannedExpert
from moebound.types import ErrorBound, Guarantee


@dataclass(frozen=True)
class Candidate:
    """What is made: the setting of a method, and the bound, in mean |weight| of an expert, of one
    that keeps bounds. layers: settings of its own for each layer; none where all have one. plan: a
    file that says it all instead. again: whether what is kept is coded by statistics that are
    gathered again, of the model without the rest. calibration: a folder of statistics of its own,
    in the place of those of all others."""

    setting: str
    rate: float | None = None
    layers: tuple[tuple[int, str], ...] = ()
    plan: str | None = None
    again: bool = False
    calibration: Path | None = None

    @property
    def own(self) -> str:
        """The setting without what codes the rest."""
        return self.setting.partition("+")[0]

    @property
    def said(self) -> str:
        """The setting, or those of the layers."""
        counts = Counter(setting for _, setting in self.layers)
        each = [f"{setting} in {n} layers" for setting, n in sorted(counts.items())]
        return ", ".join(each) or self.setting


@dataclass(frozen=True)
class Made:
    """What a store came to. n_bytes: of the compressed experts, everything counted. statistics:
    of what model those were that it was coded by; None where it needs none."""

    setting: str
    rate: float | None
    n_bytes: int
    n_weights: int
    n_bytes_whole: int
    n_parameters: int
    guarantee: Guarantee
    max_abs_error: float
    rmse: float
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    base_bytes: int
    statistics: str | None = None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.n_bytes / self.n_weights


def make(
    candidate: Candidate,
    src: str,
    calibration: Path | None,
    dst: Path,
    moved: Path | None = None,
) -> Made:
    """A store at dst, verified, made by a process of its own. moved: statistics again, of the model
    as the method leaves it to its coder.

    Raises SizeError where the method cannot be so small or large, BoundViolatedError for a store
    that breaks its promise, MoeboundError for whatever else went wrong there.
    """
    calibration = candidate.calibration or calibration
    spec = {
        "setting": candidate.setting,
        "rate": candidate.rate,
        "layers": candidate.layers,
        "plan": candidate.plan,
        "src": src,
        "calibration": None if calibration is None else str(calibration),
        "moved": None if moved is None else str(moved),
        "dst": str(dst),
    }
    command = [sys.executable, "-m", "moebound.bench.methods.making"]
    done = subprocess.run(
        command, input=json.dumps(spec), capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        why = "killed, probably because memory ran out" if done.returncode == -9 else said[-1]
        raise MoeboundError(f"{candidate.said}: {why}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if "error" not in found:
        return Made(candidate.said, candidate.rate, **found)
    if found["kind"] == "size":
        raise SizeError(found["error"], found["nearest"])
    kind = BoundViolatedError if found["kind"] == "violated" else MoeboundError
    raise kind(found["error"])


def _made(spec: dict[str, Any]) -> dict[str, Any]:
    from moebound.bench.offload.memory import peak_resident_bytes, resident_bytes
    from moebound.store import compress, verify

    rate, dst = spec["rate"], Path(spec["dst"])
    checkpoint, base = open_checkpoint(spec["src"]), resident_bytes()
    begun, cpu = time.monotonic(), time.process_time()
    bound = None if rate is None else ErrorBound(rate, "rate", "expert")
    plan = None
    if spec["plan"] is not None:
        plan = Plan.load(Path(spec["plan"]))
    elif spec["layers"]:
        plan = _plan(checkpoint, dict(spec["layers"]), spec["src"])
    summary = compress(
        checkpoint,
        dst,
        bound=plan or bound,
        method=None if plan else spec["setting"],
        calibration=spec["calibration"],
        moved=spec["moved"],
        others="keep",
        jobs=1,
    )
    seconds, cpu_seconds = time.monotonic() - begun, time.process_time() - cpu
    peak = peak_resident_bytes()
    verify(dst, against=checkpoint).check(summary.method)
    return {
        "n_bytes": summary.expert_bytes_after,
        "n_weights": summary.n_weights,
        "n_bytes_whole": summary.model_bytes_after,
        "n_parameters": summary.n_parameters,
        "guarantee": summary.guarantee,
        "max_abs_error": summary.max_abs_error,
        "rmse": summary.rmse,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_bytes": peak,
        "base_bytes": base,
        "statistics": _read(
            plan.methods if plan else [spec["setting"]], spec["calibration"], spec["moved"]
        ),
    }


def _plan(checkpoint: Checkpoint, layers: Mapping[int, str], src: str) -> Plan:
    """Each layer's experts by a setting of their own, that knows no bound."""
    experts = checkpoint.experts()
    return Plan(
        method=layers[experts[0].key.layer],
        scheme="layers",
        budget={},
        source=src,
        source_bytes=sum(expert.n_bytes for expert in experts),
        experts=tuple(
            PlannedExpert(e.key, {}, e.size, e.n_bytes, method=layers[e.key.layer]) for e in experts
        ),
    )


def _read(settings: Collection[str], calibration: str | None, moved: str | None) -> str | None:
    """Of what model the statistics are that it all was coded by, and how they are weighted."""
    if moved is not None:
        return f"after {read_statistics(Path(moved)).of.after}"
    asked = any(get_method(setting).wanted_statistics() for setting in settings)
    if not asked or calibration is None:
        return None
    fisher = read_statistics(Path(calibration)).of.fisher
    return f"the whole model{', weighted by what the loss feels (--fisher)' if fisher else ''}"


def _first(error: SizeError) -> SizeError:
    """What the method itself said: on its way it got names of tensors and files in front."""
    cause = error.__cause__
    return _first(cause) if isinstance(cause, SizeError) else error


def main() -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        found = _made(json.load(sys.stdin))
    except SizeError as error:
        first = _first(error)
        found = {"kind": "size", "error": str(first), "nearest": first.nearest}
    except BoundViolatedError as error:
        found = {"kind": "violated", "error": str(error)}
    except MoeboundError as error:
        found = {"kind": "other", "error": str(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
