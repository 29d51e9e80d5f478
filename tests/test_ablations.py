"""Ablations: every variant is a recipe of its own; tables and logs; nothing is done twice."""

from dataclasses import asdict, replace

import pandas as pd
import pytest
from conftest import SMALL_RARL, tiny_model

from roi_lib.experiments.ablations import ABLATIONS, COLUMNS, ablate, write_seeds
from roi_lib.store.files import DATA
from roi_lib.worlds import ORDERS, POCKET, Method


@pytest.fixture(scope="module")
def world(tokenizer, tmp_path_factory):
    """The pocket world with a tiny random model in place of its checkpoints."""
    folder = tmp_path_factory.mktemp("start")
    tiny_model(tokenizer).float().save_pretrained(folder)
    return replace(POCKET, methods={"mft": Method(str(folder), "roi"),
                                    "base": Method(str(folder), "direct")})


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


def test_a_run_its_continuation_and_a_variant_that_fails(world, tmp_path, refusal):
    out, work, recipe = tmp_path / "table.csv", tmp_path / "work", replace(SMALL_RARL, steps=2)
    rows = ablate(world, recipe, work, out, ["mft", "from_base"], 4)
    assert list(zip(rows["variant"], rows["budget"], rows["order"], strict=True)) == [
        (name, budget, order) for name in ("mft", "from_base") for budget in (64, 128)
        for order in ORDERS]
    table = pd.read_csv(out, keep_default_na=False)
    assert list(table) == COLUMNS and table["steps"].tolist() == [0] * 6 + [2] * 6
    # without MFT nothing is earned, and the diagnosis says why
    assert table["diagnosis"].str.contains("level never right").tolist() == [False] * 6 + [True] * 6
    assert len(pd.read_csv(tmp_path / "table" / "from_base.csv")) == 2
    assert not (tmp_path / "table" / "mft.csv").exists()
    kept = {path: path.stat().st_mtime_ns for path in work.rglob("step-*/*")}
    broken = replace(world, methods=world.methods | {"mft": Method("no-such-folder", "roi")})
    told = refusal(ablate, broken, recipe, work, out, ["mft", "from_base"], 4)
    assert "mft failed" in told and "run the same command again" in told
    again = pd.read_csv(out, keep_default_na=False)
    pd.testing.assert_frame_equal(again, table[6:].reset_index(drop=True))
    assert kept and {path: path.stat().st_mtime_ns for path in work.rglob("step-*/*")} == kept
    assert "variant must be one of mft, " in refusal(ablate, world, recipe, work, out, ["luck"])


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
