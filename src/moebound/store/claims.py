"""Do a store's records say the same as each other and as its settings? Nothing is decoded here."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

from moebound.checkpoint import find_family
from moebound.checkpoint.experts import find_experts
from moebound.codec.certificate import promised
from moebound.codec.registry import codec_class
from moebound.errors import MoeboundError
from moebound.methods import Method, codec_of, get_method
from moebound.methods.registry import BOUNDED
from moebound.store.format import CONFIG_FILE, CodedRecord, MatrixRecord
from moebound.store.layout import EXACT
from moebound.store.others import CODERS, bound_of
from moebound.store.planned import plan_of, unpromised
from moebound.store.reader import Store, StoredExpert
from moebound.store.summary import Problem
from moebound.types import NO_LOSS, Guarantee

_TOLERANCE = 1e-9


def contradictions(store: Store) -> Iterator[Problem]:
    """What a record promises otherwise than config.json, its method or its own figures say."""
    for expert in store.experts():
        name = expert.matrices[0].tensor.name
        try:
            method = get_method(expert.method)
        except MoeboundError as error:
            yield Problem("certificate", name, str(error))
            continue
        if method.setting != expert.method:
            message = f"method: expected {method.setting}, found {expert.method}"
            yield Problem("certificate", name, message)
        if store.settings.plan is None and not expert.exact:
            yield from _unlike_settings(store, expert, method)
        if expert.exact:
            yield from _not_exact(expert)
        for message in _outputs(store, expert):
            yield Problem("certificate", name, message)
        for matrix in expert.matrices:
            for message in _unfounded(matrix.record, expert.method, method):
                yield Problem("certificate", matrix.tensor.name, message)
    yield from _coded(store)
    yield from _groups(store)
    yield from _settings(store)


def _coded(store: Store) -> Iterator[Problem]:
    """Of tensors that are no expert's, config.json says what was promised."""
    settings = store.settings
    if bool(store.coded) != (settings.others != "keep"):
        message = f"others {settings.others}, and {len(store.coded)} other tensors are coded"
        yield Problem("certificate", CONFIG_FILE, message)
    for name, stored in store.coded.items():
        record = stored.record
        certificate = record.certificate
        asked = bound_of(name, certificate.shape, settings.others)
        exact = certificate.codec in ("lossless", "raw")
        wanted = NO_LOSS if certificate.codec == "raw" else asked
        if certificate.bound != wanted or (asked == NO_LOSS and not exact):
            message = f"bound: expected {wanted}, certified {certificate.bound}"
            yield Problem("certificate", name, message)
        if certificate.source_dtype != certificate.dtype:
            message = f"dtype {certificate.dtype} of {certificate.source_dtype}"
            yield Problem("certificate", name, message)
        if certificate.codec not in CODERS or certificate.outputs or certificate.columns:
            message = f"codec {certificate.codec}: expected one of {', '.join(CODERS)}"
            yield Problem("certificate", name, message)
            continue
        setting = f"{BOUNDED}:{certificate.codec}"
        for message in _unfounded(record, setting, get_method(setting)):
            yield Problem("certificate", name, message)


def _unlike_settings(store: Store, expert: StoredExpert, method: Method) -> Iterator[Problem]:
    """Without a plan, every chosen expert has the store's method and bound. method: that it says
    itself."""
    name, settings = expert.matrices[0].tensor.name, store.settings
    setting = settings.method
    if settings.version == 1:  # which has no methods, and no codec's options in its certificates
        setting = ":".join(setting.split(":")[:2])
    if expert.method != setting:
        message = f"method: {CONFIG_FILE} says {setting}, certified {expert.method}"
        yield Problem("certificate", name, message)
    for matrix in expert.matrices:
        if unpromised(matrix.record, method):
            continue
        if matrix.record.certificate.bound != settings.bound:
            message = (
                f"bound: {CONFIG_FILE} says {settings.bound}, certified "
                f"{matrix.record.certificate.bound}"
            )
            yield Problem("certificate", matrix.tensor.name, message)


def _outputs(store: Store, expert: StoredExpert) -> Iterator[str]:
    """Outputs are certified of what was rounded by a text, and of nothing else."""
    by, tokens = store.settings.calibration, set[int]()
    text = None if by is None else by.of
    for matrix in expert.matrices:
        certificate = matrix.record.certificate
        outputs = certificate.outputs
        expected = text is not None and certificate.columns is not None
        if expected != (outputs is not None):
            yield (
                f"outputs: {CONFIG_FILE} has text {None if text is None else text.text}, certified "
                f"{outputs} with bounds by channel {certificate.columns}"
            )
        if outputs is not None:
            tokens.add(outputs.tokens)
    if len(tokens) > 1 or (text is not None and any(n > text.n_tokens for n in tokens)):
        yield f"outputs: tokens {sorted(tokens)}: expected one number, of the text's"


def _not_exact(expert: StoredExpert) -> Iterator[Problem]:
    for matrix in expert.matrices:
        certificate = matrix.record.certificate
        found = expert.method, certificate.codec, certificate.guarantee
        if found != (EXACT, codec_of(EXACT), "lossless") or matrix.record.index is None:
            message = f"is certified as exact, and is of {found[0]} with guarantee {found[2]}"
            yield Problem("certificate", matrix.tensor.name, message)


def _unfounded(record: MatrixRecord | CodedRecord, setting: str, method: Method) -> Iterator[str]:
    """Guarantee, method and ratio follow from the rest of a record."""
    certificate = record.certificate
    codec, bound = certificate.codec, certificate.bound
    if method.coder is not None:
        if unpromised(record, method) and (certificate.guarantee != "none" or bound is not None):
            yield f"guarantee {certificate.guarantee} of a matrix of which nothing can be promised"
            return
        if certificate.method != setting:  # coded; what is promised is the coder's promise
            if not method.merges:
                yield from _unfounded(record, method.coder.setting, method.coder)
            elif certificate.method.split(":")[0] not in (method.coder.id, BOUNDED):
                yield f"method: coded by {method.coder.setting}, certified {certificate.method}"
            return
    expected: Guarantee = "lossless" if method.lossless else "none"
    named = setting
    if codec is not None:
        if method.id == BOUNDED:  # codecs' options are the encoder's, and stand in the setting only
            named = f"{BOUNDED}:{str(codec_of(setting)).partition(':')[0]}"
        try:
            lossy = codec_class(codec).lossy
        except MoeboundError as error:
            yield str(error)
            return
        if bound is None:
            expected = "none" if lossy else "lossless"
        else:
            expected = promised(bound, lossy=lossy)
    elif bound is not None and method.takes_bound:
        expected = promised(bound, lossy=not method.lossless)
    elif bound is not None:
        yield f"bound {bound} of a method that knows none"
    if method.id == BOUNDED and certificate.method != named:
        yield f"method: its expert has {setting}, certified {certificate.method}"
    if method.id != BOUNDED and codec is None and certificate.method != setting:
        yield f"method: its expert has {setting}, certified {certificate.method}"
    if certificate.guarantee != expected:
        yield f"guarantee: expected {expected}, certified {certificate.guarantee}"
    if certificate.codec is None and certificate.codec_version is not None:
        yield f"codec_version {certificate.codec_version} without a codec"
    if (bound is None) != (certificate.abs_bound is None):
        yield f"bound {bound} is certified as {certificate.abs_bound} in weight units"
    if certificate.guarantee == "lossless" and (certificate.max_abs_error or certificate.rmse):
        yield "is certified as lossless, with an error"
    yield from _ratio(record)


def _ratio(record: MatrixRecord | CodedRecord) -> Iterator[str]:
    certificate, ratio = record.certificate, record.ratio
    bound, asked = certificate.bound, certificate.abs_bound
    if bound is None or asked is None:
        expected = 0.0 if certificate.guarantee == "lossless" else None
    elif bound.pointwise:
        error = certificate.max_abs_error
        expected = error / asked if asked else float(error > 0)
    elif ratio is None or bool(ratio) != bool(certificate.rmse):
        yield f"ratio {ratio} for an RMSE of {certificate.rmse:g}"
        return
    else:
        return  # of RMSEs: only the original says what was promised in weight units
    if ratio != expected and (
        ratio is None or expected is None or not math.isclose(ratio, expected, rel_tol=_TOLERANCE)
    ):
        yield f"ratio: expected {expected}, certified {ratio}"


def _groups(store: Store) -> Iterator[Problem]:
    """Groups are numbered in the order of their first experts, and hold what one method saw."""
    if store.settings.version == 1:
        return
    members: dict[int, list[StoredExpert]] = defaultdict(list)
    for expert in store.experts():
        members[expert.group].append(expert)
    for expected, (number, experts) in enumerate(members.items()):
        name = experts[0].matrices[0].tensor.name
        seen = {(e.key.layer, e.key.shared, e.exact, e.method) for e in experts}
        try:
            alone = get_method(experts[0].method).scope == "expert"
        except MoeboundError:
            continue  # said before
        if number != expected or len(seen) > 1 or (alone and len(experts) > 1):
            keys = ", ".join(str(expert.key) for expert in experts[:3])
            message = f"group {number}: expected {expected}, of one method and layer; has {keys}"
            yield Problem("certificate", name, message)
            return
    for part in store.parts.values():
        methods = {expert.method for expert in members[part.record.group]}
        if methods != {part.record.method}:
            message = f"method {part.record.method}, its experts have {sorted(methods)}"
            yield Problem("certificate", part.tensor.name, message)
    for tensor, router in store.routers:
        layers = {expert.key.layer for expert in members[router.group]}
        if layers != {router.layer}:
            message = f"layer {router.layer}, its experts are in {sorted(layers)}"
            yield Problem("certificate", tensor.name, message)


def _settings(store: Store) -> Iterator[Problem]:
    """What config.json says of all experts together."""
    settings = store.settings
    try:
        plan = plan_of(store)
        left = find_experts(
            {name: store.tensors[name] for name in store.kept},
            find_family(store.config), store.config, shared=True,
        )  # fmt: skip
    except MoeboundError:
        return  # said elsewhere
    if plan is not None and (plan.method, plan.widest) != (settings.method, settings.bound):
        message = (
            f"method and bound: planned {plan.method}, {plan.widest}, found {settings.method}, "
            f"{settings.bound}"
        )
        yield Problem("certificate", CONFIG_FILE, message)
    experts = store.experts()
    layers = {expert.key.layer for expert in experts if not expert.key.shared}
    compressed = any(expert.key.shared for expert in experts)
    not_compressed = any(expert.key.layer in layers for expert in left)
    if settings.calibration is not None and not any(map(_rounds_by_inputs, experts)):
        yield Problem("certificate", CONFIG_FILE, "calibration, and no expert was rounded by it")
    if settings.shared_experts != compressed and (compressed or not_compressed):
        message = f"shared_experts {settings.shared_experts}, and the store has it otherwise"
        yield Problem("certificate", CONFIG_FILE, message)


def _rounds_by_inputs(expert: StoredExpert) -> bool:
    try:
        return bool(get_method(expert.method).wanted_statistics())
    except MoeboundError:
        return False  # said before
