"""Beside the optimal policy of OS-MCKP: other policies, simulation, and what is lost to what.

    distribution, draw, simulate             any policy: exact distribution, seeded runs
    greedy_roi, open_loop, hindsight         what to compare the optimal one with
    offline_value                            the best score when all luck is known
    best_order, order_regret, optimality_gap, value_of_information    what is lost, and to what
    read_instance, solve_document            the command `osmckp INSTANCE.json`

All values are in points, all costs in tokens. Notebook 01."""

import math
from collections import defaultdict, namedtuple
from itertools import permutations, product
from pathlib import Path

import numpy as np

from roi_lib import osmckp
from roi_lib.osmckp import TIE, Action, Instance, as_policy, evaluate, require, solve
from roi_lib.store.files import read_json

MAX_CELLS = 10**8  # actions x budgets of an instance: their arrays take at most about 5 GB
Runs = namedtuple("Runs", "score spent action left mean_score se")
Plan = namedtuple("Plan", "actions value")
Estimate = namedtuple("Estimate", "value se")  # in points; standard error 0.0: exact


class Distribution(namedtuple("Distribution", "score spent p mean_score mean_spent")):
    """Joint distribution of (score in points, tokens spent), three arrays; and the two means."""

    def of(self, what: str) -> tuple[np.ndarray, np.ndarray]:
        """The marginal of "score" or "spent": (distinct values ascending, probabilities)."""
        values, index = np.unique(getattr(self, what), return_inverse=True)
        return values, np.bincount(index, self.p)


def distribution(instance: Instance, policy) -> Distribution:
    """Exact distribution of score and tokens spent; of large instances `simulate` draws runs."""
    policy = as_policy(instance, policy)
    states, same = {(0.0, instance.budget): 1.0}, {}  # (score, tokens left) -> probability
    for i, actions in enumerate(instance.classes):
        before, states = states, defaultdict(float)
        for (score, left), p in before.items():
            a = actions[policy[i, left]]
            for cost, reward, q in np.stack([a.cost, a.reward, a.p], axis=1).tolist():
                now = score + reward * (cost <= left)
                now = same.setdefault(f"{now:.12g}", now)  # rounding makes no new score
                states[now, max(left - int(cost), 0)] += p * q
    score, left, p = np.array([(*state, p) for state, p in sorted(states.items())]).T
    spent = instance.budget - left.astype(int)
    return Distribution(score, spent, p, float(p @ score), float(p @ spent))


def draw(instance: Instance, runs: int, seed=0) -> list[np.ndarray]:
    """Seeded luck: for each class an int array (runs, K_i), the outcome of *every* action."""
    rng = np.random.default_rng(seed)
    return [np.stack([np.minimum(np.searchsorted(np.cumsum(a.p), rng.random(runs), "right"),
                                 len(a.p) - 1) for a in actions], axis=1)
            for actions in instance.classes]


def simulate(instance: Instance, policy, runs: int = 10_000, seed=0, draws=None) -> Runs:
    """Sit the exam `runs` times, with luck from `draw`: score and tokens spent (runs,), action and
    tokens left before it (runs, N), the mean score and its standard error."""
    policy = as_policy(instance, policy)
    draws = draw(instance, runs, seed) if draws is None else draws
    left, score = np.full(len(draws[0]), instance.budget), np.zeros(len(draws[0]))
    action, before = np.zeros((2, len(left), len(instance)), dtype=np.int64)
    for i, actions in enumerate(instance.classes):
        before[:, i], action[:, i] = left, policy[i, left]
        for k, a in enumerate(actions):
            here = np.flatnonzero(action[:, i] == k)
            cost, reward = (x[draws[i][here, k]] for x in (a.cost, a.reward))
            score[here] += reward * (cost <= left[here])
            left[here] = np.maximum(left[here] - cost, 0)
    return Runs(score, instance.budget - left, action, before,
                float(score.mean()), float(score.std(ddof=1) / math.sqrt(len(score))))


def greedy_roi(instance: Instance) -> np.ndarray:
    """Policy (N, B + 1) that looks at one problem at a time: the best expected return on tokens,
    E[r 1(c <= b)] / E[min(c, b)], where a free action counts as a millionth of a token."""
    policy = np.empty((len(instance), instance.budget + 1), dtype=np.int32)
    for i, actions in enumerate(instance.classes):
        charge = osmckp.expected_charge(actions, instance.budget)
        roi = osmckp.expected_reward(actions, instance.budget) / np.maximum(charge, 1e-6)
        policy[i] = osmckp.cheapest_best(roi, charge, TIE * roi.max(axis=0))
    return policy


def open_loop(instance: Instance, max_plans: int = 10_000) -> Plan:
    """The best plan fixed before the exam starts, found by trying all of them (ties: the first in
    the order of their actions). `ValueError` where there are more than `max_plans`."""
    sizes = [range(len(actions)) for actions in instance.classes]
    require(math.prod(map(len, sizes)) <= max_plans, f"open_loop: more than {max_plans:,} plans")
    plans = list(product(*sizes))
    values = np.array([evaluate(instance, plan)[0, -1] for plan in plans])
    best = int(np.argmax(values >= values.max() - TIE * instance.max_score))
    return Plan(np.array(plans[best], dtype=np.int32), float(values[best]))


def offline_value(costs, rewards, budget: int) -> float:
    """The best score when costs and rewards, N lists of K_i numbers, are known (Kellerer, Pferschy,
    Pisinger, "Knapsack Problems", ch. 11)."""
    best = np.zeros(budget + 1)
    for cost, reward in zip(costs[::-1], rewards[::-1], strict=True):
        future, best = best, np.full(budget + 1, best[0])  # what does not fit leaves V(0)
        for c, r in zip(cost, reward, strict=True):
            if c <= budget:
                np.maximum(best[c:], future[: budget + 1 - c] + r, out=best[c:])
    return float(best[-1])


def hindsight(instance: Instance, exact_limit=10**5, samples=10_000, seed=0) -> Estimate:
    """E[best score when all outcomes are known before the exam], which no policy can beat; exact
    with at most `exact_limit` joint outcomes, else the mean over `samples` seeded draws."""
    actions = [a for some in instance.classes for a in some]
    if math.prod(len(a.p) for a in actions) > exact_limit:
        best = hindsight_scores(instance, draw(instance, samples, seed))
        return Estimate(float(best.mean()), float(best.std(ddof=1) / math.sqrt(samples)))
    joint = np.array(list(product(*(range(len(a.p)) for a in actions))))
    p = np.prod([a.p[pick] for a, pick in zip(actions, joint.T, strict=True)], axis=0)
    draws = np.split(joint, np.cumsum([len(some) for some in instance.classes])[:-1], axis=1)
    return Estimate(float(p @ hindsight_scores(instance, draws)), 0.0)


def hindsight_scores(instance: Instance, draws) -> np.ndarray:
    """Best possible score in each drawn exam, (runs,), for `draws` from `draw`."""
    known = [[(a.cost[s].tolist(), a.reward[s].tolist()) for a, s in zip(some, pick.T, strict=True)]
             for some, pick in zip(instance.classes, draws, strict=True)]
    return np.array([offline_value([[cost[run] for cost, _ in some] for some in known],
                                   [[reward[run] for _, reward in some] for some in known],
                                   instance.budget) for run in range(len(draws[0]))])


def best_order(instance: Instance) -> tuple[tuple[int, ...], float]:
    """The order with the highest optimal value, and that value; on a tie the given order stays."""
    given = tuple(range(len(instance)))
    require(len(given) <= 7, f"best_order: too many orders of {len(given)} problems, 7 at most")
    best = given, solve(instance).value
    for backwards in permutations(given):
        some = [instance.classes[i] for i in backwards[::-1]]
        value = solve(Instance(instance.budget, some)).value
        if value > best[1] + TIE * instance.max_score:
            best = backwards[::-1], value
    return best


def order_regret(instance: Instance) -> float:
    """1 - V(given order) / V(best order), both solved optimally: no policy can win this back."""
    best = best_order(instance)[1]
    return 1 - solve(instance).value / best if best > 0 else 0.0


def optimality_gap(instance: Instance, policy) -> float:
    """1 - V(policy) / V(optimal policy) in the given order: the share lost to allocation."""
    best = solve(instance).value
    return 1 - float(evaluate(instance, policy)[0, -1]) / best if best > 0 else 0.0


def value_of_information(instance: Instance) -> float:
    """V(optimal policy) - V(best fixed plan), in points: what looking at the clock is worth."""
    return solve(instance).value - open_loop(instance).value


def read_instance(path: Path) -> Instance:
    """Read {"budget": B, "classes": [[{"name": ..., "outcomes": [{"p", "cost", "reward"}]}]]};
    `ValueError` names file, class and action (both counted from 0) and field."""
    document, classes, where = read_json(path), [], "instance"
    try:
        for i, actions in enumerate(_field(document, "classes", list)):
            classes.append([])
            for k, entry in enumerate(actions if isinstance(actions, list) else ()):
                where = f"class {i}, action {k}"
                rows = [[_field(outcome, field, int | float) for field in ("p", "cost", "reward")]
                        for outcome in _field(entry, "outcomes", list)]
                classes[i].append(Action(_field(entry, "name", str), rows))
        where = "instance"
        instance = Instance(_field(document, "budget", int | float), classes)
        require((instance.budget + 1) * sum(map(len, classes)) <= MAX_CELLS,
                f"field budget: {instance.budget} tokens need too much memory, give a smaller one")
    except ValueError as error:
        raise ValueError(f"{path}: {where}, {error}") from error
    return instance


def _field(entry, field: str, kind):
    value = entry.get(field) if isinstance(entry, dict) else None
    require(isinstance(value, kind) and not isinstance(value, bool),
            f"field {field}: missing, or of another type, in {str(entry)[:60]}")
    return value


def solve_document(exam: Instance) -> dict:
    """Expected rewards in points; hindsight_se 0: exact; order_regret null: above 7 problems."""
    best, ahead = solve(exam), hindsight(exam)
    return {"value": best.value, "open_loop": open_loop(exam).value,
            "greedy": float(evaluate(exam, greedy_roi(exam))[0, -1]),
            "hindsight": ahead.value, "hindsight_se": ahead.se, "first_action": best.first_action,
            "order_regret": order_regret(exam) if len(exam) <= 7 else None}
