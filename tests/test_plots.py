"""Every figure is drawn once on small hand-made data, and shows what the data say."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from roi_lib.experiments.knapsack import distribution
from roi_lib.osmckp import SKIP, Action, Instance, solve
from roi_lib.teaching import plots

matplotlib.use("Agg")
RECORDS = [{"method": m, "budget": b, "order": o, "score": score, "score_low": score - 0.1,
            "score_high": score + 0.2, "regret": 0.1, "regret_low": 0.0, "regret_high": 0.2,
            "bound_statement": best, "lost_to_order": 0.25, "tokens": 60.0,
            "tokens_1": 30.0, "tokens_2": 20.0, "accuracy_1": 0.5, "accuracy_1_low": 0.4,
            "accuracy_2": 0.25}
           for m, score, best in (("base", 1.0, 1.5), ("mft", 1.6, 1.5),
                                  ("optimal_statement", 1.5, np.nan))
           for b in (64, 128) for o in ("easy", "medium", "hard")]
#: 40 problems a method and tier: 30 tried (2 cut), 6 skipped, 4 never reached; half of them right.
TABLE = pd.concat([pd.DataFrame({
    "method": method, "tier": tier, "order": "hard", "budget": 64, "position": position,
    "cost": [*range(10, 40), *[4] * 6, *[0] * 4], "reached": [True] * 36 + [False] * 4,
    "skipped": [False] * 30 + [True] * 6 + [False] * 4, "cut": [True] * 2 + [False] * 38,
    "predicted": np.array([3] * 2 + [1] * 26 + [-1] * 12, np.int8), "correct": [True, False] * 20,
    "real": np.array([0] * 2 + [0] * 13 + [1] * 25, np.uint8)})
    for method in ("base", "mft") for position, tier in enumerate(("hard", "medium", "easy"), 1)])
LOG = pd.DataFrame({"step": [1, 2, 3, 4], "reward": [1.0, np.nan, 2.0, 3.0],
                    "skip_hard": [0.1, 0.2, 0.3, 0.4], "entropy": [0.5] * 4})


@pytest.fixture(autouse=True)
def style():
    plots.use_style()
    yield
    for number in plt.get_fignums():  # what cannot be drawn raises here
        plt.figure(number).canvas.draw()
    plt.close("all")


def texts(items):
    return [item.get_text() for item in items]


def sizes(ax, what="width"):
    """Widths (or heights) of the bars, a list a part."""
    return [[bar.properties()[what] for bar in part] for part in ax.containers
            if hasattr(part, "patches")]


def xs(ax):
    return [list(line.get_xdata()) for line in ax.lines]


def test_the_interval_of_a_share_is_scipys():
    hits, count = np.array([0, 1, 13, 40, 0]), np.array([40, 40, 40, 40, 0])
    ends = plots.share_interval(hits / np.maximum(count, 1), count)
    for i in range(4):
        known = binomtest(int(hits[i]), 40).proportion_ci(method="wilson")
        assert ends[:, i] == pytest.approx([known.low, known.high], abs=1e-4)
    assert np.isnan(ends[:, 4]).all()


def test_lines_have_looks_intervals_and_gaps():
    fig = plots.lines(
        ([1, 2], {"rarl": [[0.5, np.nan], [0.4, np.nan], [0.7, np.nan]]}, "x", "y", "one"),
        (None, {"b": pd.Series([3.0, 4.0], [10, 20]), "c": pd.Series([5.0], [15])}, "x", "y", ""))
    (bar,) = fig.axes[0].containers
    assert bar[2][0].get_segments()[0][:, 1] == pytest.approx([0.4, 0.7])
    assert bar[0].get_color() == plots.method_look("rarl")[1]
    assert xs(fig.axes[1]) == [[10, 20], [15]]
    assert [texts(ax.get_legend().texts) for ax in fig.axes] == [["MFT + RARL"], ["b", "c"]]


def test_bars_and_ranges():
    series = {"mft": [0.25, 0.5], "other": [0.5, 0.25], "third": [0.125, 0.125]}
    fig = plots.bars(["a", "b"], series, "x", "share")
    assert np.allclose(sizes(fig.axes[0], "x"), [
        [x, x + 1] for x in (-0.4, -0.4 / 3, 0.4 / 3)]), "centred on their labels"
    assert texts(fig.legends[0].texts) == ["MFT", "other", "third"]
    above, below = plots.ranges({"one": {"a": (1, 2, 5)}, "two": {"a": (1, 2, 3, 4, 8)}}, "tokens",
                                lines={"edge": 6}, log=True).axes
    assert xs(above) == [[1, 5], [2], [6, 6]] and xs(below) == [[1, 8], [3], [6, 6]]
    assert sizes(below) == [[2]] and below.get_xscale() == "log" and texts(below.texts) == ["edge"]


def test_figures_of_the_knapsack():
    exam = Instance(10, [[SKIP, Action("try", [(0.5, 3, 1), (0.5, 6, 0)])],
                         [SKIP, Action("try", [(1, 4, 1)])]])
    solution = solve(exam)
    fig = plots.policy_map(solution, ["hard", "easy"])
    assert sum(map(sum, sizes(fig.axes[0]))) == solution.policy.size
    assert texts(fig.legends[0].texts) == ["skip", "try"]
    value, price = (ax.lines[0].get_ydata() for ax in plots.value_curve(solution).axes)
    assert value[-1] == pytest.approx(1.5) and price.sum() == pytest.approx(150)
    fig = plots.score_bars({"best": distribution(exam, solution.policy),
                            "skip": distribution(exam, np.array([0, 0]))})
    assert sizes(fig.axes[0], "height") == [[0, 0.5, 0.5], [1, 0, 0]]


def test_what_is_earned_and_lost():
    (ax,) = plots.regret_split(("", ["a", "b"], [1.0, 0.5], 1.25, 2.0)).axes
    assert sizes(ax) == [[1.0, 0.5], [0.25, 0.75], [0.75, 0.75]]
    assert texts(ax.get_yticklabels()) == ["a  1.00", "b  0.50"]
    medium, hard = plots.score_split(pd.DataFrame(RECORDS).set_axis(range(7, 25)), 64).axes
    assert hard.get_title("left") == "hard order, 64 tokens"
    assert np.allclose(sizes(medium), [[1.0, 1.6], [0.5, 0], [0.25, 0.15]])
    ends = medium.containers[-1][2][0].get_segments()
    assert np.allclose([end[:, 0] for end in ends], [[0.9, 1.2], [1.5, 1.8]])


def test_sweeps():
    rows = [r | {"x": r["budget"]} for r in RECORDS]
    left, right = plots.sweep_lines(rows, "budget").axes
    assert left.get_xticks().tolist() == [64, 128] and left.get_title("left") == "easy order"
    assert left.get_ylabel() and not right.get_ylabel()
    base, mft, optimal = right.containers
    ends = [bar[2][0].get_segments()[0][:, 1] for bar in (base, mft)]
    assert np.allclose(ends, [[0.9, 1.2], [1.5, 1.8]]) and not optimal[2], "a bound has none"
    assert optimal[0].get_ydata().tolist() == [1.5, 1.5]
    (ax,) = plots.sweep_lines(rows, "budget", ["hard"], "regret", "Regret").axes
    assert ax.lines[0].get_ydata().tolist() == [0.1, 0.1] and ax.get_ylabel() == "Regret"


def test_where_tokens_go():
    small, _ = plots.tokens_by_position([r for r in RECORDS if r["method"] == "base"]).axes
    assert sizes(small) == [[30] * 3, [20] * 3]
    assert texts(small.texts) == ["50%"] * 3 + ["25%"] * 3
    fig = plots.token_strips(["a", "b"], [[0, 20, 44], [0, 50, 0]], 64)
    assert sizes(fig.axes[0]) == [[20, 50], [44, 0]]
    assert texts(fig.legends[0].texts) == ["problem 1", "problem 2"], "there is no preamble"
    assert texts(plots.token_strips(["a"], [[12, 20, 32]], 64).axes[0].texts) == ["12", "20", "32"]
    html = plots.token_lines([("row:", ["<a>", "b"], ["level", "learned"])], {"level": "tag"}).data
    assert "&lt;a&gt;</b> <u" in html and ">tag</b>" in html and ">learned</u>" in html


def test_tokens_levels_and_answers_of_problems():
    easy, _, hard = plots.token_lengths(TABLE, 64, "hard").axes
    assert texts(easy.get_yticklabels())[1] == "MFT (75% / 15% / 10%)"
    assert hard.lines[1].get_xdata() == [24.5], "the median of those tried"
    few = TABLE[(TABLE["method"] == "base") | (TABLE["cost"] < 30)]
    assert np.isnan(xs(plots.token_lengths(few, 64, "hard").axes[0])[2]).all()
    fig = plots.level_errors(TABLE)
    assert texts(fig.legends[0].texts) == ["base (exact: 50.0%)", "MFT (exact: 50.0%)"]
    assert sizes(fig.axes[0], "height") == [[0, 0, 0, 0.5, 0.5, 0, 0]] * 2
    (ax,) = plots.position_accuracy(TABLE, 64, ["hard"]).axes
    assert ax.lines[0].get_ydata().tolist() == [0.5] * 3 and ax.get_xticks().tolist() == [1, 2, 3]
    (ax,) = plots.level_shares([{"family": "tram", "tier": "hard", "level_0": 0.5, "level_1": 0.25,
                                 "level_2": 0.21, "level_3": 0.04, "solve_rate": 0.87}]).axes
    assert texts(ax.get_yticklabels()) == ["tram (hard)  0.87"]
    assert texts(ax.texts) == ["50%", "25%", "21%", ""], "too narrow for its share"
    (ax,) = plots.confusion_matrix([[15, 5], [3, 3]]).axes
    assert texts(ax.texts) == ["15\n75%", "5\n25%", "3\n50%", "3\n50%"]
    assert ax.images[0].get_array().tolist() == [[0.75, 0.25], [0, 0]], "few are not shaded"


def test_trainings(capsys):
    log = pd.DataFrame({"step": [1, 2]} | {name: [0.1, 0.2] for name in (
        "tag_easy", "tag_medium", "tag_hard", "answer_accuracy", "skip_hard")})
    assert [len(ax.lines) for ax in plots.mft_log(log).axes] == [3, 2]
    fig = plots.training_curves({"a": LOG, "b": LOG}, ["reward", "skip_hard", "entropy"], window=2)
    assert xs(fig.axes[0]) == [[1, 3, 4]] * 2
    assert fig.axes[0].lines[0].get_ydata().tolist() == [1, 1.5, 2.5]
    assert [ax.get_ylabel() for ax in fig.axes] == ["reward", "skip_hard", "entropy [nats]"]
    live = plots.LiveCurves(["reward"], every=2)
    for row in LOG.to_dict("records"):
        live(row)
    assert capsys.readouterr().out.count("Figure") == 2 and xs(live.figure().axes[0]) == [[1, 3, 4]]
