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
        "high_rate": {"learning_rate": 10 * recipe.learning_rate},
        "single_budget": {"budgets": (64,)}}
    assert [name for name, (_, _, start) in ABLATIONS.items() if start != "mft"] == ["from_base"]


def test_table_and_logs_of_a_run_and_its_continuation(world, tmp_path):
    out, work, names = tmp_path / "table.csv", tmp_path / "work", ["mft", "from_base"]
    arguments = (world, replace(SMALL_RARL, steps=2), work, out, names, 4)
    rows = ablate(*arguments)
    assert list(zip(rows["variant"], rows["budget"], rows["order"], strict=True)) == [
        (name, budget, order) for name in names for budget in (64, 128) for order in ORDERS]
    table = pd.read_csv(out, keep_default_na=False)
    assert list(table) == COLUMNS and table["steps"].tolist() == [0] * 6 + [2] * 6
    # without MFT nothing is earned, and the diagnosis says why
    assert table["diagnosis"][6:].str.contains("level never right").all()
    assert set(table["diagnosis"][:6]) == {""}
    assert len(pd.read_csv(tmp_path / "table" / "from_base.csv")) == 2
    assert not (tmp_path / "table" / "mft.csv").exists()
    assert "RARL" in (work / "from_base" / "output.txt").read_text()
    kept = {path: path.stat().st_mtime_ns for path in work.rglob("step-*/*")}
    again = ablate(*arguments[:4], ["from_base"], 4)
    pd.testing.assert_frame_equal(again, rows[6:])
    assert kept and {path: path.stat().st_mtime_ns for path in work.rglob("step-*/*")} == kept


def test_a_failed_variant_does_not_cost_the_others(world, tmp_path, refusal):
    broken = replace(world, methods=world.methods | {"base": Method("no/such/folder", "direct")})
    told = refusal(ablate, broken, replace(SMALL_RARL, steps=1), tmp_path / "work",
                   tmp_path / "table.csv", ["from_base", "mft"], 4)
    assert "from_base failed" in told and "run the same command again" in told
    assert set(pd.read_csv(tmp_path / "table.csv")["variant"]) == {"mft"}
    assert "variant must be one of mft, reference" in refusal(
        ablate, world, SMALL_RARL, tmp_path, tmp_path / "table.csv", ["luck"])


def test_the_table_of_seeds_has_the_start_once(tmp_path):
    for seed, score in ((0, 1.25), (1, 1.75)):
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "log.csv").write_text(f"step\n{seed}\n")
        rows = pd.read_csv(DATA / "pocket-rarl/exam.csv")
        rows.loc[rows["method"] == "rarl", "score"] = score
        rows.to_csv(tmp_path / str(seed) / "exam.csv", index=False)
    write_seeds([(seed, tmp_path / str(seed)) for seed in (0, 1)], tmp_path / "seeds.csv")
    found = pd.read_csv(tmp_path / "seeds.csv")
    assert list(found) == COLUMNS
    assert found["variant"].tolist() == ["start"] * 6 + ["rarl"] * 12
    assert found["seed"].isna().tolist() == [True] * 6 + [False] * 12
    assert found["score"].tolist()[6:] == [1.25] * 6 + [1.75] * 6
    assert (tmp_path / "seeds" / "1.csv").read_text() == "step\n1\n"
    with pytest.raises(FileNotFoundError, match="exam.csv"):
        write_seeds([(2, tmp_path / "2")], tmp_path / "none.csv")
