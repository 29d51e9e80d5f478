"""Score, Regret, shares and intervals: by hand, and against a bootstrap written out."""

import numpy as np
import pandas as pd
import pytest

from roi_lib.engines.replay import reference_engine
from roi_lib.evaluation import (
    BOOTSTRAP_RESAMPLES,
    by_position,
    confusion,
    paired_difference,
    paired_interval,
    per_exam,
    rates,
    regret,
    regret_difference,
    resample_counts,
    score_and_regret,
    shortfall,
    summarize,
)
from roi_lib.exams import draw_papers, in_orders
from roi_lib.sitting import points, sit
from roi_lib.worlds import POCKET


@pytest.fixture(scope="module")
def sat(env):
    """What a faultless writer makes of 20 papers under 64 tokens, by order."""
    papers = draw_papers(POCKET, 20)
    exams = {order: in_orders(papers, [order], 0) for order in ("easy", "hard")}
    engine = reference_engine(env, exams["easy"] + exams["hard"], [64])
    return {order: sit(env, engine, some, 64) for order, some in exams.items()}


def test_score_and_regret_by_hand(sat):
    summary = summarize(sat["hard"], sat["easy"])
    score, easy = (points(sat[order]).mean() for order in ("hard", "easy"))
    assert summary["score"] == score and summary["score_easy"] == easy > score > 0
    assert summary["regret"] == pytest.approx((easy - score) / easy)
    assert summary["regret_low"] < summary["regret"] < summary["regret_high"]
    frame = per_exam(sat["hard"])
    assert frame["points"].tolist() == points(sat["hard"]).tolist()
    assert summary["accuracy_2"] == sat["hard"].query("position == 2")["correct"].mean()
    assert summary["tokens_1"] == sat["hard"].query("position == 1")["cost"].mean()
    assert summary["tokens"] == pytest.approx(sum(summary[f"tokens_{i}"] for i in (1, 2, 3)))
    assert np.isnan(summary["tags_right"]) and summary["over_budget"] == summary["failed"] == 0
    wrong = sat["hard"].assign(tokens=65, overrun=3, failed="time-out")
    assert [summarize(wrong, sat["easy"])[name] for name in (
        "over_budget", "overrun_cut", "failed")] == [20, 20, 20]


def test_regret_needs_the_same_papers_and_a_score(sat, refusal):
    others = sat["hard"].assign(exam=(sat["hard"]["exam"] + 1) % 20)
    assert "these papers differ" in refusal(summarize, others, sat["easy"])
    assert np.isnan(regret(0.0, 0.0)) and regret(1.0, 2.0) == 0.5
    nothing = score_and_regret(np.zeros(5), np.zeros(5))
    assert nothing["score"] == nothing["score_high"] == 0
    assert np.isnan([nothing["regret"], nothing["regret_low"], nothing["regret_high"]]).all()


def test_intervals_are_those_of_a_bootstrap_over_papers():
    rng = np.random.default_rng(0)
    hard, easy = rng.integers(0, 4, 60).astype(float), rng.integers(1, 4, 60).astype(float)
    counts = resample_counts(60, 5)
    assert counts.shape == (BOOTSTRAP_RESAMPLES, 60) and (counts.sum(1) == 60).all()
    assert counts.var() == pytest.approx(59 / 60, rel=0.02), "drawn with replacement"
    samples = []
    for count in counts.astype(int):
        exams = np.repeat(np.arange(60), count)  # the resample, paper by paper; paired
        samples.append(1 - hard[exams].mean() / easy[exams].mean())
    found = paired_interval([hard, easy], lambda x, e: (e - x) / e, seed=5)
    assert found == pytest.approx(np.percentile(samples, [2.5, 97.5]))
    low, high = paired_interval([hard], lambda x: x)
    assert high - low == pytest.approx(2 * 1.96 * hard.std() / 60**0.5, rel=0.1)


def test_intervals_by_position_are_those_of_a_share():
    right = np.zeros((400, 3))
    right[:100, 1] = right[:, 2] = 1
    found = by_position(pd.DataFrame(right, columns=["accuracy_1", "accuracy_2", "accuracy_3"]))
    assert [found[f"accuracy_{i}"] for i in (1, 2, 3)] == [0, 0.25, 1]
    for i in (1, 3):
        assert found[f"accuracy_{i}_low"] == found[f"accuracy_{i}"] == found[f"accuracy_{i}_high"]
    half = 1.96 * (0.25 * 0.75 / 400) ** 0.5  # of the binomial, by the normal approximation
    assert found["accuracy_2_low"] == pytest.approx(0.25 - half, abs=0.006)
    assert found["accuracy_2_high"] == pytest.approx(0.25 + half, abs=0.006)


def test_one_exam_has_no_interval():
    found = by_position(pd.DataFrame({"accuracy_1": [1.0], "tokens_1": [9]}))
    assert found["accuracy_1"] == 1 and found["tokens_1"] == 9
    assert np.isnan([found["accuracy_1_low"], found["accuracy_1_high"]]).all()


def test_a_paired_difference_is_sharper_than_two_intervals(refusal):
    rng = np.random.default_rng(0)
    paper = rng.integers(0, 3, 300).astype(float)
    better = paper + (rng.random(300) < 0.2)
    difference, (low, high) = paired_difference(better, paper)
    assert difference == pytest.approx(better.mean() - paper.mean())
    assert 0 < low < difference < high and high - low < 0.1
    assert "the same papers, not 300 and 299" in refusal(paired_difference, better, paper[1:])


def test_a_difference_of_regrets_shares_its_resamples(refusal):
    rng = np.random.default_rng(3)
    easy = rng.integers(1, 4, 400)
    hard = np.maximum(easy - rng.integers(0, 2, 400), 0)
    worse = np.maximum(hard - (rng.random(400) < 0.1), 0)
    value, (low, high) = regret_difference(worse, easy, hard, easy)
    assert value == pytest.approx((hard.mean() - worse.mean()) / easy.mean())
    assert 0 < low < value < high and high - low < 0.05
    assert regret_difference(hard, easy, hard, easy) == (0, (0, 0))
    assert "needs the same papers" in refusal(regret_difference, hard, easy, hard[1:], easy[1:])


#: tier, answer, skipped, correct, reached, predicted, real
SEEN = pd.DataFrame([
    ("easy", "7", False, True, True, 0, 0), ("easy", "8", False, False, True, 1, 0),
    ("medium", "NA", True, False, True, 3, 3), ("medium", None, False, False, True, 2, 1),
    ("hard", "NA", True, False, True, 2, 3), ("hard", None, False, False, False, -1, 0)],
    columns=["tier", "answer", "skipped", "correct", "reached", "predicted", "real"])


def test_shares_and_confusion_by_hand():
    assert rates(SEEN) == pytest.approx({
        "skip_rate": 2 / 6, "skip_easy": 0, "skip_medium": 1 / 2, "skip_hard": 1 / 2,
        "accuracy": 1 / 2, "tried_right": 1 / 3, "tag_accuracy": 1 / 3, "tag_easy": 1 / 2,
        "tag_medium": 0, "tag_hard": np.nan, "tags_right": 2 / 5, "level_accuracy": 2 / 4,
        "answers_tagged_right": 1 / 2, "skips_tagged_right": 1 / 2}, nan_ok=True)
    assert confusion(SEEN).tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 1]]


def test_what_is_left_behind_adds_up():
    rng = np.random.default_rng(1)
    bound, easy = (pd.DataFrame({name: rng.random(50) + 1 for name in (
        "achievable", "plug_in", "by_family", "hindsight")}) for _ in range(2))
    earned = rng.random(50)
    found = shortfall(earned, bound, easy)
    lost = found["lost_to_order"] + found["lost_to_allocation"]
    assert earned.mean() + lost == pytest.approx(easy["achievable"].mean())
    assert found["optimality_gap"] == pytest.approx(1 - earned.mean() / found["rational"])
    assert found["rational_plug_in"] == pytest.approx(bound["plug_in"].mean())
    for name in ("optimality_gap", "lost_to_order", "lost_to_allocation"):
        assert found[f"{name}_low"] < found[name] < found[f"{name}_high"]
    low, high = paired_interval([bound["achievable"].to_numpy(), earned], lambda v, x: v - x)
    assert (found["lost_to_allocation_low"], found["lost_to_allocation_high"]) == (low, high)
