"""Codecs by id: the built-in ones, plug-ins through entry points, and clear refusals."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from types import ModuleType
from typing import ClassVar

import numpy as np
import pytest

from moebound import decode, encode
from moebound.codec import registry
from moebound.codec.base import Codec
from moebound.codec.raw import RawCodec
from moebound.codec.registry import codec_class, codec_ids, get_codec, register_codec
from moebound.errors import BackendUnavailable, CodecError

BUILT_IN = ["bound", "cuszp", "lossless", "raw", "sz3", "zfp"]


class Plug(RawCodec):
    """A codec as another package would bring it."""

    id: ClassVar[str] = "plug"


class OtherPlug(RawCodec):
    id: ClassVar[str] = "plug"


class FalseRaw(RawCodec):
    """Claims a built-in id."""


@pytest.fixture(autouse=True)
def _fresh_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.CODECS, "classes", {})


def _install(monkeypatch: pytest.MonkeyPatch, **plugs: str) -> None:
    """Entry points as installed packages would have them."""
    points = [EntryPoint(name, value, "moebound.codecs") for name, value in plugs.items()]
    module = ModuleType("some_package")
    for cls in (Plug, OtherPlug, FalseRaw):
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(__import__("sys").modules, "some_package", module)

    def entry_points(*, group: str) -> list[EntryPoint]:
        assert group == "moebound.codecs"
        return points

    monkeypatch.setattr("moebound.plugins.entry_points", entry_points)


def test_built_in_ids() -> None:
    assert set(BUILT_IN) <= set(codec_ids())
    assert codec_ids() == sorted(codec_ids())


@pytest.mark.parametrize("codec_id", BUILT_IN)
def test_every_built_in_codec_loads(codec_id: str) -> None:
    codec = get_codec(codec_id)
    assert isinstance(codec, Codec)
    assert codec.id == codec_id
    assert codec_id in repr(codec).lower()


@pytest.mark.parametrize("codec_id", ["zfp", "raw"])
def test_options_where_there_are_none(codec_id: str) -> None:
    with pytest.raises(CodecError, match=f"{codec_id}.*takes no options, found 'fast'"):
        get_codec(f"{codec_id}:fast")


def test_unknown_id_lists_the_known_ones() -> None:
    with pytest.raises(CodecError, match=r"'sz4': unknown. Known here: bound, .*sz3"):
        get_codec("sz4")


def test_a_plug_in_encodes_and_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, plug="some_package:Plug")
    assert "plug" in codec_ids()
    array = np.arange(6, dtype=np.float32)
    data = encode(array, 0.1, codec="plug")
    assert b"plug" in data
    assert np.array_equal(decode(data), array)


def test_a_plug_in_loads_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, plug="package_that_is_not_there:Plug")
    assert "plug" in codec_ids()
    assert codec_class("raw") is RawCodec
    with pytest.raises(BackendUnavailable, match=r"'plug' \(package_that_is_not_there:Plug\)"):
        get_codec("plug")


def test_a_plug_in_that_is_no_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, odd="collections:OrderedDict")
    with pytest.raises(CodecError, match="collections:OrderedDict is not a Codec"):
        get_codec("odd")


def test_a_plug_in_under_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, plugged="some_package:Plug")
    with pytest.raises(CodecError, match=r"'plugged'.*says id 'plug'"):
        get_codec("plugged")


def test_a_plug_in_never_takes_a_built_in_id(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, raw="some_package:FalseRaw")
    assert codec_class("raw") is RawCodec


def test_register_by_hand() -> None:
    register_codec(Plug)
    register_codec(Plug)
    assert codec_class("plug") is Plug
    with pytest.raises(CodecError, match=r"'plug' is taken by .*Plug"):
        register_codec(OtherPlug)


def test_register_a_built_in_id() -> None:
    with pytest.raises(CodecError, match="'raw' is built in"):
        register_codec(FalseRaw)
