"""Exercises that check themselves: `check("01.1", answer)` prints one line.

    [ ] 01.1: not answered yet          the answer is still `...`
    [PASS] 01.1
    [TRY AGAIN] 01.1: a hint            the answer is wrong (or your function raised an error)

A checker is a function answer -> None (right) or a hint (wrong). It works out the truth from the
library on cases of its own, so there is no solution to read here. To add one:

    @exercise("07.2")
    def _(answer): ...
"""

import numpy as np

from roi_lib import osmckp

EXERCISES = {}


class NotAnswered(Exception):
    """The reader's function still returns `...` or None."""


def exercise(exercise_id):
    """Decorator that registers a checker under `exercise_id`, such as "01.1"."""
    def register(checker):
        if exercise_id in EXERCISES:
            raise ValueError(f"exercise {exercise_id} is registered twice")
        EXERCISES[exercise_id] = checker
        return checker
    return register


def check(exercise_id, answer):
    """Print whether `answer` solves the exercise. Raises ValueError for an unknown id."""
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
    """Call the reader's function; NotAnswered if it returns `...` or None."""
    if not callable(function):
        raise TypeError("need a function")
    result = function(*args)
    if result is ... or result is None:
        raise NotAnswered
    return result


def close(got, truth, tolerance=1e-9):
    """Whether the reader's number, or each of several, is right up to rounding; NaN is not."""
    got, truth = np.asarray(got, float), np.asarray(truth, float)
    return got.shape == truth.shape and bool((np.abs(got - truth) <= tolerance).all())


# ---------------------------------------------------------------- 00 start here
@exercise("00.1")
def _(answer):
    if ask(answer, [10, 20, 5], 30) != 2:
        return "with costs 10, 20, 5 and a budget of 30, what is left for the third problem?"
    rng = np.random.default_rng(1)
    for _ in range(50):
        costs = rng.integers(1, 30, rng.integers(1, 6)).tolist()
        budget = int(rng.integers(1, 80))
        truth = int((np.cumsum(costs) <= budget).sum())
        if ask(answer, list(costs), budget) != truth:
            return f"not right for costs {costs} and a budget of {budget}: is the order kept?"


@exercise("00.2")
def _(answer):
    rng = np.random.default_rng(2)
    for _ in range(50):
        easy, other = (rng.integers(0, 4, 8).tolist() for _ in range(2))
        easy[0] = 3  # a Score of zero has no regret
        truth = (sum(easy) - sum(other)) / sum(easy)
        if not close(ask(answer, list(easy), list(other)), truth):
            return f"not right for {easy} in the easy order and {other}: a share of which Score?"


# ---------------------------------------------------------------- 01 OS-MCKP
def _hand_exam(p_easy, budget):
    def attempt(*outcomes):
        return [osmckp.SKIP, osmckp.Action("try", outcomes)]
    return osmckp.Instance(budget, [attempt((0.5, 3, 1), (0.5, 6, 0)),
                                    attempt((0.8, 4, 1), (0.2, 4, 0)),
                                    attempt((p_easy, 2, 1), (1 - p_easy, 2, 0))])


def _random_outcomes(rng, size):
    return list(zip(rng.dirichlet(np.ones(size)).tolist(), rng.integers(0, 12, size).tolist(),
                    rng.integers(0, 2, size).tolist(), strict=True))


@exercise("01.1")
def _(answer):
    if not close(answer, osmckp.solve(_hand_exam(0.5, 9)).value, 1e-6):
        return "work backwards: first V of the easy problem, then V of the medium one at 6 and at 3"


@exercise("01.2")
def _(answer):
    if not close(ask(answer, [(0.5, 3, 1), (0.5, 6, 1)], 3), 0.5):
        return "which outcomes fit in 3 tokens when the costs are 3 and 6?"
    rng = np.random.default_rng(2)
    for budget in range(12):
        outcomes = _random_outcomes(rng, 4)
        truth = osmckp.expected_reward([osmckp.Action("a", outcomes)], budget)[0, -1]
        if not close(ask(answer, outcomes, budget), truth):
            return f"not right for outcomes {outcomes} and b = {budget}"


@exercise("01.3")
def _(answer):
    rng = np.random.default_rng(3)
    for case in range(12):
        actions = [_random_outcomes(rng, 3) for _ in range(1 + case % 3)]
        future = np.cumsum(rng.integers(0, 3, 10)) / 2.0
        known = [osmckp.Action("a", outcomes) for outcomes in actions]
        truth = (osmckp.expected_reward(known, 9) + osmckp.expected_future(known, future)).max(0)
        got = np.asarray(ask(answer, actions, future.copy()), dtype=float)
        if got.shape != truth.shape:
            return f"need one value for each b = 0..9, got shape {got.shape}"
        wrong = [b for b in range(len(truth)) if not close(got[b], truth[b])]
        if wrong:
            kind = "a single action" if len(known) == 1 else f"{len(known)} actions"
            return (f"with {kind} your V is wrong first at b = {wrong[0]}; after a truncation "
                    "the later problems are sat with 0 tokens")


@exercise("01.4")
def _(answer):
    if not isinstance(answer, osmckp.Instance):
        return "the answer must be an Instance"
    if len(answer) != 1 or answer.budget > 20:
        return "need exactly one problem and a budget of at most 20 tokens"
    if answer.max_score > 1 or osmckp.solve(answer).value <= 0:
        return "no reward above 1 point, and some reward must be within reach"
    if osmckp.optimality_gap(answer, osmckp.greedy_roi(answer)) <= 0.5:
        return "greedy earns half of the optimum or more: which action has the best *ratio*?"


# ---------------------------------------------------------------- 02 exam building
@exercise("02.1")
def _(answer):
    from itertools import permutations

    tiers = ("easy", "easy", "medium", "hard")
    mixed = {*permutations(tiers)} - {tiers, tiers[::-1]}
    if int(answer) != len(mixed):
        return "count sequences of tiers: the easy problems look alike; two orders are not mixed"


@exercise("02.2")
def _(answer):
    rng = np.random.default_rng(2)
    for _ in range(60):
        costs = rng.integers(1, 30, rng.integers(1, 6)).tolist()
        budget = int(rng.integers(1, 80))
        left = np.maximum(budget - np.cumsum([0, *costs]), 0)
        truth = np.minimum(costs, left[:-1]).tolist()
        if [int(x) for x in ask(answer, list(costs), budget)] != truth:
            return (f"not right for costs {costs} and a budget of {budget}: what is cut off is not "
                    "charged, what was written before the cut is")


@exercise("02.3")
def _(answer):
    rng = np.random.default_rng(3)
    for _ in range(60):
        one, other = (rng.choice(list("abc"), rng.integers(3, 9)).tolist() for _ in range(2))
        runs, others = ({*zip(w, w[1:], w[2:], strict=False)} for w in (one, other))
        truth = len(runs & others) / len(runs | others)
        if not close(ask(answer, list(one), list(other)), truth):
            return f"not right for {' '.join(one)} and {' '.join(other)}: sets of runs of three"


# ---------------------------------------------------------------- 03 budgeted generation
@exercise("03.1")
def _(answer):
    from roi_lib.generation import within_budget  # here, so that notebook 01 goes without torch

    rng = np.random.default_rng(1)
    for _ in range(80):
        ids = rng.integers(0, 5, rng.integers(1, 9)).tolist()
        budget, eos = int(rng.integers(1, 9)), 4
        truth = within_budget(ids, budget, [eos])
        got = ask(answer, list(ids), budget, eos)
        if (list(got[0]), bool(got[1])) != (list(truth.ids), truth.finished):
            return (f"not right for tokens {ids}, budget {budget} and end-of-sequence {eos}: which "
                    "comes first, the end or the budget?")


@exercise("03.2")
def _(answer):
    if ask(answer, [0.1, 0.6, 0.3], 0.05) != 0 or ask(answer, [0.1, 0.6, 0.3], 0.69) != 1:
        return "token k is chosen where u lies between the sums up to k - 1 and up to k"
    rng = np.random.default_rng(2)
    for _ in range(80):
        p, u = rng.dirichlet(np.ones(6)), float(rng.random())
        if ask(answer, p.tolist(), u) != int((p.cumsum() <= u).sum()):
            return f"not right for probabilities {p.round(3).tolist()} and u = {u:.3f}"


@exercise("03.3")
def _(answer):
    rng = np.random.default_rng(3)
    for _ in range(50):
        starts = np.sort(rng.choice(np.arange(30), 3, replace=False)).tolist()
        total = int(starts[-1] + rng.integers(1, 12))
        got = [int(x) for x in ask(answer, list(starts), total)]
        if got != [starts[0], *np.diff([*starts, total]).tolist()]:
            return (f"not right for headers at tokens {starts} of {total}: the preamble first, "
                    "then one cost a problem, and all of them add up to the total")


@exercise("03.4")
def _(answer):
    rng = np.random.default_rng(4)
    for _ in range(50):
        lengths = rng.integers(1, 40, rng.integers(1, 9)).tolist()
        truth = [len(lengths) * max(lengths), sum(lengths)]
        if [int(x) for x in ask(answer, list(lengths))] != truth:
            return f"not right for lengths {lengths}: who is still in the batch at each step?"


# ---------------------------------------------------------------- 04 MFT
@exercise("04.1")
def _(answer):
    from dataclasses import replace

    from roi_lib.mft import Sample, align
    from roi_lib.worlds import POCKET

    rng = np.random.default_rng(1)
    for _ in range(120):
        edges = np.sort(rng.choice(np.arange(10, 60), 3, replace=False)).tolist()
        samples = [(int(cost), bool(rng.random() < 0.5))
                   for cost in rng.choice([*range(5, 75), *edges], rng.integers(1, 7))]
        truth = align(replace(POCKET, level_edges=tuple(edges)), None,
                      [Sample("", *sample) for sample in samples]).level
        if int(ask(answer, list(samples), list(edges))) != truth:
            return (f"not right for samples {samples} and edges {edges}: the shortest *right* one "
                    "counts, an edge belongs to the level below it, and no use means Level-3")


@exercise("04.2")
def _(answer):
    rng = np.random.default_rng(2)
    for _ in range(50):
        n = int(rng.integers(3, 12))
        nats, weight = rng.random(n).round(2), int(rng.integers(1, 20))
        kinds = ["prompt", "word", *rng.choice(["prompt", "word", "level"], n - 2)]
        weights = np.array([{"prompt": 0, "word": 1, "level": weight}[kind] for kind in kinds])
        truth = (weights * nats).sum() / (weights > 0).sum()
        got = ask(answer, nats.tolist(), [str(kind) for kind in kinds], weight)
        if not close(got, truth):
            return (f"not right for nats {nats.tolist()}, kinds {' '.join(kinds)} and weight "
                    f"{weight}: divide by the number of tokens that are learned")


@exercise("04.3")
def _(answer):
    rng = np.random.default_rng(3)
    for p in [0.0, 1.0, *rng.random(30).round(3)]:
        k = int(rng.integers(1, 17))
        truth = np.full(k, 1 - p).prod()
        if not close(ask(answer, float(p), k), truth):
            return f"not right for a solve rate of {p} and {k} samples: all of them must fail"


@exercise("04.4")
def _(answer):
    rng = np.random.default_rng(4)
    for _ in range(50):
        n = int(rng.integers(3, 12))
        skipped = np.array([True, False, *(rng.random(n - 2) < 0.4)])
        rates = rng.integers(0, 5, n) / 4
        truth = rates[skipped].mean(), (rates[~skipped] == 0).mean()
        got = ask(answer, skipped.tolist(), rates.tolist())
        if not close(got, truth):
            return (f"not right for skipped {skipped.astype(int).tolist()} and solve rates "
                    f"{rates.tolist()}: a mean over the skipped, then a share of the tried")


# ---------------------------------------------------------------- 05 RARL
@exercise("05.1")
def _(answer):
    from dataclasses import replace

    from roi_lib.exams import Segment
    from roi_lib.rarl import problem_reward
    from roi_lib.worlds import POCKET

    rng = np.random.default_rng(1)
    for _ in range(120):
        edges = np.sort(rng.choice(np.arange(10, 60), 3, replace=False)).tolist()
        world = replace(POCKET, level_edges=tuple(edges))
        costs = rng.choice([*range(5, 75), *edges], 3).tolist()
        right = [bool(x) for x in rng.random(3) < 0.7]
        levels = [world.level_of(c) if rng.random() < 0.6 else int(rng.integers(4)) for c in costs]
        truth = sum(problem_reward(world, Segment(c, "", "1", level), ok)
                    for level, c, ok in zip(levels, costs, right, strict=True))
        if float(ask(answer, list(levels), list(costs), list(right), list(edges))) != truth:
            return (f"not right for levels {levels}, costs {costs}, right {right} and edges "
                    f"{edges}: both must hold, and an edge belongs to the level below it")


@exercise("05.2")
def _(answer):
    import torch

    from roi_lib.rarl import advantages

    rng = np.random.default_rng(2)
    for _ in range(60):
        rewards = [None if rng.random() < 0.2 else int(x) for x in rng.integers(0, 4, 6)]
        rewards[0] = 3
        table = torch.tensor([[np.nan if r is None else r for r in rewards]], dtype=torch.float64)
        if not close(ask(answer, list(rewards)), advantages(table)[0]):
            return (f"not right for rewards {rewards}: a failed rollout counts in no mean, and has "
                    "advantage 0")


@exercise("05.3")
def _(answer):
    import torch

    from roi_lib.rarl import policy_loss

    rng = np.random.default_rng(3)
    for case in range(60):
        lengths = rng.integers(1, 40, 5)
        advantage, longest = rng.integers(-4, 5, 5) / 2, int(lengths.max() + rng.integers(0, 30))
        normalizer = ("constant", "length")[case % 2]
        logprobs = torch.zeros(5, int(lengths.max()), dtype=torch.float64, requires_grad=True)
        mask = (torch.arange(lengths.max())[None] < torch.tensor(lengths)[:, None]).double()
        policy_loss(logprobs, mask, torch.tensor(advantage), longest, normalizer).backward()
        truth = -logprobs.grad[:, 0].numpy()
        got = ask(answer, lengths.tolist(), advantage.tolist(), longest, normalizer)
        if not close(got, truth):
            return (f"not right for lengths {lengths.tolist()}, advantages {advantage.tolist()}, "
                    f"longest {longest} and normalizer {normalizer!r}: the loss is also a mean "
                    "over the rollouts")


@exercise("05.4")
def _(answer):
    from itertools import product

    from roi_lib.rarl import has_spread

    rng = np.random.default_rng(4)
    for q in [0.0, 1.0, *rng.random(20).round(3)]:
        n = int(rng.integers(2, 9))
        truth = sum(q ** sum(w) * (1 - q) ** (n - sum(w)) for w in product((0, 1), repeat=n)
                    if has_spread(w))
        if not close(ask(answer, float(q), n), truth):
            return f"not right for q = {q} and {n} rollouts: which two groups have no spread?"


# ---------------------------------------------------------------- 06 Regret analysis
@exercise("06.1")
def _(answer):
    from roi_lib.evaluation import regret

    rng = np.random.default_rng(5)
    for case in range(40):
        easy, other = rng.integers(0, 4, 7), rng.integers(0, 4, 7)
        if case == 0:
            easy[:] = 0
        truth = regret(float(other.mean()), float(easy.mean()))
        got = float(ask(answer, easy.tolist(), other.tolist()))
        if not np.isclose(got, np.nan if truth is None else truth, equal_nan=True):
            return (f"not right for {easy.tolist()} in the easy order and {other.tolist()} in the "
                    "other: means first, then one ratio")


@exercise("06.2")
def _(answer):
    rng = np.random.default_rng(6)
    for _ in range(40):
        a = rng.integers(0, 4, 12)
        b = np.minimum(a + rng.integers(0, 2, 12), 3)
        truth = np.std(a - b, ddof=1) / np.sqrt(len(a))
        if not close(ask(answer, a.tolist(), b.tolist()), truth):
            return (f"not right for {a.tolist()} and {b.tolist()}: take the difference of each "
                    "paper first")


@exercise("06.3")
def _(answer):
    rng = np.random.default_rng(7)
    for order in ("medium", "hard", "easy") * 10:
        best = dict(zip(("easy", "medium", "hard"), sorted(3 * rng.random(3))[::-1], strict=True))
        score = float(rng.random() * 2)
        truth = best["easy"] - best[order], best[order] - score
        if not close(ask(answer, dict(best), score, order), truth):
            return (f"not right for the {order} order: what is lost to the order, the rational "
                    "test-taker loses as well; folly is the rest")


@exercise("06.4")
def _(answer):
    rng = np.random.default_rng(8)
    for _ in range(200):
        cost, sure, budget = (int(x) for x in rng.integers(1, 30, 3))
        p = round(float(rng.random()), 2)
        skip = osmckp.Action("skip", [(1, 0, 0)])
        hard = osmckp.Action("solve", [(p, cost, 1), (1 - p, cost, 0)])
        instance = osmckp.Instance(budget, [[skip, hard],
                                            [skip, osmckp.Action("solve", [(1, sure, 1)])]])
        if not close(ask(answer, cost, p, sure, budget), osmckp.solve(instance).value):
            return (f"not right for cost {cost}, p {p}, sure {sure} and budget {budget}: a cost "
                    "above the budget earns nothing and leaves nothing")


# ---------------------------------------------------------------- 07 Behaviour
@exercise("07.1")
def _(answer):
    rng = np.random.default_rng(9)
    for _ in range(40):
        costs, budget = rng.integers(0, 40, int(rng.integers(1, 6))).tolist(), 64
        truth = [max(budget - sum(costs[:i]), 0) for i in range(len(costs))]
        if list(ask(answer, list(costs), budget)) != truth:
            return f"not right for costs {costs} and budget {budget}: before each, not after it"


@exercise("07.2")
def _(answer):
    rng = np.random.default_rng(10)
    for _ in range(40):
        predicted, real = rng.integers(-1, 4, 12), rng.integers(0, 4, 12)
        predicted[0] = 0
        given = predicted >= 0
        truth = ((predicted == real)[given].mean(), (predicted < real)[given].mean())
        if not close(ask(answer, predicted.tolist(), real.tolist()), truth):
            return (f"not right for predicted {predicted.tolist()} and real {real.tolist()}: "
                    "problems without a tag are in neither share, nor in what they are shares of")


@exercise("07.3")
def _(answer):
    rng = np.random.default_rng(11)
    for _ in range(40):
        tried, rational = rng.random(9) < 0.5, rng.random(9) < 0.5
        truth = (tried & ~rational).mean(), (~tried & rational).mean()
        if not close(ask(answer, tried.tolist(), rational.tolist()), truth):
            return (f"not right for tried {tried.tolist()} and rational {rational.tolist()}: "
                    "both are shares of all decisions")
