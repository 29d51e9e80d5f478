"""The main table: records of a comparison, how they are shown, and the rollouts behind them.

A folder of `exam --save` holds papers.json (`store.papers`), records.csv (`make_records`), tables
of `sitting` as METHOD.parquet (token ids of the first papers only), and of exact policies and rules
bounds.parquet (points of `rational.bounds`, to three digits) and METHOD-outcomes.parquet (a row an
attempt)."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from roi_lib import evaluation
from roi_lib.experiments.methods import Comparison, Results
from roi_lib.rational import BOUNDS, Outcomes
from roi_lib.sitting import points as problems_solved
from roi_lib.store.checkpoints import model_label
from roi_lib.store.files import verify_folder, write_csv, write_folder, write_json
from roi_lib.store.papers import make_paper_list
from roi_lib.worlds import RULES

TRACED = 100  # papers whose responses are kept token by token
CELL, CELL_OF_BOUND = ["method", "budget", "order"], ["abilities", "budget", "order"]
ATTEMPT = ["exam", "problem", "effort", "attempt"]
LOSSES = ["optimality_gap", "lost_to_order", "lost_to_allocation"]


def summarize_policy(rows: pd.DataFrame, easy: pd.DataFrame, seed: int = 0) -> dict[str, float]:
    """The numbers of an exact policy or a rule in one cell under `evaluation.summarize`'s names,
    from its rows of `rational.bounds` in that order and in the easy one."""
    numbers = evaluation.score_and_regret(*(x["points"].to_numpy() for x in (rows, easy)), seed)
    known = rows.dropna(axis=1)  # luck knows nothing by position
    return numbers | evaluation.by_position(known, seed) | {
        "tokens": float(rows.filter(like="tokens_").sum(axis=1, min_count=1).mean()),
        "skip_rate": float(rows.filter(like="skipped_").mean().mean()),
        "over_budget": 0, "overrun_cut": 0, "failed": 0}


def policies_of(name: str, strategy: str, rows: pd.DataFrame) -> dict[str, str]:
    """Name of a record -> policy of `rational.bounds`: a rule stands for itself, `best_rule` for
    the best of them in these rows of one cell, `optimal` for the three exact policies."""
    if strategy == "exact":
        return {f"{name}_{policy}": policy for policy in BOUNDS}
    means = rows["points"].groupby(level="policy").mean()
    return {name: name if name in RULES else means[list(RULES)].idxmax()}


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
            chosen = policies_of(name, world.method(name).strategy, rows)
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


def brackets(low: float, high: float, form: str = ".3f") -> str:
    """An interval as text; "--" where there is none."""
    return "--" if np.isnan(low) else f"[{low:{form}},{high:{form}}]"


def with_brackets(records: pd.DataFrame, name: str, form: str = ".3f") -> list[str]:
    """A number of each record with its interval, as text."""
    return ["--" if np.isnan(value) else f"{value:{form}} {brackets(low, high, form)}"
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
    texts = []
    for names in (["score", "regret"], positions, LOSSES, ["difference"]):
        if set(names) <= set(records):
            rows = records.dropna(subset=names)
            block = rows[CELL].assign(**{name: with_brackets(rows, name) for name in names})
            texts.append(block.to_string(index=False))
    return "\n\n".join(texts)


def outcomes_frame(outcomes: Outcomes) -> pd.DataFrame:
    """A row an attempt, by exam, problem, effort and attempt; `load_outcomes` reads it."""
    shape = outcomes.cost.shape
    index = pd.MultiIndex.from_product(map(range, shape), names=ATTEMPT)
    words = {name: np.broadcast_to(getattr(outcomes, name)[..., None, None], shape).ravel()
             for name in ("statement", "tier")}
    return pd.DataFrame({"cost": outcomes.cost.ravel(), "correct": outcomes.correct.ravel(),
                         **words, "skip": outcomes.skip}, index).reset_index()


def save_comparison(folder: Path, comparison: Comparison, results: Results, records: pd.DataFrame,
                    split: str = "test", traced: int = TRACED) -> None:
    """Write the folder in one piece; an earlier one is replaced only at the very end."""
    def fill(temporary: Path) -> None:
        papers = make_paper_list(comparison.world, comparison.papers, split, comparison.seed)
        write_json(temporary / "papers.json", asdict(papers))
        write_csv(temporary / "records.csv", records.round(6))
        tables = dict(iter(results.table.drop(columns="problem").groupby("method", sort=False))
                      ) if len(results.table) else {}
        for name, some in results.outcomes.items():
            tables[f"{name}-outcomes"] = outcomes_frame(some)
        if len(results.bounds):
            tables["bounds"] = results.bounds[["points"]].astype(np.float32).round(3).reset_index()
        for name, table in tables.items():
            if "ids" in table:
                first = (table["exam"] < traced) & (table["position"] == 1)
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
