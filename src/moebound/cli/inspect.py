"""`moebound inspect`: what is in a checkpoint, a store, or one safetensors file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moebound.cli import exits, wording
from moebound.cli.output import Output, output_options

if TYPE_CHECKING:
    from moebound.checkpoint import Checkpoint, Expert
    from moebound.store import Store

FEW_BOUNDS = 3


@click.command()
@click.argument("src")
@output_options
def inspect(output: Output, src: str) -> int:
    """Show what is in SRC: a checkpoint, a store, or one .safetensors file.

    Reads headers and certificates, no weights.
    """
    from moebound.checkpoint import open_checkpoint
    from moebound.store import open_store
    from moebound.wordmath.builtin import resolve

    path = resolve(src)
    if is_store(Path(path)):
        document, lines = describe_store(open_store(path))
    else:
        checkpoint = open_checkpoint(path)
        describe = describe_file if checkpoint.family is None else describe_checkpoint
        document, lines = describe(checkpoint)
    output.result(document, wording.facts(src, lines))
    return exits.OK


def is_store(path: Path) -> bool:
    """Whether a folder says that it is a store. Any doubt is left to who opens it."""
    from moebound.checkpoint import read_json
    from moebound.errors import MoeboundError

    try:
        config = read_json(path / "config.json")
        return bool(config["quantization_config"]["quant_method"] == "moebound")
    except (MoeboundError, TypeError, KeyError):
        return False


def how_it_runs(config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, str]]:
    """Whether a model can be run here, for the document and for people."""
    from moebound.model.pretrained import what_runs

    how, why = what_runs(config)
    words = "by generate, serve and moebound.load, experts compressed; and by from_pretrained"
    return {"runs": how, "why_not": why or None}, ("runs", why or words)


Description = tuple[dict[str, Any], list[tuple[str, str]]]


def describe_checkpoint(checkpoint: Checkpoint) -> Description:
    """An ordinary checkpoint: what could be compressed, and how much of the model that is."""
    assert checkpoint.family is not None
    routed = checkpoint.experts()
    shared = [expert for expert in checkpoint.experts(shared=True) if expert.key.shared]
    total, of_experts, of_shared = (
        checkpoint.total_bytes, checkpoint.expert_bytes, checkpoint.shared_bytes,
    )  # fmt: skip
    layers = sorted({expert.key.layer for expert in routed})
    per_layer = _counts(Counter(expert.key.layer for expert in routed).values())
    shapes = _shapes(routed)
    dtypes = Counter(tensor.dtype for tensor in checkpoint.tensors.values())
    runs, run_line = how_it_runs(checkpoint.config)
    document = {
        "kind": "checkpoint",
        "path": str(checkpoint.path),
        "model_type": checkpoint.config.get("model_type"),
        "family": checkpoint.family.name,
        "n_tensors": len(checkpoint.tensors),
        "total_bytes": total,
        "stored_as": checkpoint.stored_as,
        "stored_bytes": checkpoint.stored_bytes,
        "layers": layers,
        "n_experts": len(routed),
        "experts_per_layer": sorted(set(Counter(e.key.layer for e in routed).values())),
        "weights_per_expert": sorted({expert.size for expert in routed}),
        "shapes": [{"role": role, "shape": list(shape), "dtype": dtype, "count": count}
                   for (role, shape, dtype), count in shapes.items()],
        "expert_bytes": of_experts,
        "expert_share": of_experts / total if total else 0.0,
        "n_shared_experts": len(shared),
        "shared_expert_bytes": of_shared,
        "tensor_dtypes": dict(dtypes),
        "left_out": checkpoint.left_out,
        **runs,
    }  # fmt: skip
    lines = [
        ("architecture", f"{checkpoint.config.get('model_type')} "
         f"(packed like {checkpoint.family.name})"),
        ("size", f"{wording.n_bytes(total)} in {len(checkpoint.tensors)} tensors "
         f"({_join(dtypes)})"),
        ("MoE layers", f"{len(layers)}: {wording.index_ranges(layers)}"),
        ("experts", f"{len(routed)}, {per_layer} a layer"),
        ("of an expert", "; ".join(f"{role} {rows} x {cols} {dtype}"
                                   for role, (rows, cols), dtype in shapes)),
        ("experts' share", f"{wording.n_bytes(of_experts)}, "
         f"{wording.percent(of_experts, total)} of the model"),
    ]  # fmt: skip
    if checkpoint.stored_as is not None:
        stored = wording.n_bytes(checkpoint.stored_bytes)
        lines.append(("stored as", f"{checkpoint.stored_as}, {stored}; sizes here are of its "
                      "weights, dequantized"))  # fmt: skip
    if shared:
        lines.append(("shared experts", f"{len(shared)}, {wording.n_bytes(of_shared)}, "
                      f"{wording.percent(of_shared, total)}; left alone unless asked"))  # fmt: skip
    lines.append(run_line)
    lines += [("not carried", f"{name}: {why}") for name, why in checkpoint.left_out.items()]
    return document, lines


def describe_file(checkpoint: Checkpoint) -> Description:
    """One safetensors file: tensors, and nothing that says which are experts."""
    dtypes = Counter(tensor.dtype for tensor in checkpoint.tensors.values())
    document = {
        "kind": "file",
        "path": str(checkpoint.path),
        "n_tensors": len(checkpoint.tensors),
        "total_bytes": checkpoint.total_bytes,
        "tensor_dtypes": dict(dtypes),
        "tensors": [{"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape)}
                    for tensor in checkpoint.tensors.values()],
    }  # fmt: skip
    lines = [
        ("a single file", "no config.json beside it is looked at, so no experts are known"),
        ("size", f"{wording.n_bytes(checkpoint.total_bytes)} in {len(checkpoint.tensors)} tensors "
         f"({_join(dtypes)})"),
    ]  # fmt: skip
    return document, lines


def describe_store(store: Store) -> Description:
    """A store: what was promised, what was kept, what it costs. Figures are the certificates'."""
    from moebound.methods import weakest
    from moebound.store import ExpertTotals
    from moebound.store.summary import ModelTotals, OtherTotals, WithoutWeights, larger

    experts = store.experts()
    chosen = [expert for expert in experts if not expert.exact]
    matrices = [matrix.record for expert in chosen for matrix in expert.matrices]
    found, others = ExpertTotals.of(store.records()), OtherTotals.of(store.records())
    guarantee = weakest([found.guarantee, others.guarantee])
    worst = larger(found.worst, others.worst)
    max_abs_error = max(found.max_abs_error, others.max_abs_error)
    codecs = Counter(m.certificate.codec for m in matrices if m.certificate.codec is not None)
    bounds = Counter(str(m.certificate.bound) for m in matrices if m.certificate.bound is not None)
    methods = Counter(expert.method for expert in chosen)
    layers = sorted({expert.key.layer for expert in chosen})
    before, after = found.bytes_before, found.bytes_after
    model = ModelTotals.of(store.tensors, [*store.kept.values(), *store.records()])
    bits = 8 * after / found.n_weights if found.n_weights else 0.0
    settings, edits = store.settings, store.router_edits()
    without = WithoutWeights.of(store.records())
    runs, run_line = how_it_runs(store.config)
    planned, planned_line = _planned(store)
    document = {
        "kind": "store",
        "path": str(store.path),
        "model_type": store.config.get("model_type"),
        "version": settings.version,
        "method": settings.method,
        "methods": dict(methods),
        "model_bits_per_weight": model.bits_per_weight,
        "n_parameters": model.n_weights,
        "guarantee": guarantee,
        "bound": None if settings.bound is None else settings.bound.to_json(),
        "bounds": dict(bounds),
        "plan": settings.plan,
        "planned": planned,
        "codec": settings.codec,
        "codecs": dict(codecs),
        "layers": layers,
        "n_experts": len(chosen),
        "n_exact_experts": len(experts) - len(chosen),
        "shared_experts": settings.shared_experts,
        "shared_parts": len(store.parts),
        "router_edits": [edit.describe() for edit in edits.values()],
        "without_weights": asdict(without),
        "n_weights": found.n_weights,
        "expert_bytes_before": before,
        "expert_bytes_after": after,
        "expert_bits_per_weight": bits,
        "ratio": before / after if after else None,
        "others": settings.others,
        "coded": asdict(others),
        "worst": worst,
        "max_abs_error": max_abs_error,
        "rmse": found.rmse,
        "patched": found.patched,
        "total_bytes": model.n_bytes,
        "left_out": dict(settings.left_out),
        **runs,
    }
    lines = [
        ("whole model", f"{wording.bits(model.bits_per_weight)}, {wording.n_bytes(model.n_bytes)}"),
        ("store", f"{store.config.get('model_type')}, format version {settings.version}"),
        ("bound", _spread(bounds) if len(bounds) > 1 else wording.bound(settings.bound)),
        *planned_line,
        *wording.promise(guarantee, worst, max_abs_error, "as certified"),
        ("root mean square error", f"{found.rmse:.3g} in weight units"),
        ("method", _join(methods) if len(methods) > 1 else settings.method),
        *([("codec", _join(codecs))] if len(codecs) > 1 else []),
        ("experts", f"{len(chosen)} compressed in layers {wording.index_ranges(layers)}"
         + (f", {len(experts) - len(chosen)} kept exact" if len(chosen) < len(experts) else "")),
        ("their size", f"{wording.n_bytes(before)} -> {wording.n_bytes(after)}, "
         f"{wording.ratio(before, after)}, {wording.bits(bits)}"),
        *([("shared parts", str(len(store.parts)))] if store.parts else []),
        *([("routing edited", f"layers {wording.index_ranges(edits)}")] if edits else []),
        *wording.without_weights(without),
        ("stored verbatim", f"{found.patched} of {found.n_weights} weights"),
        ("other tensors", wording.others(settings.others, others)),
        run_line,
        *(("left out", f"{name}: {why}") for name, why in settings.left_out.items()),
    ]  # fmt: skip
    return document, lines


def _planned(store: Store) -> tuple[dict[str, Any] | None, list[tuple[str, str]]]:
    """By which scheme and for what the store was planned. A plan that is damaged is said to be:
    `verify` is what fails."""
    from moebound.errors import PlanError, StoreError
    from moebound.store import plan_of

    try:
        plan = plan_of(store)
    except (PlanError, StoreError) as error:
        return None, [("planned", str(error))]
    if plan is None:
        return None, []
    per, what = plan.made.get("bound_per", "expert"), "bound" if plan.bounds else "width"
    asked = ", ".join(f"{name} {value:g}" for name, value in plan.budget.items())
    return (
        {"scheme": plan.scheme, "budget": dict(plan.budget), "bound_per": per},
        [("planned", f"by scheme {plan.scheme}, for {asked}, a {what} for each {per}")],
    )


def _shapes(experts: Sequence[Expert]) -> Counter[tuple[str, tuple[int, int], str]]:
    return Counter(
        (str(matrix.role), matrix.shape, str(matrix.dtype))
        for expert in experts
        for matrix in expert.matrices
    )


def _counts(values: Iterable[int]) -> str:
    seen = sorted(set(values))
    return str(seen[0]) if len(seen) == 1 else f"{seen[0]} to {seen[-1]}"


def _spread(counts: Counter[str]) -> str:
    """A few bounds one by one; of a plan's many, the narrowest and the widest."""
    if len(counts) <= FEW_BOUNDS:
        return _join(counts)
    ordered = sorted(counts, key=lambda text: float(text.split()[1]))
    return f"{len(counts)} different ones, as planned: {ordered[0]} to {ordered[-1]}"


def _join(counts: Counter[str]) -> str:
    return ", ".join(
        name if len(counts) == 1 else f"{count} {name}" for name, count in counts.items()
    )
