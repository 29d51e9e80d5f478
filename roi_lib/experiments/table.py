"""The main table: records of a comparison, how they are shown, and the rollouts behind them.

A folder of `exam --save` holds papers.json (`store.papers`), records.csv (`make_records`), tables
of `sitting` as METHOD.parquet (token ids of the first papers only), and of the rational test-taker
bounds.parquet (`rational_bounds`) and outcomes.parquet (a row an attempt)."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from roi_lib import evaluation
from roi_lib.experiments.methods import Comparison, Results
from roi_lib.osmckp import expected_future, expected_reward
from roi_lib.rational import Outcomes, solve_in_order
from roi_lib.sitting import points as problems_solved
from roi_lib.store.checkpoints import model_label
from roi_lib.store.files import verify_folder, write_csv, write_folder, write_json
from roi_lib.store.papers import make_paper_list

TRACED = 300  # papers whose responses are kept token by token
CELL, ATTEMPT = ["method", "budget", "order"], ["exam", "problem", "attempt"]
LOSSES = ["optimality_gap", "lost_to_order", "lost_to_allocation"]


def summarize_bound(bound: pd.DataFrame, easy: pd.DataFrame, seed: int = 0) -> dict[str, float]:
    """The rational test-taker's numbers under `evaluation.summarize`'s names, from the rows of
    `rational.rational_bounds` of one budget; its Score is the achievable side."""
    numbers = evaluation.score_and_regret(bound["achievable"], easy["achievable"], seed)
    for name in ("plug_in", "by_family", "hindsight"):
        numbers |= evaluation.with_interval(name, [bound[name]], lambda x: x, seed)
    return numbers | evaluation.by_position(bound, seed) | {
        "tokens": float(bound.filter(like="tokens_").sum(axis=1).mean()),
        "skip_rate": float(bound.filter(like="skipped_").to_numpy().mean()),
        "over_budget": 0, "overrun_cut": 0, "failed": 0}


def make_records(comparison: Comparison, results: Results) -> pd.DataFrame:
    """One row for each method, budget and order, in the sequence of the results; also what it
    leaves behind where the rational one is there, and how it differs from the first method."""
    world, seed = comparison.world, comparison.seed
    sat, rational = (dict(iter(frame.groupby(CELL, sort=False))) if len(frame) else {}
                     for frame in (results.table, results.bounds))
    cells = [(m, b, o) for m, b in dict.fromkeys((m, b) for m, b, _ in [*sat, *rational])
             for o in comparison.orders]
    points = {key: problems_solved(sat[key]) if key in sat
              else rational[key]["achievable"].to_numpy() for key in cells}
    labels = {m: model_label(comparison.checkpoint(m.removesuffix("_tagged")) or "")
              for m in dict.fromkeys(m for m, _, _ in cells)}
    records = []
    for method, budget, order in cells:
        key, easy = (method, budget, order), (method, budget, "easy")
        record = {"world": world.name, "method": method, "model": labels[method], "order": order,
                  "budget": budget, "n_exams": len(comparison.papers),
                  "n_problems": len(comparison.papers[0]), "seed": seed,
                  "temperature": comparison.temperature}
        if key in rational:
            record |= summarize_bound(rational[key], rational[easy], seed)
        else:
            record |= evaluation.summarize(sat[key], sat[easy], seed)
            record |= results.facts[method, budget]
            name = "rational_tagged" if world.method(method).tagged else "rational"
            if (name, budget, order) in rational:
                record |= evaluation.shortfall(points[key], rational[name, budget, order],
                                               rational[name, budget, "easy"], seed)
        if method != cells[0][0]:
            record |= {"difference_from": cells[0][0]} | evaluation.with_interval(
                "difference", [points[key], points[cells[0][0], budget, order]],
                lambda x, y: x - y, seed)
        records.append(record)
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
        "tokens": own["tokens"].map("{:.1f}".format)} | (
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


def decision_losses(outcomes: Outcomes, place: np.ndarray, budget: int) -> np.ndarray:
    """What it costs in points to skip and to try, [papers, problems, budget + 1, 2].

    The last but one axis is the tokens left. A loss is V_i(b) - Q_i(action, b), for a test-taker
    who goes by all attempts: 0 for the better action. The losses of an exam's decisions add up, in
    expectation, to V* - Score (the performance-difference lemma; Kakade and Langford, 2002)."""
    every, losses = np.ones(outcomes.cost.shape[2], bool), []
    for solution in solve_in_order(outcomes.classes(every), place, budget):
        value = solution.value_function
        losses.append([value[i] - expected_reward(some, budget)
                       - expected_future(some, value[i + 1])
                       for i, some in enumerate(solution.instance.classes)])
    return np.moveaxis(np.array(losses), 2, 3)


def save_comparison(folder: Path, comparison: Comparison, results: Results, records: pd.DataFrame,
                    split: str = "test", traced: int = TRACED) -> None:
    """Write the folder in one piece; an earlier one is replaced only at the very end."""
    def fill(temporary: Path) -> None:
        papers = make_paper_list(comparison.world, comparison.papers, split, comparison.seed)
        write_json(temporary / "papers.json", asdict(papers))
        write_csv(temporary / "records.csv", records.round(6))
        tables = dict(iter(results.table.drop(columns="problem").groupby("method", sort=False)))
        if results.outcomes:
            shape = results.outcomes.cost.shape
            tables |= {"bounds": results.bounds.reset_index(), "outcomes": pd.DataFrame({
                "family": results.outcomes.family.repeat(shape[2]),
                "cost": results.outcomes.cost.ravel(), "correct": results.outcomes.correct.ravel(),
                "skip": results.outcomes.skip, "tag": results.outcomes.tag},
                pd.MultiIndex.from_product(map(range, shape), names=ATTEMPT)).reset_index()}
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
    """The rational test-taker, indexed by (method, budget, order, exam)."""
    return load_rollouts(folder, "bounds").set_index([*CELL, "exam"]).sort_index()


def load_outcomes(folder: Path) -> Outcomes:
    """The attempts that the bounds follow from, without tags."""
    rows = load_rollouts(folder, "outcomes")
    shape = tuple(rows[ATTEMPT].max() + 1)
    cost, correct, family = (rows[name].to_numpy().reshape(shape)
                             for name in ("cost", "correct", "family"))
    skip, tag = map(int, rows.loc[0, ["skip", "tag"]])
    return Outcomes(cost, correct, family[..., 0].astype(str), skip, tag)
