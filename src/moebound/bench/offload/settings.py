"""What to run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from moebound.bench.offload.model import Shapes
from moebound.bench.peers.settings import GGUF_TYPE
from moebound.errors import MoeboundError

LLAMA = "llama.cpp"
PEERS = ("stock", "accelerate", LLAMA)
ROUTINGS = ("forced", "own")


@dataclass(frozen=True)
class LlamaFile:
    """What llama.cpp runs. kind: a type of its files ("q4_k_m"), to which it quantizes the same
    weights; None for the weights as they are. mapped: all of the file stays mapped, so that the
    system can drop and read again what does not fit (`--no-repack`). By default it copies tensors
    of some types into another order, which is quicker, and cannot be dropped."""

    kind: str | None = None
    mapped: bool = False

    @property
    def name(self) -> str:
        return " ".join(filter(None, (LLAMA, self.kind, "mapped" if self.mapped else None)))


def _llama_file(peer: str) -> LlamaFile | None:
    """Of "llama.cpp", "llama.cpp:q4_k_m" and "llama.cpp:q4_k_m:mapped"; None for all else."""
    name, *options = peer.split(":")
    kind, mapped = None, False
    if options and GGUF_TYPE.fullmatch(options[0]):
        kind = options.pop(0)
    if options == ["mapped"]:
        mapped = bool(options.pop())
    return LlamaFile(kind, mapped) if name == LLAMA and not options else None


@dataclass(frozen=True)
class OffloadSettings:
    """What to run. model: a checkpoint, or None for a synthetic one of these shapes.

    budgets: shares of all experts decoded. routing: "forced" by a trace, "own" for the model's own
    router, or both. trace: a recorded one, or None for Zipf's law. task: whose problems a given
    model reads; a synthetic one reads drawn tokens. peers: of `PEERS`; llama.cpp always has its own
    routing, and may be followed by what `LlamaFile` has ("llama.cpp:q4_k_m:mapped"). slots: what
    those of compressed experts hold. linears: the same of linear layers that are no expert's; where
    that is codes, the run has a store of its own, whose other tensors are coded at the rate others,
    and so weights that are changed more. memory_limit: bytes that the process of each run may have,
    page cache included. device: where to compute. clients: so many at a time, beside one, in a run
    of each of ours; 1 for no such run.

    Raises MoeboundError for what does not go together.
    """

    model: str | None = None
    task: str = "wordmath"
    shapes: Shapes = field(default_factory=Shapes)
    rate: float = 0.3
    codec: str = "bound"
    budgets: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)
    tiers: tuple[str, ...] = ("disk", "ram")
    policies: tuple[str, ...] = ("hobbit",)
    predictors: tuple[str, ...] = ("none",)
    slots: tuple[str, ...] = ("values",)
    linears: tuple[str, ...] = ("values",)
    others: float = 0.3
    routing: tuple[str, ...] = ("forced",)
    trace: Path | None = None
    prompt: int = 64
    warm: int = 16
    tokens: int = 48
    device: str = "cpu"
    peers: tuple[str, ...] = ("stock", "accelerate")
    memory_limit: int | None = None
    clients: int = 1
    timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        if self.clients < 1:
            raise MoeboundError(f"clients {self.clients}: expected 1 or more")
        for option, given, known in (
            ("peers", tuple(LLAMA if _llama_file(p) else p for p in self.peers), PEERS),
            ("routing", self.routing, ROUTINGS),
            ("slots", self.slots, ("values", "codes", "codes4", "auto")),
            ("linears", self.linears, ("values", "codes", "codes4")),
        ):
            wrong = [name for name in given if name not in known]
            if wrong:
                raise MoeboundError(f"{option}: expected some of {', '.join(known)}, found {wrong}")
        if not self.routing:
            raise MoeboundError(f"routing: expected some of {', '.join(ROUTINGS)}, found none")
        if self.trace is not None and "forced" not in self.routing:
            raise MoeboundError(
                f"trace {self.trace}: followed by forced routing only, found {self.routing}"
            )
        if self.llama_files and self.device != "cpu":
            raise MoeboundError(f"peer llama.cpp: is run on the CPU, found device {self.device!r}")

    @property
    def llama_files(self) -> tuple[LlamaFile, ...]:
        return tuple(filter(None, map(_llama_file, self.peers)))
