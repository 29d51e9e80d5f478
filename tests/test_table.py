"""The main table: records, what is shown of them, and folders that are read back as written."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, Student

from roi_lib.engines import EngineConfig
from roi_lib.evaluation import per_exam
from roi_lib.exams import draw_papers
from roi_lib.experiments import table
from roi_lib.experiments.methods import Comparison, run_methods
from roi_lib.experiments.statistics import statistics
from roi_lib.experiments.table import CELL, load_rollouts, save_comparison
from roi_lib.rational import BOUNDS
from roi_lib.store.checkpoints import load_environment, model_label
from roi_lib.store.files import DATA, write_json
from roi_lib.store.papers import read_paper_list, restore_papers
from roi_lib.worlds import ORDERS, POCKET, RULES

BUDGETS, NAMES = (32, 64), ("replay", "base", "rarl", "equal_share", "best_rule", "optimal")
EXACT = [f"optimal_{name}" for name in BOUNDS]
ROWS = [*NAMES[:-1], *EXACT]


@pytest.fixture(scope="module")
def sat(env, small_world, tmp_path_factory):
    """Three methods, rules and bounds under two budgets, six papers, and the folder of it; models
    are students with luck."""
    comparison = Comparison(small_world, draw_papers(POCKET, 6))
    student = Student(env, [problem for paper in comparison.papers for problem in paper])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineConfig, "make", lambda *_: student)
        results = run_methods(comparison, NAMES, BUDGETS, workers=1)
    records, folder = table.make_records(comparison, results), tmp_path_factory.mktemp("a") / "b"
    save_comparison(folder, comparison, results, records, traced=4)
    return folder, comparison, results, records


def test_records_compare_with_the_first_method_and_with_the_bounds(sat):
    """Each method beside what its own checkpoint could do; rules and exact policies beside them."""
    _, _, results, records = sat
    at = records.set_index(CELL)
    assert {*at.index} == {(m, b, o) for m in ROWS for b in BUDGETS for o in ORDERS}
    assert records["method"].unique().tolist() == ROWS and at.index.is_unique
    own = {cell: per_exam(some)["points"].mean()
           for cell, some in results.table.groupby(CELL, sort=False)}
    cells = ["abilities", "policy", "budget", "order"]
    mean, differ = results.bounds["points"].groupby(cells).mean(), 0
    for budget, order in [(b, o) for b in BUDGETS for o in ORDERS]:
        cell, replay = (budget, order), own["replay", budget, order]
        for name in ("base", "rarl"):
            row = at.loc[(name, *cell)]
            assert row["score"] == own[name, *cell]
            assert row["difference"] == pytest.approx(row["score"] - replay)
            for bound in BOUNDS:
                assert row[f"bound_{bound}"] == pytest.approx(mean[name, bound, *cell])
            lost = row["lost_to_allocation"] + row["lost_to_order"]
            assert row["score"] + lost == pytest.approx(mean[name, "statement", budget, "easy"])
            number = "{score:.3f} [{score_low:.3f},{score_high:.3f}]".format(**row)
            assert number in table.show_order(records, order)
            assert number in table.show_details(records)
        rules = {name: mean["rarl", name, *cell] for name in RULES}
        best = at.loc[("best_rule", *cell)]
        assert best["score"] == pytest.approx(max(rules.values()))
        assert rules[best["policy"]] == pytest.approx(best["score"])
        assert at.loc[("equal_share", *cell), "score"] == pytest.approx(rules["equal_share"])
        for name, bound in zip(EXACT, BOUNDS, strict=True):
            row = at.loc[(name, *cell)]
            assert row["score"] == pytest.approx(mean["rarl", bound, *cell])
            assert row["difference"] == pytest.approx(row["score"] - replay)
            assert row["policy"] == bound
        differ += at.loc[("base", *cell), "bound_luck"] != at.loc[("rarl", *cell), "bound_luck"]
    assert differ, "abilities are a checkpoint's own"
    assert at.loc["replay", "bound_luck"].isna().all(), "nobody has its abilities"


def test_numbers_by_position_of_a_policy_are_those_of_its_rows(sat):
    """Luck chooses by what will happen, and has none."""
    _, _, results, records = sat
    rows = results.bounds.loc["rarl", "problem", 64, "hard"]
    row = records.set_index(CELL).loc[("optimal_problem", 64, "hard")]
    for i in (1, 2, 3):
        for what in ("accuracy", "tokens"):
            assert row[f"{what}_{i}"] == pytest.approx(rows[f"{what}_{i}"].mean())
    assert row["tokens"] == pytest.approx(rows.filter(like="tokens_").sum(axis=1).mean())
    assert row["skip_rate"] == pytest.approx(rows.filter(like="skipped_").to_numpy().mean())
    luck = records[records["method"] == "optimal_luck"]
    assert luck[["tokens", "skip_rate", "accuracy_1"]].isna().all(axis=None)
    (line,) = [x for x in table.show_order(records).splitlines() if x.startswith("optimal_luck")]
    assert line.count(" --") == 2 and "nan" not in line, "one a budget"


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
    points = results.bounds[["points"]].astype(np.float32).sort_index()
    pd.testing.assert_frame_equal(table.load_bounds(folder), points.round(3))
    for abilities in ("base", "rarl"):
        rows, some = load_rollouts(folder, f"{abilities}-outcomes"), results.outcomes[abilities]
        assert len(rows) == some.cost.size and 0 < rows["correct"].mean() < 1
        row = rows.query("exam == 4 and problem == 1 and effort == 0 and attempt == 3").iloc[0]
        assert (row["cost"], row["correct"]) == (some.cost[4, 1, 0, 3], some.correct[4, 1, 0, 3])
        for name, value in vars(table.load_outcomes(folder, abilities)).items():
            assert np.array_equal(value, getattr(some, name)), name


def test_what_is_not_there_or_not_ours_is_named_and_stays(sat, tmp_path, refusal):
    folder, comparison, results, records = sat
    assert "holds no 'mft'; it has base-outcomes, base, bounds" in refusal(
        load_rollouts, folder, "mft")
    assert "holds no 'mft-outcomes'" in refusal(table.load_outcomes, folder, "mft")
    copy, foreign = tmp_path / "copy", tmp_path / "thesis.txt"
    save_comparison(copy, comparison, results, records)
    (copy / "base.parquet").write_bytes(b"0" * 99)
    foreign.write_text("mine")
    assert "base.parquet is missing, cut short" in refusal(load_rollouts, copy, "base")
    for place in (tmp_path, copy):
        assert "is not replaced" in refusal(save_comparison, place, comparison, results, records)
    assert foreign.read_text() == "mine"


@pytest.mark.parametrize("name", ["main-table", "main-table-seed1", "main-table-seed2",
                                  "main-table-answer"])
def test_shipped_records_follow_from_their_tables_and_these_from_their_token_ids(name):
    records = pd.read_csv(DATA / name / "records.csv").set_index(CELL)
    policies = records.reindex(columns=["policy"])["policy"].dropna()
    for method in {*records.index.unique("method")} - {*policies.index.unique("method")}:
        for cell, own in load_rollouts(DATA / name, method).groupby(["budget", "order"]):
            score = per_exam(own)["points"].mean()
            assert score == pytest.approx(records.loc[(method, *cell), "score"], abs=1e-6)
    bounds = table.load_bounds(DATA / name)
    able = "rarl" if "rarl" in bounds.index.unique("abilities") else "mft"  # with --model
    for cell, policy in policies.items():
        found = bounds.loc[able, policy, *cell[1:]]["points"]
        assert found.astype(float).mean() == pytest.approx(records.loc[cell, "score"], abs=1e-4)
    env, own = load_environment(POCKET), load_rollouts(DATA / name, "rarl").head(60)
    for _, rows in own.groupby("exam"):
        segments = env.parse(rows["ids"].iloc[0].tolist(), 3).segments
        assert [s.cost for s in segments] == rows["cost"].tolist()


@pytest.mark.parametrize("path", [*sorted(DATA.glob("sweep-*.csv")),
                                  DATA / "main-table/records.csv"], ids=lambda path: path.stem)
def test_shipped_tables_are_of_the_shipped_models(path):
    for name, models in pd.read_csv(path).groupby("method")["model"].unique().items():
        method = POCKET.methods.get(name) or POCKET.method(name.rpartition("_")[0])
        assert list(models) == [model_label(method.checkpoint)], name


def test_statistics_of_the_datasets_are_those_that_are_shipped(real_data, tmp_path):
    write_json(tmp_path / "s.json", statistics(real_data))
    assert (tmp_path / "s.json").read_text() == (DATA / "exam-statistics.json").read_text()


def test_readme_shows_the_shipped_tables():
    readme = (ROOT / "README.md").read_text()
    records = pd.read_csv(DATA / "main-table/records.csv")
    assert table.show_order(records[records["budget"].isin(POCKET.budgets)]) in readme
    assert table.show_details(pd.read_csv(DATA / "exam-base.csv")).split("\n\n")[0] in readme
