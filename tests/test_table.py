"""The main table: records, what is shown of them, and folders that are read back as written."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from roi_lib.evaluation import per_exam
from roi_lib.exams import draw_papers
from roi_lib.experiments import table
from roi_lib.experiments.methods import Comparison, run_methods
from roi_lib.experiments.statistics import statistics
from roi_lib.experiments.table import CELL, load_rollouts, save_comparison
from roi_lib.store.checkpoints import load_environment, model_label
from roi_lib.store.files import DATA, write_json
from roi_lib.store.papers import read_paper_list, restore_papers
from roi_lib.worlds import ORDERS, POCKET


@pytest.fixture(scope="module")
def sat(tmp_path_factory):
    """Two methods and the bound under two budgets, six papers, and the folder of it."""
    comparison = Comparison(POCKET, draw_papers(POCKET, 6))
    results = run_methods(comparison, ["replay", "base", "rational"], [32, 64], workers=1)
    records, folder = table.make_records(comparison, results), tmp_path_factory.mktemp("a") / "b"
    save_comparison(folder, comparison, results, records, traced=4)
    return folder, comparison, results, records


def test_records_compare_with_the_first_method_and_with_the_bound(sat):
    _, _, results, records = sat
    names, at = ["replay", "base", "rational", "rational_tagged"], records.set_index(CELL)
    assert list(at.index) == [(m, b, o) for m in names for b in (32, 64) for o in ORDERS]
    own = {cell: per_exam(some)["points"].mean()
           for cell, some in results.table.groupby(CELL, sort=False)}
    for budget, order in [(b, o) for b in (32, 64) for o in ORDERS]:
        base, best = (at.loc[(name, budget, order)] for name in ("base", "rational"))
        bound = results.bounds.loc[("rational", budget, order)].mean()
        assert base["score"] == own["base", budget, order]
        assert base["difference"] == pytest.approx(base["score"] - own["replay", budget, order])
        assert best["score"] == base["rational"] == pytest.approx(bound["achievable"])
        assert best["plug_in"] == base["rational_plug_in"] == pytest.approx(bound["plug_in"])
        lost = base["lost_to_allocation"] + base["lost_to_order"]
        assert base["score"] + lost == pytest.approx(at.loc[("rational", budget, "easy"), "score"])
        number = "{score:.3f} [{score_low:.3f},{score_high:.3f}]".format(**base)
        assert number in table.show_order(records, order) and number in table.show_details(records)


def test_what_is_missing_is_said_and_differences_are_of_the_same_papers(sat):
    _, comparison, results, whole = sat
    lost = (results.table["method"] == "base") & (results.table["budget"] == 32) & (
        results.table["exam"] == 2)
    marked = replace(results, table=results.table.assign(failed=np.where(lost, "HTTP 400", "")))
    records = table.make_records(comparison, marked).set_index(CELL)
    assert records["failed"].tolist() == [
        int((method, budget) == ("base", 32)) for method, budget, _ in records.index]
    own = [per_exam(some)["points"].drop(2) for name in ("base", "replay") for some in [
        results.table.query(f"method == '{name}' and budget == 32 and order == 'hard'")]]
    base = records.loc[("base", 32, "hard")]
    assert base["score"] == own[0].mean()
    assert base["difference"] == pytest.approx(own[0].mean() - own[1].mean())
    assert "missing" in table.show_order(records.reset_index())
    assert "missing" not in table.show_order(whole)
    untouched = [cell for cell in records.index if cell[:2] != ("base", 32)]
    pd.testing.assert_frame_equal(records.loc[untouched], whole.set_index(CELL).loc[untouched])


def test_a_folder_is_read_back_as_it_was_written(sat):
    folder, comparison, results, records = sat
    back = pd.read_csv(folder / "records.csv").fillna({"model": ""})
    pd.testing.assert_frame_equal(back, records.round(6), check_dtype=False)
    assert restore_papers(read_paper_list(folder / "papers.json")) == comparison.papers
    for name, written in results.table.groupby("method"):
        found, written = load_rollouts(folder, name), written.reset_index(drop=True)
        one, other = (some[[c for c in found if c != "ids"]].fillna({"answer": ""})
                      for some in (found, written))
        pd.testing.assert_frame_equal(one, other, check_dtype=False)
        kept = (found["exam"] < 4) & (found["position"] == 1)
        assert found["ids"].notna().equals(kept), "of the first papers"
        assert [tuple(ids) for ids in found["ids"][kept]] == written["ids"][kept].tolist()
    pd.testing.assert_frame_equal(table.load_bounds(folder), results.bounds.sort_index())
    for name, value in vars(table.load_outcomes(folder)).items():
        assert np.array_equal(value, getattr(results.outcomes, name)), name


def test_what_is_not_there_or_not_ours_is_named_and_stays(sat, tmp_path, refusal):
    folder, comparison, results, records = sat
    assert "holds no 'rarl'; it has base, bounds" in refusal(load_rollouts, folder, "rarl")
    copy, foreign = tmp_path / "copy", tmp_path / "thesis.txt"
    save_comparison(copy, comparison, results, records)
    (copy / "base.parquet").write_bytes(b"0" * 99)
    foreign.write_text("mine")
    assert "base.parquet is missing, cut short" in refusal(load_rollouts, copy, "base")
    for place in (tmp_path, copy):
        assert "is not replaced" in refusal(save_comparison, place, comparison, results, records)
    assert foreign.read_text() == "mine"


@pytest.mark.parametrize("name", ["main-table", "main-table-seed1", "main-table-seed2"])
def test_shipped_records_follow_from_their_tables_and_these_from_their_token_ids(name):
    score = pd.read_csv(DATA / name / "records.csv").set_index(CELL)["score"]
    for method in {method for method, _, _ in score.index if not method.startswith("rational")}:
        for cell, own in load_rollouts(DATA / name, method).groupby(["budget", "order"]):
            assert per_exam(own)["points"].mean() == pytest.approx(score[method, *cell], abs=1e-6)
    env, own = load_environment(POCKET), load_rollouts(DATA / name, "rarl").head(60)
    for _, rows in own.groupby("exam"):
        segments = env.parse(rows["ids"].iloc[0].tolist(), 3).segments
        assert [s.cost for s in segments] == rows["cost"].tolist()


@pytest.mark.parametrize("path", [*sorted(DATA.glob("sweep-*.csv")),
                                  DATA / "main-table/records.csv"], ids=lambda path: path.stem)
def test_shipped_tables_are_of_the_shipped_models(path):
    for name, models in pd.read_csv(path).groupby("method")["model"].unique().items():
        checkpoint = POCKET.method(name.removesuffix("_tagged")).checkpoint
        assert list(models) == [model_label(checkpoint)], name


def test_statistics_of_the_datasets_are_those_that_are_shipped(real_data, tmp_path):
    write_json(tmp_path / "s.json", statistics(real_data))
    assert (tmp_path / "s.json").read_text() == (DATA / "exam-statistics.json").read_text()


def test_readme_shows_the_shipped_tables():
    readme = (ROOT / "README.md").read_text()
    assert table.show_order(pd.read_csv(DATA / "main-table/records.csv")) in readme
    assert table.show_details(pd.read_csv(DATA / "exam-base.csv")).split("\n\n")[0] in readme
