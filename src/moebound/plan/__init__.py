"""Stop 4 of the walk: what every expert gets, under a budget.

    sizes = measure_sizes(checkpoint)                               # moebound.store
    plan = make_plan(sizes, Evidence(sensitivity), Budget(bpw=3.0), source="...")
    plan.save(Path("plan.json"))

docs/plan.md says what is minimised, and which scheme is for what.
"""

from moebound.files.documents import Document
from moebound.plan.budget import Budget
from moebound.plan.items import RATES, ExpertSizes, Items
from moebound.plan.losses import curves_from_study
from moebound.plan.make import Evidence, Search, make_plan
from moebound.plan.make_widths import Deciding, make_width_plan
from moebound.plan.measured import Measured
from moebound.plan.plan import Plan, PlannedExpert
from moebound.plan.schemes import Scheme, effective_rank
from moebound.plan.widths import ExpertWidths, Family, Offers
from moebound.plan.within import Measure

__all__ = [
    "RATES",
    "Budget",
    "Deciding",
    "Document",
    "Evidence",
    "ExpertSizes",
    "ExpertWidths",
    "Family",
    "Items",
    "Measure",
    "Measured",
    "Offers",
    "Plan",
    "PlannedExpert",
    "Scheme",
    "Search",
    "curves_from_study",
    "effective_rank",
    "make_plan",
    "make_width_plan",
]
