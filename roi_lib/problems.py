"""Problems: the pocket world's six generated families.

A pocket problem is a short English statement with one integer answer and a worked solution. Each
tier has its own shape of cost, standing for GSM8K (easy: one to three steps), MATH (medium: a
longer chain) and AIME (hard: a short statement, then a search whose length nobody can read off).

Problems are split by a hash of their *skeleton*, the numbers without names and things, so that
no test problem is a training problem in other clothes.
"""

import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One problem of any world.

    Attributes:
        id: unique name, stable across runs.
        text: the statement (data, never instructions: see `exams.encode_prompt`).
        answer: the gold answer as text.
        solution: a worked solution ending in `\\boxed{answer}`.
        tier: "easy", "medium" or "hard".
        family: the pocket family or the dataset it comes from.
        plan: the solution's operations in words (pocket only; for Plan-and-Solve).
    """

    id: str
    text: str
    answer: str
    solution: str
    tier: str
    family: str
    plan: str = ""


def closing_brace(text: str, opening: int) -> int | None:
    """Index of the brace that closes the one at `opening`; None where it stays open."""
    depth = 0
    for end in range(opening, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return end
    return None


@dataclass(frozen=True)
class Draft:
    """What a family's sampler returns: a problem before it has an id and a split."""

    skeleton: tuple
    text: str
    answer: int
    steps: list[str]
    plan: list[str]


NAMES = ("Ana Ben Cal Dan Eva Fay Gus Hal Ida Jim Kim Leo Mia Ned Ola Pam Ray Sue Tom Una "
         "Val Wes Zoe Amy").split()
THINGS = "apples books cards coins cups eggs hats keys nuts pens pins stamps".split()
MAX_NUMBER = 99  # every number up to here is one token
OPERATIONS = {"+": "add", "-": "subtract", "*": "multiply"}


class Ledger:
    """A running calculation that writes its own steps and plan."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.plan: list[str] = []

    def step(self, left: int, sign: str, right: int) -> int:
        value = {"+": left + right, "-": left - right, "*": left * right}[sign]
        self.steps.append(f"{left} {sign} {right} = {value}.")
        self.plan.append(OPERATIONS[sign])
        return value


def signed_change(rng: random.Random, value: int, largest: int = 12) -> tuple[str, int]:
    """A sign and an amount that keep `value` between 1 and `MAX_NUMBER`."""
    sign = rng.choice("+-")
    if value <= largest:
        sign = "+"
    elif value + largest > MAX_NUMBER:
        sign = "-"
    return sign, rng.randint(2, largest)


def comparison(rng: random.Random) -> Draft:
    """Easy: Ana has 14, Ben has 5 more than Ana, ... One to three steps."""
    n = rng.randint(1, 3)
    names, thing, ledger = rng.sample(NAMES, n + 1), rng.choice(THINGS), Ledger()
    value = start = rng.randint(3, 60)
    parts, skeleton = [f"{names[0]} has {start} {thing}."], [start]
    for previous, name in zip(names, names[1:], strict=False):
        sign, amount = signed_change(rng, value)
        word = "more" if sign == "+" else "fewer"
        parts.append(f"{name} has {amount} {word} than {previous}.")
        skeleton += [sign, amount]
        value = ledger.step(value, sign, amount)
    parts.append(f"How many {thing} does {names[-1]} have?")
    return Draft(tuple(skeleton), " ".join(parts), value, ledger.steps, ledger.plan)


def boxes(rng: random.Random) -> Draft:
    """Easy: 4 boxes of 6 pens, then up to two of them sold or bought. One to three steps."""
    rows, each, thing, ledger = rng.randint(2, 9), rng.randint(2, 9), rng.choice(THINGS), Ledger()
    parts, skeleton = [f"There are {rows} boxes with {each} {thing} each."], [rows, each]
    value = ledger.step(rows, "*", each)
    for _ in range(rng.randint(0, 2)):
        sign, amount = signed_change(rng, value, largest=9)
        parts.append(f"Then {amount} {'more are bought' if sign == '+' else 'are sold'}.")
        skeleton += [sign, amount]
        value = ledger.step(value, sign, amount)
    parts.append(f"How many {thing} are there now?")
    return Draft(tuple(skeleton), " ".join(parts), value, ledger.steps, ledger.plan)


def bus(rng: random.Random) -> Draft:
    """Medium: riders get on and off a bus, three to eight times."""
    ledger = Ledger()
    value = start = rng.randint(3, 60)
    parts, skeleton = [f"A bus starts with {start} riders."], [start]
    for _ in range(rng.randint(3, 8)):
        sign, amount = signed_change(rng, value)
        parts.append(f"{amount} get {'on' if sign == '+' else 'off'}.")
        skeleton += [sign, amount]
        value = ledger.step(value, sign, amount)
    parts.append("How many riders are there now?")
    return Draft(tuple(skeleton), " ".join(parts), value, ledger.steps, ledger.plan)


def shopping(rng: random.Random) -> Draft:
    """Medium: two to five lines of a shopping list, each a product, added up as they come."""
    n, name, ledger = rng.randint(2, 5), rng.choice(NAMES), Ledger()
    lines = [(rng.randint(2, 5), rng.randint(2, 4)) for _ in range(n)]
    items = [f"{q} {thing} for {price} coins each"
             for (q, price), thing in zip(lines, rng.sample(THINGS, n), strict=True)]
    text = f"{name} buys {', '.join(items)}. How many coins does {name} pay?"
    total = ledger.step(lines[0][0], "*", lines[0][1])
    for q, price in lines[1:]:
        total = ledger.step(total, "+", ledger.step(q, "*", price))
    return Draft(tuple(lines), text, total, ledger.steps, ledger.plan)


def remainders(rng: random.Random) -> Draft:
    """Hard: the smallest number with three given remainders, found by trying candidates."""
    while True:
        a, b, c = *rng.sample(range(3, 20), 2), rng.randint(7, 9)
        if c not in (a, b) and math.lcm(a, b, c) > MAX_NUMBER // 2:
            break
    wanted = rng.randint(20, MAX_NUMBER)
    ra, rb, rc = wanted % a, wanted % b, wanted % c
    text = (f"Find the smallest positive number with remainder {ra} modulo {a}, "
            f"remainder {rb} modulo {b} and remainder {rc} modulo {c}.")
    steps, x = [], rc or c
    while True:
        for modulus, remainder in ((a, ra), (b, rb)):
            found = x % modulus == remainder
            tail = "" if found else f" ≠ {remainder}"
            steps.append(f"{x} mod {modulus} = {x % modulus}{tail}.")
            if not found:
                break
        else:
            break
        x += c
    return Draft((a, ra, b, rb, c, rc), text, x, steps, ["try", "numbers"])


def way_round(prime: int, factor: int) -> int:
    """How often 1 is multiplied by `factor`, modulo `prime`, until it is 1 again."""
    value, rounds = factor, 1
    while value != 1:
        value, rounds = value * factor % prime, rounds + 1
    return rounds


#: (prime, factor) with a long way round, in a fixed order of popularity.
CYCLES = [(prime, factor) for prime in (17, 19, 23, 29, 31) for factor in range(2, prime)
          if way_round(prime, factor) >= 14]
random.Random(0).shuffle(CYCLES)
#: Zipf's law: popular tables are learned well, rare ones badly, and a model may know which.
POPULARITY = [1 / rank for rank in range(1, len(CYCLES) + 1)]


def cycle(rng: random.Random) -> Draft:
    """Hard: how often must a number be multiplied, modulo a prime, until a given one appears?"""
    prime, factor = rng.choices(CYCLES, POPULARITY)[0]
    start = rng.randint(1, prime - 1)
    n = rng.randint(3, way_round(prime, factor) - 1)
    values = [start * factor**i % prime for i in range(n + 1)]
    text = (f"Start with {start}. Each round multiply by {factor} and keep the remainder modulo "
            f"{prime}. After how many rounds does {values[-1]} appear first?")
    steps = [f"0: {start}.", *(f"{i}: {v} ≠ {values[-1]}." for i, v in enumerate(values) if i)]
    steps[-1] = f"{n}: {values[-1]}."
    return Draft((prime, factor, start, n), text, n, steps, ["count", "rounds"])


FAMILIES: dict[str, Callable[[random.Random], Draft]] = {
    f.__name__: f for f in (comparison, boxes, bus, shopping, remainders, cycle)
}
#: One skeleton in ten is kept for testing.
TEST_SHARE = 0.1


def split_of(family: str, skeleton: tuple) -> str:
    """"train" or "test": decided by the numbers of a problem alone, for ever."""
    digest = hashlib.sha256(f"{family} {skeleton}".encode()).digest()
    return "test" if int.from_bytes(digest[:4], "big") < TEST_SHARE * 2**32 else "train"


def sample_problem(family: str, tier: str, split: str, rng: random.Random) -> Problem:
    """Draw one problem of a pocket family from one split ("train" or "test")."""
    while True:
        draft = FAMILIES[family](rng)
        if split_of(family, draft.skeleton) == split:
            break
    digest = hashlib.sha256(draft.text.encode()).hexdigest()[:12]
    solution = " ".join([*draft.steps, f"\\boxed{{{draft.answer}}}"])
    return Problem(f"pocket/{family}/{digest}", draft.text, str(draft.answer), solution, tier,
                   family, " ".join(draft.plan))
