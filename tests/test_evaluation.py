"""Score, Regret, shares and intervals: by hand, and against a bootstrap written out."""

import numpy as np
import pandas as pd
import pytest

from roi_lib import evaluation
from roi_lib.engines.replay import reference_engine
from roi_lib.evaluation import summarize, with_interval
from roi_lib.exams import draw_papers, in_orders
from roi_lib.sitting import points, sit
from roi_lib.worlds import POCKET


def test_the_numbers_of_one_order_by_hand(env, refusal):
    papers = draw_papers(POCKET, 20)
    exams, other = (in_orders(papers, [order], 0) for order in ("hard", "easy"))
    engine = reference_engine(env, exams + other, [64])
    hard, easy = (sit(env, engine, some, 64) for some in (exams, other))
    summary, score, score_easy = summarize(hard, easy), points(hard).mean(), points(easy).mean()
    assert [summary[name] for name in ("score", "score_easy", "regret")] == pytest.approx(
        [score, score_easy, (score_easy - score) / score_easy])
    assert 0 < summary["regret_low"] < summary["regret"] < summary["regret_high"]
    assert summary["accuracy_2"] == hard[hard["position"] == 2]["correct"].mean() > 0
    assert summary["accuracy_2_low"] < summary["accuracy_2"] < summary["accuracy_2_high"]
    assert summary["tokens"] == pytest.approx(sum(summary[f"tokens_{i}"] for i in (1, 2, 3)))
    assert np.isnan(summary["tags_right"]) and summary["over_budget"] == summary["failed"] == 0
    wrong = summarize(hard.assign(tokens=65, overrun=3, failed="time-out"), easy)
    assert wrong["over_budget"] == wrong["overrun_cut"] == wrong["failed"] == 20
    others = hard.assign(exam=(hard["exam"] + 1) % 20)
    assert "these papers differ" in refusal(summarize, others, easy)


def test_exams_without_a_response_count_in_no_number(env):
    papers = draw_papers(POCKET, 20)
    exams, other = (in_orders(papers, [order], 0) for order in ("hard", "easy"))
    engine = reference_engine(env, exams + other, [64])
    hard, easy = (sit(env, engine, some, 64) for some in (exams, other))
    lost = [table.assign(failed=np.where(table["exam"].isin(some), "HTTP 400", ""))
            for table, some in ((hard, [2, 3]), (easy, [3, 4]))]
    found = summarize(*lost)
    own, pairs = (~hard["exam"].isin(some) for some in ([2, 3], [2, 3, 4]))
    alone, paired = (summarize(hard[rows], easy[rows]) for rows in (own, pairs))
    wanted = alone | {n: v for n, v in paired.items() if n.startswith("regret")} | {
        "failed": 2, "score_easy": points(easy)[~np.isin(range(20), [3, 4])].mean()}
    assert found == pytest.approx(wanted, nan_ok=True)
    nothing = summarize(hard.assign(failed="away"), easy)
    assert np.isnan([nothing[name] for name in ("score", "score_low", "regret", "tokens")]).all()
    assert nothing["failed"] == 20 and nothing["score_easy"] == points(easy).mean()


def test_intervals_are_those_of_a_bootstrap_over_papers():
    rng = np.random.default_rng(0)
    hard, easy = rng.integers(0, 4, 60).astype(float), rng.integers(1, 4, 60).astype(float)
    counts, samples = evaluation.resample_counts(60, 5), []
    assert counts.shape == (evaluation.BOOTSTRAP_RESAMPLES, 60) and (counts.sum(1) == 60).all()
    for count in counts.astype(int):
        exams = np.repeat(np.arange(60), count)  # the resample, paper by paper; paired
        samples.append(1 - hard[exams].mean() / easy[exams].mean())
    found = evaluation.score_and_regret(hard, easy, seed=5)
    assert [found["regret_low"], found["regret_high"]] == pytest.approx(
        np.percentile(samples, [2.5, 97.5]))
    _, low, high = with_interval("mean", [hard], lambda x: x).values()
    assert high - low == pytest.approx(2 * 1.96 * hard.std() / 60**0.5, rel=0.1)
    nothing, one = (evaluation.score_and_regret(np.zeros(n), np.zeros(n)) for n in (5, 1))
    assert nothing["score"] == nothing["score_high"] == 0 and np.isnan(nothing["regret"])
    assert np.isnan([nothing["regret_low"], one["score_low"]]).all(), "one exam has no interval"


def test_differences_are_paired(refusal):
    rng = np.random.default_rng(3)
    paper = rng.integers(0, 3, 300).astype(float)
    better = paper + (rng.random(300) < 0.2)
    difference, (low, high) = evaluation.paired_difference(better, paper)
    assert difference == pytest.approx(better.mean() - paper.mean())
    assert 0 < low < difference < high and high - low < 0.1, "sharper than two intervals"
    assert "not 300 and 299" in refusal(evaluation.paired_difference, better, paper[1:])


def test_shares_by_hand():
    seen = pd.DataFrame([
        ("easy", "7", False, True, True, 0, 0), ("easy", "8", False, False, True, 1, 0),
        ("medium", "NA", True, False, True, 3, 3), ("medium", None, False, False, True, 2, 1),
        ("hard", "NA", True, False, True, 2, 3), ("hard", None, False, False, False, -1, 0)],
        columns=["tier", "answer", "skipped", "correct", "reached", "predicted", "real"])
    assert evaluation.rates(seen) == pytest.approx({
        "skip_rate": 2 / 6, "skip_easy": 0, "skip_medium": 1 / 2, "skip_hard": 1 / 2,
        "accuracy": 1 / 2, "tried_right": 1 / 3, "tag_accuracy": 1 / 3, "tag_easy": 1 / 2,
        "tag_medium": 0, "tag_hard": np.nan, "tags_right": 2 / 5, "level_accuracy": 2 / 4,
        "answers_tagged_right": 1 / 2, "skips_tagged_right": 1 / 2}, nan_ok=True)
