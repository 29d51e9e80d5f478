"""Sweeps: how Score and Regret change with one thing, all else as in the main table.

    budget        eight budgets, from a quarter of the largest to half above it
    problems      exams of 2 to 6 problems, with as many tokens a problem as the largest budget
                  gives to three
    mix           which tiers a paper holds
    temperature   of sampling

A sweep is a loop over settings; each draws its papers, lets the methods sit them in every order,
and gives one row a method, order and budget. Rows go to a CSV file.
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path

from roi_lib.evaluation import Setting, make_records, sit_methods
from roi_lib.exams import draw_papers
from roi_lib.files import write_csv
from roi_lib.methods import EngineChoice
from roi_lib.worlds import World

BUDGET_SHARES = (0.25, 0.375, 0.5, 0.625, 0.75, 1.0, 1.25, 1.5)  # of the world's largest budget
SIZES = (2, 3, 4, 5, 6)
#: A paper of n problems holds the first n of these, in turn: none is without a hard one.
TIERS_IN_TURN = ("easy", "hard", "medium")
MIXES = (("easy", "easy", "medium"), ("easy", "easy", "hard"), ("easy", "medium", "hard"),
         ("medium", "medium", "hard"), ("easy", "hard", "hard"), ("medium", "hard", "hard"))
TEMPERATURES = (0.0, 0.5, 0.8, 1.0, 1.2)

COLUMNS = (
    "sweep", "x", "method", "order", "budget", "n_problems", "tiers", "temperature", "n_exams",
    "seed", "score", "score_low", "score_high", "score_easy", "regret", "regret_low",
    "regret_high", "rational", "rational_plug_in", "optimality_gap", "mean_tokens", "skip_rate",
    "model_hash")


@dataclass(frozen=True)
class Point:
    """One setting of a sweep.

    Attributes:
        x: its name in the file; None: the budget.
        tiers: of the problems of a paper.
        budgets: in tokens.
    """

    x: str | None
    tiers: tuple[str, ...]
    budgets: tuple[int, ...]
    temperature: float = 1.0


def points(world: World, sweep: str) -> list[Point]:
    """The settings of a sweep.

    Raises:
        ValueError: unknown sweep.
    """
    top, three = max(world.budgets), ("easy", "medium", "hard")
    sweeps = {
        "budget": [Point(None, three, tuple(round(share * top) for share in BUDGET_SHARES))],
        "problems": [Point(str(n), tuple(islice(cycle(TIERS_IN_TURN), n)), (round(top * n / 3),))
                     for n in SIZES],
        "mix": [Point("-".join(mix), mix, world.budgets) for mix in MIXES],
        "temperature": [Point(f"{t:g}", three, world.budgets, t) for t in TEMPERATURES],
    }
    if sweep not in sweeps:
        raise ValueError(f"unknown sweep {sweep!r}; choose from {', '.join(sweeps)}")
    return sweeps[sweep]


def run_sweep(
    world: World, sweep: str, methods: Sequence[str], n_exams: int, seed: int = 0,
    root: Path | None = None, choice: EngineChoice = EngineChoice(),  # noqa: B008 - it is frozen
    workers: int | None = None,
) -> Iterator[list[dict]]:
    """The rows of one setting after another, `COLUMNS` each.

    With a log folder in `choice`, each setting has a folder of its own in it, and a run found
    there goes on.

    Raises:
        ValueError: unknown sweep, or see `methods.sit_methods`.
    """
    for i, point in enumerate(points(world, sweep)):
        papers = draw_papers(world, n_exams, seed=seed, root=root, tiers=point.tiers)
        here = replace(choice, log=choice.log / f"{sweep}-{i}") if choice.log else choice
        setting = Setting(world, papers, seed, point.temperature, choice=here)
        results = sit_methods(setting, methods, point.budgets, workers)
        yield [as_row(sweep, point, record) for record in make_records(setting, results)]


def as_row(sweep: str, point: Point, record: dict) -> dict:
    """A record of one setting as a row of the file."""
    low_high = {f"{key}_{end}": (record[f"{key}_ci"] or (None, None))[i]
                for key in ("score", "regret") for i, end in enumerate(("low", "high"))}
    row = record | low_high | {
        "sweep": sweep, "x": point.x or str(record["budget"]), "tiers": "-".join(point.tiers)}
    if "plug_in" in record:  # the rational test-taker itself
        row |= {"rational": record["score"], "rational_plug_in": record["plug_in"]}
    return {name: round(value, 6) if isinstance(value := row.get(name), float) else value
            for name in COLUMNS}


def write_sweep(path: Path, rows: Sequence[dict]) -> None:
    """Write the CSV file in one piece."""
    write_csv(path, COLUMNS, rows)


def read_sweep(path: Path) -> list[dict]:
    """The rows of a file: numbers as numbers, an empty field as None.

    Raises:
        ValueError: not such a file.
    """
    words = {"sweep", "x", "method", "order", "tiers", "model_hash"}
    with path.open(newline="") as stream:
        reader = csv.DictReader(stream)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} is not a sweep: its columns are not those of sweeps.COLUMNS")
        return [{name: text if name in words else float(text) if text else None
                 for name, text in row.items()} for row in reader]
