"""What a store looks like on disk: names, version, and the records of the certificates file.

    config.json                          the model's, with a `quantization_config` (Settings)
    model-00001-of-0000N.safetensors     tensors as they were, then coded ones (uint8 envelopes),
                                         then experts
    model.safetensors.index.json         tensor -> shard, as transformers reads it
    moebound.certificates.jsonl          one JSON record a line: what was promised and found
    moebound.plan.json                   the plan that was carried out, if there was one
    README.md                            a model card; the source's own is README.original.md
    tokenizer.json, ...                  copied, additional_chat_templates/ too

docs/store.md is the description for readers. A change that an older moebound would misread is a
new VERSION; old versions stay readable.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from moebound.checkpoint import Role
from moebound.checkpoint.shards import is_file_name
from moebound.codec import Certificate
from moebound.codec.certificate import DAMAGED, check_naturals, check_types, finite
from moebound.errors import BoundError, CorruptionError, FormatError, StoreError
from moebound.files.formats.statistics import Of
from moebound.files.regular import regular_file
from moebound.methods import codec_of
from moebound.methods.shrinkage import Rule
from moebound.types import ErrorBound, ExpertKey

VERSION = 3
"""The newest. 1 knew bounds only: no methods, shared parts, router edits. Earlier ones are read for
ever."""
EXPERTS_ONLY = 2
"""What is still written where no tensor but experts' is coded; 3 adds records `coded`."""
QUANT_METHOD = "moebound"
CONFIG_FILE = "config.json"
CERTIFICATES_FILE = "moebound.certificates.jsonl"
PLAN_FILE = "moebound.plan.json"
CARD_FILE = "README.md"
ORIGINAL_CARD_FILE = "README.original.md"
RECORDS_FORMAT = "moebound.certificates"

SHARD_MARK = "moebound.store"
"""Key in a shard's `__metadata__`: every U8 tensor in this shard is an envelope, a method's blob,
or empty. Its value is the version that the shard needs: "1" where all are envelopes."""

OWN_PREFIX = "moebound."
"""Tensors named so belong to the store: `moebound.shared.12.0`, `moebound.router.12`."""

SLICE_MARK = ".moebound."
"""Slice 3 of the 3-D tensor `w` is stored as `w.moebound.3`, and `w` as an empty uint8 tensor.

The empty one makes a transformers without moebound fail instead of starting with random experts.
"""

MAX_LINE_BYTES = 16_000_000


Others = Literal["keep", "lossless"] | float
"""What becomes of tensors that are no routed expert's: kept, coded without loss, or coded under a
rate, so that no weight of a matrix moves by more than that times the matrix's mean |weight|."""


def stored_name(name: str, index: int | None) -> str:
    """The name in the store of a source tensor, or of one slice of its leading axis."""
    return name if index is None else f"{name}{SLICE_MARK}{index}"


@dataclass(frozen=True)
class CalibratedBy:
    """of: what the statistics are of that experts were rounded by. rule: how they were shrunk and
    damped, without which the promises for outputs could not be computed again."""

    of: Of
    rule: Rule

    def to_json(self) -> dict[str, Any]:
        return {**self.of.to_json(), "rule": self.rule.to_json()}

    @classmethod
    def from_json(cls, data: Any) -> CalibratedBy:
        return cls(Of.from_json(data), Rule.from_json(data["rule"]))


@dataclass(frozen=True)
class Settings:
    """The `quantization_config` of config.json.

    method: a setting, as `get_method` takes it; of a plan, what experts get of which it says
    nothing else. bound: of every weight, None where none was asked for. run: hash of everything
    that decides the bytes (source, method, bound, selection), so that a rerun can tell its own
    store from another. plan: SHA-256 of what the plan decides, None without one; `bound` is
    then the widest of its bounds. source: what the user called the source. stored_as: how it was
    quantized, in words; None if it was not. left_out: the source's files that are not in the store,
    with the reason. calibration: what experts were rounded by. others: of all other tensors; from
    version 3 on. Unknown further fields are ignored.
    """

    method: str
    bound: ErrorBound | None
    shared_experts: bool
    run: str
    version: int = EXPERTS_ONLY
    plan: str | None = None
    source: str | None = field(default=None, compare=False)
    stored_as: str | None = field(default=None, compare=False)
    left_out: Mapping[str, str] = field(default_factory=dict, compare=False)
    calibration: CalibratedBy | None = None
    others: Others = "keep"

    @property
    def codec(self) -> str | None:
        """Of the method that keeps bounds; None of others."""
        return codec_of(self.method)

    def to_json(self) -> dict[str, Any]:
        bound = None if self.bound is None else self.bound.to_json()
        left_out = dict(self.left_out) or None
        optional = {
            "bound": bound, "left_out": left_out,
            "others": None if self.others == "keep" else self.others,
            "calibration": None if self.calibration is None else self.calibration.to_json(),
            **{name: getattr(self, name) for name in _OPTIONAL},
        }  # fmt: skip
        return {
            "quant_method": QUANT_METHOD,
            "version": self.version,
            "method": self.method,
            "shared_experts": self.shared_experts,
            "run": self.run,
            **{name: value for name, value in optional.items() if value is not None},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Settings:
        """Raises FormatError for another method or a newer version, CorruptionError if damaged."""
        method, version = data.get("quant_method"), data.get("version")
        if method != QUANT_METHOD:
            raise FormatError(f"quant_method: expected {QUANT_METHOD!r}, found {method!r}")
        if type(version) is not int or not 1 <= version <= VERSION:
            raise FormatError(
                f"store version {version!r}: this moebound reads versions up to {VERSION}; "
                "install a newer one"
            )
        try:
            bound = None if data.get("bound") is None else ErrorBound.from_json(data["bound"])
            check_types(data, str, "codec" if version == 1 else "method", "run")
            check_types(data, bool, "shared_experts")
            check_types(data, str, *(name for name in _OPTIONAL if data.get(name) is not None))
            left_out = data.get("left_out", {})
            check_types(left_out, str, *left_out)
            others = data.get("others", "keep") if version > EXPERTS_ONLY else "keep"
            method = f"bounded:{data['codec']}" if version == 1 else data["method"]
            return cls(
                method, bound, data["shared_experts"], data["run"], version,
                **{name: data.get(name) for name in _OPTIONAL}, left_out=dict(left_out),
                calibration=None
                if (by := data.get("calibration")) is None
                else CalibratedBy.from_json(by),
                others=check_others(others),
            )  # fmt: skip
        except (*DAMAGED, BoundError) as error:
            what = f"{type(error).__name__}: {error}"
            raise CorruptionError(f"quantization_config: {what}") from error


_OPTIONAL = ("plan", "source", "stored_as")


def check_others(value: Any) -> Others:
    """The same. Raises BoundError for what is none of `Others`."""
    if value in ("keep", "lossless") and isinstance(value, str):
        return cast(Others, value)
    if isinstance(value, str):
        raise BoundError(f"others {value!r}: expected keep, lossless, or a rate above 0")
    return ErrorBound(value, "rate").value


def read_settings(config: Mapping[str, Any]) -> Settings | None:
    """The store settings in a model's config, None if it has none of ours."""
    found = config.get("quantization_config")
    if not isinstance(found, Mapping) or found.get("quant_method") != QUANT_METHOD:
        return None
    return Settings.from_json(found)


@dataclass(frozen=True)
class MatrixRecord:
    """One compressed matrix.

    name, index: in the source checkpoint, as in `ExpertMatrix`. home: the source's shard file.
    ratio: measured error over promised error, at most 1 (for an rmse bound, of RMSEs); None where
    nothing is promised. uses: numbers of the shared parts, of its expert's group, that decoding
    takes.
    """

    name: str
    index: int | None
    role: Role
    home: str
    ratio: float | None
    certificate: Certificate
    uses: tuple[int, ...] = ()

    @property
    def stored_name(self) -> str:
        return stored_name(self.name, self.index)


@dataclass(frozen=True)
class ExpertRecord:
    """One expert: its matrices in the order of their bytes.

    exact: not selected for compression; kept bit for bit as `raw` envelopes, because it shares a
    3-D tensor with experts that were. method: its setting. group: whose shared parts it uses.
    """

    key: ExpertKey
    exact: bool
    matrices: tuple[MatrixRecord, ...]
    method: str
    group: int = 0


@dataclass(frozen=True)
class PartRecord:
    """A shared part: number `number` of a group. held_bytes: memory that it takes while it is open.
    checksum: what its last four bytes say."""

    name: str
    group: int
    number: int
    method: str
    n_bytes: int
    held_bytes: int
    checksum: int
    sha256: str


@dataclass(frozen=True)
class RouterRecord:
    """A group's router edit. The tensor has it whole; keep, alias and constants are for people."""

    name: str
    group: int
    layer: int
    keep: list[int] | None
    alias: dict[str, int]
    constants: list[int]
    n_bytes: int
    sha256: str


@dataclass(frozen=True)
class TensorRecord:
    """A tensor kept as it was. sha256: of its bytes. home: the source's shard file."""

    name: str
    home: str
    sha256: str


@dataclass(frozen=True)
class CodedRecord:
    """A tensor of no expert, as one envelope under its own name. ratio: as of a `MatrixRecord`."""

    name: str
    home: str
    ratio: float | None
    certificate: Certificate

    @property
    def stored_name(self) -> str:
        return self.name


@dataclass(frozen=True)
class ShardRecord:
    """A shard's header. sha256: of its length field and its text."""

    name: str
    sha256: str


@dataclass(frozen=True)
class FileRecord:
    """A file beside the shards, or in a folder beside them (`folder/name`). Documents (README.md)
    may be edited and have no record."""

    name: str
    n_bytes: int
    sha256: str


Record = (
    ExpertRecord | PartRecord | RouterRecord | TensorRecord | CodedRecord | ShardRecord | FileRecord
)
_KINDS: dict[str, type[PartRecord | RouterRecord | TensorRecord | ShardRecord | FileRecord]] = {
    "part": PartRecord,
    "router": RouterRecord,
    "tensor": TensorRecord,
    "shard": ShardRecord,
    "file": FileRecord,
}


def to_line(record: Record) -> bytes:
    """One record as a line of JSON."""
    if isinstance(record, ExpertRecord):
        content: dict[str, Any] = {
            "kind": "expert",
            "layer": record.key.layer,
            "expert": record.key.expert,
            "shared": record.key.shared,
            "exact": record.exact,
            "method": record.method,
            "group": record.group,
            "matrices": [
                {
                    "name": m.name, "index": m.index, "role": m.role, "home": m.home,
                    "ratio": m.ratio, "uses": m.uses, "certificate": m.certificate.to_json(),
                }
                for m in record.matrices
            ],
        }  # fmt: skip
    elif isinstance(record, CodedRecord):
        content = {
            "kind": "coded", "name": record.name, "home": record.home, "ratio": record.ratio,
            "certificate": record.certificate.to_json(),
        }  # fmt: skip
    else:
        kind = next(name for name, cls in _KINDS.items() if cls is type(record))
        content = {"kind": kind, **asdict(record)}
    return _json_line(content)


def from_line(line: bytes, where: str) -> Record:
    """Raises CorruptionError, with `where` in front, for anything `to_line` cannot have made."""
    try:
        content = json.loads(line)
        kind = content.pop("kind")
        if kind == "expert":
            return _expert_record(content)
        if kind == "coded":
            return _coded_record(content)
        record = _KINDS[kind](**content)
        texts = ("name", "sha256", *_TEXTS.get(kind, ()))
        check_types(content, str, *texts)
        check_naturals(content, *_NATURALS.get(kind, ()))
        if kind == "router":
            _check_router(content)
        elif kind != "part":
            named = content["home"] if kind == "tensor" else content["name"]
            parts = named.split("/", 1) if kind == "file" else [named]
            if not all(map(is_file_name, parts)):
                raise ValueError(f"{named!r} is not a plain file name")
        return record
    except DAMAGED as error:
        raise CorruptionError(f"{where}: {type(error).__name__}: {error}") from error


_TEXTS = {"tensor": ("home",), "part": ("method",)}
_NATURALS = {
    "part": ("group", "number", "n_bytes", "held_bytes", "checksum"),
    "router": ("group", "layer", "n_bytes"),
    "file": ("n_bytes",),
}


def _check_router(content: Mapping[str, Any]) -> None:
    keep, alias, constants = (content[name] for name in ("keep", "alias", "constants"))
    check_types(content, list, "constants", *(() if keep is None else ("keep",)))
    check_types(content, dict, "alias")
    for numbers in (keep or [], alias, constants):
        check_naturals(numbers, *(numbers if isinstance(numbers, dict) else range(len(numbers))))


def _coded_record(content: dict[str, Any]) -> CodedRecord:
    check_types(content, str, "name", "home")
    if not is_file_name(content["home"]):
        raise ValueError(f"{content['home']!r} is not a plain file name")
    ratio = None if content["ratio"] is None else finite(content, "ratio")
    certificate = Certificate.from_json(content["certificate"])
    return CodedRecord(content["name"], content["home"], ratio, certificate)


def _expert_record(content: dict[str, Any]) -> ExpertRecord:
    check_types(content, list, "matrices")
    check_types(content, bool, "shared", "exact")
    check_naturals(content, "layer", "expert")
    matrices = []
    for item in content["matrices"]:
        check_types(item, str, "name", "home", "role")
        if item["role"] not in get_args(Role):
            raise ValueError(f"role {item['role']!r}")
        if not is_file_name(item["home"]):
            raise ValueError(f"{item['home']!r} is not a plain file name")
        uses, index = item.get("uses", []), item["index"]
        check_types({"uses": uses}, list, "uses")
        check_naturals(uses, *range(len(uses)))
        if index is not None:
            check_naturals(item, "index")
        ratio = None if item["ratio"] is None else finite(item, "ratio")
        certificate = Certificate.from_json(item["certificate"])
        matrices.append(
            MatrixRecord(
                item["name"], index, cast(Role, item["role"]), item["home"], ratio, certificate,
                tuple(uses),
            )
        )  # fmt: skip
    if not matrices:
        raise ValueError("an expert without matrices")
    key = ExpertKey(content["layer"], content["expert"], content["shared"])
    method, group = content.get("method", matrices[0].certificate.method), content.get("group", 0)
    check_types({"method": method}, str, "method")
    check_naturals({"group": group}, "group")
    return ExpertRecord(key, content["exact"], tuple(matrices), method, group)


def _json_line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def certificates_bytes(lines: Iterable[bytes], *, version: int = EXPERTS_ONLY) -> Iterator[bytes]:
    """The certificates file, line by line: a first line that names it, a last one that seals it."""
    digest = hashlib.sha256()
    head = _json_line({"kind": "header", "format": RECORDS_FORMAT, "version": version})
    count = 0
    for line in (head, *lines):
        digest.update(line)
        count += 1
        yield line
    yield _json_line({"kind": "end", "lines": count, "sha256": digest.hexdigest()})


def read_certificates(file: Path, *, version: int | None = None) -> list[Record]:
    """All records of a certificates file. version: what its first line has to say.

    Raises StoreError if it cannot be read, FormatError for a newer version, CorruptionError if
    its seal does not match, a line is damaged, or it is of another version.
    """
    digest, records, last, number = hashlib.sha256(), list[Record](), b"", 0
    found = VERSION
    try:
        with regular_file(file) as (fd, _), open(fd, "rb", closefd=False) as handle:
            for number, line in enumerate(iter(lambda: handle.readline(MAX_LINE_BYTES), b""), 1):
                if number == 1:
                    found = _check_head(file, line)
                    if version not in (None, found):
                        raise CorruptionError(
                            f"{file}: version {found}, {CONFIG_FILE} says {version}"
                        )
                elif last and number > 2:
                    records.append(from_line(last, f"{file}: line {number - 1}"))
                digest.update(last)
                last = line
    except OSError as error:
        raise StoreError(f"{file}: cannot be read: {error.strerror or error}") from error
    if found <= EXPERTS_ONLY and any(isinstance(record, CodedRecord) for record in records):
        raise CorruptionError(f"{file}: version {found} has no coded tensors but experts")
    end = {"kind": "end", "lines": number - 1, "sha256": digest.hexdigest()}
    if last != _json_line(end):
        raise CorruptionError(
            f"{file}: its last line does not match its contents; it was changed or is cut short"
        )
    return records


def _check_head(file: Path, line: bytes) -> int:
    """Its version."""
    try:
        head = json.loads(line)
        form, version = head["format"], head["version"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise CorruptionError(f"{file}: line 1: expected a header, found {line[:60]!r}") from None
    if form != RECORDS_FORMAT:
        raise FormatError(f"{file}: expected format {RECORDS_FORMAT!r}, found {form!r}")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise FormatError(f"{file}: version {version!r}: this moebound reads up to {VERSION}")
    return version
