"""Ablations: every variant is a recipe of its own; tables and logs; nothing is done twice."""

from dataclasses import asdict, replace

import pandas as pd
from conftest import SMALL_RARL, tiny_model

from roi_lib.experiments.ablations import ABLATIONS, COLUMNS, ablate, write_seeds
from roi_lib.store.files import DATA
from roi_lib.worlds import ORDERS, POCKET, Method


def test_each_variant_changes_what_it_says():
    recipe, differs = POCKET.rarl, {}
    for name, (_, change, _) in ABLATIONS.items():
        variant = asdict(replace(recipe, **change(recipe) if change else {}))
        differs[name] = {k: v for k, v in variant.items() if asdict(recipe)[k] != v}
    assert differs == {
        "mft": {}, "reference": {}, "from_base": {}, "answer_only": {"reward": "answer"},
        "skip_bonus": {"reward": "skip_bonus"}, "grpo": {"scale": "std", "normalizer": "length"},
        "high_rate": {"learning_rate": 2e-3}, "single_budget": {"budgets": (64,)}}
    assert [name for name, (_, _, start) in ABLATIONS.items() if start != "mft"] == ["from_base"]


def test_a_run_its_continuation_and_a_variant_that_fails(tokenizer, tmp_path, refusal):
    tiny_model(tokenizer).float().save_pretrained(tmp_path / "tiny")
    tiny, broken = (Method(name, "roi") for name in (str(tmp_path / "tiny"), "no-such-folder"))
    world, work = replace(POCKET, methods={"mft": tiny, "base": tiny}), tmp_path / "work"
    out, arguments = tmp_path / "table.csv", (["mft", "from_base"], 4)
    rows = ablate(world, replace(SMALL_RARL, steps=2), work, out, *arguments)
    table = pd.read_csv(out, keep_default_na=False)
    assert list(table) == COLUMNS and table["steps"].tolist() == [0] * 6 + [2] * 6
    assert list(zip(rows["variant"], rows["budget"], rows["order"], strict=True)) == [
        (name, b, order) for name in arguments[0] for b in (64, 128) for order in ORDERS]
    # without MFT nothing is earned, and the diagnosis says why
    assert table["diagnosis"].str.contains("level never right").tolist() == [False] * 6 + [True] * 6
    assert [path.name for path in (tmp_path / "table").iterdir()] == ["from_base.csv"]
    kept = {path: path.stat().st_mtime_ns for path in work.rglob("step-*/*")}
    world = replace(world, methods={"mft": broken, "base": tiny})
    told = refusal(ablate, world, replace(SMALL_RARL, steps=2), work, out, *arguments)
    assert "mft failed" in told and "run the same command again" in told
    again = pd.read_csv(out, keep_default_na=False)
    pd.testing.assert_frame_equal(again, table[6:].reset_index(drop=True))
    assert kept and {path: path.stat().st_mtime_ns for path in work.rglob("step-*/*")} == kept


def test_the_table_of_seeds_has_the_start_once(tmp_path):
    rows = pd.read_csv(DATA / "pocket-rarl/exam.csv")
    for seed in range(2):
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "log.csv").write_text(f"step\n{seed}\n")
        rows.loc[rows["method"] == "rarl", "score"] = seed / 4
        rows.to_csv(tmp_path / str(seed) / "exam.csv", index=False)
    write_seeds([(seed, tmp_path / str(seed)) for seed in (0, 1)], tmp_path / "seeds.csv")
    found = pd.read_csv(tmp_path / "seeds.csv").fillna({"seed": -1})
    assert list(found) == COLUMNS and found["score"].tolist()[6:] == [0] * 6 + [0.25] * 6
    assert found["variant"].tolist() == ["start"] * 6 + ["rarl"] * 12
    assert found["seed"].tolist() == [-1] * 6 + [0] * 6 + [1] * 6
    assert (tmp_path / "seeds" / "1.csv").read_text() == "step\n1\n"
