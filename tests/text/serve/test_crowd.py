"""Many requests at once, that fail, leave and ask for too much: each ends, and ends once."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from moebound.model import joined
from moebound.offload.loading import load
from moebound.text.generation import GenerationSettings
from moebound.text.serve.stats import Record
from moebound.text.serve.worker import Event, Job, Worker
from moebound.text.together import Text
from tiny_models import make_tiny

from ..test_together import Numbers
from .live import PATIENCE_S, until

N_JOBS = 60


class Engine:
    """What `moebound.load` gives, with a tokenizer of numbers."""

    def __init__(self, offloaded: Any) -> None:
        self.model, self.tokenizer = offloaded.model, Numbers()
        self.begin_sequence = offloaded.begin_sequence

    def stats(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kv_budget", [None, 60_000])
def test_every_request_ends_once(
    seed: int, kv_budget: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joined, "LEAST_WEIGHTS", 1)
    rng = random.Random(seed)
    records, lock = list[Record](), threading.Lock()
    texts: dict[tuple[int, int], str] = {}
    ends = [0] * N_JOBS

    def job(number: int) -> Job:
        asked = list[Text]()
        for _ in range(rng.choice([1, 1, 2, 5])):
            prompt = [rng.randrange(3, 90) for _ in range(rng.choice([1, 2, 7, 40]))]
            if rng.random() < 0.1:
                prompt = [95_000]  # no such token: an error when its turn comes
            asked.append(Text(prompt, GenerationSettings(rng.randrange(1, 14), 1.0, seed=number)))

        def notify(event: Event) -> None:
            with lock:
                if isinstance(event, Exception):
                    ends[number] += 1
                    return
                index, piece = event
                key = number, index
                texts[key] = texts.get(key, "") + piece.text
                if piece.finish is not None:
                    done[number] += 1
                    ends[number] += done[number] == len(asked)

        return Job(asked, notify)

    done = [0] * N_JOBS
    with load(make_tiny("qwen3_moe", tmp_path / "src"), ram_budget="80%") as offloaded:
        offloaded.model.generation_config.eos_token_id = None
        worker = Worker(
            Engine(offloaded), N_JOBS, most=4, kv_budget=kv_budget, on_record=records.append
        )
        jobs = [job(number) for number in range(N_JOBS)]
        worker.start()
        cancelled = set[int]()
        for number, one in enumerate(jobs):
            worker.submit(one)
            if rng.random() < 0.15:
                gone = rng.randrange(number + 1)
                cancelled.add(gone)
                worker.cancel(jobs[gone])
            time.sleep(rng.choice([0, 0, 0.01]))
        until(lambda: len(records) == N_JOBS)
        state = worker.state()
        assert (state["running"], state["waiting"], state["sequences"]) == (0, 0, 0)
        assert state["kv_bytes"] == 0
        worker.close()
        assert worker.join(PATIENCE_S)
        for number, one in enumerate(jobs):
            wrong = any(text.prompt_ids == [95_000] for text in one.texts)
            if number not in cancelled:
                assert ends[number] == 1
                assert wrong or done[number] == len(one.texts)
            else:
                assert ends[number] <= 1
        # Whoever was beside it, each text is what it is alone.
        alone = Worker(Engine(offloaded), N_JOBS, most=4)
        again = dict[tuple[int, int], str]()
        whole = [n for n in range(N_JOBS) if n not in cancelled and done[n] == len(jobs[n].texts)]
        alone.start()
        for number in whole[:5]:
            for index, text in enumerate(jobs[number].texts):
                told, ended = list[str](), threading.Event()

                def notify(event: Event, told: list[str] = told, ended: Any = ended) -> None:
                    assert isinstance(event, tuple)
                    told.append(event[1].text)
                    if event[1].finish is not None:
                        ended.set()

                alone.submit(Job([text], notify))
                assert ended.wait(PATIENCE_S)
                again[number, index] = "".join(told)
        alone.close()
        assert alone.join(PATIENCE_S)
    assert again
    assert all(texts[key] == text for key, text in again.items())
