"""Mutated stores: files damaged, records that lie. Each says which doors have to notice.

    verify   `verify(store)`: whatever differs from what was written and certified
    against  `verify(store, against=source)`: whatever differs from what may be said of that source
    load     `from_pretrained`, `moebound.load`, `open_store` and decoding, `decompress`:
             the same weights and logits as before, or a refusal

Someone who writes weights or a config anew, and their hashes with them, is seen by the second only.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from moebound import ErrorBound, load
from moebound.checkpoint import open_checkpoint
from moebound.checkpoint.shards import read_chunks, read_header, read_tensors
from moebound.integrations.transformers import register
from moebound.store import compress, open_store, verify
from moebound.store.decompress import decompress

from .cases import Attack, Case, Wrong, refused

CERTIFICATES, CONFIG = "moebound.certificates.jsonl", "config.json"
JOURNAL, INDEX = "moebound.journal.json", "model.safetensors.index.json"
ALL, AGAINST = ["verify", "against", "load"], ["against"]
IDS = torch.arange(3, 11).view(1, 8)
ODD: list[Any] = [None, True, False, 0, 1, -1, 2, 3, 10**9, 2**63, 0.001, 1e300, -5.0, "", "x", "0",
                  "../x", [], [0], {}, {"a": 1}, float("nan"), float("inf")]  # fmt: skip
# What no door can know, or what changes nothing: what the user called the source, a hash of what a
# rerun would do.
UNKNOWABLE = {("quantization_config", "source"), ("quantization_config", "run")}
Files = dict[str, bytes]
Path_ = tuple[Any, ...]


def _make_sources(folder: Path) -> list[Path]:
    """Two small models of one shape, and one whose experts are slices of 3-D tensors."""
    found = []
    for number, fused in enumerate((False, False, True)):
        config = AutoConfig.for_model(
            "qwen3_moe", vocab_size=24, hidden_size=16, intermediate_size=16,
            moe_intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2,
            max_position_embeddings=32, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
            pad_token_id=0,
        )  # fmt: skip
        torch.manual_seed(number)
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.bfloat16
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(0, 0.3 if "expert" in name else 0.1)
        path = folder / f"source{number}"
        model.save_pretrained(path, save_original_format=not fused)
        (path / "tokenizer.json").write_text('{"model": {}}')
        found.append(path)
    return found


class _Original:
    """A store that is whole, and what its doors say of it."""

    def __init__(self, source: Path, folder: Path, **options: Any) -> None:
        self.source, self.folder = open_checkpoint(source), folder
        compress(self.source, folder, shard_bytes=6000, jobs=1, **options)
        self.files = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
        self.lines = [json.loads(line) for line in self.files[CERTIFICATES].splitlines()]
        self.config = json.loads(self.files[CONFIG])
        self.shards = [name for name in self.files if name.endswith(".safetensors")]
        self.tensors = [t for n in self.shards for t in read_header(folder / n)[0].values()]
        self.found = {name: door(folder) for name, door in DOORS.items()}
        assert verify(folder, against=self.source, jobs=1).ok


def _weights(folder: Path) -> bytes:
    store, digest = open_store(folder), hashlib.sha256()
    for expert in store.experts():
        for role, array in store.decode_expert(expert.key, threads=1).items():
            digest.update(f"{expert.key} {role} {array.dtype} {array.shape}".encode())
            digest.update(array.tobytes())
    return digest.digest()


def _decompressed(folder: Path) -> bytes:
    out, digest = folder.with_name("decompressed"), hashlib.sha256()
    shutil.rmtree(out, ignore_errors=True)
    decompress(folder, out, jobs=1)
    for name, tensor in sorted(read_tensors(out).items()):  # in whichever shards
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(b"".join(read_chunks(tensor)))
    digest.update((out / CONFIG).read_bytes())
    return digest.digest()


def _pretrained(folder: Path) -> bytes:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with torch.no_grad():
        return bytes(model(IDS).logits.float().numpy().tobytes())


def _offloaded(folder: Path) -> bytes:
    with load(folder, ram_budget="50%", tier="disk", threads=1) as found, torch.no_grad():
        return bytes(found.model(IDS).logits.float().numpy().tobytes())


DOORS: dict[str, Callable[[Path], bytes]] = {
    "open_store and decode": _weights,
    "decompress": _decompressed,
    "from_pretrained": _pretrained,
    "moebound.load": _offloaded,
}


class Stores(Attack):
    """Damage: nobody made the certificates fit it."""

    name: ClassVar[str] = "stores"
    limit_s: ClassVar[float] = 30
    memory_bytes: ClassVar[int] = 1 << 30

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        logging.set_verbosity(50)
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        register()
        torch.set_num_threads(1)
        one, two, fused = _make_sources(folder)
        rate = ErrorBound(0.3, "rate", "expert")
        self.originals = [
            _Original(one, folder / "bound", bound=rate),
            _Original(one, folder / "rtn", method="rtn:int4:g16"),
            _Original(fused, folder / "fused", bound=rate, experts={0, 1}),
        ]
        self.other = _Original(two, folder / "other", bound=rate)

    def draw(self, rng: random.Random) -> Case:
        index = rng.randrange(len(self.originals))
        original = self.originals[index]
        files, special = dict(original.files), dict[str, str]()
        how = rng.choice(DAMAGES)(rng, original, files, special, self.other)
        return self.case(how, index, files, special, ALL)

    def case(
        self, how: str, index: int, files: Files, special: dict[str, str], doors: list[str]
    ) -> Case:
        return Case(how, files, {"of": index, "special": special, "doors": doors})

    def judge(self, case: Case) -> str:
        original, doors = self.originals[case.facts["of"]], case.facts["doors"]
        folder = self.folder / "case"
        shutil.rmtree(folder, ignore_errors=True)
        self._write(folder, case)
        special = case.facts["special"]
        changed = {
            name
            for name in {*case.files, *original.files}
            if case.files.get(name) != original.files.get(name)
        }
        # A link to the same bytes is how a hub's cache has every file.
        changed |= {name for name, what in special.items() if what != "outside"}
        harmless = all(name.endswith(".md") for name in changed)
        words = set()
        for name in ("verify", "against"):
            source = original.source if name == "against" else None
            report, error = refused(lambda s=source: verify(folder, against=s, jobs=1))  # type: ignore[misc]
            good = error is None and report.ok
            if good and name in doors and not harmless:
                raise Wrong(f"{name}: {self.topic(case)}", f"{name} says good: {case.how}")
            words.add("good" if good else "refused")
        for name, door in DOORS.items():
            found, why = self._through(name, door, folder)
            if why is None and found != original.found[name] and "load" in doors:
                raise Wrong(f"{name}: {self.topic(case)}", f"{name} gives other: {case.how}")
            words.add("refused" if why is not None else "good")
        return (
            "refused" if words == {"refused"} else "refused by some" if len(words) > 1 else "same"
        )

    def topic(self, case: Case) -> str:
        """What a finding is counted under."""
        return case.how.partition(":")[0]

    def _through(
        self, name: str, door: Callable[[Path], bytes], folder: Path
    ) -> tuple[bytes | None, BaseException | None]:
        try:
            return refused(lambda: door(folder))
        except Exception as error:
            # transformers reads some files before we are asked, and has errors of its own for them.
            if name == "from_pretrained" and not _last_is_ours(error):
                return None, error
            raise

    def _write(self, folder: Path, case: Case) -> None:
        folder.mkdir()
        special = case.facts["special"]
        for name, data in case.files.items():
            if name not in special:
                (folder / name).write_bytes(data)
        for name, what in special.items():
            place = folder / name
            if what == "folder":
                place.mkdir()
            elif what == "pipe":
                os.mkfifo(place)
            elif what == "sparse":
                with open(place, "wb") as handle:
                    handle.truncate(1 << 33)
            elif what == "outside":  # a link to the same bytes, elsewhere
                outside = folder.with_name("outside")
                outside.write_bytes(case.files.get(name, b"outside"))
                place.symlink_to(outside)
            else:
                place.symlink_to(what)


def _last_is_ours(error: BaseException) -> bool:
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return at is not None and "/moebound/" in at.tb_frame.f_code.co_filename


# --- damage


def _flip(rng: random.Random, o: _Original, files: Files, special: Any, other: _Original) -> str:
    name = rng.choice(sorted(files))
    data = bytearray(files[name])
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    files[name] = bytes(data)
    return f"bit flipped: byte {at} of {name}"


def _length(rng: random.Random, o: _Original, files: Files, special: Any, other: _Original) -> str:
    name = rng.choice(sorted(files))
    data = files[name]
    cut = rng.choice((0, len(data) // 2, len(data) - 1, rng.randrange(len(data))))
    if rng.random() < 0.3:
        files[name] = data + rng.randbytes(rng.randrange(1, 9))
        return f"grown: {name}"
    files[name] = data[:cut]
    return f"cut: {name} at {cut}"


def _files(rng: random.Random, o: _Original, files: Files, special: Any, other: _Original) -> str:
    way, name = rng.randrange(5), rng.choice(sorted(files))
    if way == 0:
        del files[name]
        return f"file gone: {name}"
    if way == 1:
        second = rng.choice(sorted(files))
        files[name], files[second] = files[second], files[name]
        return f"files exchanged: {name}, {second}"
    if way == 2:
        name = rng.choice([n for n in sorted(files) if n in other.files])
        files[name] = other.files[name]
        return f"file of another store: {name}"
    if way == 3:
        extra = rng.choice(("extra.bin", "modeling_x.py", "model-00009-of-00009.safetensors",
                            "model.safetensors", "pytorch_model.bin", "vocab.json"))  # fmt: skip
        files[extra] = files[o.shards[-1]] if extra.endswith("safetensors") else b"{}"
        return f"file not listed: {extra}"
    files[JOURNAL] = rng.choice((b"{}", b"", b"[1]"))
    return "unfinished: a journal is there"


def _special(rng: random.Random, o: _Original, files: Files, special: Any, other: _Original) -> str:
    name = rng.choice(sorted(files))
    what = rng.choice(("folder", "pipe", "sparse", "outside", "/dev/zero", "nowhere", name))
    special[name] = what
    return f"not a file: {name} is {what}"


def _exchange(
    rng: random.Random, o: _Original, files: Files, special: Any, other: _Original
) -> str:
    """Two tensors of one length, whose bytes are whole, each for itself."""
    ours = [t for t in o.tensors if t.n_bytes]
    first = rng.choice(ours)
    theirs = [t for t in ours if t.n_bytes == first.n_bytes and t.name != first.name]
    second = rng.choice(theirs or [first])
    one, two = (files[t.file.name][t.offset : t.offset + t.n_bytes] for t in (first, second))
    if not theirs:  # an envelope of the same length in the other store is as good
        same = [t for t in other.tensors if t.n_bytes == first.n_bytes]
        if same:
            t = rng.choice(same)
            two = other.files[t.file.name][t.offset : t.offset + t.n_bytes]
    for t, data in ((first, two), (second, one)) if theirs else ((first, two),):
        whole = bytearray(files[t.file.name])
        whole[t.offset : t.offset + t.n_bytes] = data
        files[t.file.name] = bytes(whole)
    return f"tensors exchanged: {first.name}, {second.name}"


def _json(rng: random.Random, o: _Original, files: Files, special: Any, other: _Original) -> str:
    name = rng.choice((CONFIG, INDEX, CONFIG, "generation_config.json"))
    if name not in files:
        name = CONFIG
    content = json.loads(files[name])
    path, value = change_json(rng, content)
    files[name] = json.dumps(content).encode()
    return f"JSON of {name}: {_spelled(path)} is {value!r}"


def _header(rng: random.Random, o: _Original, files: Files, special: Any, other: _Original) -> str:
    """A shard's header, with a length that fits."""
    name = rng.choice(o.shards)
    data = files[name]
    length = int.from_bytes(data[:8], "little")
    content = json.loads(data[8 : 8 + length])
    path, value = change_json(rng, content)
    text = json.dumps(content).encode()
    files[name] = len(text).to_bytes(8, "little") + text + data[8 + length :]
    return f"header: {_spelled(path)} is {value!r}"


def _lines(rng: random.Random, o: _Original, files: Files, special: Any, other: _Original) -> str:
    """Certificates without a line, or with one of another store; the seal is the old one."""
    lines = files[CERTIFICATES].splitlines(keepends=True)
    at = rng.randrange(len(lines))
    if rng.random() < 0.5:
        del lines[at]
    else:
        lines[at] = rng.choice(other.files[CERTIFICATES].splitlines(keepends=True)[:-1])
    files[CERTIFICATES] = b"".join(lines)
    return f"certificates not sealed: line {at + 1}"


DAMAGES = [_flip, _flip, _length, _files, _special, _exchange, _exchange, _json, _header, _lines]


# --- records that lie


class Certificates(Stores):
    """Records and configs written anew, with hashes that fit them."""

    name: ClassVar[str] = "certificates"

    def draw(self, rng: random.Random) -> Case:
        index = rng.randrange(len(self.originals))
        original = self.originals[index]
        files, lines = dict(original.files), copy.deepcopy(original.lines)
        ways = (
            self._field,
            self._field,
            self._exchanged,
            self._exchanged,
            self._config,
            self._kept,
        )
        how, doors = rng.choice(ways)(rng, original, files, lines)
        for record in lines:
            if record.get("kind") == "file" and record.get("name") == CONFIG:
                data = files[CONFIG]
                if data != original.files[CONFIG]:
                    record |= {"n_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        files[CERTIFICATES] = sealed(lines)
        return self.case(how, index, files, {}, doors)

    def _field(
        self, rng: random.Random, o: _Original, files: Files, lines: list[Any]
    ) -> tuple[str, list[str]]:
        at = rng.randrange(len(lines) - 1)
        if rng.random() < 0.6:  # most of what is promised stands there
            at = rng.choice([n for n, r in enumerate(lines) if r["kind"] == "expert"])
        kind = lines[at]["kind"]
        if rng.random() < 0.1 and at:
            if rng.random() < 0.5:
                del lines[at]
                return f"record gone: {kind}", ["against", "load"]
            lines.insert(at, copy.deepcopy(lines[at]))
            return f"record twice: {kind}", ["load"]
        path, value = change_json(rng, lines[at], {("kind",)})
        return f"{kind} {_topic(path)}: is {value!r}", ["against", "load"]

    def _exchanged(
        self, rng: random.Random, o: _Original, files: Files, lines: list[Any]
    ) -> tuple[str, list[str]]:
        """A field of two records of a kind, or of two matrices of an expert."""
        kinds = rng.choice(("expert", "expert", "expert", "tensor", "file", "shard"))
        records = [r for r in lines if r["kind"] == kinds]
        one, two = rng.sample(records, 2) if len(records) > 1 else (records[0], records[0])
        if kinds == "expert" and rng.random() < 0.6:
            pairs = [m for r in (one, two) for m in r["matrices"]]
            one, two = rng.sample(pairs, 2)
            if rng.random() < 0.5:
                one, two = one["certificate"], two["certificate"]
        keys = [key for key in one if key in two and one[key] != two[key]]
        if not keys:
            return self._field(rng, o, files, lines)
        chosen = rng.sample(keys, 1) if rng.random() < 0.7 else keys
        for key in chosen:
            one[key], two[key] = two[key], one[key]
        if chosen == keys and kinds != "expert":  # nothing but the order
            return self._field(rng, o, files, lines)
        whole = chosen == keys and "matrices" in keys
        return f"exchanged {kinds} {'+'.join(chosen)}: two", ["load"] if whole else [
            "against",
            "load",
        ]

    def _config(
        self, rng: random.Random, o: _Original, files: Files, lines: list[Any]
    ) -> tuple[str, list[str]]:
        content = copy.deepcopy(o.config)
        part = content["quantization_config"] if rng.random() < 0.5 else content
        path, value = change_json(rng, part)
        full = ("quantization_config", *path) if part is not content else path
        files[CONFIG] = json.dumps(content).encode()
        doors = [] if full[:2] in UNKNOWABLE or full == ("quantization_config",) else AGAINST
        return f"config {_topic(full)}: is {value!r}", doors

    def _kept(
        self, rng: random.Random, o: _Original, files: Files, lines: list[Any]
    ) -> tuple[str, list[str]]:
        """A tensor that was kept, written anew together with its hash."""
        records = [r for r in lines if r["kind"] == "tensor"]
        tensors = {t.name: t for t in o.tensors if t.n_bytes}
        record = rng.choice([r for r in records if r["name"] in tensors])
        tensor = tensors[record["name"]]
        whole = bytearray(files[tensor.file.name])
        whole[tensor.offset + rng.randrange(tensor.n_bytes)] ^= 1 << rng.randrange(8)
        files[tensor.file.name] = bytes(whole)
        data = whole[tensor.offset : tensor.offset + tensor.n_bytes]
        record["sha256"] = hashlib.sha256(data).hexdigest()
        return f"kept tensor written anew: {tensor.name}", AGAINST


def sealed(lines: list[Any]) -> bytes:
    """A certificates file whose last line fits the others."""
    body = b"".join(_line(line) for line in lines[:-1])
    end = {"kind": "end", "lines": len(lines) - 1, "sha256": hashlib.sha256(body).hexdigest()}
    return body + _line(end)


def _line(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def leaves(content: Any, path: Path_ = ()) -> Iterator[Path_]:
    """The paths to all values, those that hold others too."""
    if path:
        yield path
    items = (
        content.items() if isinstance(content, dict)
        else enumerate(content) if isinstance(content, list) else ()
    )  # fmt: skip
    for key, value in items:
        yield from leaves(value, (*path, key))


def change_json(
    rng: random.Random, content: Any, never: set[Path_] | None = None
) -> tuple[Path_, Any]:
    """Sets one value to another, which is not what the old one would be read as. In place."""
    path = rng.choice([p for p in leaves(content) if p not in (never or ())])
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    old = parent[path[-1]]
    values = list(ODD)
    if isinstance(old, (int, float)) and not isinstance(old, bool):
        values += [old + 1, old - 1, old * 2, old / 2, -old] * 3
    if isinstance(old, str) and old:
        flipped = list(old)
        flipped[rng.randrange(len(old))] = rng.choice("0aZ")
        values += ["".join(flipped), old[:-1], old.upper()] * 4
    values = [v for v in values if _differ(v, old)]
    value = rng.choice(values)
    if rng.random() < 0.1 and isinstance(parent, dict):
        del parent[path[-1]]
        return path, "gone"
    parent[path[-1]] = value
    return path, value


def _differ(one: Any, other: Any) -> bool:
    """Not only spelled in another way, as 1 and True are."""
    empty: tuple[Any, ...] = (None, [], {}, "", False, 0)
    return str(one) != str(other) and one != other and not (one in empty and other in empty)


def _topic(path: Path_) -> str:
    return ".".join(str(key) for key in path if not isinstance(key, int))


def _spelled(path: Path_) -> str:
    return ".".join(map(str, path))
