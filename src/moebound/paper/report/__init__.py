"""What a study found, as tables beside the paper's, verdicts on its conclusions, and one HTML page.

read (files -> rows) -> tables (rows -> what is shown) -> verdicts (rules -> supports, contradicts,
leaves open) -> plots, page. Several reports -> models -> a page of their own. Nothing here runs a
model.
"""

from moebound.files.formats.study import Study, read_study
from moebound.paper.report.models import Models, compare_models
from moebound.paper.report.report import Report, make_report

__all__ = ["Models", "Report", "Study", "compare_models", "make_report", "read_study"]
