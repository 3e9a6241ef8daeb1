"""What a plan may take, and what is said where it cannot."""

from __future__ import annotations

from dataclasses import dataclass

from moebound.errors import PlanError


@dataclass(frozen=True)
class Budget:
    """Exactly one of: bpw (bits per weight, experts only), ratio (times smaller than the source's
    experts), max_kl (nats a token; measured where plans are measured, else predicted). Raises
    PlanError otherwise."""

    bpw: float | None = None
    ratio: float | None = None
    max_kl: float | None = None

    def __post_init__(self) -> None:
        if len(self.asked) != 1:
            raise PlanError(f"expected one of bpw, ratio and max_kl, found {list(self.asked)}")

    @property
    def asked(self) -> dict[str, float]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def n_bytes(self, *, n_weights: int, source_bytes: int) -> int | None:
        """The most bytes; None for max_kl."""
        if self.bpw is not None:
            return int(self.bpw * n_weights / 8)
        return None if self.ratio is None else int(source_bytes / self.ratio)

    def refuse(self, most: int, smallest: int, *, n_weights: int, source_bytes: int) -> None:
        """Raises PlanError if the smallest is more than the most, and says in the budget's units
        what can be."""
        if smallest <= most:
            return
        if self.bpw is not None:
            # Rounded up, so that asking for what is said here works.
            bits = -(-8000 * smallest // n_weights) / 1000
            asked, possible = f"--bpw {self.bpw:g}", f"{bits:.3f} bits per weight"
        else:
            ratio = int(1000 * source_bytes / smallest) / 1000
            asked, possible = f"--ratio {self.ratio:g}", f"{ratio:.3f} times smaller"
        raise PlanError(
            f"{asked} cannot be met: that is {most} bytes, and the smallest is {smallest} bytes, "
            f"{possible}"
        )
