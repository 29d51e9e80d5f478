"""Rollout logs: what is saved is what was sat, and the shipped folders are what they claim."""

import json
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from roi_lib.checkpoints import load_tokenizer, verify_folder
from roi_lib.methods import Setting
from roi_lib.rollouts import (
    COLUMNS,
    load_bounds,
    load_columns,
    load_points,
    load_sittings,
    save_rollouts,
)
from scipy.stats import binomtest

from roi_lib import plots
from roi_lib.evaluation import (
    make_records,
    paired_difference,
    points_of,
    regret,
    regret_difference,
    sit_methods,
)
from roi_lib.exams import draw_papers
from roi_lib.worlds import DATA, ORDERS, POCKET, get_world

matplotlib.use("Agg")
SHIPPED = sorted(path.parent for path in DATA.glob("*/papers.json"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two methods and the bound under two budgets, six papers, in a folder."""
    folder = tmp_path_factory.mktemp("rollouts") / "table"
    setting = Setting(POCKET, draw_papers(POCKET, 6))
    results = sit_methods(setting, ["replay", "base", "optimal"], [32, 64])
    records = make_records(setting, results)
    save_rollouts(folder, setting, results, records, traced=4)
    return folder, setting, results, records


def test_columns_and_points(saved):
    folder, _, results, records = saved
    assert json.loads((folder / "records.json").read_text()) == records
    for result in results[:4]:
        columns = load_columns(folder, result.method)
        assert set(columns) == set(COLUMNS) and len(columns["paper"]) == 2 * 3 * 6 * 3
        for order in ORDERS:
            points = load_points(folder, result.method, result.budget, order)
            assert np.array_equal(points, points_of(result, order))
            here = (columns["budget"] == result.budget) & (columns["order"] == order)
            costs = [x.cost for s in result.sittings[order] for x in s.response.segments]
            assert columns["cost"][here].tolist() == costs


def test_responses_come_back_as_sittings(saved):
    folder, _, results, _ = saved
    tokenizer = load_tokenizer("pocket-base", POCKET.tokenizer)
    for result in results[:4]:
        for order in ORDERS:
            found = load_sittings(POCKET, tokenizer, folder, result.method, result.budget, order)
            assert found == result.sittings[order][:4]


def test_bounds_come_back(saved):
    folder, _, results, _ = saved
    bounds, outcomes = load_bounds(folder)
    for result in results[4:]:
        for order in ORDERS:
            bound = bounds[result.tagged, result.budget, order]
            for name, value in vars(result.bounds[order]).items():
                assert np.array_equal(getattr(bound, name), value), name
        assert np.array_equal(outcomes.cost, result.outcomes.cost)
        assert np.array_equal(outcomes.family, result.outcomes.family)


def test_what_is_not_there_is_named(saved, tmp_path):
    folder, setting, results, records = saved
    with pytest.raises(ValueError, match="holds papers of the world pocket, not paper"):
        load_sittings(get_world("paper"), None, folder, "base", 64, "hard")
    with pytest.raises(ValueError, match="holds no 'rarl'; it has base, rational, replay"):
        load_columns(folder, "rarl")
    with pytest.raises(ValueError, match="did not sit order 'hard' under budget 7"):
        load_points(folder, "base", 7, "hard")
    tokenizer = load_tokenizer("pocket-base", POCKET.tokenizer)
    with pytest.raises(ValueError, match="parts of papers"):
        load_sittings(POCKET, tokenizer, folder, "mft_greedy_knapsack", 64, "hard")
    save_rollouts(tmp_path / "copy", setting, results[:1], records)
    (tmp_path / "copy" / "replay.npz").write_bytes(b"0" * 99)
    with pytest.raises(ValueError, match="cut short"):
        load_columns(tmp_path / "copy", "replay")


def test_every_plot_draws(saved):
    folder, _, _, records = saved
    columns = {name: load_columns(folder, name) for name in ("replay", "base")}
    tagged = {"base": columns["base"] | {"predicted": columns["base"]["real"]}}
    figures = [plots.score_split(records, 64), plots.token_lengths(columns, 64, "hard"),
               plots.level_errors(tagged), plots.position_accuracy(columns, 64)]
    for figure in figures:
        figure.canvas.draw()
        assert figure.axes[0].get_xlabel() or figure.axes[-1].get_xlabel()
    bars = figures[0].axes[1].containers
    row = next(r for r in records if (r["method"], r["budget"], r["order"]) == (
        "replay", 64, "hard"))
    assert [c[0].get_width() for c in bars[:3]] == pytest.approx(
        [row["score"], row["lost_to_folly"], row["lost_to_order"]], abs=1e-9)


def test_the_interval_of_a_share_is_scipys():
    hits, count = np.array([0, 1, 13, 40, 40]), np.array([40, 40, 40, 40, 0])
    ends = plots.share_interval(hits / np.maximum(count, 1), count)
    for i in range(4):
        known = binomtest(int(hits[i]), 40).proportion_ci(method="wilson")
        assert ends[:, i] == pytest.approx([known.low, known.high], abs=1e-4)
    assert np.isnan(ends[:, 4]).all()
    figure = plots.line_panels([([1, 2], {"a": [[0.5, np.nan], [0.4, np.nan], [0.7, np.nan]],
                                          "b": [0.1, 0.2]}, "x", "y", "")])
    (bar,) = (c for c in figure.axes[0].containers)
    assert bar[2][0].get_segments()[0][:, 1] == pytest.approx([0.4, 0.7])


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_shipped_folders_are_whole_and_agree_with_themselves(folder):
    """Hashes match; scores follow from the columns, and the columns from the token ids."""
    verify_folder(folder)
    records = json.loads((folder / "records.json").read_text())
    world = get_world(records[0]["world"])
    for record in records:
        if world.methods.get(record["method"], POCKET.methods["optimal"]).way != "rational":
            points = load_points(folder, record["method"], record["budget"], record["order"])
            assert points.mean() == pytest.approx(record["score"])
    name, budget = records[0]["method"], records[0]["budget"]
    columns = load_columns(folder, name)
    here = (columns["budget"] == budget) & (columns["order"] == "hard")
    tokenizer = load_tokenizer(world.method(name).checkpoint, world.tokenizer)
    sittings = load_sittings(world, tokenizer, folder, name, budget, "hard")
    costs = [x.cost for s in sittings for x in s.response.segments]
    assert columns["cost"][here][: len(costs)].tolist() == costs
    assert sum(map(sum, (s.correct for s in sittings))) == columns["correct"][here][
        : len(costs)].sum()


def test_a_difference_of_regrets_shares_its_resamples():
    rng = np.random.default_rng(3)
    easy = rng.integers(1, 4, 400)
    hard = np.maximum(easy - rng.integers(0, 2, 400), 0)
    worse = np.maximum(hard - (rng.random(400) < 0.1), 0)
    value, (low, high) = regret_difference(worse, easy, hard, easy)
    assert value == pytest.approx(regret(worse.mean(), easy.mean()) - regret(hard.mean(),
                                                                             easy.mean()))
    assert 0 < low < value < high and high - low < 0.05
    assert regret_difference(hard, easy, hard, easy) == (0, [0, 0])
    with pytest.raises(ValueError, match="needs the same papers"):
        regret_difference(hard, easy, hard[1:], easy[1:])


def test_a_paired_difference_is_sharper_than_two_intervals():
    rng = np.random.default_rng(0)
    paper = rng.integers(0, 3, 300).astype(float)
    better = paper + (rng.random(300) < 0.2)
    difference, (low, high) = paired_difference(better, paper)
    assert difference == pytest.approx(better.mean() - paper.mean())
    assert 0 < low < difference < high and high - low < 0.1
    assert paired_difference(better[:1], paper[:1])[1] is None
    with pytest.raises(ValueError, match="the same papers, not 300 and 299"):
        paired_difference(better, paper[1:])


def test_medium_order_depends_on_the_seed():
    setting = Setting(POCKET, draw_papers(POCKET, 8))
    assert setting.exams("medium") != replace(setting, seed=1).exams("medium")
    assert setting.exams("hard") == replace(setting, seed=1).exams("hard")
