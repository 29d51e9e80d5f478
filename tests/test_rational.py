"""The rational test-taker: by brute force, and honest about what it has seen."""

from functools import cache
from itertools import product

import numpy as np
import pytest

from roi_lib import osmckp, rational
from roi_lib.engines.replay import ReplayEngine, reference_engine
from roi_lib.exams import Exam, draw_papers, tag
from roi_lib.experiments import knapsack
from roi_lib.generation import Engine, Rollout
from roi_lib.rational import BOUNDS, PRIOR, Outcomes, bounds, sample_outcomes
from roi_lib.worlds import POCKET, RULES

SKIP, N = 5, 3
PLACE = np.array([[2, 0, 1], [1, 2, 0], [0, 1, 2], [2, 0, 1], [2, 1, 0]])
PAPERS = draw_papers(POCKET, 3)
PROBLEMS = [problem for paper in PAPERS for problem in paper]


def luck(seed, papers=5, efforts=3, attempts=4):
    """Random papers of one kind: the dearer an effort, the surer; one statement in two tiers."""
    rng, shape = np.random.default_rng(seed), (papers, N, efforts, attempts)
    dear = np.arange(efforts)[:, None]
    words = rng.choice(["a", "b", "c"], (papers, N))
    return Outcomes(rng.integers(10, 30, shape) + 18 * dear, rng.random(shape) < 0.4 + 0.25 * dear,
                    words, np.where(words == "c", "hard", "easy"), SKIP)


def known_of(some, paper, problem, attempts=()):
    """What is known of a problem: a list of (p, cost, right) for each action, skip first. Own
    `attempts` count one each, all attempts at problems with its words together `PRIOR`."""
    found, weight = [[(1.0, SKIP, False)]], len(attempts) + PRIOR if len(attempts) else 1
    alike = np.argwhere(some.statement == some.statement[paper, problem]).tolist()
    for cost, right in zip(some.cost[paper, problem], some.correct[paper, problem], strict=True):
        own = [(1 / weight, cost[a], right[a]) for a in attempts]
        share = (PRIOR if own else 1) / weight / len(alike) / some.cost.shape[3]
        found.append(own + [(share, some.cost[p, q, len(found) - 1, a],
                             some.correct[p, q, len(found) - 1, a])
                            for p, q in alike for a in range(some.cost.shape[3])])
    return found


def best_action(known, skip=SKIP):
    """The action that is best by what is `known` of each problem, by (problem, tokens left); on a
    tie the cheapest, then the first."""
    @cache
    def value(i, left):
        return max(gain(i, left, k) for k in range(len(known[i]))) if i < len(known) else 0.0

    @cache
    def gain(i, left, k):
        return sum(p * ((right and cost <= left) + value(i + 1, max(left - cost, 0)))
                   for p, cost, right in known[i][k])

    @cache
    def choose(i, left):
        charge = {k: round(sum(p * min(cost, left) for p, cost, _ in some), 9)
                  for k, some in enumerate(known[i]) if gain(i, left, k) > value(i, left) - 1e-8}
        return min(charge, key=lambda k: (charge[k], k))

    return choose


def expect(choose, paid, budget):
    """Right, skipped and tokens by position, [3, N], where `paid` attempts are as likely."""
    def go(i, left):
        if i == len(paid):
            return 0.0
        k, row = choose(i, left), np.zeros((3, len(paid)))
        total = 0.0
        for cost, right in paid[i][k - 1] if k else [(SKIP, False)]:
            row[:, i] = right and cost <= left, k == 0, min(cost, left)
            total = total + row + go(i + 1, max(left - cost, 0))
        return total / (len(paid[i][k - 1]) if k else 1)

    return go(0, budget)


def rules(some, paper, order, budget):
    """The six rules of thumb by plain loops, name -> action by (position, tokens left)."""
    cost, right, hard = [], [], []
    for problem in order:
        alike = np.argwhere(some.statement == some.statement[paper, problem]).tolist()
        for x, means in ((some.cost, cost), (some.correct, right)):
            means.append([np.mean([x[p, q, k] for p, q in alike])
                          for k in range(some.cost.shape[2])])
        hard.append(some.tier[paper, problem] == "hard")
    full = [1 + max(range(len(r)), key=r.__getitem__) for r in right]
    brief = [1 + min(range(len(c)), key=c.__getitem__) for c in cost]
    taken, room = set(), budget
    for i in sorted(range(N), key=lambda i: cost[i][full[i] - 1]):
        room -= cost[i][full[i] - 1]
        taken |= {i} if room >= 0 else set()

    def share(i, left):
        fits = [k for k, c in enumerate(cost[i]) if c * (N - i) <= left]
        return 1 + max(fits, key=right[i].__getitem__) if fits else 0

    return {"always_full": lambda i, left: full[i], "always_brief": lambda i, left: brief[i],
            "skip_hard": lambda i, left: full[i] * (not hard[i]), "equal_share": share,
            "skip_hard_unless_last": lambda i, left: full[i] * (i == N - 1 or not hard[i]),
            "cheapest_first": lambda i, left: full[i] * (i in taken)}


def test_bounds_and_rules_equal_brute_force():
    """Three efforts and a skip; attempts 0 and 2 pay what 1 and 3 decided, and the other way."""
    some, budgets, folds = luck(4), [60, 110], ([0, 2], [1, 3])
    found = bounds(some, {"any": PLACE}, budgets, folds=2)
    assert {*found.index.unique("policy")} == {*BOUNDS, *RULES} and len(found) == 9 * 2 * 5
    differ = set()
    for budget, paper in product(budgets, range(5)):
        order, wanted = PLACE[paper], {}
        paid = [[[list(zip(some.cost[paper, i, k, fold], some.correct[paper, i, k, fold],
                           strict=True)) for k in range(3)] for i in order] for fold in folds]
        for name, own in (("statement", ((), ())), ("problem", folds[::-1])):
            wanted[name] = np.mean([expect(best_action(
                [known_of(some, paper, i, seen) for i in order]), some_paid, budget)
                for seen, some_paid in zip(own, paid, strict=True)], axis=0)
        for name, choose in rules(some, paper, order, budget).items():
            wanted[name] = np.mean([expect(choose, one, budget) for one in paid], axis=0)
        for name, (right, skipped, tokens) in wanted.items():
            row = found.loc[name, budget, "any", paper]
            assert row["points"] == pytest.approx(right.sum()), (name, budget, paper)
            for what, numbers in (("accuracy", right), ("skipped", skipped), ("tokens", tokens)):
                assert [row[f"{what}_{i}"] for i in (1, 2, 3)] == pytest.approx(numbers), name
            differ.add(name if wanted["statement"].tolist() != wanted[name].tolist() else "")
        known = [knapsack.offline_value(
            [[SKIP, *some.cost[paper, i, :, a]] for i in order],
            [[0, *some.correct[paper, i, :, a]] for i in order], budget) for a in range(4)]
        assert found.loc["luck", budget, "any", paper]["points"] == pytest.approx(np.mean(known))
    assert differ == {"", "problem", *RULES}, "each policy is one of its own"


@pytest.mark.parametrize("own", [False, True])
def test_exact_policies_are_those_that_the_solver_finds(own):
    """All papers at a time, at every number of tokens left, and with the prior of the words."""
    some, budget = luck(11, papers=5, attempts=6), 130
    known = np.array([True, False, True, True, False, False]) if own else None
    found = rational.exact_policies(some, PLACE, budget, known)
    for paper, policy in enumerate(found):
        exam = osmckp.Instance(budget, [[osmckp.Action(str(k), rows) for k, rows in enumerate(
            known_of(some, paper, i, np.flatnonzero(known) if own else ()))]
            for i in PLACE[paper]])
        best = osmckp.solve(exam).value_function
        np.testing.assert_allclose(osmckp.evaluate(exam, policy), best, atol=1e-9)
        assert (policy[:, 0] == 0).all() and len(np.unique(policy)) > 2


def coin_flips(right, cost):
    """Papers whose first and second problem have one effort, attempts [papers, 2, attempts]."""
    shape = len(cost), 2
    return Outcomes(cost[:, :, None], right[:, :, None], np.tile(["a", "b"], (shape[0], 1)),
                    np.full(shape, "hard"), SKIP)


def test_what_is_known_of_a_problem_pays_by_hand():
    """Every problem is always right or never, one of 30 tokens fits: by its words, half a point;
    who knows the problem gives up the wrong first one, and loses only where both are wrong."""
    right = np.array(list(product([True, False], repeat=2)))[:, :, None].repeat(4, axis=2)
    some, place = coin_flips(right, np.full((4, 2, 4), 30)), np.tile([0, 1], (4, 1))
    found = bounds(some, {"easy": place}, [34, 35, 65])["points"].unstack("exam")
    assert found.loc["statement", 35].to_numpy().tolist() == [[1, 0, 1, 0]], "a tie is a skip"
    assert found.loc["problem", 35].to_numpy().tolist() == [[1, 1, 1, 0]]
    assert found.loc["luck", 35].to_numpy().tolist() == [[1, 1, 1, 0]]
    assert found.loc["luck", 34].to_numpy().tolist() == [[1, 1, 0, 0]], "no token for a skip"
    for name in ("statement", "problem", "luck", "always_full"):
        assert found.loc[name, 65].to_numpy().tolist() == [[2, 1, 1, 0]]


def test_no_bound_is_too_good_to_be_true_where_problems_are_alike():
    """400 papers of coin flips: four attempts tell nothing, and are not taken for knowledge."""
    rng, papers, budget = np.random.default_rng(2), 400, 60
    truth = osmckp.solve(osmckp.Instance(budget, [
        (osmckp.Action("skip", [(1, SKIP, 0)]), osmckp.Action("solve", [
            (q / 2, c, r) for c in (30, 55) for r, q in ((1, right), (0, 1 - right))]))
        for right in (0.5, 0.6)])).value
    right = rng.random((papers, 2, 4)) < np.array([[0.5], [0.6]])
    some = coin_flips(right, np.where(rng.random((papers, 2, 4)) < 0.5, 30, 55))
    found = bounds(some, {"any": np.tile([0, 1], (papers, 1))}, [budget], folds=2)["points"]
    mean, error = found.groupby("policy").mean(), 3 * found.loc["statement"].std() / papers**0.5
    assert abs(mean["statement"] - truth) < error and mean["luck"] > truth + error
    assert mean["problem"] < mean["statement"] + 1e-9


# ---------------------------------------------------------------- attempts
def test_attempts_cost_what_the_answer_costs(env):
    exams = [Exam((problem,), "easy") for problem in PROBLEMS]
    found = sample_outcomes(env, reference_engine(env, exams, [40]), PAPERS, 40, samples=2)
    words = np.array([[len(env.encode(f"Q1. {p.solution}")) for p in paper] for paper in PAPERS])
    assert (found.cost == np.minimum(words, 40)[:, :, None, None]).all()
    assert (found.correct == (words <= 40)[:, :, None, None]).all()
    assert found.cost.shape == (3, 3, 1, 2) and found.cost.max() == 40 and found.skip == SKIP
    first = PAPERS[0][0]
    assert (found.statement[0, 0], found.tier[0].tolist()) == (
        f"{first.family} {first.length}", ["easy", "medium", "hard"])


def test_with_tags_each_level_is_an_effort_that_is_made_to_begin(env):
    """At once after Level-0, in brief after Level-1, in full after Level-2; and the tag is paid."""
    alone, replies, costs = [Exam((p,), "easy") for p in PROBLEMS], {}, []
    for exam, p in zip(alone, PROBLEMS, strict=True):
        costs.append([])
        for level, words in enumerate((f"\\boxed{{{p.answer}}}", p.brief, p.solution)):
            opening = env.encode(f"Q1. {tag(level)}")
            replies[(*env.prompt(exam, 128, "roi"), *opening)] = env.encode(words)
            costs[-1].append(len(opening) + len(env.encode(words)))
    engine = ReplayEngine(replies, env.tokenizer.eos_token_id)
    found = sample_outcomes(env, engine, PAPERS, 128, samples=2, style="roi")
    wanted = np.reshape(costs, (3, 3, 3))[..., None]
    assert (found.cost == np.minimum(wanted, 128)).all() and found.cost.shape == (3, 3, 3, 2)
    assert (found.correct == (wanted <= 128)).all()
    assert found.skip == len(env.encode(f"Q1. {tag(3)} \\boxed{{NA}}")) == SKIP + 3


def test_what_cannot_be_bounded_is_refused(env, refusal):
    class Away(Engine):
        def stream(self, requests, temperature=1.0):
            yield from ((i, [Rollout((), False, failed="HTTP 500")] * r.n)
                        for i, r in enumerate(requests))

    some = luck(1)
    assert "4 attempts cannot be divided into 3 folds" in refusal(bounds, some, {}, [50], folds=3)
    assert "give a multiple of 4" in refusal(rational.check_samples, 6)
    assert "18 of 18 attempts failed, and the bounds need all of them: HTTP 500" in refusal(
        sample_outcomes, env, Away(), PAPERS, 60, 2)
    assert "5 papers of 3 problems, and the order easy of 4 of 3" in refusal(
        bounds, some, {"easy": PLACE[:4]}, [50])
    none = Outcomes(some.cost, some.correct, some.statement, np.full((5, N), ""), SKIP)
    assert "need problems of the tiers easy, medium, hard" in refusal(
        rational.rule_policies, none, PLACE, 50)


def test_papers_without_hard_problems_have_rules_too():
    some = luck(4)
    easy = Outcomes(some.cost, some.correct, some.statement, np.full((5, N), "easy"), SKIP)
    found = bounds(easy, {"any": PLACE}, [60])["points"]
    for name in ("skip_hard", "skip_hard_unless_last"):
        assert found.loc[name].tolist() == found.loc["always_full"].tolist()


def test_luck_gives_a_problem_up_by_what_costs_least():
    """A wrong attempt of 2 tokens instead of a skip of 5, and then one of 30 fits into 32."""
    cost, right = np.array([[[[2]], [[30]]]]), np.array([[[[False]], [[True]]]])
    assert rational.luck(cost, right, SKIP, 32).tolist() == [1]
    assert rational.luck(cost, right, SKIP, 31).tolist() == [0]
