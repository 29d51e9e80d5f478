"""The rational test-taker: by brute force, and honest about what it has seen."""

from functools import cache
from itertools import product

import numpy as np
import pytest

from roi_lib import osmckp, rational
from roi_lib.engines.replay import reference_engine
from roi_lib.exams import Exam, draw_papers
from roi_lib.experiments.table import decision_losses
from roi_lib.rational import Outcomes, rational_bounds
from roi_lib.worlds import POCKET

SKIP, TAG = 5, 3
PLACE = [2, 0, 1]


def luck(seed, papers, attempts):
    """Random papers of one kind, costs 10 to 80, right answers in most attempts."""
    rng, shape = np.random.default_rng(seed), (papers, 3, attempts)
    return Outcomes(rng.integers(10, 80, shape), rng.random(shape) < 0.7,
                    np.array([["a", "b", "c"]] * papers), SKIP, TAG)


def brute_force(cost, right, known, paid, budget, skip=SKIP):
    """Points, tokens and skips of the best policy by the attempts `known`, paid by others."""
    def outcomes_of(i, tries, attempts):
        return [(cost[i][k], right[i][k]) for k in attempts] if tries else [(skip, False)]

    @cache
    def value(i, left, tries):
        return 0 if i == len(cost) else np.mean([
            (r and c <= left) + max(value(i + 1, max(left - c, 0), a) for a in (False, True))
            for c, r in outcomes_of(i, tries, known)])

    def pay(i, left):
        if i == len(cost):
            return np.zeros(3)
        tries = value(i, left, True) > value(i, left, False) + 1e-9  # a tie is a skip
        return np.mean([pay(i + 1, max(left - c, 0)) + (r and c <= left, min(c, left), not tries)
                        for c, r in outcomes_of(i, tries, paid)], axis=0)

    return pay(0, budget)


@pytest.mark.parametrize("tagged", [False, True])
def test_bounds_equal_brute_force(tagged):
    some = luck(4, 15, 4).tagged() if tagged else luck(4, 15, 4)
    assert some.skip == SKIP + TAG * tagged and some.cost.min() == 10 + TAG * tagged
    bounds = rational_bounds(some, {"any": np.tile(PLACE, (15, 1))}, [60, 110], folds=2)
    for budget, paper in product([60, 110], range(15)):
        exam = some.cost[paper][PLACE], some.correct[paper][PLACE]
        row = bounds.loc[budget, "any", paper]
        found = [brute_force(*exam, known, [k for k in range(4) if k not in known], budget,
                             some.skip) for known in ([1, 3], [0, 2])]  # attempts in turn
        assert np.mean(found, axis=0) == pytest.approx(
            [row["achievable"], *(row.filter(like=name).sum() for name in ("tokens", "skipped"))])
        assert row["plug_in"] == pytest.approx(
            brute_force(*exam, range(4), range(4), budget, some.skip)[0])
        known = [osmckp.offline_value([[some.skip, c] for c in exam[0][:, k]],
                                      [[0, r] for r in exam[1][:, k]], budget) for k in range(4)]
        assert row["hindsight"] == pytest.approx(np.mean(known))


def test_losses_of_decisions_add_up_to_what_a_policy_falls_short_of():
    some, papers, budget = luck(7, 20, 3), 20, 90
    losses = decision_losses(some, np.tile(PLACE, (papers, 1)), budget)
    assert losses.shape == (papers, 3, budget + 1, 2) and (losses > -1e-12).all()
    cost, correct = some.cost[:, PLACE], some.correct[:, PLACE]
    best = [brute_force(*exam, range(3), range(3), budget)[0]
            for exam in zip(cost, correct, strict=True)]
    for tries in product((False, True), repeat=3):
        lost, score = np.zeros(papers), np.zeros(papers)
        for paper, luck_of in product(range(papers), product(range(3), repeat=3)):
            left = budget
            for i, k in enumerate(luck_of):
                lost[paper] += losses[paper, i, left, int(tries[i])] / 27
                price = cost[paper, i, k] if tries[i] else SKIP
                score[paper] += (tries[i] and correct[paper, i, k] and price <= left) / 27
                left = max(left - price, 0)
        assert lost == pytest.approx(best - score)


def test_the_truth_lies_between_achievable_and_plug_in():
    """1,000 papers of coin flips, whose optimum is known: two attempts a problem tell little."""
    rng, papers, budget = np.random.default_rng(2), 1_000, 60
    truth = osmckp.solve(osmckp.Instance(budget, [
        (osmckp.Action("skip", [(1, SKIP, 0)]), osmckp.Action("solve", [
            (q / 2, c, r) for c in (30, 55) for r, q in ((1, right), (0, 1 - right))]))
        for right in (0.5, 0.6)])).value
    cost = np.where(rng.random((papers, 2, 4)) < 0.5, 30, 55)
    right = rng.random((papers, 2, 4)) < np.array([[0.5], [0.6]])
    drawn = Outcomes(cost, right, np.array([["a", "b"]] * papers), SKIP, TAG)
    bound = rational_bounds(drawn, {"any": np.tile([0, 1], (papers, 1))}, [budget], folds=2)
    mean, error = bound.mean(), 3 * bound["achievable"].std() / np.sqrt(papers)
    assert mean["achievable"] < truth - error / 3 and mean["plug_in"] > truth + error
    assert abs(mean["by_family"] - truth) < error and mean["hindsight"] > mean["plug_in"]


def test_attempts_cost_what_the_answer_costs(env, refusal):
    papers = draw_papers(POCKET, 3)
    exams = [Exam((problem,), "easy") for paper in papers for problem in paper]
    found = rational.sample_outcomes(env, reference_engine(env, exams, [60]), papers, 60, samples=2)
    words = np.array([[len(env.encode(f"Q1. {p.solution}")) for p in paper] for paper in papers])
    assert (found.cost == np.minimum(words, 60)[:, :, None]).all() and found.cost.max() == 60
    assert (found.correct == (words <= 60)[:, :, None]).all() and found.correct.any()
    assert (found.skip, found.tag, found.family[0, 0]) == (SKIP, TAG, papers[0][0].family)
    assert "2 attempts cannot be divided" in refusal(rational_bounds, found, {}, [50], folds=4)
