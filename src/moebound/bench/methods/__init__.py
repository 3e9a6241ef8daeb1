"""Every method that makes experts smaller, at the same bytes, on the same problems."""

from moebound.bench.methods.rows import MethodRow, MethodsReport
from moebound.bench.methods.run import BITS, COMPARED, METHODS, REMOVED, run

__all__ = ["BITS", "COMPARED", "METHODS", "REMOVED", "MethodRow", "MethodsReport", "run"]
