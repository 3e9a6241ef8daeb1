"""Stop 5 of the walk: the compressed checkpoint on disk.

    compress(checkpoint, "model-moebound", bound=ErrorBound(0.1, "rate", "expert"))  # or a Plan
    verify("model-moebound", against=checkpoint).ok
    store = open_store("model-moebound")
    weights = store.decode_expert(ExpertKey(layer=1, expert=0))     # one read
    decompress("model-moebound", "model-again")

docs/store.md describes the files.
"""

from moebound.store.at_size import rate_within, within
from moebound.store.card import Measurement, read_measurement, write_card
from moebound.store.decompress import decompress
from moebound.store.encoded import Encoded, Memo
from moebound.store.fisher import fisher_bounds, fisher_plan
from moebound.store.format import ExpertRecord, MatrixRecord, Settings
from moebound.store.planned import plan_of
from moebound.store.reader import (
    EncodedExpert,
    Store,
    StoredExpert,
    StoredMatrix,
    compressed_tensors,
    open_store,
)
from moebound.store.sizes import measure_calibrated, measure_sizes
from moebound.store.summary import (
    CompressSummary,
    DecompressSummary,
    ExpertTotals,
    Problem,
    Progress,
    VerifyReport,
)
from moebound.store.verify import verify
from moebound.store.weights import decoded_weights
from moebound.store.widths import measure_widths
from moebound.store.writer import compress

__all__ = [
    "CompressSummary",
    "DecompressSummary",
    "Encoded",
    "EncodedExpert",
    "ExpertRecord",
    "ExpertTotals",
    "MatrixRecord",
    "Measurement",
    "Memo",
    "Problem",
    "Progress",
    "Settings",
    "Store",
    "StoredExpert",
    "StoredMatrix",
    "VerifyReport",
    "compress",
    "compressed_tensors",
    "decoded_weights",
    "decompress",
    "fisher_bounds",
    "fisher_plan",
    "measure_calibrated",
    "measure_sizes",
    "measure_widths",
    "open_store",
    "plan_of",
    "rate_within",
    "read_measurement",
    "verify",
    "within",
    "write_card",
]
