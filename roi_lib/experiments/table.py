"""Records of a comparison and of a sweep, how they are shown, and the rollouts behind them.

A folder of `exam --save` holds papers.json (`store.papers`), records.csv (`make_records`), tables
of `sitting` as METHOD.parquet (with `copied`, see `methods.copied_tokens`; token ids of the first
papers only, and of generated problems only: a response may quote a dataset), and of exact policies
and rules bounds.parquet (points of `rational.bounds`, to three digits) and METHOD-outcomes.parquet
(a row an attempt)."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd

from roi_lib import evaluation
from roi_lib.engines import EngineConfig
from roi_lib.exams import draw_papers
from roi_lib.experiments.methods import Comparison, Results, run_methods
from roi_lib.problems import Problem, is_generated
from roi_lib.rational import BOUNDS, Outcomes
from roi_lib.sitting import points as problems_solved
from roi_lib.store.checkpoints import model_label
from roi_lib.store.files import verify_folder, write_csv, write_folder, write_json
from roi_lib.store.papers import make_paper_list
from roi_lib.worlds import RULES, TIERS, World, check_choice

PER_PROBLEM = (1/16, 1/8, 3/16)  # of the world's largest budget, for each problem of a paper
TIERS_IN_TURN = ("easy", "hard", "medium") * 2  # a paper of n problems holds the first n
MIXES = (("easy", "easy", "medium"), ("easy", "easy", "hard"), ("easy", "medium", "hard"),
         ("medium", "medium", "hard"), ("easy", "hard", "hard"), ("medium", "hard", "hard"))
TRACED = 100  # papers whose responses are kept token by token
CELL, CELL_OF_BOUND = ["method", "budget", "order"], ["abilities", "budget", "order"]
ATTEMPT = ["exam", "problem", "effort", "attempt"]


def summarize_policy(rows: pd.DataFrame, easy: pd.DataFrame, seed: int = 0) -> dict[str, float]:
    """The numbers of an exact policy or a rule in one cell under `evaluation.summarize`'s names,
    from its rows of `rational.bounds` in that order and in the easy one."""
    numbers = evaluation.score_and_regret(*(x["points"].to_numpy() for x in (rows, easy)), seed)
    known = rows.dropna(axis=1)  # luck knows nothing by position
    return numbers | evaluation.by_position(known, seed) | {
        "tokens": float(rows.filter(like="tokens_").sum(axis=1, min_count=1).mean()),
        "skip_rate": float(rows.filter(like="skipped_").mean().mean()),
        "over_budget": 0, "overrun_cut": 0, "failed": 0}


def make_records(comparison: Comparison, results: Results) -> pd.DataFrame:
    """One row for each method, budget and order, in the sequence of the results, then of `rules`
    and bounds; also each method's bounds with its own abilities, and what it leaves behind, where
    they were computed; and how it differs from the first method."""
    world, seed = comparison.world, comparison.seed
    table, found = results.table, results.bounds
    sat = dict(iter(table.groupby(CELL, sort=False))) if len(table) else {}
    able = {cell: rows.droplevel(CELL_OF_BOUND) for cell, rows in
            found.groupby(CELL_OF_BOUND, sort=False)} if len(found) else {}
    labels = {m: model_label(comparison.checkpoint(m) or "")
              for m in [*dict.fromkeys(m for m, _, _ in sat), *results.policies]}
    shared = {"world": world.name, "n_exams": len(comparison.papers), "seed": seed,
              "n_problems": len(comparison.papers[0]), "temperature": comparison.temperature}
    records, points = [], {}
    for method, budget, order in sat:
        key, own = (method, budget, order), comparison.abilities(method)
        points[key] = problems_solved(sat[key])
        record = dict(zip(CELL, key, strict=True)) | {"model": labels[method]}
        record |= evaluation.summarize(sat[key], sat[method, budget, "easy"], seed)
        record |= results.facts[method, budget]
        if (own, budget, order) in able:
            record |= evaluation.shortfall(points[key], *(
                {name: able[own, budget, o].loc[name]["points"].to_numpy() for name in BOUNDS}
                for o in (order, "easy")), seed)
        records.append(record)
    for name in results.policies:
        for own, budget, order in able:
            if own != comparison.abilities(name):
                continue
            rows, easy = able[own, budget, order], able[own, budget, "easy"]
            best = rows.loc[list(RULES)]["points"].groupby(level="policy").mean().idxmax()
            chosen = {f"{name}_{policy}": policy for policy in BOUNDS}
            if world.method(name).strategy == "rule":  # each stands for itself, but `best_rule`
                chosen = {name: name if name in RULES else best}
            for method, policy in chosen.items():
                key = method, budget, order
                points[key] = rows.loc[policy]["points"].to_numpy()
                records.append(dict(zip(CELL, key, strict=True)) | {
                    "model": labels[name], "policy": policy}
                    | summarize_policy(rows.loc[policy], easy.loc[policy], seed))
    first = records[0]["method"]
    for record in records:
        method, budget, order = (record[name] for name in CELL)
        record |= shared
        if method != first:
            record |= {"difference_from": first} | evaluation.with_interval(
                "difference", [points[method, budget, order], points[first, budget, order]],
                lambda x, y: x - y, seed)
    return pd.DataFrame(records)


def run_sweep(world: World, sweep: str, methods: Sequence[str], n_exams: int, seed: int = 0,
              pool: Sequence[Problem] | None = None, engine: EngineConfig = Comparison.engine,
              workers: int | None = None) -> pd.DataFrame:
    """All settings of a sweep, each with its papers and its log folder: `make_records` with
    three more columns, sweep, x (the setting) and tiers. The more `problems`, the more budget."""
    top, tables = max(world.budgets), []
    sweeps = {  # (x, tiers of a paper, budgets, temperature) of each setting
        "problems": [(n, TIERS_IN_TURN[:n], tuple(round(top * n * share) for share in PER_PROBLEM),
                      1.0) for n in (2, 4, 5, 6)],
        "mix": [("-".join(mix), mix, world.budgets, 1.0) for mix in MIXES],
        "temperature": [(t, TIERS, world.budgets, t) for t in (0.0, 0.5, 0.8, 1.0, 1.2)]}
    check_choice("sweep", sweep, sweeps)
    for i, (x, tiers, budgets, temperature) in enumerate(sweeps[sweep]):
        papers = draw_papers(world, n_exams, seed=seed, pool=pool, tiers=tiers)
        here = replace(engine, log=engine.log / f"{sweep}-{i}") if engine.log else engine
        comparison = Comparison(world, papers, seed, temperature, engine=here)
        records = make_records(comparison, run_methods(comparison, methods, budgets, workers))
        tables.append(records.assign(sweep=sweep, tiers="-".join(tiers), x=x))
    return pd.concat(tables, ignore_index=True).round(6)


def with_brackets(records: pd.DataFrame, name: str, form: str = ".3f") -> list[str]:
    """A number of each record with its interval, as text; "--" where there is none."""
    return ["--" if np.isnan(value) else f"{value:{form}} --" if np.isnan(low) else
            f"{value:{form}} [{low:{form}},{high:{form}}]"
            for value, low, high in records[[name, f"{name}_low", f"{name}_high"]].to_numpy(float)]


def show_order(records: pd.DataFrame, order: str = "hard") -> str:
    """One order as text: a row a method; Score, Regret and tokens, budgets side by side, and where
    any exam has no response, how many."""
    parts = {f"{budget} tokens": pd.DataFrame({
        "Score": with_brackets(own, "score"), "Regret": own["regret"].map("{:.3f}".format),
        "tokens": own["tokens"].map("{:.1f}".format).replace("nan", "--")} | (
            {"missing": own["failed"]} if records["failed"].any() else {})).set_axis(own["method"])
        for budget, own in records[records["order"] == order].groupby("budget", sort=False)}
    text = pd.concat(parts, axis=1).rename_axis(None).to_string()
    return "\n".join(line.rstrip() for line in text.splitlines())


def show_details(records: pd.DataFrame) -> str:
    """All records as text: Scores and Regrets; accuracy by position; what is lost to whom; how the
    methods differ from the first one. Every number with its 95 % interval."""
    positions = [c for c in records.columns if c.removeprefix("accuracy_").isdigit()]
    losses, texts = ["optimality_gap", "lost_to_order", "lost_to_allocation"], []
    for names in (["score", "regret"], positions, losses, ["difference"]):
        if set(names) <= set(records):
            rows = records.dropna(subset=names)
            block = rows[CELL].assign(**{name: with_brackets(rows, name) for name in names})
            texts.append(block.to_string(index=False))
    return "\n\n".join(texts)


def save_comparison(folder: Path, comparison: Comparison, results: Results, records: pd.DataFrame,
                    split: str = "test", traced: int = TRACED) -> None:
    """Write the folder in one piece; an earlier one is replaced only at the very end."""
    def fill(temporary: Path) -> None:
        own = is_generated(comparison.world)
        papers = make_paper_list(comparison.world, comparison.papers, split, comparison.seed)
        write_json(temporary / "papers.json", asdict(papers))
        write_csv(temporary / "records.csv", records.round(6))
        tables = dict(iter(results.table.drop(columns="problem").groupby("method", sort=False))
                      ) if len(results.table) else {}
        for name, some in results.outcomes.items():
            shape = some.cost.shape
            words = {column: np.broadcast_to(getattr(some, column)[..., None, None], shape).ravel()
                     for column in ("statement", "tier")}
            tables[f"{name}-outcomes"] = pd.DataFrame(
                {"cost": some.cost.ravel(), "correct": some.correct.ravel(), **words,
                 "skip": some.skip},
                pd.MultiIndex.from_product(map(range, shape), names=ATTEMPT)).reset_index()
        if len(results.bounds):
            tables["bounds"] = results.bounds[["points"]].astype(np.float32).round(3).reset_index()
        for name, table in tables.items():
            if "ids" in table:
                first = (table["exam"] < traced) & (table["position"] == 1) & own
                table = table.assign(ids=table["ids"].where(first)).drop(columns="method")
            table.to_parquet(temporary / f"{name}.parquet", index=False, compression="zstd")

    write_folder(folder, fill)


def load_rollouts(folder: Path, method: str) -> pd.DataFrame:
    """`sitting`'s table of one method, all budgets and orders; `ids` of the first papers alone, in
    the row of position 1. `ValueError`: it is not there, or the folder is not whole."""
    verify_folder(folder)
    known = {path.stem: path for path in sorted(folder.glob("*.parquet"))}
    if method not in known:
        raise ValueError(f"{folder} holds no {method!r}; it has {', '.join(known)}")
    return pd.read_parquet(known[method])


def load_bounds(folder: Path) -> pd.DataFrame:
    """Points of exact policies and rules, by (abilities, policy, budget, order, exam)."""
    return load_rollouts(folder, "bounds").set_index(
        ["abilities", "policy", "budget", "order", "exam"]).sort_index()


def load_outcomes(folder: Path, abilities: str) -> Outcomes:
    """The attempts that bounds and rules with these abilities, a method's, follow from."""
    rows = load_rollouts(folder, f"{abilities}-outcomes")
    shape = tuple(rows[ATTEMPT].max() + 1)
    cost, correct, statement, tier = (rows[name].to_numpy().reshape(shape)
                                      for name in ("cost", "correct", "statement", "tier"))
    words = (x[..., 0, 0].astype(str) for x in (statement, tier))
    return Outcomes(cost, correct, *words, int(rows["skip"].iloc[0]))
