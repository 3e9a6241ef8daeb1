"""Methods by id: the built-in ones, and those of other packages through entry points.

A package adds a method with an entry point in the group ``moebound.methods``, named as its id.
"""

from __future__ import annotations

from moebound.codec import codec_ids
from moebound.errors import MethodError
from moebound.methods.base import Method
from moebound.plugins import Plugins

BOUNDED = "bounded"
METHODS = Plugins(
    "method",
    Method,  # type: ignore[type-abstract]
    group="moebound.methods",
    built_in={
        "awq_re": "moebound.methods.quantizing.awq:Awq",
        BOUNDED: "moebound.methods.bounded:Bounded",
        "calibrated": "moebound.methods.calibrated:Calibrated",
        "d2_moe_fixed": "moebound.methods.bases.d2_moe:D2Moe",
        "frequency": "moebound.methods.pruning.frequency:Frequency",
        "gptq_re": "moebound.methods.quantizing.gptq:Gptq",
        "hc_smoe_fixed": "moebound.methods.merging.hc_smoe:HcSmoe",
        "hqq": "moebound.methods.hqq:Hqq",
        "lu_re": "moebound.methods.pruning.search:Lu",
        "m_smoe_re": "moebound.methods.merging.m_smoe:MSmoe",
        "milo_fixed": "moebound.methods.bases.milo:Milo",
        "mobe_fixed": "moebound.methods.bases.mobe:Mobe",
        "modegpt_re": "moebound.methods.bases.modegpt:ModeGpt",
        "moe_i2_re": "moebound.methods.bases.moe_i2:MoeI2",
        "moequant_re": "moebound.methods.quantizing.moequant:MoeQuant",
        "mone_re": "moebound.methods.pruning.mone:Mone",
        "moqe_re": "moebound.methods.quantizing.moqe:Moqe",
        "puzzle_moe_re": "moebound.methods.merging.puzzle:PuzzleMoe",
        "qmoe_re": "moebound.methods.quantizing.qmoe:Qmoe",
        "reap_re": "moebound.methods.pruning.reap:Reap",
        "residual": "moebound.methods.bases.residual:Residual",
        "resmoe_fixed": "moebound.methods.bases.resmoe:ResMoe",
        "rfid_re": "moebound.methods.bases.rfid:Rfid",
        "rtn": "moebound.methods.rtn:Rtn",
        "soco_lite": "moebound.methods.bases.soco:SoCoLite",
        "sub_moe_re": "moebound.methods.merging.sub_moe:SubMoe",
        "svd": "moebound.methods.bases.svd:Svd",
    },
    error=MethodError,
)


def method_ids() -> list[str]:
    """Ids of all methods that can be asked for, sorted. A codec's id can be, too."""
    return METHODS.ids()


def get_method(setting: str) -> Method:
    """The method of a setting: an id, with options behind a colon: ``rtn:int4:g64``.

    A codec's id means the method that keeps bounds with it: ``sz3:interp`` is
    ``bounded:sz3:interp``. Raises MethodError for an unknown id or option, BackendUnavailable if
    it cannot be loaded, CodecError as `get_codec`.
    """
    method_id, _, options = setting.partition(":")
    if not METHODS.knows(method_id):
        if method_id not in codec_ids():
            raise MethodError(
                f"method {method_id!r}: unknown. Known here: {', '.join(method_ids())}; and a "
                f"codec's id ({', '.join(codec_ids())}) is that of the method that keeps bounds"
            )
        method_id, options = BOUNDED, setting
    return method_class(method_id).from_options(options)


def codec_of(setting: str) -> str | None:
    """The codec of a setting of the method that keeps bounds; None of others."""
    name, _, codec = setting.partition(":")
    return codec if name == BOUNDED else None


def method_class(method_id: str) -> type[Method]:
    """The class behind an id. Raises as get_method."""
    return METHODS.get(method_id)


def register_method(cls: type[Method]) -> None:
    """Make a method known in this process. The same class twice is fine, another is not."""
    METHODS.register(cls)
