"""Sweeps: their settings, their rows, and a run that goes on from its logs."""

from dataclasses import replace

import pandas as pd

from roi_lib.engines import EngineConfig
from roi_lib.experiments.sweeps import run_sweep, settings
from roi_lib.worlds import PAPER, POCKET, TIERS

SMALL = replace(POCKET, budgets=(24, 48))


def test_settings(refusal):
    for world in (POCKET, PAPER):
        ((x, tiers, budgets, temperature),) = settings(world, "budget")
        assert set(world.budgets) < set(budgets) and (x, tiers, temperature) == (None, TIERS, 1)
    sizes = settings(POCKET, "problems")
    assert [(x, len(tiers), budgets) for x, tiers, budgets, _ in sizes] == [
        (n, n, (budget,)) for n, budget in zip(range(2, 7), (85, 128, 171, 213, 256), strict=True)]
    assert all("hard" in tiers for _, tiers, _, _ in sizes)
    assert [t for *_, t in settings(POCKET, "temperature")] == [0, 0.5, 0.8, 1, 1.2]
    assert {tuple(x.split("-")) == tiers for x, tiers, *_ in settings(POCKET, "mix")} == {True}
    assert "budget, problems, mix, temperature" in refusal(settings, POCKET, "weather")


def test_rows_of_reference_solutions():
    table = run_sweep(SMALL, "problems", ["replay"], 4)
    assert table["x"].tolist() == table["n_problems"].tolist() == [n for n in range(2, 7)
                                                                   for _ in range(3)]
    assert set(table["sweep"]) == {"problems"} and table["tiers"].nunique() == 5
    assert (table["score_low"] <= table["score"]).all() and table["accuracy_6"].notna().sum() == 3


def test_a_sweep_goes_on_from_its_logs(tmp_path):
    """A log folder for each setting; what they hold is asked for no more."""
    methods, here = ["base", "rational"], EngineConfig(log=tmp_path)
    first = run_sweep(SMALL, "budget", methods, 2, engine=here)
    assert set(first["budget"]) == set(first["x"]) == {12, 18, 24, 30, 36, 48, 60, 72}
    base, best = (first[first["method"] == name].reset_index() for name in methods)
    assert base["rational"].equals(best["score"].rename("rational"))
    replay = run_sweep(SMALL, "budget", methods, 2, engine=EngineConfig("replay", log=tmp_path))
    pd.testing.assert_frame_equal(replay, first)
    assert [path.name for path in tmp_path.iterdir()] == ["budget-0"]
