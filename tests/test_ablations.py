"""Ablations: every variant is a recipe of its own; tables and logs; nothing is done twice."""

from dataclasses import asdict, replace

import pandas as pd
from conftest import SMALL_RARL

from roi_lib.experiments.ablations import ABLATIONS, COLUMNS, ablate, write_seeds
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


def test_the_table_of_seeds_has_the_start_once_and_replaces_nothing_else(tmp_path, refusal):
    rows = pd.DataFrame([{"method": name, "budget": budget, "order": order, "score": 0.0}
                         for name in ("start", "rarl") for budget in (64, 128) for order in ORDERS])
    for seed in range(2):
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "log.csv").write_text(f"step\n{seed}\n")
        rows.loc[rows["method"] == "rarl", "score"] = seed / 4
        rows.to_csv(tmp_path / str(seed) / "exam.csv", index=False)
    write_seeds([(seed, tmp_path / str(seed)) for seed in (0, 1)], tmp_path / "seeds.csv")
    found = pd.read_csv(tmp_path / "seeds.csv", keep_default_na=False)
    assert list(found) == COLUMNS and found["score"].tolist()[6:] == [0] * 6 + [0.25] * 6
    assert found["seed"].tolist() == [""] * 6 + ["0"] * 6 + ["1"] * 6
    assert (tmp_path / "seeds" / "1.csv").read_text() == "step\n1\n"
    (tmp_path / "seeds" / "0.csv").write_text("mine")
    table = (tmp_path / "seeds.csv").read_bytes()
    for name, words in (("seeds.csv", "seeds/0.csv; move it"), ("seeds", "no file"),
                        ("new", "the logs go to a folder")):
        assert words in refusal(write_seeds, [(0, tmp_path / "1")], tmp_path / name)
    (tmp_path / "0" / "exam.csv").write_text("[]")
    assert "0/exam.csv is no log or table" in refusal(write_seeds, [(0, tmp_path / "0")],
                                                      tmp_path / "x.csv")
    assert (tmp_path / "seeds.csv").read_bytes() == table
