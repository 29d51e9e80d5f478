"""Each cause of a failed run is found in a log that shows it, and none in a healthy one."""

import numpy as np
import pandas as pd
import pytest

from roi_lib.experiments.diagnosis import diagnose, report
from roi_lib.store.files import DATA
from roi_lib.training.rarl import COLUMNS

HEALTHY = {"step": (1, 40), "budget": 64, "reward": (0.6, 1.1), "score": (0.7, 1.15),
           "skip_easy": 0.0, "skip_medium": (0.0, 0.02), "skip_hard": (0.2, 0.9),
           "skip_small": (0.4, 0.95), "skip_middle": (0.2, 0.4), "skip_large": (0.1, 0.15),
           "level_small": (1.0, 0.4), "level_middle": 1.0, "level_large": (1.0, 1.3),
           "level_accuracy": (0.7, 0.95), "accuracy": (0.93, 0.95), "tokens": (63, 55),
           "cut": (0.9, 0.4), "no_spread": (0.2, 0.5), "grad_norm": (0.03, 0.02),
           "entropy": (0.2, 0.1), "level_entropy": (0.9, 0.3), "logprob_gap": 1e-6,
           "seconds": (2, 80)}


def log(folder, rows=40, **changes):
    """A log whose columns reach a second value half-way, or stay, or stay empty (NaN)."""
    ends = pd.DataFrame(HEALTHY | changes)[list(COLUMNS)].to_numpy(float)
    half = np.minimum(1, 2 * np.arange(rows) / rows)[:, None]
    table = pd.DataFrame(ends[0] + (ends[1] - ends[0]) * half, columns=list(COLUMNS))
    table.to_csv(folder / "log.csv", index=False)
    return folder / "log.csv"


@pytest.mark.parametrize(("causes", "number", "changes"), [
    ("no spread", "no_spread 1.00", {"no_spread": 1.0, "entropy": np.nan, "grad_norm": 0.0}),
    ("all truncated", "cut 1.00 with reward 0.00", {"cut": 1.0, "reward": 0.0, "score": 0.01}),
    ("level never right", "level_accuracy 0.05", {"level_accuracy": 0.05, "reward": 0.1}),
    ("level never right", "no answer with a level tag", {"level_accuracy": np.nan, "reward": 0.0}),
    ("skipping died out", "from 0.18 to 0.000", {"skip_hard": (0.25, 0.0)}),
    ("rate too high", "fell from 0.9", {"accuracy": (0.97, 0.7), "score": (0.9, 0.6)}),
    ("sampler out of step", "0.080 nats", {"logprob_gap": (1e-6, 0.08)}),
    ("budgets not told apart", "skip_large 0.45, level_small 1.00, level_large 1.10",
     {"skip_small": (0.2, 0.5), "skip_large": (0.2, 0.45), "level_small": 1.0,
      "level_large": (1.3, 1.1)}),
    ("budgets not told apart", "level_small nan", {  # everything is skipped
        "skip_small": 1.0, "skip_large": 1.0, "level_small": np.nan, "level_large": np.nan}),
    ("no choice left", "level_entropy 0.004 nats", {"level_entropy": (0.5, 0.004)}),
    ("rate too high, skipping died out", "from 0.1", {  # the collapse of a high rate
        "accuracy": (0.97, 0.78), "score": (0.9, 0.7), "skip_hard": (0.2, 0.0)})])
def test_each_cause_is_named_with_its_number(tmp_path, causes, number, changes):
    found = diagnose(log(tmp_path, **changes))
    assert ", ".join(f.cause for f in found) == causes and number in found[-1].evidence
    assert report(found).startswith(f"{found[0].cause}: {found[0].evidence}\n    try: ")


def test_the_shipped_run_is_a_healthy_one():
    assert diagnose(DATA / "pocket-rarl/log.csv") == []


def test_healthy_logs_have_no_findings_and_bad_ones_are_refused(tmp_path, refusal):
    effort = {"skip_small": 0.0, "skip_large": 0.0, "level_small": 0.8, "level_large": 1.3}
    for healthy in ({}, {"rows": 1}, {"logprob_gap": np.nan}, effort):
        assert diagnose(log(tmp_path, **healthy)) == []
    assert "no known cause fits" in report([])
    path = log(tmp_path)
    whole = path.read_bytes()
    for content, words in ((whole.partition(b"\n")[0] + b"\n", "no step yet"),
                           (b"step,loss\n1,2\n", "it has no column 'budget'"),
                           (whole.replace(b",64.0,", b",many,", 1), "is no number"),
                           (b"", "is no log"), (b"a,b\n1,2,3,4\n5", "is no log"),
                           (b"\xff\xfe\x00", "is no log")):
        path.write_bytes(content)
        assert words in refusal(diagnose, path)
