"""Every method that makes experts smaller, at the same bytes, on the same problems."""

from moebound.bench.methods.comparison import BITS, COMPARED, METHODS, run
from moebound.bench.methods.rows import MethodRow, MethodsReport

__all__ = ["BITS", "COMPARED", "METHODS", "MethodRow", "MethodsReport", "run"]
