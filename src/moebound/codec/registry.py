"""Codecs by id: the built-in ones, and those of other packages through entry points.

A package adds a codec with an entry point in the group ``moebound.codecs``, named as its id.
Entry points load only when their id is asked for; a file can name a codec but never install one.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import EntryPoints, entry_points

from moebound.codec.base import Codec
from moebound.errors import BackendUnavailable, CodecError

ENTRY_POINTS = "moebound.codecs"

_BUILT_IN = {
    "bound": "moebound.codec.bound:BoundCodec",
    "cuszp": "moebound.codec.cuszp:CuszpCodec",
    "sz3": "moebound.codec.sz3:SZ3Codec",
    "zfp": "moebound.codec.zfp:ZfpCodec",
    "lossless": "moebound.codec.lossless:LosslessCodec",
    "raw": "moebound.codec.raw:RawCodec",
}
_classes: dict[str, type[Codec]] = {}


def codec_ids() -> list[str]:
    """Ids of all codecs that can be asked for, sorted."""
    return sorted(_BUILT_IN.keys() | _classes.keys() | {e.name for e in _entry_points()})


def get_codec(name: str) -> Codec:
    """The codec for an id, or for an id with options: ``bound``, ``sz3:interp``.

    Raises CodecError for an unknown id or option, BackendUnavailable if it cannot be loaded.
    """
    codec_id, _, options = name.partition(":")
    return codec_class(codec_id).from_options(options)


def codec_class(codec_id: str) -> type[Codec]:
    """The class behind an id. Raises as get_codec."""
    if codec_id not in _classes:
        register_codec(_load(codec_id), as_id=codec_id)
    return _classes[codec_id]


def register_codec(cls: type[Codec], *, as_id: str | None = None) -> None:
    """Make a codec known in this process. The same class twice is fine, another is not."""
    if as_id is not None and cls.id != as_id:
        raise CodecError(f"codec {as_id!r}: its class {cls.__qualname__} says id {cls.id!r}")
    known = _classes.get(cls.id)
    if known is not None and known is not cls:
        raise CodecError(f"codec {cls.id!r} is taken by {known.__module__}.{known.__qualname__}")
    if known is None and as_id is None and cls.id in _BUILT_IN:
        raise CodecError(f"codec {cls.id!r} is built in")
    _classes[cls.id] = cls


def _entry_points() -> EntryPoints:
    return entry_points(group=ENTRY_POINTS)


def _load(codec_id: str) -> type[Codec]:
    if codec_id in _BUILT_IN:
        module, _, name = _BUILT_IN[codec_id].partition(":")
        return getattr(import_module(module), name)  # type: ignore[no-any-return]
    for entry in _entry_points():
        if entry.name == codec_id:
            try:
                cls = entry.load()
            except Exception as error:
                raise BackendUnavailable(f"codec {codec_id!r} ({entry.value}): {error}") from error
            if not (isinstance(cls, type) and issubclass(cls, Codec)):
                raise CodecError(f"codec {codec_id!r}: {entry.value} is not a Codec")
            return cls
    raise CodecError(f"codec {codec_id!r}: unknown. Known here: {', '.join(codec_ids())}")
