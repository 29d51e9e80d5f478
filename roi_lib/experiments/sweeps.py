"""Sweeps: how Score and Regret change with one thing, all else as in the main table."""

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from roi_lib.engines import EngineConfig
from roi_lib.exams import draw_papers
from roi_lib.experiments.methods import Comparison, run_methods
from roi_lib.experiments.table import make_records
from roi_lib.problems import Problem
from roi_lib.worlds import TIERS, World, check_choice

PER_PROBLEM = (1/16, 1/8, 3/16)  # of the world's largest budget, for each problem of a paper
TIERS_IN_TURN = ("easy", "hard", "medium") * 2  # a paper of n problems holds the first n
MIXES = (("easy", "easy", "medium"), ("easy", "easy", "hard"), ("easy", "medium", "hard"),
         ("medium", "medium", "hard"), ("easy", "hard", "hard"), ("medium", "hard", "hard"))


def settings(world: World, sweep: str) -> list[tuple]:
    """(x, tiers of a paper, budgets, temperature) of each setting. The more `problems`, the larger
    the budget."""
    top = max(world.budgets)
    sweeps = {
        "problems": [(n, TIERS_IN_TURN[:n], tuple(round(top * n * share) for share in PER_PROBLEM),
                      1.0) for n in (2, 4, 5, 6)],
        "mix": [("-".join(mix), mix, world.budgets, 1.0) for mix in MIXES],
        "temperature": [(t, TIERS, world.budgets, t) for t in (0.0, 0.5, 0.8, 1.0, 1.2)]}
    check_choice("sweep", sweep, sweeps)
    return sweeps[sweep]


def run_sweep(world: World, sweep: str, methods: Sequence[str], n_exams: int, seed: int = 0,
              pool: Sequence[Problem] | None = None, engine: EngineConfig = Comparison.engine,
              workers: int | None = None) -> pd.DataFrame:
    """All settings of a sweep, each with its papers and its log folder: `table.make_records` with
    three more columns, sweep, x (the setting) and tiers."""
    tables = []
    for i, (x, tiers, budgets, temperature) in enumerate(settings(world, sweep)):
        papers = draw_papers(world, n_exams, seed=seed, pool=pool, tiers=tiers)
        here = replace(engine, log=engine.log / f"{sweep}-{i}") if engine.log else engine
        comparison = Comparison(world, papers, seed, temperature, engine=here)
        records = make_records(comparison, run_methods(comparison, methods, budgets, workers))
        tables.append(records.assign(sweep=sweep, tiers="-".join(tiers), x=x))
    return pd.concat(tables, ignore_index=True).round(6)
