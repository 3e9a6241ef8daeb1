"""Codecs by id: the built-in ones, and those of other packages through entry points.

A package adds a codec with an entry point in the group ``moebound.codecs``, named as its id.
"""

from __future__ import annotations

from moebound.codec.base import Codec
from moebound.errors import CodecError
from moebound.plugins import Plugins

CODECS = Plugins(
    "codec",
    Codec,  # type: ignore[type-abstract]
    group="moebound.codecs",
    built_in={
        "bound": "moebound.codec.bound:BoundCodec",
        "cuszp": "moebound.codec.cuszp:CuszpCodec",
        "sz3": "moebound.codec.sz3:SZ3Codec",
        "zfp": "moebound.codec.zfp:ZfpCodec",
        "lossless": "moebound.codec.lossless:LosslessCodec",
        "raw": "moebound.codec.raw:RawCodec",
    },
    error=CodecError,
)


def codec_ids() -> list[str]:
    """Ids of all codecs that can be asked for, sorted."""
    return CODECS.ids()


def get_codec(name: str) -> Codec:
    """The codec for an id, or for an id with options: ``bound``, ``sz3:interp``.

    Raises CodecError for an unknown id or option, BackendUnavailable if it cannot be loaded.
    """
    codec_id, _, options = name.partition(":")
    return codec_class(codec_id).from_options(options)


def codec_class(codec_id: str) -> type[Codec]:
    """The class behind an id. Raises as get_codec."""
    return CODECS.get(codec_id)


def register_codec(cls: type[Codec]) -> None:
    """Make a codec known in this process. The same class twice is fine, another is not."""
    CODECS.register(cls)
