"""Sweeps: their rows, and a run that goes on from its logs."""

from dataclasses import replace

import pandas as pd

from roi_lib.engines import EngineConfig
from roi_lib.experiments.sweeps import run_sweep
from roi_lib.worlds import POCKET


def test_rows_and_a_sweep_that_goes_on_from_its_logs(tmp_path):
    small = replace(POCKET, budgets=(24, 48))
    table = run_sweep(small, "problems", ["replay"], 4)
    assert table["x"].tolist() == table["n_problems"].tolist() == sorted([2, 3, 4, 5, 6] * 3)
    assert set(table["sweep"]) == {"problems"} and table["tiers"].str.contains("hard").all()
    first, again = (run_sweep(small, "budget", ["base", "rational"], 2, engine=EngineConfig(
        name, log=tmp_path)) for name in ("torch", "replay"))
    pd.testing.assert_frame_equal(first, again)
    assert set(first["budget"]) == set(first["x"]) == {12, 18, 24, 30, 36, 48, 60, 72}
    assert [path.name for path in tmp_path.iterdir()] == ["budget-0"], "a folder for each setting"
