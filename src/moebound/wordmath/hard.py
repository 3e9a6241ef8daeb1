"""The templates of `wordmath-hard`: 3 to 5 steps, two-digit factors, sums of three digits.

Stands where the paper uses MATH. Most problems also state a fact that does not matter. Written as
easy.py; `story` puts the sentences together.
"""

from __future__ import annotations

from moebound.wordmath.draw import PLACES, Draw, Rejected
from moebound.wordmath.easy import Template

LARGEST = 9999
TEMPLATES: list[Template] = []


def hard(template: Template) -> Template:
    TEMPLATES.append(template)
    return template


def story(d: Draw, *sentences: str) -> str:
    """The sentences, the last of which asks; two in three times a fact that does not matter."""
    told = list(sentences)
    if d.chance(2 / 3):
        told.insert(d.below(len(told)), _distraction(d))
    return " ".join(told)


def _distraction(d: Draw) -> str:
    n = 2 + d.below(97)
    person = d.actors[0] if d.actors[0] not in PLACES else f"The {d.actors[0]}"
    return d.pick(
        [
            f"{person} is {n} years old.",
            f"It is {n} miles to the {d.pick(PLACES)}.",
            f"There are {n} people in the {d.pick(PLACES)}.",
            f"The {d.things[0]} weigh {n} pounds.",
            f"It took {n} hours to clean the {d.pick(PLACES)}.",
            f"Last year {n} {d.things[0]} were broken.",
        ]
    )


def positive(n: int) -> int:
    if n <= 0:
        raise Rejected
    return n


@hard
def order(d: Draw) -> str:
    a, o, q = d.name(), d.thing(), d.thing()
    x, p, y, r = d.number(11, 60), d.number(11, 40), d.number(11, 60), d.number(2, 12)
    total = d.add(d.multiply(x, p), d.multiply(y, r))
    m = d.number(total + 1, total + 900)
    d.subtract(m, total)
    return story(
        d,
        f"{a} buys {x} {o} at {p} dollars each and {y} {q} at {r} dollars each.",
        f"{a} had {m} dollars.",
        f"How many dollars does {a} have left?",
    )


@hard
def theatre(d: Draw) -> str:
    p, o = d.place(), d.thing()
    r, c = d.number(15, 60), d.number(13, 48)
    x = d.number(101, 899)
    y = d.number(101, 899)
    d.subtract(d.multiply(r, c), d.add(x, y))
    return story(
        d,
        f"A {p} keeps {o} in {r} rows of {c}.",
        f"It sells {x} {o} in April and {y} {o} in May.",
        f"How many {o} remain?",
    )


@hard
def three_shops(d: Draw) -> str:
    a, o, b, c = d.name(), d.thing(), d.name(), d.name()
    x, y, z = d.number(101, 699), d.number(51, 299), d.number(51, 399)
    second = d.add(x, y)
    third = d.subtract(second, z)
    d.add(d.add(x, second), third)
    return story(
        d,
        f"{a} sold {x} {o}.",
        f"{b} sold {y} more {o} than {a}, and {c} sold {z} fewer than {b}.",
        f"How many {o} did the friends sell together?",
    )


@hard
def machines(d: Draw) -> str:
    p, o = d.place(), d.thing()
    x, h, y, g = d.number(13, 79), d.number(13, 48), d.number(13, 79), d.number(3, 12)
    broken = d.number(51, 499)
    d.subtract(d.add(d.multiply(x, h), d.multiply(y, g)), broken)
    return story(
        d,
        f"A {p} has two machines.",
        f"One makes {x} {o} an hour and works {h} hours, one makes {y} {o} an hour and works "
        f"{g} hours.",
        f"Then {broken} {o} are thrown away.",
        f"How many {o} are left?",
    )


@hard
def school_trip(d: Draw) -> str:
    a, o = d.name(), d.thing()
    c, n, p, bus = d.number(3, 8), d.number(11, 12), d.number(13, 79), d.number(101, 899)
    d.add(d.multiply(d.multiply(c, n), p), bus)
    return story(
        d,
        f"{a} plans a trip for {c} classes with {n} students each.",
        f"Every student needs {p} dollars for {o}, and the bus costs {bus} dollars.",
        "How many dollars does the trip cost?",
    )


@hard
def harvest(d: Draw) -> str:
    p, o = d.place(), d.thing()
    k, n, price = d.number(3, 9), d.number(21, 99), d.number(13, 59)
    y = d.number(101, 499)
    x = positive(k * n - y)
    d.multiply(d.divide(d.add(x, y), k), price)
    return story(
        d,
        f"A {p} gets {x} {o} on Monday and {y} {o} on Tuesday.",
        f"All are put into boxes of {k} and every box is sold for {price} dollars.",
        f"How many dollars does the {p} get?",
    )


@hard
def savings(d: Draw) -> str:
    a, o = d.name(), d.thing()
    w, m = d.number(21, 89), d.number(13, 47)
    x, p, gift = d.number(5, 12), d.number(13, 60), d.number(101, 699)
    d.add(d.subtract(d.multiply(w, m), d.multiply(x, p)), gift)
    return story(
        d,
        f"{a} saves {w} dollars a week for {m} weeks.",
        f"Then {a} buys {x} {o} at {p} dollars each and gets {gift} dollars as a gift.",
        f"How many dollars does {a} have now?",
    )


@hard
def shelves(d: Draw) -> str:
    a, o, b = d.name(), d.thing(), d.name()
    boxes, k, s, each = d.number(4, 12), d.number(21, 80), d.number(3, 9), d.number(31, 99)
    given = d.number(51, 199)
    x = positive(s * each + given - boxes * k)
    d.divide(d.subtract(d.add(x, d.multiply(boxes, k)), given), s)
    return story(
        d,
        f"{a} has {x} {o} and buys {boxes} boxes of {k} {o}.",
        f"{a} gives {given} {o} to {b} and puts the rest on {s} equal shelves.",
        f"How many {o} are on each shelf?",
    )


@hard
def relay(d: Draw) -> str:
    a, o, b, c = d.name(), d.thing(), d.name(), d.name()
    x, y, z = d.number(101, 499), d.number(21, 199), d.number(51, 399)
    second = d.subtract(d.multiply(x, 2), y)
    d.add(d.add(x, second), z)
    return story(
        d,
        f"{a} made {x} {o}.",
        f"{b} made {y} fewer than twice as many {o} as {a}.",
        f"{c} made {z} more {o} than {a} and {b} together.",
        f"How many {o} did {c} make?",
    )


@hard
def returned(d: Draw) -> str:
    a, o = d.name(), d.thing()
    x, back, p, fee = d.number(41, 99), d.number(11, 29), d.number(13, 79), d.number(101, 799)
    d.add(d.multiply(d.subtract(x, back), p), fee)
    return story(
        d,
        f"{a} orders {x} {o} at {p} dollars each and sends {back} {o} back.",
        f"The transport costs {fee} dollars.",
        f"How much does {a} pay in total?",
    )


@hard
def shared_bill(d: Draw) -> str:
    a, o, q = d.name(), d.thing(), d.thing()
    k = d.number(2, 5)
    x, p, y, r = d.number(11, 30), d.number(11, 30), d.number(3, 12), d.number(11, 60)
    d.divide(d.add(d.multiply(x, p), d.multiply(y, r)), k)
    return story(
        d,
        f"{a} and the friends of {a} buy {x} {o} at {p} dollars each and {y} {q} at {r} dollars "
        f"each.",
        f"The {k} friends share the cost equally.",
        "How much does each friend pay?",
    )


@hard
def festival(d: Draw) -> str:
    p, o, q = d.place(), d.thing(), d.thing()
    k = d.number(2, 6)
    x, price, y, r = d.number(11, 40), d.number(11, 40), d.number(3, 12), d.number(11, 60)
    bus = d.number(101, 899)
    d.divide(d.add(d.add(d.multiply(x, price), d.multiply(y, r)), bus), k)
    return story(
        d,
        f"A {p} buys {x} {o} at {price} dollars each and {y} {q} at {r} dollars each.",
        f"The bus costs {bus} dollars.",
        f"All costs are shared equally by {k} classes.",
        "How many dollars does each class pay?",
    )


@hard
def half_sold(d: Draw) -> str:
    p, o = d.place(), d.thing()
    r, c = d.number(13, 60), d.number(13, 48)
    y, z = d.number(21, 199), d.number(101, 699)
    d.add(d.subtract(d.divide(d.multiply(r, c), 2), y), z)
    return story(
        d,
        f"A {p} has {r} boxes of {c} {o} and sells half of all {o}.",
        f"Then {y} {o} are lost and {z} more {o} are found.",
        f"How many {o} does the {p} have now?",
    )


@hard
def profit(d: Draw) -> str:
    a, o = d.name(), d.thing()
    x, cost, gain, rent = d.number(3, 13), d.number(11, 60), d.number(13, 39), d.number(101, 699)
    made = d.multiply(x, 7)
    d.subtract(d.multiply(made, d.subtract(cost + gain, cost)), rent)
    return story(
        d,
        f"{a} makes {x} {o} a day and sells each for {cost + gain} dollars.",
        f"It costs {cost} dollars to make one.",
        f"{a} pays {rent} dollars a week for the {d.pick(PLACES)}.",
        f"How many dollars does {a} have left after one week?",
    )


@hard
def compare(d: Draw) -> str:
    a, o, b, q = d.name(), d.thing(), d.name(), d.thing()
    x, p, y, r = d.number(31, 89), d.number(21, 69), d.number(13, 59), d.number(13, 49)
    d.subtract(d.multiply(x, p), d.multiply(y, r))
    return story(
        d,
        f"{a} sold {x} {o} at {p} dollars each.",
        f"{b} sold {y} {q} at {r} dollars each.",
        f"How many more dollars did {a} get than {b}?",
    )


@hard
def stock(d: Draw) -> str:
    p, o = d.place(), d.thing()
    y = d.number(51, 199)
    x, z = d.number(3 * y + 20, 999), d.number(51, 399)
    d.add(d.subtract(d.subtract(x, y), d.multiply(y, 2)), z)
    return story(
        d,
        f"A {p} has {x} {o}.",
        f"It sells {y} {o} on Monday and twice as many on Tuesday.",
        f"Then it gets {z} more {o}.",
        f"How many {o} does the {p} have now?",
    )


@hard
def average(d: Draw) -> str:
    a, o, b, c = d.name(), d.thing(), d.name(), d.name()
    x, y, each = d.number(101, 499), d.number(101, 499), d.number(101, 399)
    z = positive(3 * each - x - y)
    d.divide(d.add(d.add(x, y), z), 3)
    return story(
        d,
        f"{a} has {x} {o}, {b} has {y} and {c} has {z}.",
        f"They put all {o} together and share them equally.",
        f"How many {o} does each of the {3} friends get?",
    )
