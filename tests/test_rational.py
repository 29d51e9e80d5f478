"""The rational test-taker: by hand, against the solver, and honest about what it has seen."""

from itertools import product

import numpy as np
import pytest

from roi_lib import osmckp
from roi_lib.exams import Exam, draw_papers
from roi_lib.rational import (
    Outcomes,
    decision_losses,
    follow,
    prophet,
    rational_bounds,
    rational_policies,
    sample_outcomes,
)
from roi_lib.sitting import reference_generator
from roi_lib.worlds import POCKET

SKIP, TAG = 5, 3


def outcomes(cost, correct=None, family=None):
    cost = np.array(cost)
    correct = np.ones_like(cost, bool) if correct is None else np.array(correct, bool)
    family = [[f"f{i}" for i in range(cost.shape[1])]] * len(cost) if family is None else family
    return Outcomes(cost, correct, np.array(family), SKIP, TAG)


def luck(rng, papers, attempts, n=3):
    """Random papers with costs 10 to 80 and right answers in most attempts."""
    return outcomes(rng.integers(10, 80, (papers, n, attempts)),
                    rng.random((papers, n, attempts)) < 0.7)


def test_one_paper_by_hand():
    """The hard problem takes 50 tokens, always; the easy one 20; a skip takes 5."""
    two = outcomes([[[20] * 4, [50] * 4]])
    places = {"easy": np.array([[0, 1]]), "hard": np.array([[1, 0]])}
    bounds = rational_bounds(two, places, [69, 70, 24], folds=2)
    for budget, order, points, skipped in (
            (70, "easy", 2, [0, 0]), (70, "hard", 2, [0, 0]), (69, "easy", 1, [1, 0]),
            (69, "hard", 1, [1, 0]), (24, "easy", 1, [0, 1]), (24, "hard", 0, [1, 1])):
        b = bounds[budget, order]
        assert b.achievable == b.by_family == b.prophet == points
        assert b.plug_in == pytest.approx(points)
        assert b.skipped.tolist() == [skipped], "a tie goes to the cheaper action"
    assert bounds[24, "hard"].tokens.tolist() == [[5, 5]]
    tagged = rational_bounds(two.tagged(), places, [70, 76], folds=2)
    assert tagged[70, "hard"].achievable == 1 and tagged[76, "hard"].achievable == 2
    assert two.tagged().skip == SKIP + TAG


def test_losses_of_decisions_add_up_to_what_a_policy_falls_short_of():
    """Whatever a test-taker does, over all combinations of the attempts."""
    rng, papers, budget = np.random.default_rng(7), 20, 90
    some, place = luck(rng, papers, 3), np.tile([2, 0, 1], (papers, 1))
    losses = decision_losses(some, place, budget)
    assert losses.shape == (papers, 3, budget + 1, 2) and (losses > -1e-12).all()
    best = rational_policies(some, np.arange(3) >= 0, {"any": place}, budget)["any"][1][:, budget]
    cost, correct = (np.take_along_axis(x, place[:, :, None], 1)
                     for x in (some.cost, some.correct))
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


def test_policies_are_those_of_the_solver_and_are_followed_exactly():
    some, place = luck(np.random.default_rng(0), 12, 4), np.tile([0, 1, 2], (12, 1))
    solve, value = rational_policies(some, np.arange(4) >= 0, {"any": place}, 100)["any"]
    for budget in (100, 40):
        accuracy, skipped, tokens = follow(solve, some.cost, some.correct, SKIP, budget)
        for i in range(12):
            instance = osmckp.Instance(budget, [
                (osmckp.Action("skip", [(1, SKIP, 0)]),
                 osmckp.Action("solve", [(1 / 4, c, r) for c, r in zip(*row, strict=True)]))
                for row in zip(some.cost[i], some.correct[i], strict=True)])
            exact = osmckp.solve(instance)
            assert value[i, budget] == pytest.approx(exact.value)
            assert accuracy[i].sum() == pytest.approx(exact.value)
            whole = osmckp.distribution(instance, exact.policy)
            assert tokens[i].sum() == pytest.approx(whole.mean_spent)
        assert ((0 <= skipped) & (skipped <= 1)).all() and tokens.sum(1).max() <= budget


def test_the_prophet_is_the_offline_optimum():
    some = luck(np.random.default_rng(1), 20, 3)
    found = prophet(some.cost, some.correct, SKIP, 90)
    for i in range(20):
        known = [osmckp.offline_value([[SKIP, c] for c in some.cost[i, :, k]],
                                      [[0, r] for r in some.correct[i, :, k]], 90)
                 for k in range(3)]
        assert found[i] == pytest.approx(np.mean(known))


def test_the_truth_lies_between_achievable_and_plug_in():
    """1,000 papers of one kind, whose optimum is known: two attempts a problem tell little."""
    rng, papers, budget = np.random.default_rng(2), 1_000, 60
    p, cheap, dear = [0.5, 0.6], 30, 55  # as likely as each other
    truth = osmckp.solve(osmckp.Instance(budget, [
        (osmckp.Action("skip", [(1, SKIP, 0)]),
         osmckp.Action("solve", [(q * h, c, r) for c, h in ((cheap, 0.5), (dear, 0.5))
                                 for r, q in ((1, right), (0, 1 - right))]))
        for right in p])).value
    shape = (papers, 2, 4)
    drawn = outcomes(np.where(rng.random(shape) < 0.5, cheap, dear),
                     rng.random(shape) < np.array(p)[:, None])
    bound = rational_bounds(drawn, {"any": np.tile([0, 1], (papers, 1))}, [budget], folds=2)
    b = bound[budget, "any"]
    error = 3 * b.achievable.std() / np.sqrt(papers)
    assert b.achievable.mean() < truth - error / 3 and b.plug_in.mean() > truth + error
    assert abs(b.by_family.mean() - truth) < error, "papers of one kind: the family tells all"
    assert b.prophet.mean() > b.plug_in.mean()


def test_folds_must_divide_the_attempts():
    place = {"any": np.zeros((1, 1), int)}
    for folds in (1, 3):
        with pytest.raises(ValueError, match="4 attempts cannot be divided"):
            rational_bounds(outcomes([[[9] * 4]]), place, [50], folds=folds)


def test_attempts_cost_what_the_answer_costs(tokenizer):
    """Header and answer, without the end-of-sequence; cut attempts take the budget and earn 0."""
    papers = draw_papers(POCKET, 3)
    exams = [Exam((problem,), "easy") for paper in papers for problem in paper]
    generator = reference_generator(POCKET, tokenizer, exams, [60], "direct")
    found = sample_outcomes(POCKET, tokenizer, generator, papers, 60, samples=2)
    words = [[len(tokenizer(f"Q1. {p.solution}").input_ids) for p in paper] for paper in papers]
    assert (found.cost == np.minimum(words, 60)[:, :, None]).all() and found.cost.max() == 60
    assert (found.correct == (np.array(words) <= 60)[:, :, None]).all()
    assert (found.skip, found.tag) == (SKIP, TAG)
    assert found.family.tolist() == [[p.family for p in paper] for paper in papers]
