"""Problems: the pocket world's six generated families, and streams of problems.

    comparison, boxes (easy); bus, shopping (medium); remainders, cycle (hard)
    sample_problem, problem_stream    one `Problem` of a family; endless ones of a tier, seeded

Each tier has its own shape of cost, standing for GSM8K (easy: one to three steps), MATH (medium: a
longer chain) and AIME (hard: a short statement, then a search whose length nobody can read off).
Problems are split by a hash of their *skeleton*, the numbers without names and things, so that no
test problem is a training problem in other clothes. Notebook 00."""

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from roi_lib.worlds import World, check_choice


@dataclass(frozen=True)
class Problem:
    """One problem of any world."""

    id: str  # unique name, stable across runs
    text: str  # the statement: data, never instructions (see `exams.Environment.encode_data`)
    answer: str  # the gold answer
    solution: str  # worked, and ending in `\boxed{answer}`
    tier: str  # "easy", "medium" or "hard"
    family: str  # the pocket family or the dataset it comes from
    plan: str = ""  # the solution's operations in words (pocket only; for Plan-and-Solve)


def closing_brace(text: str, opening: int) -> int | None:
    """Index of the brace that closes the one at `opening`; None where it stays open."""
    depth = 0
    for end in range(opening, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return end
    return None


@dataclass(frozen=True)
class Sketch:
    """What a family returns: a problem before it has an id and a split."""

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
    """A running calculation that writes its own skeleton, steps and plan."""

    def __init__(self, *skeleton) -> None:
        self.skeleton, self.steps, self.plan = list(skeleton), [], []

    def step(self, left: int, sign: str, right: int) -> int:
        """The value of one calculation, which is written down."""
        value = {"+": left + right, "-": left - right, "*": left * right}[sign]
        self.steps.append(f"{left} {sign} {right} = {value}.")
        self.plan.append(OPERATIONS[sign])
        return value

    def change(self, rng: random.Random, value: int, largest: int = 12) -> tuple[str, int, int]:
        """A sign and an amount that keep `value` between 1 and `MAX_NUMBER`, and its new value."""
        sign = rng.choice("+-")
        if value <= largest:
            sign = "+"
        elif value + largest > MAX_NUMBER:
            sign = "-"
        amount = rng.randint(2, largest)
        self.skeleton += [sign, amount]
        return sign, amount, self.step(value, sign, amount)

    def sketch(self, parts: Sequence[str], answer: int) -> Sketch:
        """The problem that this was the calculation of."""
        return Sketch(tuple(self.skeleton), " ".join(parts), answer, self.steps, self.plan)


def comparison(rng: random.Random) -> Sketch:
    """Easy: Ana has 14, Ben has 5 more than Ana, ... One to three steps."""
    n = rng.randint(1, 3)
    names, thing, value = rng.sample(NAMES, n + 1), rng.choice(THINGS), rng.randint(3, 60)
    parts, ledger = [f"{names[0]} has {value} {thing}."], Ledger(value)
    for previous, name in zip(names, names[1:], strict=False):
        sign, amount, value = ledger.change(rng, value)
        parts.append(f"{name} has {amount} {'more' if sign == '+' else 'fewer'} than {previous}.")
    return ledger.sketch([*parts, f"How many {thing} does {names[-1]} have?"], value)


def boxes(rng: random.Random) -> Sketch:
    """Easy: 4 boxes of 6 pens, then up to two of them sold or bought. One to three steps."""
    rows, each, thing = rng.randint(2, 9), rng.randint(2, 9), rng.choice(THINGS)
    parts, ledger = [f"There are {rows} boxes with {each} {thing} each."], Ledger(rows, each)
    value = ledger.step(rows, "*", each)
    for _ in range(rng.randint(0, 2)):
        sign, amount, value = ledger.change(rng, value, largest=9)
        parts.append(f"Then {amount} {'more are bought' if sign == '+' else 'are sold'}.")
    return ledger.sketch([*parts, f"How many {thing} are there now?"], value)


def bus(rng: random.Random) -> Sketch:
    """Medium: riders get on and off a bus, three to eight times."""
    value = rng.randint(3, 60)
    parts, ledger = [f"A bus starts with {value} riders."], Ledger(value)
    for _ in range(rng.randint(3, 8)):
        sign, amount, value = ledger.change(rng, value)
        parts.append(f"{amount} get {'on' if sign == '+' else 'off'}.")
    return ledger.sketch([*parts, "How many riders are there now?"], value)


def shopping(rng: random.Random) -> Sketch:
    """Medium: two to five lines of a shopping list, each a product, added up as they come."""
    n, name = rng.randint(2, 5), rng.choice(NAMES)
    lines = [(rng.randint(2, 5), rng.randint(2, 4)) for _ in range(n)]
    items = ", ".join(f"{q} {thing} for {price} coins each" for (q, price), thing in zip(
        lines, rng.sample(THINGS, n), strict=True))
    ledger, total = Ledger(*lines), 0
    for q, price in lines:
        product = ledger.step(q, "*", price)
        total = ledger.step(total, "+", product) if total else product
    return ledger.sketch([f"{name} buys {items}. How many coins does {name} pay?"], total)


def remainders(rng: random.Random) -> Sketch:
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
    return Sketch((a, ra, b, rb, c, rc), text, x, steps, ["try", "numbers"])


def way_round(prime: int, factor: int) -> int:
    """How often 1 is multiplied by `factor`, modulo `prime`, until it is 1 again."""
    return next(k for k in range(1, prime) if pow(factor, k, prime) == 1)


#: (prime, factor) with a long way round, in a fixed order of popularity.
CYCLES = [(prime, factor) for prime in (17, 19, 23, 29, 31) for factor in range(2, prime)
          if way_round(prime, factor) >= 14]
random.Random(0).shuffle(CYCLES)
#: Zipf's law: popular tables are learned well, rare ones badly, and a model may know which.
POPULARITY = [1 / rank for rank in range(1, len(CYCLES) + 1)]


def cycle(rng: random.Random) -> Sketch:
    """Hard: how often must a number be multiplied, modulo a prime, until a given one appears?"""
    prime, factor = rng.choices(CYCLES, POPULARITY)[0]
    start = rng.randint(1, prime - 1)
    n = rng.randint(3, way_round(prime, factor) - 1)
    values = [start * factor**i % prime for i in range(n + 1)]
    text = (f"Start with {start}. Each round multiply by {factor} and keep the remainder modulo "
            f"{prime}. After how many rounds does {values[-1]} appear first?")
    tried = [f"{i}: {values[i]} ≠ {values[-1]}." for i in range(1, n)]
    steps = [f"0: {start}.", *tried, f"{n}: {values[-1]}."]
    return Sketch((prime, factor, start, n), text, n, steps, ["count", "rounds"])


SPLITS = ("train", "test")
TEST_SHARE = 0.1  # one skeleton in ten is kept for testing
FAMILIES: dict[str, Callable[[random.Random], Sketch]] = {
    f.__name__: f for f in (comparison, boxes, bus, shopping, remainders, cycle)}


def split_of(family: str, skeleton: tuple) -> str:
    """"train" or "test": decided by the numbers of a problem alone, for ever."""
    digest = hashlib.sha256(f"{family} {skeleton}".encode()).digest()
    return "test" if int.from_bytes(digest[:4], "big") < TEST_SHARE * 2**32 else "train"


def sample_problem(family: str, tier: str, split: str, rng: random.Random) -> Problem:
    """Draw one problem of a pocket family from one split ("train" or "test")."""
    sketch = FAMILIES[family](rng)
    while split_of(family, sketch.skeleton) != split:
        sketch = FAMILIES[family](rng)
    digest = hashlib.sha256(sketch.text.encode()).hexdigest()[:12]
    solution = " ".join([*sketch.steps, f"\\boxed{{{sketch.answer}}}"])
    return Problem(f"pocket/{family}/{digest}", sketch.text, str(sketch.answer), solution, tier,
                   family, " ".join(sketch.plan))


def is_generated(world: World) -> bool:
    """Whether the world's problems are generated here, and not read from datasets."""
    return all(name in FAMILIES for names in world.families.values() for name in names)


def problem_stream(world: World, tier: str, split: str, seed: int,
                   pool: Sequence[Problem] | None = None) -> Iterator[Problem]:
    """An endless seeded stream of one tier's problems.

    Generated families alternate at random and are drawn afresh. A pool, which a world of datasets
    needs (see `store.sources.load_pool`), is shuffled and gone through again and again."""
    check_choice("split", split, SPLITS)
    rng = random.Random(f"{seed}/{split}/{tier}")
    if pool is None and not is_generated(world):
        raise ValueError(f"the problems of world {world.name} come from datasets: give a pool")
    if pool is None:
        while True:
            yield sample_problem(rng.choice(world.families[tier]), tier, split, rng)
    own = [problem for problem in pool if problem.tier == tier]
    if not own:
        raise ValueError(f"there are no {tier} problems to draw from")
    while True:
        yield from rng.sample(own, len(own))
