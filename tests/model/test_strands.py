"""Strands: calls that meet, and what they share there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from moebound.model import joined
from moebound.model.joined import ROWS, JoinedLinears, compute_rows, least_rows
from moebound.model.strands import Strand, Strands, current


def run(*calls: Callable[[Strand], object]) -> list[Strand]:
    """All of them, to their ends."""
    strands, begun = Strands(), list[Strand]()
    for index, call in enumerate(calls):
        begun.append(strands.start(lambda index=index, call=call: call(begun[index])))  # type: ignore[misc]
    while alive := [strand for strand in begun if not strand.dead]:
        strands.advance(alive)
    return begun


def test_what_waits_at_one_place_is_served_at_once() -> None:
    served = list[list[int]]()

    def double(items: list[int]) -> list[int]:
        served.append(items)
        return [2 * item for item in items]

    results = dict[int, int]()

    def call(item: int) -> Callable[[Strand], None]:
        def work(strand: Strand) -> None:
            assert current() is strand
            results[item] = strand.meet("here", item, double)

        return work

    run(call(1), call(2), call(3))
    assert current() is None
    assert served == [[1, 2, 3]]
    assert results == {1: 2, 2: 4, 3: 6}


def test_who_is_patient_is_served_when_all_have_come() -> None:
    order = list[tuple[str, int]]()

    def serve(name: str) -> Callable[[list[int]], list[int]]:
        def serving(items: list[int]) -> list[int]:
            order.append((name, len(items)))
            return items

        return serving

    def long(strand: Strand) -> None:
        for _ in range(3):
            strand.meet("linear", 0, serve("linear"))
        strand.meet("experts", 0, serve("experts"), patient=True)

    def short(strand: Strand) -> None:
        strand.meet("experts", 0, serve("experts"), patient=True)

    run(short, long, short)
    assert order == [*[("linear", 1)] * 3, ("experts", 3)]


def test_an_error_is_of_the_one_whose_item_causes_it() -> None:
    def refuse_odd(items: list[int]) -> list[int]:
        if any(item % 2 for item in items):
            raise ValueError("odd")
        return items

    found = run(*(lambda strand, n=n: strand.meet("here", n, refuse_odd) for n in range(4)))
    assert [type(strand.error) for strand in found] == [type(None), ValueError] * 2
    assert found[1].error is not found[3].error


def test_an_error_outside_of_a_meeting_and_one_that_is_caught() -> None:
    def fail(items: list[int]) -> list[int]:
        raise ValueError

    def catch(strand: Strand) -> None:
        with pytest.raises(ValueError):  # noqa: PT011
            strand.meet("here", 1, fail)

    def leave(strand: Strand) -> None:
        raise KeyError("gone")

    caught, left = run(catch, leave)
    assert caught.error is None
    assert isinstance(left.error, KeyError)


def test_one_that_is_ended_unwinds_and_goes_no_further() -> None:
    unwound = list[str]()

    def work(strand: Strand) -> None:
        try:
            strand.rest()
            unwound.append("went on")
        finally:
            unwound.append("unwound")

    strands = Strands()
    begun = list[Strand]()
    begun.append(strands.start(lambda: work(begun[0])))
    strands.advance(begun)
    begun[0].end()
    assert begun[0].dead
    assert begun[0].error is None
    assert unwound == ["unwound"]


def test_gradients_are_off_for_all_whatever_one_does() -> None:
    seen = list[bool]()

    def work(strand: Strand) -> None:
        with torch.no_grad():
            strand.rest()
        strand.rest()
        seen.append(torch.is_grad_enabled())

    run(work, work)
    assert seen == [False, False]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("least", [1, 2, ROWS, None])
@pytest.mark.parametrize("n", [1, 3, ROWS, 2 * ROWS + 3])
def test_rows_are_computed_as_many_together_and_none_twice(n: int, least: int | None) -> None:
    sizes = list[int]()

    def compute(x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return 2 * x

    rows = [torch.full((1, 4), float(i)) for i in range(n)]
    found = compute_rows(compute, rows, least)
    assert [float(row[0, 0]) for row in found] == [2.0 * i for i in range(n)]
    assert len({row.data_ptr() for row in found}) == n
    if least is None:
        assert sizes == [1] * n
    else:
        full, rest = divmod(n, ROWS)
        assert sizes == [ROWS] * full + [max(rest, least)] * (rest > 0)


def test_from_how_many_rows_on_they_do_not_mix() -> None:
    options: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}

    def from_(n: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: x * 3 if len(x) >= n else x + x + x + 1e-6

    def by_place(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:5] * 3, x[5:] * 3 + 1e-6])

    def by_company(x: torch.Tensor) -> torch.Tensor:
        return x + 1e-6 * x.abs().max()

    for n in range(1, ROWS + 1):
        assert least_rows(from_(n), 64, **options) == n
    assert least_rows(by_place, 1000, **options) is None
    assert least_rows(by_company, 64, **options) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["stock", "by number"])
def test_layers_meet_in_strands_with_one_row_and_nowhere_else(
    dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever number of rows torch sums alike."""
    monkeypatch.setattr(joined, "LEAST_WEIGHTS", 1000)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 2)).to(dtype)
    sizes = list[int]()

    def compute(x: torch.Tensor) -> torch.Tensor:
        sizes.append(x.numel() // 256)
        return nn.functional.linear(x, model[0].weight, model[0].bias)  # type: ignore[arg-type]

    def by_number(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """In other parts if there are fewer than five: found, though bfloat16 hides nearly all of
        it."""
        at = 60 if len(x) < 5 else 100
        terms = x.float().unsqueeze(1) * weight.float()
        summed = terms[..., :at].sum(-1) + terms[..., at:].sum(-1)
        return summed.to(dtype) if bias is None else summed.to(dtype) + bias

    if way == "by number":
        monkeypatch.setattr(joined, "linear", by_number)
    with torch.no_grad():
        model[0].forward = compute  # as other hooks do
        meeting = JoinedLinears(model)
        assert len(meeting) == 1  # the other one is too small
        xs = [torch.randn(1, 1, 256, dtype=dtype) for _ in range(2)]
        xs.append(torch.randn(1, 3, 256, dtype=dtype))
        found = dict[int, torch.Tensor]()
        calls = [lambda _, i=i: found.update({i: model(xs[i])}) for i in range(3)]
        sizes.clear()
        assert not any(strand.error for strand in run(*calls))
        assert len(sizes) == 2
        three, two = sizes  # the three rows of one strand are a call of its own
        assert three == 3
        assert (two == 5) if way == "by number" else (2 <= two <= ROWS)
        for i, x in enumerate(xs):
            assert found[i].shape == (*x.shape[:-1], 2)
            assert torch.allclose(found[i].float(), model(x).float(), atol=0.05)
        meeting.remove()
        assert model[0].forward is compute
