"""Exercises that check themselves: `check("01.1", answer)` prints one line.

The truth is worked out by the library on random cases, so there is no solution to read here. An
exercise is a case maker (rng, number) -> (the function's arguments, truth) under `cases`, or a
checker (answer) -> None (right) or a hint (wrong) under `exercise`. "03.1" is of notebook 03."""

from copy import deepcopy
from dataclasses import replace
from itertools import permutations, product

import numpy as np
import torch

from roi_lib import osmckp
from roi_lib.experiments import knapsack
from roi_lib.generation import within_budget
from roi_lib.mft import Sample, align
from roi_lib.rarl import advantages, policy_loss
from roi_lib.worlds import ORDERS, POCKET

EXERCISES = {}


class NotAnswered(Exception):
    """The reader's function still returns `...` or None."""


def exercise(exercise_id):
    """Decorator that registers a checker under `exercise_id`, such as "01.1"."""
    return lambda checker: EXERCISES.setdefault(exercise_id, checker)


def check(exercise_id, answer):
    """Print [PASS], [TRY AGAIN] with a hint, or [ ] (no answer yet). ValueError: unknown id."""
    if exercise_id not in EXERCISES:
        raise ValueError(f"no exercise {exercise_id!r}; there are {', '.join(sorted(EXERCISES))}")
    try:
        if answer is ... or answer is None:
            raise NotAnswered
        hint = EXERCISES[exercise_id](answer)
    except NotAnswered:
        print(f"[ ] {exercise_id}: not answered yet")
        return
    except Exception as error:  # whatever the reader's code raises is theirs to read
        hint = " ".join(f"your answer raised {type(error).__name__}: {error}".split())
    print(f"[TRY AGAIN] {exercise_id}: {hint}" if hint else f"[PASS] {exercise_id}")


def ask(function, *args):
    """Call the reader's function on copies; NotAnswered if it returns `...` or None."""
    result = function(*deepcopy(args))
    if result is ... or result is None:
        raise NotAnswered
    return result


def close(got, truth, tolerance=1e-9):
    """Whether the reader's number, or each of several, is right up to rounding; NaN is not."""
    got, truth = np.asarray(got, float), np.asarray(truth, float)
    return got.shape == truth.shape and bool((np.abs(got - truth) <= tolerance).all())


def cases(exercise_id, seed, n, hint, right=close):
    """Decorator of a case maker: the answer must be `right` in `n` cases drawn with `seed`; `hint`
    is formatted with the arguments of the first that is not, or with what follows its truth."""
    def register(make_case):
        def checker(answer):
            rng = np.random.default_rng(seed)
            for number in range(n):
                args, truth, *shown = make_case(rng, number)
                if not right(ask(answer, *args), truth):
                    return "not right for " + hint.format(*(shown or args))
        return exercise(exercise_id)(checker)
    return register


def _costs_and_budget(rng):
    return rng.integers(1, 30, rng.integers(1, 6)).tolist(), int(rng.integers(1, 80))


@cases("00.1", 1, 51, "costs {0}, budget {1}: what is left for the later problems, in this order?")
def _(rng, number):
    costs, budget = _costs_and_budget(rng) if number else ([10, 20, 5], 30)
    return (costs, budget), int((np.cumsum(costs) <= budget).sum())


@cases("00.2", 2, 50, "{0} in the easy order and {1}: a share of which Score?")
def _(rng, number):
    easy, other = (rng.integers(0, 4, 8).tolist() for _ in range(2))
    easy[0] = 3  # a Score of zero has no regret
    return (easy, other), (sum(easy) - sum(other)) / sum(easy)


@exercise("01.1")
def _(answer):
    exam = osmckp.Instance(9, [[osmckp.SKIP, osmckp.Action("try", outcomes)] for outcomes in (
        [(0.5, 3, 1), (0.5, 6, 0)], [(0.8, 4, 1), (0.2, 4, 0)], [(0.5, 2, 1), (0.5, 2, 0)])])
    if not close(answer, osmckp.solve(exam).value, 1e-6):
        return "work backwards: first V of the easy problem, then V of the medium one at 6 and at 3"


def _random_outcomes(rng, size):
    columns = rng.dirichlet(np.ones(size)), rng.integers(0, 12, size), rng.integers(0, 2, size)
    return list(zip(*(column.tolist() for column in columns), strict=True))


@cases("01.2", 2, 13, "outcomes {0} and b = {1}: which of them fit in?")
def _(rng, number):
    outcomes = _random_outcomes(rng, 4) if number else [(0.5, 0, 1), (0.5, 6, 1)]
    return (outcomes, number), osmckp.expected_reward([osmckp.Action("a", outcomes)], number)[0, -1]


@cases("01.3", 3, 12, "{0} action(s), V of the later problems {1}: one value for each b = 0..9; "
       "after a truncation the later problems are sat with 0 tokens")
def _(rng, number):
    actions = [_random_outcomes(rng, 3) for _ in range(1 + number % 3)]
    future = np.cumsum(rng.integers(0, 3, 10)) / 2.0
    known = [osmckp.Action("a", outcomes) for outcomes in actions]
    truth = (osmckp.expected_reward(known, 9) + osmckp.expected_future(known, future)).max(0)
    return (actions, future), truth, len(actions), future.tolist()


@exercise("01.4")
def _(answer):
    if not isinstance(answer, osmckp.Instance):
        return "the answer must be an Instance"
    if len(answer) != 1 or answer.budget > 20:
        return "need exactly one problem and a budget of at most 20 tokens"
    if answer.max_score > 1 or osmckp.solve(answer).value <= 0:
        return "no reward above 1 point, and some reward must be within reach"
    if knapsack.optimality_gap(answer, knapsack.greedy_roi(answer)) <= 0.5:
        return "greedy earns half of the optimum or more: which action has the best *ratio*?"


@exercise("02.1")
def _(answer):
    tiers = ("easy", "easy", "medium", "hard")
    if int(answer) != len({*permutations(tiers)} - {tiers, tiers[::-1]}):
        return "count sequences of tiers: the easy problems look alike; two orders are not mixed"


@cases("02.2", 2, 60, "costs {0}, budget {1}: what is written before the cut is charged, no more")
def _(rng, number):
    costs, budget = _costs_and_budget(rng)
    left = np.maximum(budget - np.cumsum([0, *costs]), 0)
    return (costs, budget), np.minimum(costs, left[:-1])


@cases("02.3", 3, 60, "{0} and {1}: sets of runs of three")
def _(rng, number):
    one, other = (rng.choice(list("abc"), rng.integers(3, 9)).tolist() for _ in range(2))
    runs, others = ({*zip(w, w[1:], w[2:], strict=False)} for w in (one, other))
    return (one, other), len(runs & others) / len(runs | others), " ".join(one), " ".join(other)


@cases("03.1", 1, 80, "tokens {0}, budget {1}, end {2}: which comes first, the end or the budget?",
       lambda got, truth: ([*got[0]], bool(got[1])) == truth)
def _(rng, number):
    ids, budget, eos = rng.integers(0, 5, rng.integers(1, 9)).tolist(), int(rng.integers(1, 9)), 4
    truth = within_budget(ids, budget, [eos])
    return (ids, budget, eos), ([*truth.ids], truth.finished)


@cases("03.2", 2, 82, "p = {0}, u = {1}: token k if u is between the sums up to k - 1 and up to k")
def _(rng, number):
    p, u = rng.dirichlet(np.ones(6)).tolist(), float(rng.random())
    return (p, u), int((np.cumsum(p) <= u).sum()), np.round(p, 3).tolist(), f"{u:.3f}"


@cases("03.3", 3, 50, "headers at tokens {0} of {1}: preamble first, and the costs add up to {1}")
def _(rng, number):
    starts = np.sort(rng.choice(np.arange(30), 3, replace=False)).tolist()
    total = int(starts[-1] + rng.integers(1, 12))
    return (starts, total), np.diff([0, *starts, total])


@cases("03.4", 4, 50, "lengths {0}: who is still in the batch at each step?")
def _(rng, number):
    lengths = rng.integers(1, 40, rng.integers(1, 9)).tolist()
    return (lengths,), (len(lengths) * max(lengths), sum(lengths))


def _edges(rng):
    return np.sort(rng.choice(np.arange(10, 60), 3, replace=False)).tolist()


@cases("04.1", 1, 120, "samples {0} and edges {1}: the shortest *right* one counts, an edge "
       "belongs to the level below it, and no use means Level-3")
def _(rng, number):
    edges = _edges(rng)
    samples = [(int(cost), bool(rng.random() < 0.5))
               for cost in rng.choice([*range(5, 75), *edges], rng.integers(1, 7))]
    return (samples, edges), align(replace(POCKET, level_edges=tuple(edges)), None,
                                   [Sample("", *sample) for sample in samples]).level


@cases("04.2", 2, 50, "nats {0}, kinds {1}, weight {2}: divide by the number of learned tokens")
def _(rng, number):
    n = int(rng.integers(3, 12))
    nats, weight = rng.random(n).round(2), int(rng.integers(1, 20))
    kinds = ["prompt", "word", *rng.choice(["prompt", "word", "level"], n - 2).tolist()]
    weights = np.array([{"prompt": 0, "word": 1, "level": weight}[kind] for kind in kinds])
    return (nats.tolist(), kinds, weight), (weights * nats).sum() / (weights > 0).sum()


@cases("04.3", 3, 60, "samples {0}, a skip of {1} and a budget of {2}: try every combination")
def _(rng, number):
    costs, right = rng.integers(1, 40, (3, 3)).tolist(), (rng.random((3, 3)) < 0.7).tolist()
    skip, budget = (int(x) for x in rng.integers((1, 20), (9, 90)))
    samples = [[*zip(*some, strict=True)] for some in zip(costs, right, strict=True)]
    return (samples, skip, budget), knapsack.offline_value(
        [[skip, *some] for some in costs], [[0, *some] for some in right], budget)


@cases("04.4", 4, 50, "skipped {0}, solve rates {1}: a mean over the skipped, a share of the tried")
def _(rng, number):
    n = int(rng.integers(3, 12))
    skipped = np.array([True, False, *(rng.random(n - 2) < 0.4)])
    rate = rng.integers(0, 5, n) / 4
    return (skipped.tolist(), rate.tolist()), (rate[skipped].mean(), (rate[~skipped] == 0).mean())


@cases("05.1", 1, 120, "levels {0}, costs {1}, right {2} and edges {3}: both must hold, and an "
       "edge belongs to the level below it")
def _(rng, number):
    edges = _edges(rng)
    costs = rng.choice([*range(5, 75), *edges], 3).tolist()
    right = [bool(x) for x in rng.random(3) < 0.7]
    real = [replace(POCKET, level_edges=tuple(edges)).level_of(cost) for cost in costs]
    levels = [level if rng.random() < 0.6 else int(rng.integers(4)) for level in real]
    earned = [ok and level == of for ok, level, of in zip(right, levels, real, strict=True)]
    return (levels, costs, right, edges), sum(earned)


@cases("05.2", 2, 60, "rewards {0}: a failed rollout counts in no mean, and has advantage 0")
def _(rng, number):
    rewards = [None if rng.random() < 0.2 else int(x) for x in rng.integers(0, 4, 6)]
    rewards[0] = 3
    return (rewards,), advantages(torch.tensor(np.array([rewards], float)))[0]


@cases("05.3", 3, 60, "arguments {0}, {1}, {2}, {3!r}: the loss is also a mean over the rollouts")
def _(rng, number):
    lengths = rng.integers(1, 40, 5)
    advantage, longest = rng.integers(-4, 5, 5) / 2, int(lengths.max() + rng.integers(0, 30))
    normalizer = ("constant", "length")[number % 2]
    logprobs = torch.zeros(5, int(lengths.max()), dtype=torch.float64, requires_grad=True)
    mask = (torch.arange(lengths.max())[None] < torch.tensor(lengths)[:, None]).double()
    policy_loss(logprobs, mask, torch.tensor(advantage), longest, normalizer).backward()
    return (lengths.tolist(), advantage.tolist(), longest, normalizer), -logprobs.grad[:, 0]


@cases("05.4", 4, 22, "q = {0} and {1} rollouts: which two groups have no spread?")
def _(rng, number):
    q = float(number) if number < 2 else round(float(rng.random()), 3)
    n = int(rng.integers(2, 9))
    return (q, n), sum(q ** sum(w) * (1 - q) ** (n - sum(w)) for w in product((0, 1), repeat=n)
                       if len(set(w)) > 1)


@cases("06.1", 5, 40, "{0} in the easy order and {1} in the other: means first, then one ratio",
       lambda got, truth: np.isclose(float(got), truth, equal_nan=True))
def _(rng, number):
    easy, other = rng.integers(0, 4, 7), rng.integers(0, 4, 7)
    easy *= number > 0  # nothing earned in the easy order at first: no regret is known
    return (easy.tolist(), other.tolist()), (easy - other).sum() / easy.sum() if number else np.nan


@cases("06.2", 6, 40, "{0} and {1}: take the difference of each paper first")
def _(rng, number):
    a = rng.integers(0, 4, 12)
    b = np.minimum(a + rng.integers(0, 2, 12), 3)
    return (a.tolist(), b.tolist()), np.std(a - b, ddof=1) / np.sqrt(len(a))


@cases("06.3", 7, 30, "the {2} order: what the order costs, the rational test-taker loses as well")
def _(rng, number):
    best = dict(zip(ORDERS, sorted(3 * rng.random(3))[::-1], strict=True))
    score, order = float(rng.random() * 2), ("medium", "hard", "easy")[number % 3]
    return (best, score, order), (best["easy"] - best[order], best[order] - score)


@cases("06.4", 8, 200, "cost {0}, p {1}, sure {2}, budget {3}: a cost above it leaves nothing")
def _(rng, number):
    cost, sure, budget = (int(x) for x in rng.integers(1, 30, 3))
    p = round(float(rng.random()), 2)
    hard = osmckp.Action("solve", [(p, cost, 1), (1 - p, cost, 0)])
    easy = osmckp.Action("solve", [(1, sure, 1)])
    exam = osmckp.Instance(budget, [[osmckp.SKIP, hard], [osmckp.SKIP, easy]])
    return (cost, p, sure, budget), osmckp.solve(exam).value


@cases("07.1", 9, 40, "costs {0} and budget {1}: before each, not after it")
def _(rng, number):
    costs, budget = rng.integers(0, 40, int(rng.integers(1, 6))).tolist(), 64
    return (costs, budget), [max(budget - sum(costs[:i]), 0) for i in range(len(costs))]


@cases("07.2", 10, 40, "predicted {0}, real {1}: leave problems without a tag out of the total too")
def _(rng, number):
    predicted, real = rng.integers(-1, 4, 12), rng.integers(0, 4, 12)
    predicted[0] = 0
    given = predicted >= 0
    return (predicted.tolist(), real.tolist()), ((predicted == real)[given].mean(),
                                                 (predicted < real)[given].mean())


@cases("07.3", 11, 40, "tried {0} and rational {1}: both are shares of all decisions")
def _(rng, number):
    tried, rational = rng.random(9) < 0.5, rng.random(9) < 0.5
    return (tried.tolist(), rational.tolist()), ((tried & ~rational).mean(),
                                                 (~tried & rational).mean())


@cases("08.1", 12, 20, "layers {0}, kv heads {1}, head size {2}, bytes {3}: keys *and* values")
def _(rng, number):
    sizes = [int(x) for x in rng.integers(1, 33, 3)] + [int(rng.choice([2, 4]))]
    return sizes, 2 * np.prod(sizes)


@cases("08.2", 13, 20, "{0} weights of {1} bytes, {2} FLOP/s, {3} bytes/s: what grows with rows?",
       lambda got, truth: np.isclose(float(got), truth))
def _(rng, number):
    weights, speed, width = (int(x) for x in rng.integers(1, 1_000, 3) * 10**9)
    size = int(rng.choice([2, 4]))
    return (weights, size, 100 * speed, width), size * 100 * speed / (2 * width)


@cases("08.3", 14, 20, "deviation {0}, half width {1}: an interval has 1.96 standard errors a side")
def _(rng, number):
    deviation, half = round(float(rng.uniform(0.2, 1)), 2), round(float(rng.uniform(0.02, 0.3)), 2)
    return (deviation, half), int(np.ceil((1.96 * deviation / half) ** 2))
