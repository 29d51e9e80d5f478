"""Ablations: every variant is a recipe of its own; table and logs; nothing is done twice."""

import csv
from dataclasses import asdict, replace

import pytest
from test_rarl import SMALL, tiny

from roi_lib.ablations import ABLATIONS, COLUMNS, ablate
from roi_lib.worlds import POCKET, Method


@pytest.fixture(scope="module")
def world(tokenizer, tmp_path_factory):
    """The pocket world with a tiny random model in place of its checkpoints."""
    folder = tmp_path_factory.mktemp("start")
    tiny(tokenizer).save_pretrained(folder)
    return replace(POCKET, methods={"mft": Method(str(folder), "roi"),
                                    "base": Method(str(folder), "direct")})


def test_each_variant_changes_what_it_says():
    changed = {}
    for name, ablation in ABLATIONS.items():
        if ablation.change:
            recipe = asdict(ablation.change(POCKET.rarl))
            changed[name] = {k for k, v in asdict(POCKET.rarl).items() if recipe[k] != v}
    assert changed == {
        "reference": set(), "from_base": set(), "answer_only": {"reward"},
        "skip_bonus": {"reward"}, "grpo": {"scale", "normalizer"},
        "high_rate": {"learning_rate"}, "single_budget": {"budgets"}}
    assert ABLATIONS["from_base"].start == "base"


def test_table_and_logs_of_a_small_run_and_its_continuation(world, tmp_path, capsys):
    out, names = tmp_path / "table.csv", ["mft", "from_base"]
    arguments = (world, replace(SMALL, steps=2), tmp_path / "work", out, names, 4)
    rows = ablate(*arguments)
    assert [(r["variant"], r["budget"], r["order"]) for r in rows] == [
        (name, b, order) for name in names for b in (64, 128)
        for order in ("easy", "medium", "hard")]
    with out.open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert list(table[0]) == list(COLUMNS) and len(table) == 12
    assert {r["steps"] for r in table} == {"0", "2"} and table[0]["diagnosis"] == ""
    # without MFT nothing is earned, and the diagnosis says why
    assert table[6]["diagnosis"] == "level never right; no spread"
    assert len((tmp_path / "table" / "from_base.csv").read_text().splitlines()) == 3
    assert not (tmp_path / "table" / "mft.csv").exists()
    printed = (tmp_path / "work" / "from_base" / "output.txt").read_text()
    assert printed.count("step 2/2") == 1 and "2 of 2 after" in capsys.readouterr().out
    assert ablate(*arguments) == rows
    printed = (tmp_path / "work" / "from_base" / "output.txt").read_text()
    assert printed.count("step 2/2") == 1  # the second time, nothing was left to do


def test_a_failed_variant_does_not_cost_the_others(world, tmp_path, capsys):
    broken = replace(world, methods=world.methods | {"base": Method("no/such/folder", "direct")})
    with pytest.raises(ValueError, match="from_base failed .*run the same command again"):
        ablate(broken, replace(SMALL, steps=1), tmp_path / "work", tmp_path / "table.csv",
               ["from_base", "mft"], 4)
    assert (tmp_path / "table.csv").read_text().count("mft,") == 6
    with pytest.raises(ValueError, match="unknown variant 'luck'; choose from mft, reference"):
        ablate(world, SMALL, tmp_path / "work", tmp_path / "table.csv", ["luck"])
