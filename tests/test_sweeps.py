"""Sweeps: their settings, their rows, and a run that goes on from its logs."""

from dataclasses import replace

import pandas as pd

from roi_lib.engines import EngineConfig
from roi_lib.experiments.sweeps import run_sweep, settings
from roi_lib.worlds import PAPER, POCKET, TIERS


def test_settings(refusal):
    for world in (POCKET, PAPER):
        ((x, tiers, budgets, temperature),) = settings(world, "budget")
        assert set(world.budgets) < set(budgets) and (x, tiers, temperature) == (None, TIERS, 1)
    assert [(x, len(tiers), *budgets) for x, tiers, budgets, _ in settings(POCKET, "problems")] == [
        (2, 2, 85), (3, 3, 128), (4, 4, 171), (5, 5, 213), (6, 6, 256)]
    assert all("hard" in tiers for _, tiers, _, _ in settings(POCKET, "problems"))
    assert [t for *_, t in settings(POCKET, "temperature")] == [0, 0.5, 0.8, 1, 1.2]
    assert all(tuple(x.split("-")) == tiers for x, tiers, *_ in settings(POCKET, "mix"))
    assert "budget, problems, mix, temperature" in refusal(settings, POCKET, "weather")


def test_rows_and_a_sweep_that_goes_on_from_its_logs(tmp_path):
    small = replace(POCKET, budgets=(24, 48))
    table = run_sweep(small, "problems", ["replay"], 4)
    assert table["x"].tolist() == table["n_problems"].tolist() == sorted([2, 3, 4, 5, 6] * 3)
    assert set(table["sweep"]) == {"problems"} and table["tiers"].nunique() == 5
    first, again = (run_sweep(small, "budget", ["base", "rational"], 2, engine=EngineConfig(
        name, log=tmp_path)) for name in ("torch", "replay"))
    pd.testing.assert_frame_equal(first, again)
    assert set(first["budget"]) == set(first["x"]) == {12, 18, 24, 30, 36, 48, 60, 72}
    assert [path.name for path in tmp_path.iterdir()] == ["budget-0"], "a folder for each setting"
