"""Problems: the pocket world's six generated families, and streams of problems.

    marbles, shelves (easy); tram, market (medium); residues, rounds (hard)
    sample_problem, problem_stream    one `Problem` of a family; endless ones of a tier, seeded

The tiers stand for GSM8K (one to three steps), MATH (a longer chain) and AIME (long work, and a
gamble). Each problem can be answered at three efforts: *in full* every calculation is written
out, *in brief* only the running values are, and each step is done in the head; *at once* there is
nothing but the answer. Effort is what tokens buy: the more is written, the surer the answer. The
statement gives away what tram, market and rounds cost, not what residues does.

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
    length: int = 0  # what the statement says of its length (pocket only; see `Sketch`)
    brief: str = ""  # the solution in brief (pocket only)
    plan: str = ""  # its operations in words (pocket only; for Plan-and-Solve)


def closing_brace(text: str, opening: int) -> int | None:
    """Index of the brace that closes the one at `opening`; None where it stays open."""
    depth = 0
    for end in range(opening, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return end
    return None


NAMES = ("Ana Ben Cal Dan Eva Fay Gus Hal Ida Jim Kim Leo Mia Ned Ola Pam Ray Sue Tom Una "
         "Val Wes Zoe Amy").split()
THINGS = "apples books cards coins cups eggs hats keys nuts pens pins stamps".split()
MAX_NUMBER = 320  # every number up to here is one token
OPERATIONS = {"+": "add", "-": "subtract", "*": "multiply"}


@dataclass(frozen=True)
class Sketch:
    """What a family returns: a problem before it has an id and a split."""

    skeleton: tuple
    text: str
    answer: int
    steps: list[str]  # the solution in full, a calculation each
    plan: list[str]  # its operations in words
    notes: list[str]  # the solution in brief: what is written down before the answer
    length: int  # what the statement says of its length: steps, stops, lines, or a modulus

    @property
    def brief(self) -> str:
        """The solution in brief, in words. It opens with `=`, for else a first number might begin
        either way of working, and a small model would fall from the one into the other."""
        return " ".join(["=", *(f"{note}," for note in self.notes), f"\\boxed{{{self.answer}}}"])


class Ledger:
    """A running calculation that writes its own skeleton, steps and plan."""

    def __init__(self, *skeleton) -> None:
        self.skeleton, self.steps, self.plan = list(skeleton), [], []
        self.values: list[int] = []  # what the calculation is at, step by step

    def step(self, left: int, sign: str, right: int) -> int:
        """The value of one calculation, which is written down."""
        value = {"+": left + right, "-": left - right, "*": left * right}[sign]
        self.steps.append(f"{left} {sign} {right} = {value}.")
        self.plan.append(OPERATIONS[sign])
        return value

    def change(self, rng: random.Random, value: int, largest: int) -> tuple[str, int, int]:
        """A sign and an amount that keep `value` between 1 and 99, and its new value."""
        sign = rng.choice("+-")
        if value <= largest:
            sign = "+"
        elif value + largest > 99:
            sign = "-"
        amount = rng.randint(2, largest)
        self.skeleton += [sign, amount]
        self.values.append(self.step(value, sign, amount))
        return sign, amount, self.values[-1]

    def sketch(self, parts: Sequence[str]) -> Sketch:
        """The problem that this was the calculation of."""
        *before, answer = self.values
        return Sketch(tuple(self.skeleton), " ".join(parts), answer, self.steps, self.plan,
                      list(map(str, before)), len(self.values))


def marbles(rng: random.Random) -> Sketch:
    """Easy: Ana has 14, Ben has 5 more than Ana, ... One to three steps."""
    n = rng.randint(1, 3)
    names, thing, value = rng.sample(NAMES, n + 1), rng.choice(THINGS), rng.randint(3, 40)
    parts, ledger = [f"{names[0]} has {value} {thing}."], Ledger(value)
    for previous, name in zip(names, names[1:], strict=False):
        sign, amount, value = ledger.change(rng, value, 9)
        parts.append(f"{name} has {amount} {'more' if sign == '+' else 'fewer'} than {previous}.")
    return ledger.sketch([*parts, f"How many {thing} does {names[-1]} have?"])


def shelves(rng: random.Random) -> Sketch:
    """Easy: 4 shelves with 6 books each, then up to two changes. One to three steps."""
    rows, each, thing = rng.randint(2, 9), rng.randint(2, 9), rng.choice(THINGS)
    parts, ledger = [f"There are {rows} shelves with {each} {thing} each."], Ledger(rows, each)
    ledger.values.append(value := ledger.step(rows, "*", each))
    for _ in range(rng.randint(0, 2)):
        sign, amount, value = ledger.change(rng, value, 9)
        parts.append(f"Then {amount} more are bought." if sign == "+" else
                     f"Then {amount} are sold.")
    return ledger.sketch([*parts, f"How many {thing} are there now?"])


def tram(rng: random.Random) -> Sketch:
    """Medium: riders get on or off at three to seven stops; the statement says how many."""
    n, value = rng.randint(3, 7), rng.randint(10, 60)
    start, ledger, stops = value, Ledger(value), []
    for _ in range(n):
        sign, amount, value = ledger.change(rng, value, 9)
        stops.append(f"{amount} get {'on' if sign == '+' else 'off'}")
    return ledger.sketch([f"A tram starts with {start} riders and makes {n} stops:",
                          f"{', '.join(stops)}.", "How many riders are there now?"])


def market(rng: random.Random) -> Sketch:
    """Medium: two to five lines of a shopping list, each a product, added up as they come."""
    n, name = rng.randint(2, 5), rng.choice(NAMES)
    lines = [(rng.randint(2, 6), rng.randint(2, 5)) for _ in range(n)]
    items = ", ".join(f"{q} {thing} for {price} coins each" for (q, price), thing in zip(
        lines, rng.sample(THINGS, n), strict=True))
    ledger, total = Ledger(*lines), 0
    for q, price in lines:
        product = ledger.step(q, "*", price)
        total = ledger.step(total, "+", product) if total else product
        ledger.values.append(total)
    return ledger.sketch([f"{name} buys {items}. How many coins does {name} pay?"])


def residues(rng: random.Random) -> Sketch:
    """Hard: the smallest multiple of a number with a given remainder, found by trying candidates in
    turn. That number bounds how many there are; how many it takes, nobody can read."""
    while math.gcd(a := rng.randint(4, 13), b := rng.randint(7, 20)) > 1:
        pass
    first = rng.choice([x for x in range(1, b) if x % a])
    candidates = [first]
    while candidates[-1] % a:
        candidates.append(candidates[-1] + b)
    text = f"Find the smallest multiple of {a} that has remainder {first} modulo {b}."
    steps = [f"{first} mod {a} = {first % a}."]
    for x in candidates[1:]:
        steps += [f"{x - b} + {b} = {x}.", f"{x} mod {a} = {x % a}."]
    return Sketch((a, b, first), text, candidates[-1], steps, ["try", "numbers"],
                  [f"{x}: {x % a}" for x in candidates], a)


#: (modulus, factor), in a fixed order of popularity.
TABLES = [(modulus, factor) for modulus in (11, 13, 17, 19, 23, 29) for factor in range(2, 12)
          if factor != modulus]
random.Random(0).shuffle(TABLES)
#: Zipf's law: popular tables are known by heart, rare ones are not, and a model may know which.
POPULARITY = [1 / rank for rank in range(1, len(TABLES) + 1)]


def rounds(rng: random.Random) -> Sketch:
    """Hard: multiply again and again, modulo a number. The statement says how often, so what it
    costs; whether the model knows that table by heart, it must know of itself."""
    modulus, factor = rng.choices(TABLES, POPULARITY)[0]
    n, value = rng.randint(3, 9), rng.randint(1, modulus - 1)
    text = (f"Start with {value}. Multiply by {factor} modulo {modulus}, {n} times in a row. "
            "What is the last number?")
    skeleton, steps, notes = (modulus, factor, value, n), [], []
    for i in range(n, 0, -1):  # rounds to go
        product = value * factor
        steps.append(f"{i}: {value} * {factor} = {product} ≡ {product % modulus}.")
        notes.append(f"{i}: {(value := product % modulus)}")
    return Sketch(skeleton, text, value, steps, ["multiply", "rounds"], notes[:-1], n)


SPLITS = ("train", "test")
TEST_SHARE = 0.1  # one skeleton in ten is kept for testing
FAMILIES: dict[str, Callable[[random.Random], Sketch]] = {
    f.__name__: f for f in (marbles, shelves, tram, market, residues, rounds)}


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
                   family, sketch.length, sketch.brief, " ".join(sketch.plan))


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
