"""Ablations: every variant is a recipe of its own; tables and logs; nothing is done twice."""

from dataclasses import asdict, replace

import pandas as pd
from conftest import SMALL_RARL

from roi_lib.experiments.ablations import ABLATIONS, COLUMNS, ablate
from roi_lib.worlds import ORDERS, POCKET, Method


def test_each_variant_changes_what_it_says():
    recipe, differs = asdict(POCKET.rarl), {}
    for name, (_, change, _) in ABLATIONS.items():
        variant = asdict(replace(POCKET.rarl, **change(POCKET.rarl) if change else {}))
        differs[name] = " ".join(key for key in recipe if variant[key] != recipe[key])
    assert differs == {"mft": "", "reference": "", "from_base": "", "answer_only": "reward",
                       "uncut": "reward cut", "budget_for_step": "budget_for",
                       "skip_bonus": "reward", "grpo": "scale normalizer",
                       "high_rate": "learning_rate", "single_budget": "budgets"}


def test_a_run_its_continuation_and_a_variant_that_fails(small_world, tmp_path, refusal):
    tiny, broken = small_world.method("mft"), Method("no-such-folder", "roi")
    world, work = replace(small_world, methods={"mft": tiny, "base": tiny}), tmp_path / "work"
    out, names = tmp_path / "table.csv", ["mft", "from_base"]
    arguments = replace(SMALL_RARL, steps=2), work, out, names, 4
    ablate(world, *arguments)
    table = pd.read_csv(out, keep_default_na=False)
    assert list(table) == COLUMNS and table["steps"].tolist() == [0] * 9 + [2] * 9
    assert table[["variant", "budget", "order"]].to_numpy().tolist() == [
        [name, budget, order] for name in names for budget in (64, 128, 256)
        for order in ORDERS]
    assert table["diagnosis"].str.contains("level never right").tolist() == [False] * 9 + [True] * 9
    assert [path.name for path in (tmp_path / "table").iterdir()] == ["from_base.csv"]
    kept = {path: path.stat().st_mtime_ns for path in work.rglob("step-*/*")}
    world = replace(world, methods={"mft": broken, "base": tiny})
    assert "run the same command again" in refusal(ablate, world, *arguments)
    assert pd.read_csv(out, keep_default_na=False).equals(table[9:].reset_index(drop=True))
    assert kept and {path: path.stat().st_mtime_ns for path in work.rglob("step-*/*")} == kept


def test_a_table_replaces_nothing_else(small_world, tmp_path, refusal):
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "mft.csv").write_text("mine")
    for name, words in (("table.csv", "table/mft.csv; move it"), ("table", "no file"),
                        ("new", "the logs go to a folder")):
        assert words in refusal(ablate, small_world, SMALL_RARL, tmp_path / "work",
                                tmp_path / name, ["mft"])
    assert (tmp_path / "table" / "mft.csv").read_text() == "mine"
