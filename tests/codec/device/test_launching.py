"""The short way to launch a kernel passes what triton's own does: on a driver that runs nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moebound import encode
from moebound.codec.bound import BoundCodec
from moebound.codec.device import DecodePlan, launch, plan_decode, triton_kernels

from .. import weights

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to launch on")

CODEC = BoundCodec(segment_weights=4096)


class Utilities:
    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return (0, 0, 32, 0, 1024)  # module, function, registers, spills, most threads

    def unload_module(self, *_: Any) -> None:
        pass

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 17}


class Driver:
    """As much of one as a launch asks for. launched: the arguments of each."""

    def __init__(self, target: Any) -> None:
        self.utils, self.target = Utilities(), target
        self.launched: list[tuple[Any, ...]] = []

    def launcher_cls(self, *_: Any) -> Any:
        return lambda *arguments: self.launched.append(arguments)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    pytest.importorskip("triton", reason="needs triton: pip install 'moebound[gpu]'")
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver as config

    from moebound.codec.device import decode_kernel, encode_kernel

    driver = Driver(GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(config, "_active", driver)
    monkeypatch.setattr(
        launch, "kernels", lambda _: triton_kernels.Kernels(decode_kernel, encode_kernel)
    )
    monkeypatch.setattr(triton_kernels, "_COMPILED", {})
    for name in ("expand_tables", "decode_segments", "lay_patches"):
        getattr(decode_kernel, name).device_caches.clear()
    return driver


def comparable(arguments: tuple[Any, ...]) -> list[Any]:
    """Tensors by their address; without what triton notes for profilers."""
    plain = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
    return [a for a in plain if type(a).__name__ != "LazyDict"]


def planned() -> DecodePlan:
    """With something for each of the three kernels."""
    array = weights.gaussian((96, 512))
    array[3, 4] = np.nan  # for a patch
    return plan_decode([encode(array, 0.005, codec=CODEC)])


def test_every_launch_passes_the_same(driver: Driver) -> None:
    plan = planned()
    compressed = torch.zeros(plan.n_bytes, dtype=torch.uint8)
    ready = plan.prepare(compressed, [torch.zeros(96, 512, dtype=torch.bfloat16)])
    ready.run()
    ready.run()
    first, second = driver.launched[:3], driver.launched[3:]
    assert len(triton_kernels._COMPILED) == 3
    assert [comparable(a) for a in first] == [comparable(a) for a in second]
    assert first[1][0] == len(plan.metadata.owners)  # programs


def test_another_alignment_is_another_kernel(driver: Driver) -> None:
    plan = planned()
    room = torch.zeros(plan.n_bytes + 2, dtype=torch.uint8)
    out = torch.zeros(96, 512, dtype=torch.bfloat16)
    for compressed in (room[:-2], room[2:], room[2:]):
        plan.launch(compressed, [out])
    assert len(driver.launched) == 3 * 3
    assert len(triton_kernels._COMPILED) == 4  # that of segments twice
