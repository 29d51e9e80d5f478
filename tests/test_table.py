"""The main table: records, what is shown of them, and folders that are read back as written."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from roi_lib.evaluation import per_exam
from roi_lib.exams import draw_papers
from roi_lib.experiments.methods import Comparison, run_methods
from roi_lib.experiments.table import (
    CELL,
    load_bounds,
    load_outcomes,
    load_rollouts,
    make_records,
    save_comparison,
    show_details,
    show_order,
)
from roi_lib.sitting import responses
from roi_lib.store.checkpoints import load_environment, model_label
from roi_lib.store.files import DATA, verify_folder
from roi_lib.store.papers import read_paper_list, restore_papers
from roi_lib.worlds import ORDERS, POCKET, get_world

SHIPPED = sorted(path.parent for path in DATA.glob("*/papers.json"))


@pytest.fixture(scope="module")
def sat(tmp_path_factory):
    """Two methods and the bound under two budgets, six papers, and the folder of it."""
    comparison = Comparison(POCKET, draw_papers(POCKET, 6))
    results = run_methods(comparison, ["replay", "base", "rational"], [32, 64], workers=1)
    records, folder = make_records(comparison, results), tmp_path_factory.mktemp("a") / "table"
    save_comparison(folder, comparison, results, records, traced=4)
    return folder, comparison, results, records


def test_records_compare_with_the_first_method_and_with_the_bound(sat):
    _, _, results, records = sat
    names = ["replay", "base", "rational", "rational_tagged"]
    assert list(zip(*(records[c] for c in CELL), strict=True)) == [
        (name, budget, order) for name in names for budget in (32, 64) for order in ORDERS]
    at = records.set_index(CELL)
    own = {cell: per_exam(table)["points"].mean()
           for cell, table in results.table.groupby(CELL, sort=False)}
    for budget, order in [(b, o) for b in (32, 64) for o in ORDERS]:
        base, best = at.loc[("base", budget, order)], at.loc[("rational", budget, order)]
        bound = results.bounds.loc[("rational", budget, order)].mean()
        assert base["score"] == own["base", budget, order]
        assert base["difference"] == pytest.approx(base["score"] - own["replay", budget, order])
        assert best["score"] == base["rational"] == pytest.approx(bound["achievable"])
        assert best["plug_in"] == base["rational_plug_in"] == pytest.approx(bound["plug_in"])
        assert base["lost_to_allocation"] == pytest.approx(bound["achievable"] - base["score"])
        assert best["tokens"] == pytest.approx(bound.filter(like="tokens_").sum())
    assert records["difference_from"].dropna().unique().tolist() == ["replay"]
    nobody = records[records["method"] == "replay"]["model"]
    assert set(nobody) == {""}, "reference solutions have no model"


def test_what_is_shown(sat):
    records = sat[3]
    text = show_order(records, "medium")
    assert len(text.splitlines()) == 2 + 4 and "32 tokens" in text and "64 tokens" in text
    row = records.set_index(CELL).loc[("base", 64, "medium")]
    number = "{score:.3f} [{score_low:.3f},{score_high:.3f}]".format(**row)
    assert number in text and number in show_details(records)
    assert show_details(records).count("\n\n") == 3, "four blocks, that of the losses too"
    one = records.assign(**{name: np.nan for name in records if name.endswith(("low", "high"))})
    assert "[" not in show_order(one) and "--" in show_order(one)


def test_a_folder_is_read_back_as_it_was_written(sat):
    folder, comparison, results, records = sat
    back = pd.read_csv(folder / "records.csv").fillna({"model": ""})
    pd.testing.assert_frame_equal(back, records.round(6), check_dtype=False)
    assert restore_papers(read_paper_list(folder / "papers.json")) == comparison.papers
    for name in ("replay", "base"):
        table = results.table[results.table["method"] == name].reset_index(drop=True)
        found = load_rollouts(folder, name)
        shared = [c for c in table if c in found and c != "ids"]
        one, other = (frame[shared].fillna({"answer": ""}) for frame in (found, table))
        pd.testing.assert_frame_equal(one, other, check_dtype=False)
        assert set(table) - set(found) == {"method", "problem"}
        kept = (found["exam"] < 4) & (found["position"] == 1)
        assert found["ids"].notna().equals(kept)
        assert [tuple(ids) for ids in found["ids"][kept]] == table["ids"][kept].tolist()
    pd.testing.assert_frame_equal(load_bounds(folder), results.bounds.sort_index())
    for name, value in vars(load_outcomes(folder)).items():
        assert np.array_equal(value, getattr(results.outcomes, name)), name


def test_what_is_not_there_or_not_whole_is_named(sat, tmp_path, refusal):
    folder, comparison, results, records = sat
    assert "holds no 'rarl'; it has base, bounds" in refusal(load_rollouts, folder, "rarl")
    copy = tmp_path / "copy"
    save_comparison(copy, comparison, replace(results, outcomes=None), records)
    assert "holds no 'bounds'" in refusal(load_bounds, copy)
    (copy / "base.parquet").write_bytes(b"0" * 99)
    assert "base.parquet is missing, cut short" in refusal(load_rollouts, copy, "base")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    for place in (foreign, copy):
        assert "is not replaced" in refusal(save_comparison, place, comparison, results, records)
    assert (foreign / "thesis.txt").read_text() == "mine" and len([*foreign.iterdir()]) == 1


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_shipped_folders_are_whole_and_agree_with_themselves(folder):
    """Hashes match; records follow from the tables, and these from the token ids."""
    verify_folder(folder)
    world = get_world(json.loads((folder / "papers.json").read_text())["world"])
    records = pd.read_csv(folder / "records.csv").set_index(CELL)
    papers = restore_papers(read_paper_list(folder / "papers.json"))
    for name in {name for name, _, _ in records.index if not name.startswith("rational")}:
        table = load_rollouts(folder, name)
        budget = int(table["budget"].max())
        for order in ("easy", "hard"):
            own = table[(table["budget"] == budget) & (table["order"] == order)]
            assert per_exam(own)["points"].mean() == pytest.approx(
                records.loc[(name, budget, order), "score"], abs=1e-6)
    env = load_environment(world, world.method(name).checkpoint)
    for row in responses(own[own["ids"].notna()]).head(20).itertuples():
        segments = env.parse(row.ids.tolist(), len(papers[row.exam])).segments
        here = own[own["exam"] == row.exam].sort_values("position")
        if not name.startswith("mft_greedy"):
            assert [s.cost for s in segments] == here["cost"].tolist()


@pytest.mark.parametrize("path", [*sorted(DATA.glob("sweep-*.csv")),
                                  DATA / "main-table/records.csv"], ids=lambda path: path.stem)
def test_shipped_tables_are_of_the_shipped_models(path):
    """A checkpoint that changes wants its tables made again."""
    for name, models in pd.read_csv(path).groupby("method")["model"].unique().items():
        checkpoint = POCKET.method(name.removesuffix("_tagged")).checkpoint
        assert list(models) == [model_label(checkpoint)], name
