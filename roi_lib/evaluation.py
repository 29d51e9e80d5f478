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


def with_interval(name: str, columns: Sequence[np.ndarray], statistic: Callable,
                  seed: int = 0) -> dict[str, float]:
    """NAME, NAME_low and NAME_high of a statistic of the means of columns with one number an exam.

    All columns share each resample, so differences and ratios of columns are paired. An exam that
    is NaN in one column, for lack of a response, counts in none. NaN: no exam is left; of the
    interval also, one exam alone, or a resample makes the statistic infinite. `ValueError`: one
    column has more papers than another."""
    if len(set(map(len, columns))) > 1:
        raise ValueError("a paired comparison needs the same papers, not "
                         + " and ".join(str(len(column)) for column in columns))
    table = np.stack(columns, axis=1).astype(float)
    table = table[~np.isnan(table).any(1)]
    value, samples, n = np.nan, np.nan, len(table)
    with np.errstate(divide="ignore", invalid="ignore"):
        if n:
            value = float(statistic(*map(np.mean, table.T)))
        if n > 1:
            samples = statistic(*(resample_counts(n, seed) @ table / n).T)
    low, high = np.percentile(samples, [2.5, 97.5]) if np.isfinite(samples).all() else (np.nan,) * 2
    return {name: value if np.isfinite(value) else np.nan,
            f"{name}_low": float(low), f"{name}_high": float(high)}


def paired_difference(a: np.ndarray, b: np.ndarray, seed: int = 0) -> tuple[float, tuple]:
    """Mean of a - b, points of the same papers in the same sequence, and its interval."""
    value, *ends = with_interval("", [a, b], lambda x, y: x - y, seed).values()
    return value, tuple(ends)


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


def by_position(frame: pd.DataFrame, seed: int = 0) -> dict[str, float]:
    """Accuracy with its interval, and mean tokens, at each position; `frame` has a row an exam and
    the columns accuracy_1 ... and tokens_1 ... (see `per_exam`)."""
    numbers: dict[str, float] = {}
    for name, right in frame.filter(like="accuracy_").items():
        numbers |= with_interval(name, [right.to_numpy(float)], lambda x: x, seed)
    return numbers | frame.filter(like="tokens_").mean().to_dict()


def per_exam(table: pd.DataFrame) -> pd.DataFrame:
    """A row an exam: points, and by position accuracy_1 ... and tokens_1 ...; one rollout each."""
    wide = table.pivot(index="exam", columns="position", values=["correct", "cost"]).astype(float)
    wide.columns = [f"{'accuracy' if name == 'correct' else 'tokens'}_{position}"
                    for name, position in wide.columns]
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
    return {f"bound_{name}": float(np.mean(values)) for name, values in bound.items()} | (
        with_interval("optimality_gap", columns, lambda x, v, e: 1 - x / v, seed)
        | with_interval("lost_to_order", columns, lambda x, v, e: e - v, seed)
        | with_interval("lost_to_allocation", columns, lambda x, v, e: v - x, seed))
