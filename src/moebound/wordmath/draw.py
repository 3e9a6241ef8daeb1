"""One draw of a word problem: names, things and numbers, and the steps that solve it.

Held out by construction. A fifth of all pairs of a name (or place) and a thing, and a fifth of all
combinations of numbers, are reserved by a hash of their text. A training draw never contains a
reserved pair and never has a reserved combination; a test draw always has a reserved first pair and
a reserved combination. So no problem can be in both splits, whatever the seed.

Only `random.Random.random()` is used, the one method whose stream Python promises never to change.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, TypeVar

Split = Literal["train", "test"]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Ava Ben Cara Dan Eli Fay Gus Hana Ian Joy Ken Lia Max Nora Omar Pia Quin Rosa Sam Tara Uma "
    "Vic Wren Yara Zane Amir Bela Chen Dora Emil Finn Gita Hugo Ines Jonas Kira Leo Mina Noel Olga"
)
THINGS = _words(
    "apples books coins marbles stickers cards pencils shells cookies stamps beads balloons "
    "tickets ribbons stones candles muffins peaches lemons flowers badges bottles baskets puzzles "
    "kites crayons buttons magnets photos plates masks whistles"
)
PLACES = _words("shop market school farm park library garden store museum bakery")

_RESERVED_ONE_IN = 5

T = TypeVar("T")


class Rejected(Exception):  # not an error: the draw is repeated
    """The draw breaks a rule (a negative number, a reserved combination)."""


@lru_cache(maxsize=1 << 14)
def reserved(kind: str, *parts: str | int) -> bool:
    """Whether this combination is kept out of training. A fifth of all are, the same everywhere."""
    text = "|".join([kind, *map(str, parts)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _RESERVED_ONE_IN == 0


class Draw:
    """What a template writes its problem with.

    `name`, `place`, `thing` and `number` draw what the problem is about; `add`, `subtract`,
    `multiply` and `divide` solve it and record each step. `largest` is the largest number that may
    appear. Every method raises Rejected where no good problem can come out.
    """

    def __init__(self, rng: random.Random, split: Split, largest: int) -> None:
        self._rng = rng
        self._split = split
        self._largest = largest
        self.actors: list[str] = []
        self.things: list[str] = []
        self.numbers: list[int] = []
        self.steps: list[str] = []
        self.result: int | None = None

    # What the problem is about

    def below(self, n: int) -> int:
        """A whole number from 0 to n - 1."""
        return int(self._rng.random() * n)

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def chance(self, probability: float) -> bool:
        return self._rng.random() < probability

    def number(self, lowest: int, highest: int) -> int:
        """A number that matters to the answer, both ends included."""
        if highest < lowest:
            raise Rejected
        n = lowest + self.below(highest - lowest + 1)
        self.numbers.append(n)
        return n

    def name(self) -> str:
        return self._actor(NAMES)

    def place(self) -> str:
        return self._actor(PLACES)

    def _actor(self, pool: Sequence[str]) -> str:
        free = [a for a in pool if a not in self.actors and self._fits(a, self.things)]
        if not free:
            raise Rejected
        actor = self.pick(free)
        self.actors.append(actor)
        return actor

    def thing(self) -> str:
        free = [t for t in THINGS if t not in self.things]
        if self._split == "train":
            free = [t for t in free if not any(reserved("pair", a, t) for a in self.actors)]
        elif self.actors and not self.things:
            free = [t for t in free if reserved("pair", self.actors[0], t)]
        if not free:
            raise Rejected
        thing = self.pick(free)
        self.things.append(thing)
        return thing

    def _fits(self, actor: str, things: Sequence[str]) -> bool:
        if self._split == "train":
            return not any(reserved("pair", actor, t) for t in things)
        return bool(self.actors) or not things or reserved("pair", actor, things[0])

    # How it is solved

    def add(self, a: int, b: int) -> int:
        return self._step(f"{a} + {b}", a + b)

    def subtract(self, a: int, b: int) -> int:
        return self._step(f"{a} - {b}", a - b)

    def divide(self, a: int, b: int) -> int:
        if a % b:
            raise Rejected
        return self._step(f"{a} / {b}", a // b)

    def multiply(self, a: int, b: int) -> int:
        """Larger factors go by partial products: 47 * 83 = 47 * 80 + 47 * 3 = 3760 + 141 = 3901."""
        small, large = sorted((a, b))
        if (small <= 12 and large <= 99) or a % 10 == 0 or b % 10 == 0:
            return self._step(f"{a} * {b}", a * b)
        if small <= 9 and large <= 999:
            rest = large % 100
        elif large <= 99:
            large = b
            rest = b % 10
            small = a
        else:
            raise Rejected
        round_part = large - rest
        first, second = small * round_part, small * rest
        self._step(
            f"{a} * {b} = {small} * {round_part} + {small} * {rest} = {first} + {second}",
            first + second,
        )
        return first + second

    def _step(self, text: str, result: int) -> int:
        if not 0 <= result <= self._largest:
            raise Rejected
        self.steps.append(f"{text} = {result}.")
        self.result = result
        return result

    def finish(self) -> int:
        """The answer. Raises Rejected where the split does not allow these numbers."""
        assert self.result is not None
        if reserved("numbers", *self.numbers) != (self._split == "test"):
            raise Rejected
        return self.result
