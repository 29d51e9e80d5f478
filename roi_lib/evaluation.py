"""Evaluation: Score and Regret with intervals, shares of a table, and what is lost to whom.

    score_and_regret, summarize              the numbers of one order under one budget
    paired_difference                        two methods on the same papers
    rates                                    whatever is a share: of skips, right answers, tags
    shortfall                                what a method leaves behind, beside the rational one

`Score` is the mean number of problems solved an exam; `Regret` is (Score_easy - Score) / Score_easy
(paper, evaluation metrics). Beside the rational test-taker, whose Score is V*(order):

    lost to order        V*(easy) - V*(order)   no policy could have avoided it
    lost to allocation   V*(order) - Score      better allocation would have saved it

The optimality gap is the second as a share, 1 - Score / V*(order), of the exact policy that knows
of a problem what its statement gives away. Intervals are 95 % percentile intervals of a
bootstrap over papers, with the same resamples for whatever is compared; a number NAME comes with
NAME_low and NAME_high (NaN: one exam has no interval). Notebook 06."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np
import pandas as pd

from roi_lib.sitting import points, responses
from roi_lib.worlds import TIERS

BOOTSTRAP_RESAMPLES = 2_000


@lru_cache(maxsize=2)
def resample_counts(n: int, seed: int) -> np.ndarray:
    """How often each of `n` exams is drawn, [resamples, n]."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n, np.full(n, 1 / n), BOOTSTRAP_RESAMPLES).astype(float)


def paired_interval(columns: Sequence[np.ndarray], statistic: Callable,
                    seed: int = 0) -> tuple[float, float]:
    """95 % interval of a statistic of the means of columns that hold one number an exam.

    All columns share each resample, so differences and ratios of columns are paired. (NaN, NaN)
    for a single exam, which has none, and where a resample makes the statistic infinite.
    `ValueError`: one column has more papers than another."""
    if len(set(map(len, columns))) > 1:
        raise ValueError("a paired comparison needs the same papers, not "
                         + " and ".join(str(len(column)) for column in columns))
    n = len(columns[0])
    if n < 2:
        return np.nan, np.nan
    means = resample_counts(n, seed) @ np.stack(columns, axis=1) / n
    with np.errstate(divide="ignore", invalid="ignore"):
        samples = statistic(*means.T)
    if not np.isfinite(samples).all():
        return np.nan, np.nan
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


def with_interval(name: str, columns: Sequence[np.ndarray], statistic: Callable,
                  seed: int = 0) -> dict[str, float]:
    """NAME, NAME_low and NAME_high of a statistic of the columns' means. An exam that is NaN in one
    column, for lack of a response, counts in none."""
    there = ~np.isnan(np.stack(columns)).any(0)
    if not there.any():
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"), np.nan)
    columns = [np.asarray(column)[there] for column in columns]
    low, high = paired_interval(columns, statistic, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(*(np.mean(column) for column in columns)))
    return {name: value if np.isfinite(value) else np.nan,
            f"{name}_low": low, f"{name}_high": high}


def paired_difference(a: np.ndarray, b: np.ndarray, seed: int = 0) -> tuple[float, tuple]:
    """Mean of a - b, points of the same papers in the same sequence, and its interval."""
    return float(np.mean(a) - np.mean(b)), paired_interval([a, b], lambda x, y: x - y, seed)


def score_and_regret(points: np.ndarray, easy: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Score and Regret with intervals, from the points of the same papers in two orders."""
    return (with_interval("score", [points], lambda x: x, seed)
            | {"score_easy": float(pd.Series(easy).mean())}
            | with_interval("regret", [points, easy], lambda x, e: (e - x) / e, seed))


def rates(table: pd.DataFrame) -> dict[str, float]:
    """Shares of the problems of `sitting`'s table; NaN where there is nothing to count.

    skip_rate, skip_easy ...      skipped, of all and of a tier
    accuracy                      right, of the answers given
    tried_right                   right, of the problems tried (reached, not skipped)
    tag_accuracy, tag_easy ...    tag at the real level, of the problems tried, and of a tier's
    tags_right                    the same of all tags
    level_accuracy                of the tags of problems that the budget did not cut, which have a
                                  real cost; answers_tagged_right, skips_tagged_right: its parts"""
    tier, skipped, correct = table["tier"], table["skipped"], table["correct"]
    given, tagged = table["answer"].notna(), table["predicted"] >= 0
    tried, hit = table["reached"] & ~skipped, table["predicted"] == table["real"]
    shares = {
        "skip_rate": skipped,
        **{f"skip_{name}": skipped[tier == name] for name in TIERS},
        "accuracy": correct[given & ~skipped],
        "tried_right": correct[tried],
        "tag_accuracy": hit[tried],
        **{f"tag_{name}": hit[tried & (tier == name)] for name in TIERS},
        "tags_right": hit[tagged],
        "level_accuracy": hit[tagged & given],
        "answers_tagged_right": hit[tagged & given & ~skipped],
        "skips_tagged_right": hit[tagged & skipped],
    }
    return {name: float(values.mean()) if len(values) else np.nan
            for name, values in shares.items()}


def confusion(table: pd.DataFrame, levels: int = 4) -> np.ndarray:
    """Counts [predicted level, real level]; problems without a tag are left out."""
    given = table[table["predicted"] >= 0]
    flat = np.bincount(given["predicted"] * levels + given["real"], minlength=levels * levels)
    return flat.reshape(levels, levels)


def by_position(frame: pd.DataFrame, seed: int = 0) -> dict[str, float]:
    """Accuracy with its interval, and mean tokens, at each position; `frame` has a row an exam and
    the columns accuracy_1 ... and tokens_1 ... (see `per_exam`)."""
    numbers: dict[str, float] = {}
    for name in frame.columns[frame.columns.str.startswith("accuracy_")]:
        numbers |= with_interval(name, [frame[name].to_numpy(float)], lambda x: x, seed)
    return numbers | {name: float(frame[name].mean())
                      for name in frame.columns[frame.columns.str.startswith("tokens_")]}


def per_exam(table: pd.DataFrame) -> pd.DataFrame:
    """A row an exam: points, and by position accuracy_1 ... and tokens_1 ...; one rollout each."""
    wide = table.pivot(index="exam", columns="position", values=["correct", "cost"])
    wide.columns = [f"{'accuracy' if name == 'correct' else 'tokens'}_{position}"
                    for name, position in wide.columns]
    wide = wide.astype(float)
    return wide.assign(points=wide.filter(like="accuracy_").sum(axis=1))


def summarize(table: pd.DataFrame, easy: pd.DataFrame, seed: int = 0) -> dict[str, float]:
    """The numbers of one order under one budget: `table` in that order, one rollout an exam, and
    the same papers in the same sequence in the `easy` order (else a `ValueError`)."""
    papers = [t.groupby("exam")["problem"].agg(frozenset) for t in (table, easy)]
    if not papers[0].equals(papers[1]):
        raise ValueError("regret compares orders of the same papers, and these papers differ")
    there, whole = table[table["failed"] == ""], responses(table)
    frame, shares = per_exam(there), rates(there)
    return score_and_regret(points(table), points(easy), seed) | by_position(frame, seed) | {
        "tokens": float(responses(there)["tokens"].mean()),
        "skip_rate": shares["skip_rate"], "tags_right": shares["tags_right"],
        "over_budget": int((whole["tokens"] > whole["budget"]).sum()),
        "overrun_cut": int((whole["overrun"] > 0).sum()),
        "failed": int((whole["failed"] != "").sum()),
    }


def shortfall(points: np.ndarray, bound: Mapping[str, np.ndarray],
              easy: Mapping[str, np.ndarray], seed: int = 0) -> dict[str, float]:
    """What a method leaves behind, beside V*, what the exact policy by statement earns with the
    method's own abilities: `points`, one number a paper, `bound` of `rational.BOUNDS` of the same
    cell, and of the same papers in the easy order."""
    columns = [points, bound["statement"], easy["statement"]]
    return {f"bound_{name}": float(np.mean(values)) for name, values in bound.items()
            } | with_interval(
        "optimality_gap", columns, lambda x, v, e: 1 - x / v, seed) | with_interval(
        "lost_to_order", columns, lambda x, v, e: e - v, seed) | with_interval(
        "lost_to_allocation", columns, lambda x, v, e: v - x, seed)
