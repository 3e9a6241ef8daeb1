"""The templates of `wordmath`: 1 to 3 steps, modest numbers.

A template draws its names and things first (the first name and the first thing are the pair that is
held out), then its numbers, records the steps that solve it, and returns the problem's text.
"""

from __future__ import annotations

from collections.abc import Callable

from moebound.wordmath.draw import Draw, Rejected

Template = Callable[[Draw], str]
LARGEST = 999
TEMPLATES: list[Template] = []


def easy(template: Template) -> Template:
    TEMPLATES.append(template)
    return template


@easy
def give_away(d: Draw) -> str:
    a, o, b = d.name(), d.thing(), d.name()
    x = d.number(20, 99)
    y = d.number(2, x - 5)
    d.subtract(x, y)
    return f"{a} has {x} {o}. {a} gives {y} {o} to {b}. How many {o} does {a} have left?"


@easy
def change(d: Draw) -> str:
    a, o = d.name(), d.thing()
    x, p = d.number(2, 9), d.number(2, 12)
    m = d.number(x * p, 150)
    d.subtract(m, d.multiply(x, p))
    return (
        f"{a} buys {x} {o} for {p} dollars each and pays with {m} dollars. "
        f"How much change does {a} get?"
    )


@easy
def two_days(d: Draw) -> str:
    a, o = d.name(), d.thing()
    x, y = d.number(5, 60), d.number(2, 30)
    d.add(x, d.add(x, y))
    return (
        f"On Monday {a} sold {x} {o}. On Tuesday {a} sold {y} more {o} than on Monday. "
        f"How many {o} did {a} sell in total?"
    )


@easy
def half_as_many(d: Draw) -> str:
    a, o = d.name(), d.thing()
    x = 2 * d.number(5, 48)
    d.add(x, d.divide(x, 2))
    return (
        f"{a} sold {x} {o} in April and half as many in May. How many {o} did {a} sell altogether?"
    )


@easy
def boxes(d: Draw) -> str:
    a, o = d.name(), d.thing()
    k, b = d.number(2, 12), d.number(2, 9)
    r = d.number(1, b * k - 1)
    d.subtract(d.multiply(b, k), r)
    return f"{a} packs {k} {o} in each of {b} boxes and then loses {r} {o}. How many {o} remain?"


@easy
def share(d: Draw) -> str:
    a, o = d.name(), d.thing()
    k, each = d.number(2, 9), d.number(2, 12)
    d.divide(k * each, k)
    return (
        f"{a} shares {k * each} {o} equally among {k} friends. How many {o} does each friend get?"
    )


@easy
def wage(d: Draw) -> str:
    a, o = d.name(), d.thing()
    w, h = d.number(5, 20), d.number(2, 9)
    s = d.number(1, w * h - 1)
    d.subtract(d.multiply(w, h), s)
    return (
        f"{a} earns {w} dollars an hour and works {h} hours. Then {a} spends {s} dollars on {o}. "
        f"How many dollars are left?"
    )


@easy
def times_as_many(d: Draw) -> str:
    a, o, b, c = d.name(), d.thing(), d.name(), d.name()
    x, y, k = d.number(3, 40), d.number(2, 30), d.number(2, 4)
    d.multiply(d.add(x, y), k)
    return (
        f"{a} has {x} {o}. {b} has {y} more {o} than {a}. "
        f"{c} has {k} times as many {o} as {b}. How many {o} does {c} have?"
    )


@easy
def fewer(d: Draw) -> str:
    a, o, b = d.name(), d.thing(), d.name()
    x, y = d.number(20, 90), d.number(2, 18)
    d.add(x, d.subtract(x, y))
    return f"{a} has {x} {o} and {b} has {y} fewer. How many {o} do they have together?"


@easy
def rows(d: Draw) -> str:
    p, o = d.place(), d.thing()
    r, c, extra = d.number(2, 12), d.number(2, 9), d.number(2, 60)
    d.add(d.multiply(r, c), extra)
    return (
        f"A {p} has {r} rows with {c} {o} in each row and {extra} extra {o}. "
        f"How many {o} does the {p} have?"
    )


@easy
def weeks(d: Draw) -> str:
    a, o = d.name(), d.thing()
    x, w = d.number(2, 12), d.number(2, 6)
    d.multiply(d.multiply(w, 7), x)
    return f"{a} makes {x} {o} a day. How many {o} does {a} make in {w} weeks?"


@easy
def years(d: Draw) -> str:
    a, o, b = d.name(), d.thing(), d.name()
    x, k, y = d.number(4, 30), d.number(2, 3), d.number(2, 20)
    d.add(d.multiply(x, k), y)
    return (
        f"{a} is {x} years old and collects {o}. {b} is {k} times as old as {a}. "
        f"How old will {b} be in {y} years?"
    )


@easy
def two_items(d: Draw) -> str:
    a, o, q = d.name(), d.thing(), d.thing()
    x, p, y, r = d.number(2, 9), d.number(2, 9), d.number(2, 9), d.number(2, 9)
    d.add(d.multiply(x, p), d.multiply(y, r))
    return (
        f"{a} buys {x} {o} at {p} dollars each and {y} {q} at {r} dollars each. "
        f"How much does {a} spend?"
    )


@easy
def pool(d: Draw) -> str:
    a, o, b = d.name(), d.thing(), d.name()
    k, each = d.number(2, 5), d.number(4, 25)
    x = d.number(3, k * each - 2)
    y = k * each - x
    d.divide(d.add(x, y), k)
    return (
        f"{a} has {x} {o} and {b} has {y} {o}. They put all {o} into {k} equal bags. "
        f"How many {o} are in each bag?"
    )


@easy
def lost_and_found(d: Draw) -> str:
    a, o = d.name(), d.thing()
    x = d.number(30, 99)
    y, z = d.number(5, x - 5), d.number(5, 60)
    d.add(d.subtract(x, y), z)
    return f"{a} had {x} {o}, lost {y} of them and found {z} more. How many {o} does {a} have now?"


@easy
def three_friends(d: Draw) -> str:
    a, o, b, c = d.name(), d.thing(), d.name(), d.name()
    x, y, z = d.number(5, 60), d.number(5, 60), d.number(5, 60)
    d.add(d.add(x, y), z)
    return (
        f"{a} found {x} {o}, {b} found {y} and {c} found {z}. How many {o} did the friends find "
        f"together?"
    )


@easy
def twice(d: Draw) -> str:
    a, o, b = d.name(), d.thing(), d.name()
    x, y = d.number(5, 60), d.number(2, 40)
    d.add(d.multiply(x, 2), y)
    return f"{a} made {x} {o}. {b} made {y} more than twice as many. How many {o} did {b} make?"


@easy
def share_the_rest(d: Draw) -> str:
    a, o = d.name(), d.thing()
    k, each, eaten = d.number(2, 9), d.number(2, 11), d.number(2, 40)
    d.divide(d.subtract(k * each + eaten, eaten), k)
    return (
        f"{a} has {k * each + eaten} {o}, keeps {eaten} and shares the rest equally among {k} "
        f"friends. How many {o} does each friend get?"
    )


@easy
def packs(d: Draw) -> str:
    p, o, q = d.place(), d.thing(), d.thing()
    x, k, y, m = d.number(2, 9), d.number(2, 12), d.number(2, 9), d.number(2, 12)
    first, second = d.multiply(x, k), d.multiply(y, m)
    if first < second:
        d.subtract(second, first)
        more, less = q, o
    else:
        d.subtract(first, second)
        more, less = o, q
    return (
        f"A {p} has {x} packs of {k} {o} and {y} packs of {m} {q}. "
        f"How many more {more} than {less} are there?"
    )


@easy
def discount(d: Draw) -> str:
    a, o = d.name(), d.thing()
    less, p, x = d.number(1, 9), d.number(2, 12), d.number(2, 12)
    d.multiply(d.subtract(p + less, less), x)
    return (
        f"One of the {o} costs {p + less} dollars. {a} buys {x} {o} and pays {less} dollars less "
        f"for each. How much does {a} pay?"
    )


@easy
def use_up(d: Draw) -> str:
    a, o = d.name(), d.thing()
    y, z = d.number(2, 9), d.number(2, 9)
    x = d.number(y * z, 99)
    d.subtract(x, d.multiply(y, z))
    return f"{a} has {x} {o} and uses {y} {o} a day. How many {o} are left after {z} days?"


@easy
def days_needed(d: Draw) -> str:
    a, o = d.name(), d.thing()
    x, k, n = d.number(2, 40), d.number(2, 9), d.number(2, 9)
    d.divide(d.subtract(x + k * n, x), k)
    return f"{a} wants {x + k * n} {o}, has {x} and gets {k} a day. How many days does {a} need?"


@easy
def half_and_more(d: Draw) -> str:
    a, o, b, c = d.name(), d.thing(), d.name(), d.name()
    x = 2 * d.number(6, 49)
    y = d.number(1, x // 2 - 1)
    d.subtract(d.divide(x, 2), y)
    return (
        f"{a} had {x} {o}. {a} gave half of them to {b} and {y} to {c}. "
        f"How many {o} does {a} have now?"
    )


@easy
def saving(d: Draw) -> str:
    a, o = d.name(), d.thing()
    w, p, k = d.number(2, 9), d.number(2, 9), d.number(2, 9)
    if w * p * k > 150:
        raise Rejected
    d.divide(d.multiply(p * k, w), p)
    return (
        f"{a} saves {w} dollars a week for {p * k} weeks. How many {o} at {p} dollars each can {a} "
        f"buy?"
    )


@easy
def repack(d: Draw) -> str:
    p, o = d.place(), d.thing()
    x, k, m = d.number(2, 9), d.number(2, 12), d.number(2, 6)
    each = d.number(x * k // m + 1, x * k // m + 6)
    extra = m * each - x * k
    d.divide(d.add(d.multiply(x, k), extra), m)
    return (
        f"A {p} has {x} boxes of {k} {o} and {extra} more {o}. All {o} are put into {m} equal "
        f"bags. How many {o} are in each bag?"
    )


@easy
def plus_and_times(d: Draw) -> str:
    a, o, b = d.name(), d.thing(), d.name()
    x, k = d.number(2, 15), d.number(2, 6)
    d.add(x, d.multiply(x, k))
    return (
        f"{a} has {x} {o} and {b} has {k} times as many {o} as {a}. "
        f"How many {o} do they have together?"
    )
