"""Mutated streams: envelopes of every codec and blobs of every method, field by field.

Where the checksum does not fit, a stream is refused or is the same array. Where it does, because it
was made to fit, so that the code behind it is reached, the values may be any: what is asked is
that every way of decoding them agrees, and that they have the shape and dtype that the frame says.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from moebound import _native, encode
from moebound.codec import Steps, codec_ids, encode_codes
from moebound.codec.fields import FieldReader, checksum, put_varint
from moebound.codec.patch import positions_n_bytes
from moebound.errors import MoeboundError
from moebound.methods import ExpertView, OpenPart, RouterEdit, Stored, compress_expert, get_method
from moebound.methods.blob import RouterBlob, SharedBlob, is_blob, parse_router
from moebound.types import NUMPY_DTYPES, Array, DType, ErrorBound, ExpertKey

from .cases import Attack, Case, Wrong, refused

Fields = list[tuple[str, bytes]]
NUMBERS = [0, 1, 2, 3, 7, 8, 31, 32, 33, 127, 128, 255, 256, 2**16, 2**18, 2**22, 2**24, 2**25,
           2**26, 2**27, 2**28, 2**31, 2**32 - 1, 2**32, 2**40,
           2**40 + 1, 2**62, 2**63 - 1]  # fmt: skip
FLOATS = [0.0, -0.0, 1e-320, 2.0**-126, 1e-3, 1.0, 1e30, 1e300, -1.0, float("inf"), float("nan")]
VARINTS = {"extent", "count", "length", "group", "uses", "number", "held"}


@dataclass(frozen=True)
class Stream:
    """One that is whole: its bytes, its fields, what it decodes to (nothing for parts, edits)."""

    name: str
    data: bytes
    fields: Fields
    values: bytes


def fields_of(data: bytes) -> Fields:
    """An envelope or a blob, cut into the fields of docs/format.md and format-method.md."""
    view, found, at = memoryview(data), Fields(), 0
    read = FieldReader(view[:-4], 0)

    def cut(name: str) -> bytes:
        nonlocal at
        end = len(data) - 4 - read.left
        piece = data[at:end]
        found.append((name, piece))
        at = end
        return piece

    def number(name: str) -> int:
        value = read.varint()
        cut(name)
        return value

    def take(name: str, n_bytes: int) -> bytes:
        read.take(n_bytes)
        return cut(name)

    take("magic", 4)
    take("version", 1)
    if is_blob(data):
        kind = take("kind", 1)[0]
        take("id", take("id length", 1)[0])
        take("payload version", 1)
        if kind == 0:
            take("dtype", 1)
            for _ in range(take("dimensions", 1)[0]):
                number("extent")
            n_uses = number("uses")
            if n_uses:
                number("group")
            for _ in range(n_uses):
                number("number")
                take("use", 4)
        else:
            number("group")
            if kind == 1:
                number("number")
                number("held")
    else:
        take("flags", 1)
        dtype = take("dtype", 1)[0]
        take("source dtype", 1)
        take("id", take("id length", 1)[0])
        take("payload version", 1)
        size = 1
        for _ in range(take("dimensions", 1)[0]):
            size *= number("extent")
        take("bound", 8)
        count = number("count")
        if count:
            take("positions", positions_n_bytes(size, count))
            take("values", count * (2, 2, 4)[dtype])
    take("payload", number("length"))
    found.append(("checksum", data[-4:]))
    return found


def _arrays() -> list[Array]:
    rng, found = np.random.default_rng(3), list[Array]()
    dtypes: tuple[DType, ...] = ("BF16", "F16", "F32")
    for dtype in dtypes:
        for shape in ((6, 40), (33,), (2, 3, 4), (1, 1), (0, 5), ()):
            values = rng.standard_normal(shape) * 0.02
            found.append(values.astype(NUMPY_DTYPES[dtype]))
        patched = (rng.standard_normal((7, 33)) * 0.02).astype(NUMPY_DTYPES[dtype])
        patched.reshape(-1)[[3, 50, 51, 200]] = np.nan, np.inf, -np.inf, 1e4
        wide = rng.standard_normal((12, 34)) * np.exp(rng.standard_normal((12, 1)))
        found += [patched, np.zeros((8, 40), NUMPY_DTYPES[dtype]), wide.astype(patched.dtype)]
    return found


def _stepped(arrays: list[Array]) -> list[bytes]:
    """Versions 2 and 3 of codec `bound`, with steps of columns and of rows, and factors."""
    found = list[bytes]()
    for i, array in enumerate(array for array in arrays if array.ndim == 2 and array.size):
        by_row = i % 2 == 1
        n = array.shape[0 if by_row else 1]
        others = (np.arange(array.size // n) * 5 % 9).astype(np.uint8)
        for factors in (None, others):
            steps = Steps((np.arange(n) * 7 % 11).astype(np.uint8), 2.0, by_row, factors)
            codes = array.astype(np.float32) / steps.of_weights(0.02)
            whole = np.rint(np.nan_to_num(codes, posinf=0, neginf=0)).astype(np.int32)
            found.append(encode_codes(array, whole, steps, ErrorBound(0.02), 0.02).data)
    return found


def corpus() -> list[Stream]:
    """Small ones, with each part that a stream can have."""
    made: list[tuple[str, bytes]] = []
    arrays = _arrays()
    for codec in codec_ids():
        for array in arrays:
            try:
                made.append((codec, encode(array, 0.004, codec=codec)))
            except MoeboundError:
                continue  # not installed, or not for such an array
    made += [("bound with steps", data) for data in _stepped(arrays)]
    for method in ("rtn:int2:g4", "rtn:int4:g64", "rtn:int8:g32", "hqq:int4:g64", "moqe_re:int4"):
        for array in arrays:
            if array.ndim == 2 and array.size and np.isfinite(array.astype(np.float32)).all():
                view = ExpertView(ExpertKey(0, 0), {"gate": array})
                try:
                    artifact = compress_expert(get_method(method), view)
                except MoeboundError:
                    continue  # not a whole number of groups
                made.append((method, artifact.experts[view.key]["gate"].data))
    edit = RouterEdit(1, (0, 1, 2), {0: 1}, {2: np.zeros(4, np.float32)})
    made.append(("router", RouterBlob("rtn", 1, 3, memoryview(edit.to_bytes())).build()))
    made.append(("shared", SharedBlob("rtn", 1, 3, 0, 64, memoryview(b"part")).build()))
    streams = []
    for name, data in made:
        fields = fields_of(data)
        assert b"".join(piece for _, piece in fields) == data
        values = b"" if name in ("router", "shared") else Stored.of(data).decode().tobytes()
        streams.append(Stream(name, data, fields, values))
    return streams


def seal(data: bytes) -> bytes:
    """With a checksum that fits."""
    return data[:-4] + struct.pack("<I", checksum(data[:-4]))


def _mutate(rng: random.Random, fields: Fields, other: Fields) -> str:
    """One change, in place. Returns what it was."""
    at = rng.randrange(len(fields))
    if rng.random() < 0.4:  # where most of the code is
        at = next(i for i, (name, _) in enumerate(fields) if name == "payload")
    name, piece = fields[at]
    if name in VARINTS and rng.random() < 0.8:
        value = rng.choice([*NUMBERS, rng.randrange(1 << rng.randrange(1, 63))])
        out = bytearray()
        put_varint(out, value)
        fields[at] = name, bytes(out)
        return f"{name} is {value}"
    if name == "bound" and rng.random() < 0.8:
        value_f = rng.choice([*FLOATS, rng.lognormvariate(0, 30)])
        fields[at] = name, struct.pack("<d", value_f)
        return f"bound is {value_f}"
    if not piece:
        fields[at] = name, rng.randbytes(rng.randrange(1, 9))
        return f"bytes in an empty {name}"
    # Half of the time near the front, where a payload has its header.
    near = min(len(piece), 24) if rng.random() < 0.5 else len(piece)
    place, changed = rng.randrange(near), bytearray(piece)
    way = rng.randrange(9)
    if way == 0:
        for _ in range(rng.choice((1, 1, 2, 4))):
            changed[rng.randrange(near)] ^= 1 << rng.randrange(8)
        how = "bits flipped"
    elif way == 1:
        changed[place] = rng.choice((0, 1, 2, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        how = f"byte {place} set"
    elif way == 2:
        changed[place] = (changed[place] + rng.choice((-1, 1))) % 256
        how = f"byte {place} one more or less"
    elif way == 3:
        del changed[place:]
        how = f"cut at {place}"
    elif way == 4:
        del changed[place : place + rng.randrange(1, 9)]
        how = f"bytes at {place} left out"
    elif way == 5:
        changed[place:place] = rng.randbytes(rng.randrange(1, 9))
        how = f"bytes put in at {place}"
    elif way == 6:
        start = rng.randrange(len(piece))
        part = piece[start : start + rng.randrange(1, 17)]
        changed[place : place + len(part)] = part
        how = f"bytes of {start} at {place}"
    elif way == 7:
        pieces = [p for n, p in other if n == name] or [rng.choice(other)[1]]
        changed[:] = rng.choice(pieces)
        how = "that of another"
    else:
        second = rng.randrange(len(fields))
        fields[at], fields[second] = (name, fields[second][1]), (fields[second][0], piece)
        return f"{name} and {fields[second][0]} exchanged"
    fields[at] = name, bytes(changed)
    return f"{name}: {how}"


class Streams(Attack):
    """The largest stream has 2 KB, and is read by someone who expects 64 MiB at most, as who knows
    the shape does; nothing may take more than the limit below."""

    name: ClassVar[str] = "streams"
    limit_s: ClassVar[float] = 30
    memory_bytes: ClassVar[int] = 768 << 20
    expected_bytes: ClassVar[int] = 64 << 20

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._corpus = corpus()
        self._isas: list[str] = _native.runnable_isas()

    def draw(self, rng: random.Random) -> Case:
        index = rng.randrange(len(self._corpus))
        stream, other = self._corpus[index], rng.choice(self._corpus)
        what = list[str]()
        if rng.random() < 0.05:
            cuts = rng.randrange(len(stream.data)), rng.randrange(len(other.data))
            data = stream.data[: cuts[0]] + other.data[cuts[1] :]
            what.append(f"first {cuts[0]} bytes, then those of {other.name} from {cuts[1]}")
        else:
            fields = list(stream.fields)
            what += [_mutate(rng, fields, other.fields) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
            if rng.random() < 0.8:
                self._fix_length(fields, what)
            data = b"".join(piece for _, piece in fields)
        if rng.random() < 0.75 and len(data) >= 4:
            data = seal(data)
            what.append("sealed")
        return Case(f"{stream.name}: {'; '.join(what)}", {"stream": data}, {"of": index})

    def _fix_length(self, fields: Fields, what: list[str]) -> None:
        """The payload's length again as it is, unless it is what was changed."""
        if any(done.startswith("length") for done in what):
            return
        names = [name for name, _ in fields]
        at, length = names.index("length"), bytearray()
        put_varint(length, len(fields[names.index("payload")][1]))
        fields[at] = "length", bytes(length)

    def judge(self, case: Case) -> str:
        data, stream = case.files["stream"], self._corpus[case.facts["of"]]
        fits = len(data) >= 8 and seal(data) == data
        if stream.name in ("router", "shared"):
            return self._judge_part(data)
        stored, error = refused(lambda: Stored.of(data))
        if stored is None:
            return "refused"
        first, error = refused(lambda: stored.decode(max_bytes=self.expected_bytes))
        self._same_on_every_path(stored, first)
        if error is not None:
            return "refused"
        spec = stored.spec
        if first.shape != spec.shape or first.dtype != NUMPY_DTYPES[spec.dtype]:
            raise Wrong("shape", f"{first.shape} {first.dtype} from a frame that says {spec}")
        same = first.tobytes() == stream.values
        if not fits and not same:
            raise Wrong("silent", "a stream whose checksum does not fit decodes to other values")
        return "same" if same else "other, sealed"

    def _same_on_every_path(self, stored: Stored, first: Array | None) -> None:
        """Each instruction set, and into an array that has other bytes in it."""
        before = _native.isa()
        if stored.spec.size > 1 << 22:
            return  # of which several would be the memory of this test, not of the decoder
        try:
            for isa in self._isas:
                _native.use_isa(isa)
                out = np.empty(stored.spec.shape, NUMPY_DTYPES[stored.spec.dtype])
                out.reshape(-1).view(np.uint8)[:] = 0xA5
                _, error = refused(lambda out=out: stored.decode_into(out))  # type: ignore[misc]
                if (error is None) != (first is not None):
                    raise Wrong(f"paths {isa}", f"{isa} and {before} disagree: {error}")
                if first is not None and out.tobytes() != first.tobytes():
                    raise Wrong(f"paths {isa}", f"{isa} and {before} decode to other values")
        finally:
            _native.use_isa(before)

    def _judge_part(self, data: bytes) -> str:
        _, error = refused(lambda: OpenPart.of(data, 3, 0))
        edit, other = refused(lambda: RouterEdit.from_bytes(parse_router(data).payload))
        if edit is not None:
            refused(edit.to_bytes)
        return "refused" if error is not None and other is not None else "other, sealed"


class Arrays(Attack):
    """encode and decode agree on any array: the bound is kept, or the refusal says why."""

    name: ClassVar[str] = "arrays"
    limit_s: ClassVar[float] = 30

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._codecs = [codec for codec in codec_ids() if refused(lambda c=codec: encode(  # type: ignore[misc]
            np.ones(3, np.float32), 0.1, codec=c))[1] is None]  # fmt: skip

    def draw(self, rng: random.Random) -> Case:
        dtype = rng.choice(("BF16", "F16", "F32"))
        shape = [rng.choice((0, 1, 2, 3, 5, 8, 31, 32, 33, 40)) for _ in range(rng.randrange(4))]
        if rng.random() < 0.05:
            shape = [rng.choice((1, 1, 2)) for _ in range(rng.randrange(4, 10))]
        size = int(np.prod(shape, dtype=np.int64))
        np_rng = np.random.default_rng(rng.randrange(1 << 32))
        width = NUMPY_DTYPES[dtype].itemsize  # type: ignore[index]
        if rng.random() < 0.3:
            data = np_rng.bytes(size * width)  # any patterns: NaN, denormals, -0.0
        else:
            spread = 10.0 ** rng.uniform(-30, 30 if dtype == "F32" else 4)
            values = np_rng.standard_normal(size) * spread
            if rng.random() < 0.3 and size:
                values[np_rng.integers(size, size=3)] = [np.nan, np.inf, 0.0]
            with np.errstate(all="ignore"):
                data = values.astype(NUMPY_DTYPES[dtype]).tobytes()  # type: ignore[index]
        bound = rng.choice((10.0 ** rng.uniform(-40, 38), 0.01, 5e-324, 1e308))
        facts = {"dtype": dtype, "shape": shape, "bound": bound, "codec": rng.choice(self._codecs),
                 "to": rng.choice((None, None, "BF16", "F16", "F32")),
                 "mode": rng.choice(("abs", "abs", "rate", "rel"))}  # fmt: skip
        return Case(f"{facts}", {"array": data}, facts)

    def judge(self, case: Case) -> str:
        f = case.facts
        array = np.frombuffer(case.files["array"], NUMPY_DTYPES[f["dtype"]]).reshape(f["shape"])
        to = None if f["to"] is None else NUMPY_DTYPES[f["to"]]
        bound, error = refused(lambda: ErrorBound(f["bound"], f["mode"]))
        if error is not None:
            return "refused"
        data, error = refused(lambda: encode(array, bound, codec=f["codec"], dtype=to))
        if error is not None:
            return "refused"
        stored, error = refused(lambda: Stored.of(data))
        back, error = (None, error) if stored is None else refused(stored.decode)
        if back is None:
            raise Wrong(f"encode {f['codec']}", f"what encode wrote, decode refuses: {error}")
        if back.shape != array.shape or back.dtype != (array.dtype if to is None else to):
            raise Wrong(f"shape {f['codec']}", f"{back.shape} {back.dtype} comes back")
        promised = stored.found.spec.abs_bound
        x, y = array.astype(np.float64).reshape(-1), back.astype(np.float64).reshape(-1)
        finite = np.isfinite(x)
        with np.errstate(all="ignore"):
            off = np.abs(x[finite] - y[finite])
        if not (off <= promised).all():
            raise Wrong(f"bound {f['codec']}", f"off by {off.max():g}, promised {promised:g}")
        odd = ~finite
        if not (np.array_equal(np.isnan(x[odd]), np.isnan(y[odd]))
                and np.array_equal(x[odd & ~np.isnan(x)], y[odd & ~np.isnan(x)])):  # fmt: skip
            raise Wrong(f"odd {f['codec']}", "NaN or infinity does not come back")
        if encode(array, bound, codec=f["codec"], dtype=to) != data:
            raise Wrong(f"twice {f['codec']}", "the same array gives other bytes")
        return "same"
