"""Why does nothing move? The known causes of "reward 0, loss 0, no progress", read off a log.

On policy the *value* of the loss says nothing, and is not even logged. Other columns (see
`training.rarl.COLUMNS`) say what is wrong: the means of the first and the last rows are compared.
Thresholds are rules of thumb for groups of 8 to 32."""

from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from roi_lib.store.files import read_csv
from roi_lib.training.rarl import COLUMNS, LARGEST_GAP

#: One cause that fits a log: its name, the number that shows it, and what to try.
Finding = namedtuple("Finding", "cause evidence remedy")
WINDOW = 12  # rows at each end, at most: two or three budgets in turn weigh the same at both


def diagnose(log: Path) -> list[Finding]:
    """The known causes that fit a training log, the more fundamental first; `ValueError` where it
    is none, or has no row. NaN, for which no comparison holds, is what was not measured."""
    rows = read_csv(log, COLUMNS)
    if rows.empty:
        raise ValueError(f"{log} has no step yet; let the training do a few")
    rows = rows[list(COLUMNS)]
    if words := list(rows.select_dtypes(exclude="number")):
        raise ValueError(f"{log} holds a field that is no number, in column {words[0]!r}; restore "
                         "it, or run the training again")
    width = max(1, min(WINDOW, len(rows) // 2))
    first, last, largest = rows[:width].mean(), rows[-width:].mean(), rows.max()
    reward = f"reward {last.reward:.2f}"
    level = ("no answer with a level tag" if np.isnan(last.level_accuracy)
             else f"level_accuracy {last.level_accuracy:.2f}")
    checks = [
        (largest.logprob_gap > LARGEST_GAP, "sampler out of step",
         f"logprob_gap reached {largest.logprob_gap:.3f} nats a token, above {LARGEST_GAP}",
         "give the sampler the trainer's weights after every update, and the same temperature and "
         "precision"),
        (first.accuracy - last.accuracy > 0.1 and last.score < first.score, "rate too high",
         f"accuracy fell from {first.accuracy:.2f} to {last.accuracy:.2f} and score from "
         f"{first.score:.2f} to {last.score:.2f} (largest grad_norm {largest.grad_norm:.2f})",
         "a learning rate 3 to 10 times lower, from the start checkpoint: what is lost does not "
         "come back"),
        (first.skip_hard > 0.05 and last.skip_hard < 0.01, "skipping died out",
         f"skip_hard fell from {first.skip_hard:.2f} to {last.skip_hard:.3f}",
         "a lower learning rate, more rollouts an exam, more exams in the hard order"),
        (last.cut > 0.95 and last.reward < 0.1, "all truncated",
         f"cut {last.cut:.2f} with {reward}",
         "a larger budget or shorter answers (MFT on the shortest ones); check that the "
         "end-of-sequence id is the tokenizer's"),
        (not last.level_accuracy >= 0.2, "level never right",  # a guess has 0.25; NaN: not one tag
         f"{level}, with score {last.score:.2f} and {reward}",
         "start from an MFT checkpoint, with the prompting style that it was trained on; check the "
         "level edges against the costs, tag included"),
        (last.skip_small - last.skip_large < 0.1 and not last.level_large - last.level_small >= 0.2,
         "budgets not told apart", "one rule for all: " + ", ".join(
             f"{name} {last[name]:.2f}" for name in (
                 "skip_small", "skip_large", "level_small", "level_large")),
         "draw a budget for each exam (budget_for exam), and start from an MFT whose rows were "
         "chosen under their budgets (combinations); state the budget last, as one number"),
        (last.level_entropy < 0.01, "no choice left",
         f"level_entropy {last.level_entropy:.3f} nats", "an earlier checkpoint, a lower rate"),
        (last.no_spread > 0.9, "no spread", f"no_spread {last.no_spread:.2f} with {reward}",
         "more rollouts an exam; exams that the model solves now and then; temperature 1")]
    return [Finding(*words) for fits, *words in checks if fits]


def report(found: Sequence[Finding]) -> str:
    """Findings as text, the more fundamental first."""
    return "\n".join(f"{f.cause}: {f.evidence}\n    try: {f.remedy}" for f in found) or (
        "no known cause fits: nothing in this log looks wrong")
