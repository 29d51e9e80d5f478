"""Why does nothing move? The known causes of "reward 0, loss 0, no progress", read off a log.

On policy the *value* of the loss says nothing (it is 0 where all responses are equally long), so
it is not even logged. These columns say what is wrong (see `rarl_loop.COLUMNS`):

    cause                 seen in
    sampler out of step   logprob_gap: the rollouts are those of another policy
    rate too high         accuracy: what the model could do at the beginning it can no longer
    skipping died out     skip_hard: it was there at the beginning, and is gone
    all truncated         cut: the budget ends nearly every response, before its first point
    level never right     level_accuracy: tags are missing or wrong, so right answers earn nothing
    no spread             no_spread: groups whose rollouts all earned the same have no advantage

The first rows of a log are compared with its last ones. Thresholds are rules of thumb for groups
of 8 to 32 rollouts.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from roi_lib.rarl_loop import COLUMNS, LARGEST_GAP

#: Rows at each end of the log, at most; never more than half of it. Two or three budgets in turn
#: weigh the same at both ends.
WINDOW = 12
#: Answers given may be right this much less often than at first; a good run keeps its accuracy.
COLLAPSE = 0.1
#: Skipping has died out when its share was above the first number and fell below the second.
SKIPPED_ONCE, SKIPS_NO_MORE = 0.05, 0.01
#: The budget ends all when this share is cut and hardly any reward is left.
ALL_CUT, HARDLY_ANY_REWARD = 0.95, 0.1
#: Levels are "never right" below this; guessing among four gives 0.25.
LEVEL_NEVER = 0.2
#: Share of groups without spread above which a step teaches next to nothing.
NO_SPREAD = 0.9


@dataclass(frozen=True)
class Finding:
    """One cause that fits a log.

    Attributes:
        cause: its name, as in the table above.
        evidence: the number that shows it.
        remedy: what to try.
    """

    cause: str
    evidence: str
    remedy: str


class Curves:
    """The columns of a log at its two ends; NaN, which no comparison holds for, if not measured."""

    def __init__(self, rows: Sequence[dict[str, str]]) -> None:
        self.columns = {name: [float(row[name] or "nan") for row in rows] for name in COLUMNS}
        self.width = max(1, min(WINDOW, len(rows) // 2))

    def first(self, column: str) -> float:
        """Mean of the first rows."""
        return known_mean(self.columns[column][: self.width])

    def last(self, column: str) -> float:
        """Mean of the last rows."""
        return known_mean(self.columns[column][-self.width :])

    def largest(self, column: str) -> float:
        """The largest number of the whole log."""
        return max((v for v in self.columns[column] if not math.isnan(v)), default=math.nan)


def known_mean(values: Sequence[float]) -> float:
    """The mean of what was measured; NaN where nothing was."""
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan


def sampler_out_of_step(c: Curves) -> Finding | None:
    """The rollouts are another policy's than the one that is updated (FAULTS F26, F27)."""
    if c.largest("logprob_gap") > LARGEST_GAP:
        return Finding(
            "sampler out of step", f"logprob_gap reached {c.largest('logprob_gap'):.3f} nats a "
            f"token, above {LARGEST_GAP}",
            "give the sampler the trainer's weights after every update, and the same temperature "
            "and precision")
    return None


def rate_too_high(c: Curves) -> Finding | None:
    """The policy forgets how to calculate: its answers are less often right, and it shows."""
    fallen = c.first("accuracy") - c.last("accuracy")
    if fallen > COLLAPSE and c.last("score") < c.first("score"):
        return Finding(
            "rate too high", f"accuracy fell from {c.first('accuracy'):.2f} to "
            f"{c.last('accuracy'):.2f} and score from {c.first('score'):.2f} to "
            f"{c.last('score'):.2f} (largest grad_norm {c.largest('grad_norm'):.2f})",
            "a learning rate 3 to 10 times lower, from the start checkpoint: what is lost does "
            "not come back")
    return None


def skipping_died_out(c: Curves) -> Finding | None:
    """A skip earns nothing by itself; lose the habit early, and there is nothing to reinforce."""
    if c.first("skip_hard") > SKIPPED_ONCE and c.last("skip_hard") < SKIPS_NO_MORE:
        return Finding(
            "skipping died out", f"skip_hard fell from {c.first('skip_hard'):.2f} to "
            f"{c.last('skip_hard'):.3f}",
            "a lower learning rate, more rollouts an exam, more exams in the hard order")
    return None


def all_truncated(c: Curves) -> Finding | None:
    """The budget ends every response before it has earned anything (FAULTS F23)."""
    if c.last("cut") > ALL_CUT and c.last("reward") < HARDLY_ANY_REWARD:
        return Finding(
            "all truncated", f"cut {c.last('cut'):.2f} with reward {c.last('reward'):.2f}",
            "a larger budget or shorter answers (MFT on the shortest ones); check that the "
            "end-of-sequence id is the tokenizer's")
    return None


def level_never_right(c: Curves) -> Finding | None:
    """The reward asks for the level, too, and there is none or it is wrong."""
    accuracy = c.last("level_accuracy")
    if not accuracy >= LEVEL_NEVER:  # NaN: not one tag
        shown = ("no answer with a level tag" if math.isnan(accuracy)
                 else f"level_accuracy {accuracy:.2f}")
        return Finding(
            "level never right", f"{shown}, with score {c.last('score'):.2f} and reward "
            f"{c.last('reward'):.2f}",
            "start from an MFT checkpoint, with the prompting style that it was trained on; check "
            "the level edges against the costs, tag included")
    return None


def no_spread(c: Curves) -> Finding | None:
    """All rollouts of nearly every group earn the same: no advantage, no gradient (FAULTS F22)."""
    if c.last("no_spread") > NO_SPREAD:
        return Finding(
            "no spread", f"no_spread {c.last('no_spread'):.2f} with reward "
            f"{c.last('reward'):.2f}",
            "more rollouts an exam; exams that the model solves now and then; temperature 1")
    return None


#: The more fundamental first: one that comes earlier often explains those that follow.
CHECKS = (sampler_out_of_step, rate_too_high, skipping_died_out, all_truncated, level_never_right,
          no_spread)


def diagnose(log: Path) -> list[Finding]:
    """The known causes that fit a training log (CSV with `rarl_loop.COLUMNS`); empty: healthy.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no log of RARL, holds a field that is no number, or has no row yet.
    """
    with Path(log).open(newline="") as stream:
        reader = csv.DictReader(stream)
        rows = list(reader)
    missing = [c for c in COLUMNS if c not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(f"{log} is no log of RARL: it has no column {missing[0]!r}")
    if not rows:
        raise ValueError(f"{log} has no step yet; let the training do a few")
    try:
        curves = Curves(rows)
    except ValueError as error:
        raise ValueError(f"{log} holds a field that is no number ({error}); restore it, or run "
                         "the training again") from error
    return [finding for check in CHECKS if (finding := check(curves))]


def report(findings: Sequence[Finding]) -> str:
    """Findings as text, the more fundamental first."""
    if not findings:
        return "no known cause fits: nothing in this log looks wrong"
    return "\n".join(f"{f.cause}: {f.evidence}\n    try: {f.remedy}" for f in findings)
