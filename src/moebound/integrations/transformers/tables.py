"""What our quantizers have in common: how transformers knows them, and what they leave."""

from __future__ import annotations

from typing import Any

from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer


class OrdinaryQuantizer(HfQuantizer):
    """Of a model that is an ordinary one, once it is loaded."""

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True


def enter(method: str, config: type[Any], quantizer: type[Any]) -> None:
    """Into transformers' tables, under a `quant_method`. Any number of times."""
    if method not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(method)(config)
    if method not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(method)(quantizer)
