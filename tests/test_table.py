"""The main table: records, what is shown of them, and folders that are read back as written."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from roi_lib.evaluation import per_exam
from roi_lib.exams import draw_papers
from roi_lib.experiments import table
from roi_lib.experiments.methods import Comparison, run_methods
from roi_lib.experiments.table import CELL, load_rollouts, save_comparison
from roi_lib.sitting import responses
from roi_lib.store.checkpoints import load_environment, model_label
from roi_lib.store.files import DATA, verify_folder
from roi_lib.store.papers import read_paper_list, restore_papers
from roi_lib.worlds import ORDERS, POCKET

SHIPPED = sorted(path.parent for path in DATA.glob("*/papers.json"))


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
        base, best = at.loc[("base", budget, order)], at.loc[("rational", budget, order)]
        bound = results.bounds.loc[("rational", budget, order)].mean()
        assert base["score"] == own["base", budget, order]
        assert base["difference"] == pytest.approx(base["score"] - own["replay", budget, order])
        assert best["score"] == base["rational"] == pytest.approx(bound["achievable"])
        assert best["plug_in"] == base["rational_plug_in"] == pytest.approx(bound["plug_in"])
        assert base["lost_to_allocation"] == pytest.approx(bound["achievable"] - base["score"])
        assert best["tokens"] == pytest.approx(bound.filter(like="tokens_").sum())
    assert records["difference_from"].dropna().unique().tolist() == ["replay"]


def test_what_is_shown(sat):
    records, text, details = sat[3], table.show_order(sat[3], "medium"), table.show_details(sat[3])
    assert len(text.splitlines()) == 2 + 4 and "32 tokens" in text and "64 tokens" in text
    row = records.set_index(CELL).loc[("base", 64, "medium")]
    number = "{score:.3f} [{score_low:.3f},{score_high:.3f}]".format(**row)
    assert number in text and number in details and details.count("\n\n") == 3, "four blocks"
    one = records.assign(**{name: np.nan for name in records if name.endswith(("low", "high"))})
    assert "[" not in table.show_order(one) and "--" in table.show_order(one)


def test_a_folder_is_read_back_as_it_was_written(sat):
    folder, comparison, results, records = sat
    back = pd.read_csv(folder / "records.csv").fillna({"model": ""})
    pd.testing.assert_frame_equal(back, records.round(6), check_dtype=False)
    assert restore_papers(read_paper_list(folder / "papers.json")) == comparison.papers
    for name, written in results.table.groupby("method"):
        found, written = load_rollouts(folder, name), written.reset_index(drop=True)
        assert set(written) - set(found) == {"method", "problem"}
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
    save_comparison(copy, comparison, replace(results, outcomes=None), records)
    assert "holds no 'bounds'" in refusal(table.load_bounds, copy)
    (copy / "base.parquet").write_bytes(b"0" * 99)
    foreign.write_text("mine")
    assert "base.parquet is missing, cut short" in refusal(load_rollouts, copy, "base")
    for place in (tmp_path, copy):
        assert "is not replaced" in refusal(save_comparison, place, comparison, results, records)
    assert foreign.read_text() == "mine"


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_shipped_folders_are_whole_and_agree_with_themselves(folder):
    """Hashes match; records follow from the tables, and these from the token ids."""
    verify_folder(folder)
    score = pd.read_csv(folder / "records.csv").set_index(CELL)["score"]
    for name in {name for name, _, _ in score.index if not name.startswith("rational")}:
        for cell, own in load_rollouts(folder, name).groupby(["budget", "order"]):
            found = per_exam(own)["points"].mean()
            assert found == pytest.approx(score[name, *cell], abs=1e-6)
    own, env = load_rollouts(folder, "rarl"), load_environment(POCKET)
    for row in responses(own[own["ids"].notna()]).head(20).itertuples():
        here = own[(own["exam"] == row.exam) & (own["budget"] == row.budget)
                   & (own["order"] == row.order)].sort_values("position")
        assert [s.cost for s in env.parse(row.ids.tolist(), 3).segments] == here["cost"].tolist()


@pytest.mark.parametrize("path", [*sorted(DATA.glob("sweep-*.csv")),
                                  DATA / "main-table/records.csv"], ids=lambda path: path.stem)
def test_shipped_tables_are_of_the_shipped_models(path):
    """A checkpoint that changes wants its tables made again."""
    for name, models in pd.read_csv(path).groupby("method")["model"].unique().items():
        checkpoint = POCKET.method(name.removesuffix("_tagged")).checkpoint
        assert list(models) == [model_label(checkpoint)], name
