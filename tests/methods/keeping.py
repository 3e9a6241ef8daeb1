"""What tests of pruning and merging share: a model with its statistics, and groups of arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import moebound
from moebound.calibrate import Settings, Statistics, Text, collect
from moebound.evaluate.loading import Loaded, Source
from moebound.methods import ExpertView, GroupView, Routing
from moebound.store import CompressSummary, compress, open_store, verify
from moebound.types import Array, ErrorBound, ExpertKey
from tiny_models import model_class

from .test_schemas import LINES, lines

TEXT = Text("rows", tuple(tuple(range(3 + i, 20 + 2 * i)) for i in range(5)))
IDS = torch.arange(5, 25).view(2, 10)
RATE = ErrorBound(0.3, "rate", "expert")


def loaded(folder: Path) -> Any:
    config = AutoConfig.from_pretrained(folder)
    return model_class(config).from_pretrained(folder, dtype=torch.float32).train(False)


def statistics(src: Path, out: Path, **settings: Any) -> Statistics:
    model = Loaded(loaded(src), None, Source(src.name, "checkpoint", "float32", "its own"))
    return collect(model, TEXT, out, Settings(**settings))


def stored(
    src: Path, dst: Path, method: str, found: Statistics | None, **options: Any
) -> CompressSummary:
    """Compressed, verified against its source and the schemas, loaded whole and offloaded with the
    same logits."""
    bound = RATE if "bound" in method or "calibrated" in method else None
    summary = compress(src, dst, method=method, calibration=found, bound=bound, **options)
    report = verify(dst, against=src)
    assert report.ok, report.problems
    assert report.guarantee == summary.guarantee == "none"
    for line in lines(dst):
        LINES.validate(line)
    with torch.inference_mode():
        whole = AutoModelForCausalLM.from_pretrained(dst, dtype=torch.float32)(IDS).logits
        with moebound.load(dst, dtype="float32") as offloaded:
            assert torch.allclose(offloaded.model(IDS).logits, whole, atol=1e-5)
    assert torch.isfinite(whole).all()
    return summary


def headers(dst: Path) -> int:
    """What a store of `raw` needs beside weights: frames and router edits, in bytes."""
    store = open_store(dst)
    edits = sum(tensor.n_bytes for tensor, _ in store.routers)
    frames = 0
    for expert in store.experts():
        for matrix in expert.matrices:
            certificate = matrix.record.certificate
            weights = 2 * certificate.n_weights if certificate.codec == "raw" else 0
            frame = matrix.tensor.n_bytes - weights
            assert 0 < frame < 100
            frames += frame
    return frames + edits


def group(n: int, routing: Routing | None = None, width: int = 6, **arrays: Array) -> GroupView:
    """n experts of layer 3 with random matrices, and these statistics, [n, ...] each."""
    rng = np.random.default_rng(0)
    keys = [ExpertKey(3, number) for number in range(n)]
    views = tuple(
        ExpertView(
            key,
            {
                "gate": rng.normal(size=(8, width)).astype(np.float32),
                "up": rng.normal(size=(8, width)).astype(np.float32),
                "down": rng.normal(size=(width, 8)).astype(np.float32),
            },
        )
        for key in keys
    )
    found = {name: dict(zip(keys, rows, strict=True)) for name, rows in arrays.items()}
    return GroupView(views, found, routing=routing)
