"""Plans, at a size: files that were made before, or made for every size."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from moebound.bench.methods.making import Candidate
from moebound.bench.methods.place import WITHIN, Place, Search, Sizing
from moebound.errors import MethodError, PlanError, SizeError
from moebound.files.formats.statistics import Statistics
from moebound.plan import Budget, Plan
from moebound.plan.fisher import Widest
from moebound.store import fisher_bounds, fisher_plan
from moebound.store.sizes import Known

PLAN = "plan:"
"""What a file of `moebound plan`, or a folder of them, stands behind."""
FISHER = f"{PLAN}fisher"
"""The plan of scheme `fisher`, made for every size. A folder of that name is plan:./fisher."""


@dataclass(frozen=True, eq=False)
class OfPlans(Sizing):
    """Plans, by what they are predicted to come to."""

    plans: Mapping[str, Plan]

    @classmethod
    def of(cls, path: Path) -> OfPlans:
        """Raises MethodError for a folder without any, PlanError for a file that is none."""
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not files:
            raise MethodError(f"plan:{path}: expected files of `moebound plan`, found none")
        return cls({str(file): Plan.load(file) for file in files})

    def search(self, bits: float) -> Search:
        file = min(self.plans, key=lambda name: abs(self.plans[name].bits_per_weight - bits))
        size = self.plans[file].bits_per_weight
        if abs(size - bits) > 2 * WITHIN * bits:
            raise SizeError(
                f"{bits:g} bits a weight: no plan is for that; the nearest is {file}, {size:.4g} "
                "bits",
                size,
            )
        return lambda asked: Candidate(f"plan:{file}", plan=file)


@dataclass(frozen=True, eq=False)
class ByFisher(Sizing):
    """Planned for the size by what the loss feels, and coded by those statistics."""

    place: Place
    statistics: Statistics
    _known: Known = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, place: Place) -> ByFisher:
        """Raises MethodError where there are no such statistics."""
        if place.fisher is None:
            raise MethodError(
                f"method {FISHER}: needs statistics of `moebound calibrate --fisher`: give their "
                "folder with --fisher"
            )
        return cls(place, place.fisher)

    @cached_property
    def _folder(self) -> Path:
        folder = TemporaryDirectory(prefix="moebound-plans-")
        weakref.finalize(self, folder.cleanup)
        return Path(folder.name)

    @cached_property
    def _widest(self) -> Widest:
        """The same at every size."""
        return fisher_bounds(self.place.checkpoint, self.statistics)

    def search(self, bits: float) -> Search:
        first = self._plan(bits)
        size = first.bits_per_weight
        if abs(size - bits) > 2 * WITHIN * bits:
            raise SizeError(
                f"{bits:g} bits a weight: a plan by what the loss feels comes to {size:.4g} bits",
                size,
            )

        def at(asked: float) -> Candidate:
            file = self._folder / f"{asked:.8g}.json"
            (first if asked == bits else self._plan(asked)).save(file)
            return Candidate(
                f"calibrated, {FISHER}", plan=str(file), calibration=self.statistics.folder
            )

        return at

    def _plan(self, bits: float) -> Plan:
        try:
            return fisher_plan(
                self.place.checkpoint, self.statistics, Budget(bpw=bits), widest=self._widest,
                known=self._known,
            )  # fmt: skip
        except PlanError as error:
            raise SizeError(str(error), None) from error
