"""Sweeps: their rows, and a run that goes on from its logs."""

from dataclasses import replace

import pandas as pd

from roi_lib.engines import EngineConfig
from roi_lib.experiments.table import MIXES, run_sweep
from roi_lib.rational import BOUNDS


def test_rows_and_a_sweep_that_goes_on_from_its_logs(small_world, tmp_path, refusal):
    assert "problems, mix, temperature, not 'weather'" in refusal(
        run_sweep, small_world, "weather", ["replay"], 4)
    small = replace(small_world, budgets=(24, 48))
    table = run_sweep(small, "problems", ["replay"], 4)
    assert table["x"].tolist() == table["n_problems"].tolist() == sorted([2, 4, 5, 6] * 9)
    assert {x: tuple(own["budget"].unique()) for x, own in table.groupby("x")} == {
        n: (3 * n, 6 * n, 9 * n) for n in (2, 4, 5, 6)}
    assert set(table["sweep"]) == {"problems"} and table["tiers"].str.contains("hard").all()
    first, again = (run_sweep(small, "mix", ["base", "optimal"], 2, engine=EngineConfig(
        name, log=tmp_path)) for name in ("torch", "replay"))
    pd.testing.assert_frame_equal(first, again)
    assert first["x"].nunique() == len(MIXES) and (first["x"] == first["tiers"]).all()
    assert first["method"].unique().tolist() == ["base", *(f"optimal_{name}" for name in BOUNDS)]
    assert {path.name for path in tmp_path.iterdir()} == {
        f"mix-{i}" for i in range(len(MIXES))}, "a folder for each setting"
