"""Each cause of a failed run is found in a log that shows it, and none in a healthy one."""

import csv

import pytest

from roi_lib.__main__ import main
from roi_lib.diagnosis import CHECKS, diagnose
from roi_lib.rarl_loop import COLUMNS

STEPS = 40
HEALTHY = {"budget": 64, "reward": (0.6, 1.1), "score": (0.7, 1.15), "skip_easy": 0.0,
           "skip_medium": (0.0, 0.02), "skip_hard": (0.2, 0.9), "level_accuracy": (0.7, 0.95),
           "accuracy": (0.93, 0.95), "tokens": (63, 55), "cut": (0.9, 0.4),
           "no_spread": (0.2, 0.5), "grad_norm": (0.03, 0.02), "entropy": (0.2, 0.1),
           "logprob_gap": 1e-6}


def log(path, rows=STEPS, **changes):
    """A log whose columns reach a second value half-way, or stay, or stay empty (None)."""
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        for i in range(rows):
            row = {"step": i + 1, "seconds": 2.0 * i}
            for name, value in (HEALTHY | changes).items():
                start, end = value if isinstance(value, tuple) else (value, value)
                row[name] = "" if value is None else start + (end - start) * min(1, 2 * i / rows)
            writer.writerow(row)
    return path


def test_a_healthy_run_has_no_findings(tmp_path):
    assert diagnose(log(tmp_path / "log.csv")) == []
    assert diagnose(log(tmp_path / "one.csv", rows=1)) == []


@pytest.mark.parametrize(("cause", "number", "changes"), [
    ("no spread", "no_spread 1.00", {"no_spread": 1.0, "entropy": None, "grad_norm": 0.0}),
    ("all truncated", "cut 1.00 with reward 0.00", {"cut": 1.0, "reward": 0.0, "score": 0.01}),
    ("level never right", "level_accuracy 0.05", {"level_accuracy": 0.05, "reward": 0.1}),
    ("level never right", "no answer with a level tag", {"level_accuracy": None, "reward": 0.0}),
    ("skipping died out", "from 0.18 to 0.000", {"skip_hard": (0.25, 0.0)}),
    ("rate too high", "fell from 0.9", {"accuracy": (0.97, 0.7), "score": (0.9, 0.6),
                                               "grad_norm": (0.03, 0.8)}),
    ("sampler out of step", "0.080 nats", {"logprob_gap": (1e-6, 0.08)}),
])
def test_each_cause_is_named_with_its_number(tmp_path, cause, number, changes):
    found = diagnose(log(tmp_path / "log.csv", **changes))
    assert [f.cause for f in found] == [cause]
    assert number in found[0].evidence and found[0].remedy


def test_the_collapse_of_a_high_rate_shows_in_two_findings(tmp_path):
    found = diagnose(log(tmp_path / "log.csv", accuracy=(0.97, 0.78), score=(0.9, 0.7),
                         skip_hard=(0.2, 0.0)))
    assert [f.cause for f in found] == ["rate too high", "skipping died out"]


def test_the_sampler_is_measured_only_now_and_then(tmp_path):
    assert diagnose(log(tmp_path / "log.csv", logprob_gap=None)) == []


def test_bad_logs_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        diagnose(tmp_path / "none.csv")
    (tmp_path / "other.csv").write_text("step,loss\n1,2\n")
    with pytest.raises(ValueError, match="no log of RARL: it has no column 'budget'"):
        diagnose(tmp_path / "other.csv")
    path = log(tmp_path / "bad.csv")
    path.write_text(path.read_text().replace(",64.0,", ",many,", 1))
    with pytest.raises(ValueError, match="holds a field that is no number"):
        diagnose(path)
    with pytest.raises(ValueError, match="no step yet"):
        diagnose(log(tmp_path / "empty.csv", rows=0))
    assert len({check.__name__ for check in CHECKS}) == 6


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    main(["diagnose", str(log(tmp_path / "good.csv"))])
    assert capsys.readouterr().out == "no known cause fits: nothing in this log looks wrong\n"
    main(["diagnose", str(log(tmp_path / "bad.csv", level_accuracy=None, reward=0.0, no_spread=1))])
    out = capsys.readouterr().out
    assert out.startswith("level never right: no answer with a level tag, with score")
    assert "\nno spread: no_spread 1.00 with reward 0.00\n    try: more rollouts" in out
    with pytest.raises(SystemExit):
        main(["diagnose", str(tmp_path / "none.csv")])
    assert "none.csv" in capsys.readouterr().err
