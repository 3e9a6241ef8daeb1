"""The worker by itself: what its server's tests do not reach."""

from __future__ import annotations

import threading

from moebound.text.generation import GenerationSettings
from moebound.text.serve.stats import Record
from moebound.text.serve.worker import Event, Job, Worker
from moebound.text.together import Text

from ..tokenizers_made import byte_level
from .live import PATIENCE_S
from .scripted import ScriptedEngine


def job(max_new_tokens: int = 50) -> tuple[Job, list[Event], threading.Event]:
    """A job, what it was told, and whether that was all."""
    told, done = list[Event](), threading.Event()

    def notify(event: Event) -> None:
        told.append(event)
        if isinstance(event, Exception) or event[1].finish is not None:
            done.set()

    text = Text([1, 2, 3], GenerationSettings(max_new_tokens))
    return Job([text], notify), told, done


def test_a_log_that_cannot_be_written_ends_nothing() -> None:
    def fail(record: Record) -> None:
        raise OSError(28, "No space left on device")

    worker = Worker(ScriptedEngine.saying("the cat", byte_level()), 1, on_record=fail)
    worker.start()
    for _ in range(2):
        asked, told, done = job()
        worker.submit(asked)
        assert done.wait(PATIENCE_S)
        assert "".join(event[1].text for event in told if isinstance(event, tuple)) == "the cat"
    worker.close()
    assert worker.join(PATIENCE_S)


def test_a_job_that_is_cancelled_before_the_start_runs_nothing() -> None:
    engine = ScriptedEngine.saying("the cat", byte_level())
    worker = Worker(engine, 1)
    first, told, _ = job()
    second, _, done = job()
    worker.submit(first)
    worker.submit(second)
    worker.cancel(first)
    worker.cancel(first)
    worker.start()
    assert done.wait(PATIENCE_S)
    worker.cancel(second)  # has ended
    worker.close()
    assert worker.join(PATIENCE_S)
    assert told == []
    assert engine.begun == 1
    counts = worker.stats.to_json()["requests"]
    assert counts == {"completed": 1, "cancelled": 1, "failed": 0, "refused": 0}


def test_the_texts_of_a_job_come_one_after_another_and_count_as_one_request() -> None:
    records = list[Record]()
    engine = ScriptedEngine.saying("the cat", byte_level())
    worker = Worker(engine, 1, on_record=records.append)
    told, done = list[Event](), threading.Event()

    def notify(event: Event) -> None:
        told.append(event)
        if isinstance(event, tuple) and event[0] == 2 and event[1].finish is not None:
            done.set()

    text = Text([1, 2, 3], GenerationSettings(50))
    other = Text([4, 5], GenerationSettings(2, echo=True), prompt="so: ")
    worker.start()
    worker.submit(Job([text, text, other], notify, n=2))
    assert done.wait(PATIENCE_S)
    worker.close()
    assert worker.join(PATIENCE_S)
    events = [event for event in told if isinstance(event, tuple)]
    assert [index for index, _ in events] == sorted(index for index, _ in events)
    texts = ["".join(piece.text for at, piece in events if at == index) for index in range(3)]
    assert texts[:2] == ["the cat", "the cat"]
    assert texts[2].startswith("so: ")
    assert engine.begun == 3
    (record,) = records
    finishes = [piece.finish for _, piece in events if piece.finish is not None]
    assert record.n_prompt == 3 + 2  # each prompt once
    assert record.n_new == sum(finish.n_new for finish in finishes)
    assert worker.stats.to_json()["requests"]["completed"] == 1


def test_it_has_room_again_when_the_answer_is_there() -> None:
    worker = Worker(ScriptedEngine.saying("the cat", byte_level()), 0)
    worker.start()
    for _ in range(50):  # with a queue of 0: an answer that came too early would mean a refusal
        asked, _, done = job()
        worker.submit(asked)
        assert done.wait(PATIENCE_S)
    worker.close()
    assert worker.join(PATIENCE_S)
