"""A forked child is refused at once, and a model that is dropped gives everything back."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moebound.errors import CacheError
from moebound.offload import loading
from moebound.offload.loading import load

IDS = torch.arange(5, 25).view(2, 10)


def in_child(act: Callable[[], Any]) -> str:
    """What a forked child says: the error of `act`, or "". Ended after 20 s."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        said = ""
        try:
            act()
        except CacheError as error:
            said = str(error)
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    assert status == 0, "the child did not end by itself"
    return said


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing to fork with")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
class TestFork:
    @pytest.mark.parametrize("locked", [False, True])
    def test_a_pass_in_a_child_is_refused(self, locked: bool, store: Path) -> None:
        """locked: a thread held the cache when the process was forked."""
        with load(store, ram_budget="60%", tier="disk") as offloaded:
            offloaded.model(IDS)
            acts: list[Callable[[], Any]] = [
                lambda: offloaded.model(IDS),
                lambda: offloaded.model.model(IDS),
                lambda: offloaded.model.generate(IDS, max_new_tokens=2),
                offloaded.begin_sequence,
                offloaded.stats,
                offloaded.model.state_dict,
            ]
            if locked:
                done = threading.Event()

                def hold() -> None:
                    with offloaded.cache._changed, offloaded.meter._lock:
                        held.set()
                        done.wait(60)

                held = threading.Event()
                holder = threading.Thread(target=hold)
                holder.start()
                held.wait(60)
            try:
                for act in acts:
                    assert "forked child" in in_child(act)
                assert in_child(offloaded.close) == ""
            finally:
                if locked:
                    done.set()
                    holder.join()
            offloaded.model(IDS)  # the parent goes on


class TestThreads:
    def test_passes_side_by_side_do_not_wait_for_each_others_room(self, store: Path) -> None:
        """Each would hold experts that arrived, and wait for room that another holds."""
        ids = [(IDS + 17 * n) % 60 for n in range(8)]
        with load(store, ram_budget="60%", tier="disk") as offloaded, torch.no_grad():
            expected = [offloaded.model(text).logits for text in ids]
            found = dict[int, list[torch.Tensor]]()

            def run(n: int) -> None:
                with torch.no_grad():
                    found[n] = [offloaded.model(ids[n]).logits for _ in range(25)]

            threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            hung = any(thread.is_alive() for thread in threads)
        assert not hung
        for n, logits in found.items():
            assert all(torch.equal(one, expected[n]) for one in logits)


def wait_for(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


class TestDropped:
    @pytest.mark.parametrize("predictor", ["none", "gate"])
    def test_threads_files_and_memory_are_given_back(self, predictor: str, store: Path) -> None:
        threads, before = threading.active_count(), len(os.listdir("/proc/self/fd"))
        offloaded = load(store, ram_budget="60%", tier="disk", drop_cache=True,
                         predictor=predictor, coarse=store)  # fmt: skip
        offloaded.model.generate(IDS, max_new_tokens=3, do_sample=False)
        slots = [weakref.ref(slot) for slot in offloaded.cache._values.values()]
        model = weakref.ref(offloaded.model)
        assert threading.active_count() > threads
        assert slots
        del offloaded
        gc.collect()
        assert model() is None
        assert wait_for(lambda: threading.active_count() <= threads)
        gc.collect()
        assert not any(slot() for slot in slots)
        assert len(os.listdir("/proc/self/fd")) <= before

    def test_the_model_alone_is_enough_to_go_on(self, store: Path) -> None:
        model = load(store, ram_budget="60%", tier="disk").model
        gc.collect()
        expected = model(IDS).logits
        base, head = model.model, model.lm_head
        del model
        gc.collect()
        assert torch.equal(head(base(IDS).last_hidden_state), expected)

    def test_a_load_that_fails_leaves_no_thread(
        self, store: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any) -> Any:
            raise RuntimeError("no tokenizer")

        before = threading.active_count()
        monkeypatch.setattr(loading, "_load_tokenizer", fail)
        with pytest.raises(RuntimeError, match="no tokenizer"):
            load(store)
        assert threading.active_count() == before
