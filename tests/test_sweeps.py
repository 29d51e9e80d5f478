"""Sweeps: their settings, their rows, and a run that goes on from its logs."""

import json
from dataclasses import replace

import matplotlib
import pytest
from test_cli import run

from roi_lib.plots import sweep_lines, use_style
from roi_lib.runlog import model_hash
from roi_lib.sweeps import COLUMNS, points, read_sweep, run_sweep, write_sweep
from roi_lib.worlds import DATA, PAPER, POCKET, TIERS

matplotlib.use("Agg")
SMALL = replace(POCKET, budgets=(24, 48))


def test_settings():
    (budgets,) = points(POCKET, "budget")
    assert budgets.budgets == (32, 48, 64, 80, 96, 128, 160, 192)
    assert set(POCKET.budgets) < set(budgets.budgets)
    assert set(PAPER.budgets) < set(points(PAPER, "budget")[0].budgets)
    sizes = points(POCKET, "problems")
    assert [len(p.tiers) for p in sizes] == [2, 3, 4, 5, 6]
    assert [p.budgets for p in sizes] == [(85,), (128,), (171,), (213,), (256,)]
    assert all("hard" in p.tiers for p in sizes) and sorted(sizes[1].tiers) == sorted(TIERS)
    assert [p.temperature for p in points(POCKET, "temperature")] == [0, 0.5, 0.8, 1, 1.2]
    assert len({p.x for p in points(POCKET, "mix")}) == 6
    with pytest.raises(ValueError, match="unknown sweep 'weather'; choose from budget"):
        points(POCKET, "weather")


def test_rows_come_back_from_the_file(tmp_path):
    rows = [row for part in run_sweep(SMALL, "problems", ["replay"], 4) for row in part]
    assert len(rows) == 15 and all(tuple(row) == COLUMNS for row in rows)
    assert {row["model_hash"] for row in rows} == {""}, "reference solutions have no model"
    assert [row["x"] for row in rows[::3]] == ["2", "3", "4", "5", "6"]
    assert {row["n_problems"] for row in rows} == {2, 3, 4, 5, 6}
    assert all(row["score_low"] <= row["score"] <= row["score_high"] for row in rows)
    write_sweep(tmp_path / "sweep.csv", rows)
    back = read_sweep(tmp_path / "sweep.csv")
    for name in ("x", "order", "score", "n_exams", "regret"):
        assert [row[name] for row in back] == [row[name] for row in rows]
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="is not a sweep"):
        read_sweep(tmp_path / "other.csv")


def test_the_command_with_the_rational_bound(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("roi_lib.worlds").worlds.WORLDS, "pocket", SMALL)
    out, log = tmp_path / "sweep.csv", tmp_path / "logs"
    command = ("sweep", "budget", "--methods", "base,optimal", "--exams", 2, "--progress", 0,
               "--log", log)
    status, printed, _ = run(capsys, *command, "--out", out)
    rows = read_sweep(out)
    assert status == 0 and "wrote" in printed and len(rows) == 8 * 3 * 3
    assert {row["budget"] for row in rows} == {12, 18, 24, 30, 36, 48, 60, 72}
    base = [row for row in rows if row["method"] == "base"]
    best = [row for row in rows if row["method"] == "optimal"]
    assert [row["rational"] for row in base] == [row["rational"] for row in best] == [
        row["score"] for row in best]
    assert all(len(row["model_hash"]) == 12 for row in rows)
    first = out.read_text()
    status, printed, _ = run(capsys, *command, "--out", out, "--engine", "replay")
    assert status == 0 and out.read_text() == first, "the logs hold all of it"
    status, _, error = run(capsys, "sweep", "weather", "--out", out)
    assert status == 2 and "unknown sweep" in error and out.read_text() == first


def test_the_plot_draws_numbers_and_words():
    use_style()
    for sweep, budget in (("problems", None), ("mix", 48)):
        rows = [row for part in run_sweep(SMALL, sweep, ["replay"], 3) for row in part]
        best = [row | {"method": "optimal", "rational_plug_in": row["score"]} for row in rows]
        figure = sweep_lines(rows + best, "setting", budget=budget)
        figure.canvas.draw()
        hard = [row["score"] for row in rows if row["order"] == "hard"
                and row["budget"] == (budget or row["budget"])]
        assert figure.axes[1].get_title(loc="left") == "hard order" and len(figure.axes) == 2
        lines = [line.get_ydata().tolist() for line in figure.axes[1].lines]
        assert hard in lines


@pytest.mark.parametrize("path", [*sorted(DATA.glob("sweep-*.csv")),
                                  DATA / "main-table" / "records.json"], ids=lambda p: p.stem)
def test_shipped_tables_are_of_the_shipped_models(path):
    """A checkpoint that changes wants its tables made again."""
    rows = json.loads(path.read_text()) if path.suffix == ".json" else read_sweep(path)
    assert len({row["method"] for row in rows}) > 3
    for row in rows:
        checkpoint = POCKET.method(row["method"].removesuffix("_tagged")).checkpoint
        assert row["model_hash"] == model_hash(checkpoint)[:12], f"{path}: {row['method']}"
