"""The Ordered Stochastic Multiple-Choice Knapsack Problem (OS-MCKP), solved exactly.

An exam has N problems in a fixed order and one token budget B. Each problem is a *class* of
*actions* (skip, quick, careful, ...); exactly one action per class is taken, in order, knowing the
tokens that remain. An action is a finite distribution over (token cost, reward):

    max over policies  E[ sum_i r_i ]   subject to   sum_i c_i <= B          (arXiv 2601.03822)

A cost above the remaining budget is a *truncation*: no reward, and all that remained is spent.
Rewards are finite and not negative (with a penalty, running out of tokens would be a way to dodge
it, and more budget could hurt). Rewards are in points, costs and budgets in whole tokens.

What is here, in reading order:
    Action, Instance          the problem, checked when it is built
    solve, solve_batch        the optimal policy by Bellman backward induction
    evaluate, distribution, simulate      any policy: value, exact distribution, seeded runs
    open_loop, greedy_roi, greedy_knapsack, hindsight      what to compare it with
    best_order, order_regret, optimality_gap, value_of_information
    solve_document            JSON in, JSON out

A *policy* is an int array (N, B + 1): problem x remaining budget -> action. A *plan* is an int
array (N,): one action per problem, whatever remains. Functions that take a policy take a plan too.

Ties. Two actions tie when their values differ by at most TIE times the largest total reward, so
that rounding never decides and every machine finds the same policy. A tie goes to the cheaper
action: smaller expected charge E[min(cost, b)], then the lower index.

Sources: Kellerer, Pferschy, Pisinger, "Knapsack Problems", ch. 11 (multiple-choice knapsack);
Bellman, "Dynamic Programming"; Dean, Goemans, Vondrak, "Approximating the Stochastic Knapsack
Problem" (adaptivity); Krengel, Sucheston, "Semiamarts and finite values" (the prophet).
"""

import math
import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

TIE = 1e-9
LOOP = 1500  # a Python step costs about as much as this many array cells: sizes default work
CENTROIDS = (128, 384, 768)  # tokens for Level 0, 1, 2 in the paper's Greedy Knapsack


# ---------------------------------------------------------------- checks (all raise ValueError)
def _require(condition, message):
    if not condition:
        raise ValueError(message)


def _field(mapping, field, where):
    _require(field in mapping, f"{where}{', ' if where else ''}field {field}: missing")
    return mapping[field]


def _list(value, where):
    _require(isinstance(value, list | tuple), f"{where}: need a list")
    return value


def _text(value, where):
    _require(isinstance(value, str), f"{where}: need a string, got {value!r}")
    return value


def _number(value, where):
    ok = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    _require(ok and value == value, f"{where}: need a number, got {value!r}")  # NaN != NaN
    return value


def _whole(value, where):
    value = _number(value, where)
    whole = isinstance(value, int | np.integer) or float(value).is_integer()
    _require(whole, f"{where}: {value} is not a whole number")
    _require(value >= 0, f"{where}: {value} is negative")
    return int(value)


# ---------------------------------------------------------------- the problem
class Action:
    """One way to treat a problem: `outcomes` is a list or (S, 3) array of (p, cost, reward).

    Afterwards `p`, `cost` (tokens, int64) and `reward` are arrays over the distinct possible
    outcomes, sorted by cost; equal outcomes are merged and impossible ones dropped. `costs` and
    `costs_p` are the distribution of the cost alone. Raises ValueError naming action and field.
    """

    def __init__(self, name, outcomes):
        self.name = _text(name, "field name")
        where = f"action {name!r}, field"
        try:
            table = np.array(outcomes, dtype=float)
        except (TypeError, ValueError, OverflowError):
            table = np.array(math.nan)  # no table: the second check below says so
        _require(table.size > 0, f"{where} outcomes: empty")
        _require(table.ndim == 2 and table.shape[1] == 3,
                 f"{where} outcomes: need rows of three numbers (p, cost, reward)")
        p, cost, reward = table.T
        _require(np.all(p >= 0), f"{where} p: a probability is negative or NaN")
        _require(abs(p.sum() - 1) <= 1e-9, f"{where} p: sums to {p.sum():.12g}, not to 1")
        _require(np.all(cost >= 0), f"{where} cost: negative or NaN")
        _require(np.all(cost <= 2**53), f"{where} cost: above 2**53 tokens")
        _require(np.all(cost == np.floor(cost)), f"{where} cost: not a whole number of tokens")
        _require(np.all(np.isfinite(reward)), f"{where} reward: not finite")
        _require(np.all(reward >= 0), f"{where} reward: negative (see the module docstring)")
        p, cost, reward = table[p > 0][np.lexsort((reward[p > 0], cost[p > 0]))].T
        new = np.append(True, (np.diff(cost) > 0) | (np.diff(reward) > 0))
        self.p = np.add.reduceat(p, np.flatnonzero(new)) / p.sum()
        self.cost, self.reward = cost[new].astype(np.int64), reward[new]
        new = np.append(True, np.diff(self.cost) > 0)
        self.costs, self.costs_p = self.cost[new], np.add.reduceat(self.p, np.flatnonzero(new))

    def __repr__(self):
        return f"Action({self.name!r}, E[cost]={self.p @ self.cost:.4g}, E[reward]=" \
               f"{self.p @ self.reward:.4g}, {len(self.p)} outcomes)"


SKIP = Action("skip", [(1, 0, 0)])


@dataclass(frozen=True, eq=False)
class Instance:
    """A budget in tokens and the classes in the order they must be sat.

    `classes` is a sequence of N classes, each a non-empty sequence of K_i `Action`s (K_i may
    differ). Raises ValueError when a class is empty or the budget is no whole number >= 0, or so
    large that the value function would not fit in this machine's memory.
    """

    budget: int
    classes: tuple

    def __post_init__(self):
        classes = tuple(tuple(_list(actions, f"class {i}, field actions"))
                        for i, actions in enumerate(_list(self.classes, "field classes")))
        _require(len(classes) > 0, "field classes: empty, need at least one class")
        for i, actions in enumerate(classes):
            _require(len(actions) > 0, f"class {i}, field actions: empty, need at least one action")
            for k, a in enumerate(actions):
                _require(isinstance(a, Action), f"class {i}, action {k}: not an Action")
        budget = _whole(self.budget, "field budget")
        # bytes: V, the policy and one more of each to compare with; Q and charge of one class
        need = (budget + 1) * (24 * len(classes) + 40 * max(map(len, classes)))
        _require(need <= memory_limit(), f"field budget: needs {need >> 20} MiB of memory, "
                 f"more than the {memory_limit() >> 20} MiB that may be used")
        object.__setattr__(self, "classes", classes)
        object.__setattr__(self, "budget", budget)

    def __len__(self):
        return len(self.classes)

    @property
    def max_score(self):
        """Sum over the classes of the largest reward: the scale that tolerances refer to."""
        return sum(max(a.reward.max() for a in actions) for actions in self.classes)

    def reordered(self, order):
        """The same exam with problem order[0] first, order[1] second, ... (a permutation)."""
        _require(sorted(order) == list(range(len(self))), f"order: {order} is no permutation")
        return replace(self, classes=tuple(self.classes[i] for i in order))

    @classmethod
    def from_dict(cls, doc):
        """Read {"budget": B, "classes": [[{"name", "outcomes": [{"p", "cost", "reward"}]}]]}.

        Raises ValueError naming class and action (both counted from 0) and field.
        """
        _require(isinstance(doc, dict), "the instance: need a JSON object")
        budget = _whole(_field(doc, "budget", ""), "field budget")
        rows = _list(_field(doc, "classes", ""), "field classes")
        classes = []
        for i, actions in enumerate(rows):
            actions = _list(actions, f"class {i}, field actions")
            classes.append([_action_from_dict(entry, f"class {i}, action {k}")
                            for k, entry in enumerate(actions)])
        return cls(budget, classes)


def _action_from_dict(entry, where):
    _require(isinstance(entry, dict), f"{where}: need an object with name and outcomes")
    name = _text(_field(entry, "name", where), f"{where}, field name")
    where = f"{where} ({name!r})"
    outcomes, rows = _list(_field(entry, "outcomes", where), f"{where}, field outcomes"), []
    for s, outcome in enumerate(outcomes):
        spot = f"{where}, outcome {s}"
        _require(isinstance(outcome, dict), f"{spot}: need an object with p, cost and reward")
        rows.append([_number(_field(outcome, f, spot), f"{spot}, field {f}")
                     for f in ("p", "cost", "reward")])
    try:
        return Action(name, rows)
    except ValueError as error:
        what = str(error).removeprefix(f"action {name!r}, ")
        raise ValueError(f"{where}, {what}") from None


@cache
def memory_limit():
    """Half of this machine's (or container's) memory in bytes; 4 GiB where it cannot be read."""
    limits = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    cgroup = Path("/sys/fs/cgroup/memory.max")
    if cgroup.exists() and cgroup.read_text().strip().isdigit():
        limits.append(int(cgroup.read_text()))
    return min(limits, default=8 * 2**30) // 2


# ---------------------------------------------------------------- the exact solution
@dataclass(frozen=True, eq=False)
class Solution:
    """`value_function[i, b]`, shape (N + 1, B + 1): best expected reward from problem i on with b
    tokens left (its last row is 0). `policy[i, b]`, shape (N, B + 1): the action that earns it."""

    instance: Instance
    value_function: np.ndarray
    policy: np.ndarray

    @property
    def value(self):
        """Expected reward of the whole exam at the full budget, in points."""
        return float(self.value_function[0, -1])

    @property
    def first_action(self):
        """Name of the action to take on the first problem."""
        return self.instance.classes[0][self.policy[0, -1]].name

    @property
    def shadow_price(self):
        """V(b + 1) - V(b), shape (N + 1, B): what one more token is worth, in points a token."""
        return np.diff(self.value_function, axis=1)


def expected_reward(actions, budget):
    """E[r 1(c <= b)] of each action at each b = 0..budget, shape (K, budget + 1)."""
    out = np.empty((len(actions), budget + 1))
    for row, a in zip(out, actions, strict=True):
        fits = a.cost <= budget
        weights = (a.p * a.reward)[fits]
        np.cumsum(np.bincount(a.cost[fits], weights, minlength=budget + 1), out=row)
    return out


def expected_charge(actions, budget):
    """E[min(c, b)] in tokens, shape (K, budget + 1): a truncated action costs what remained."""
    out = np.zeros((len(actions), budget + 1))
    for row, a in zip(out, actions, strict=True):
        fits = a.costs < budget
        pmf = np.bincount(a.costs[fits], a.costs_p[fits], minlength=budget)[:budget]
        np.cumsum(1 - np.cumsum(pmf), out=row[1:])  # E[min(c, b)] = sum of P(c > t) over t < b
    return out


def expected_future(actions, future):
    """E[V(max(b - c, 0))] of each action at each b, shape (K, B + 1), for `future` = V, (B + 1,).

    One shifted slice per distinct cost. Every outcome keeps V(0); a cost c adds V(b - c) - V(0)
    to the budgets b >= c, and nothing to the others, which it truncates.
    """
    out = np.full((len(actions), len(future)), future[0])
    above = future - future[0]
    if not above.any():
        return out
    for row, a in zip(out, actions, strict=True):
        for c, p in zip(a.costs.tolist(), a.costs_p.tolist(), strict=True):
            if c < len(future):
                row[c:] += p * above[: len(future) - c]
    return out


def _cheapest_best(q, charge, tolerance):
    """Over axis -2 (actions): the index of the cheapest action within `tolerance` of the best."""
    tied = q >= q.max(axis=-2, keepdims=True) - tolerance
    charge = np.where(tied, charge, np.inf)
    cheapest = charge.min(axis=-2, keepdims=True)
    return np.argmax(charge <= cheapest * (1 + TIE) + TIE, axis=-2)


def solve(instance):
    """The optimal policy and its value by backward induction over the remaining budget.

        V_i(b) = max_k  E[ r_ik 1(c_ik <= b) + V_{i+1}(max(b - c_ik, 0)) ],    V_{N+1} = 0

    Returns a `Solution`. Time N K S B, memory N B (and K B while a class is worked on).
    """
    n, budget = len(instance), instance.budget
    value, policy = np.zeros((n + 1, budget + 1)), np.empty((n, budget + 1), dtype=np.int32)
    tolerance = TIE * instance.max_score
    for i in reversed(range(n)):
        actions = instance.classes[i]
        q = expected_reward(actions, budget) + expected_future(actions, value[i + 1])
        value[i] = q.max(axis=0)
        policy[i] = _cheapest_best(q, expected_charge(actions, budget), tolerance)
    return Solution(instance, value, policy)


def solve_batch(instances, chunk=8):
    """Solve M instances with the same N and B at once; returns a list of M `Solution`s.

    E[V(max(b - c, 0))] is a convolution of the cost distribution with V, so here all instances
    and actions share Fourier transforms: B log B an action whatever S is. Rounding (about 1e-15 of
    the scale) stays far below TIE, so policies equal those of `solve`. Raises ValueError when N or
    B differ. `chunk` instances are worked on at a time, which keeps the arrays in the cache.
    """
    instances = list(instances)
    sizes = {(len(x), x.budget) for x in instances}
    _require(len(sizes) <= 1, f"solve_batch: need one N and one budget, got {sorted(sizes)}")
    solutions = []
    for start in range(0, len(instances), chunk):
        solutions += _solve_chunk(instances[start : start + chunk])
    return solutions


def _solve_chunk(instances):
    m, n, budget = len(instances), len(instances[0]), instances[0].budget
    value, policy = np.zeros((m, n + 1, budget + 1)), np.empty((m, n, budget + 1), dtype=np.int32)
    tolerance = TIE * np.array([x.max_score for x in instances])[:, None, None]
    size = 1 << max(2 * budget - 2, 0).bit_length()  # a power of two >= 2 B - 1: no wrap-around
    for i in reversed(range(n)):
        classes = [x.classes[i] for x in instances]
        pmf, gain, exists = _stacked(classes, budget)
        cdf = np.cumsum(pmf, axis=-1)
        charge = np.zeros_like(cdf)
        np.cumsum(1 - cdf[..., :-1], axis=-1, out=charge[..., 1:])
        q = np.where(exists, np.cumsum(gain, axis=-1), -np.inf)
        if i < n - 1:
            future = value[:, None, i + 1]  # V(b) - V(0) is 0 at b = 0, so only b >= 1 is needed
            above = np.fft.rfft(future[..., 1:] - future[..., :1], size)
            moved = np.fft.irfft(np.fft.rfft(pmf[..., :budget], size) * above, size)
            q += future[..., :1]
            q[..., 1:] += moved[..., :budget]
        value[:, i] = q.max(axis=1)
        policy[:, i] = _cheapest_best(q, charge, tolerance)
    return [Solution(x, v, a) for x, v, a in zip(instances, value, policy, strict=True)]


def _stacked(classes, budget):
    """P(cost = b) and E[reward; cost = b], (M, K, B + 1), K the largest; (M, K, 1) what exists."""
    shape = (len(classes), max(map(len, classes)), budget + 1)
    rows = [(m * shape[1] + k, a) for m, actions in enumerate(classes)
            for k, a in enumerate(actions)]
    row = np.repeat([r for r, _ in rows], [len(a.p) for _, a in rows])
    p, cost, reward = (np.concatenate([getattr(a, name) for _, a in rows])
                       for name in ("p", "cost", "reward"))
    fits = cost <= budget
    cell, p, reward = (row * shape[2] + cost)[fits], p[fits], reward[fits]
    pmf = np.bincount(cell, p, math.prod(shape)).reshape(shape)
    gain = np.bincount(cell, p * reward, math.prod(shape)).reshape(shape)
    exists = np.arange(shape[1]) < np.array([[len(actions)] for actions in classes])
    return pmf, gain, exists[..., None]


# ---------------------------------------------------------------- any policy
def as_policy(instance, policy):
    """Check a policy (N, B + 1) or a plan (N,) and return it as a policy. Raises ValueError."""
    policy = np.asarray(policy)
    _require(np.issubdtype(policy.dtype, np.integer), "policy: need whole numbers")
    shape = (len(instance), instance.budget + 1)
    _require(policy.shape in (shape, shape[:1]),
             f"policy: shape {policy.shape}, need {shape}, or {shape[:1]} for a plan")
    policy = np.broadcast_to(policy[:, None] if policy.ndim == 1 else policy, shape)
    for i, actions in enumerate(instance.classes):
        _require(policy[i].min() >= 0 and policy[i].max() < len(actions),
                 f"policy: class {i} has actions 0..{len(actions) - 1}")
    return policy


def evaluate(instance, policy):
    """Value function of a given policy (or plan), shape (N + 1, B + 1); [0, -1] is its value."""
    policy = as_policy(instance, policy)
    value = np.zeros((len(instance) + 1, instance.budget + 1))
    for i in reversed(range(len(instance))):
        actions = instance.classes[i]
        q = expected_reward(actions, instance.budget) + expected_future(actions, value[i + 1])
        value[i] = np.take_along_axis(q, policy[i][None], axis=0)[0]
    return value


@dataclass(frozen=True, eq=False)
class Distribution:
    """Joint distribution of (score in points, tokens spent): three arrays of equal length."""

    score: np.ndarray
    spent: np.ndarray
    p: np.ndarray

    @property
    def mean_score(self):
        return float(self.p @ self.score)

    @property
    def mean_spent(self):
        return float(self.p @ self.spent)

    def of(self, what):
        """The marginal of "score" or "spent": (distinct values ascending, probabilities)."""
        values, index = np.unique(getattr(self, what), return_inverse=True)
        return values, np.bincount(index, self.p)


def distribution(instance, policy, max_states=5 * 10**6):
    """Exact joint distribution of score and tokens spent under a policy or plan.

    A forward pass over the states (score so far, tokens left); scores that differ by rounding
    alone are one state. Raises ValueError when a class meets more than `max_states` pairs of state
    and outcome; `simulate` then helps.
    """
    policy = as_policy(instance, policy)
    scale = instance.max_score or 1.0
    score, left, p = np.zeros(1), np.array([instance.budget]), np.ones(1)
    for i, actions in enumerate(instance.classes):
        parts = []
        for k, a in enumerate(actions):
            here = policy[i, left] == k
            _require(here.sum() * len(a.p) <= max_states, f"distribution: class {i} meets more "
                     f"than {max_states} states; use simulate")
            after = left[here, None] - a.cost
            parts.append((score[here, None] + a.reward * (after >= 0),
                          np.maximum(after, 0), p[here, None] * a.p))
        score, left, p = (np.concatenate([part[j].ravel() for part in parts]) for j in range(3))
        _, one, level = np.unique(np.round(score / scale, 12), return_index=True,
                                  return_inverse=True)
        states, index = np.unique(level * (instance.budget + 1) + left, return_inverse=True)
        p = np.bincount(index, p)
        score, left = score[one][states // (instance.budget + 1)], states % (instance.budget + 1)
    return Distribution(score, instance.budget - left, p)


def draw(instance, runs, seed=0):
    """Seeded luck: for each class an int array (runs, K_i), the outcome of *every* action.

    The same draws can be given to `simulate` and `prophet`, so that all face the same luck.
    `seed` may also be a NumPy Generator.
    """
    rng = np.random.default_rng(seed)
    return [np.stack([np.minimum(np.searchsorted(np.cumsum(a.p), rng.random(runs), "right"),
                                 len(a.p) - 1) for a in actions], axis=1)
            for actions in instance.classes]


@dataclass(frozen=True, eq=False)
class Runs:
    """Simulated exams: `score`, `spent` (runs,); `action` taken and `left` before it (runs, N)."""

    score: np.ndarray
    spent: np.ndarray
    action: np.ndarray
    left: np.ndarray

    @property
    def mean_score(self):
        return float(self.score.mean())

    @property
    def se(self):
        """Standard error of `mean_score`."""
        return float(self.score.std(ddof=1) / math.sqrt(len(self.score)))


def simulate(instance, policy, runs=10_000, seed=0, draws=None):
    """Sit the exam `runs` times under a policy or plan; returns `Runs`. Luck from `draw`."""
    policy = as_policy(instance, policy)
    draws = draw(instance, runs, seed) if draws is None else draws
    row = np.arange(len(draws[0]))
    left, score = np.full(len(row), instance.budget), np.zeros(len(row))
    action, before = (np.empty((len(row), len(instance)), dtype=np.int64) for _ in range(2))
    for i, actions in enumerate(instance.classes):
        before[:, i], action[:, i] = left, policy[i, left]
        cost, reward = (table[row, action[:, i]] for table in realize(actions, draws[i]))
        score += np.where(cost <= left, reward, 0.0)
        left = np.maximum(left - cost, 0)
    return Runs(score, instance.budget - left, action, before)


# ---------------------------------------------------------------- what to compare it with
def greedy_roi(instance):
    """Policy (N, B + 1) that looks at one problem at a time: the best expected return on tokens.

    ROI_k(b) = E[r 1(c <= b)] / E[min(c, b)], truncation included in both. A free action counts as
    a millionth of a token, so skipping has ROI 0. Ties (relative TIE) as everywhere.
    """
    budget = instance.budget
    policy = np.empty((len(instance), budget + 1), dtype=np.int32)
    for i, actions in enumerate(instance.classes):
        charge = expected_charge(actions, budget)
        roi = expected_reward(actions, budget) / np.maximum(charge, 1e-6)
        policy[i] = _cheapest_best(roi, charge, TIE * roi.max(axis=0))
    return policy


def greedy_knapsack(levels, budget, centroids=CENTROIDS):
    """The paper's Greedy Knapsack: which problems to sit, bool (N,), from predicted levels.

    Level l is taken to cost centroids[l] tokens; cheapest first (the earlier problem on equal
    levels), keep while the sum is <= budget. Levels without a centroid (Level 3) are skipped.
    """
    levels = [_whole(level, f"class {i}, field level") for i, level in enumerate(levels)]
    sit, total = np.zeros(len(levels), dtype=bool), 0
    for i in sorted(range(len(levels)), key=levels.__getitem__):  # sorted is stable
        if levels[i] >= len(centroids) or total + centroids[levels[i]] > budget:
            break
        sit[i], total = True, total + centroids[levels[i]]
    return sit


class Plan(NamedTuple):
    """A fixed plan: `actions` (N,) ints, its `value`; `exact` False if only a lower bound."""

    actions: np.ndarray
    value: float
    exact: bool


def open_loop(instance, max_nodes=None):
    """The best plan fixed before the exam starts (non-adaptive); truncation still applies.

    No dynamic program exists, so this is branch and bound over the K^N plans: a partial plan
    leaves a distribution over tokens left, and going on *adaptively* from there is an upper bound.
    After `max_nodes` partial plans (default 10,000, fewer on large instances, at least N) the
    best plan so far is returned, with `exact` False if a better one is possible.
    """
    n, budget, future = len(instance), instance.budget, solve(instance).value_function
    if max_nodes is None:
        steps = sum(len(a.costs) for actions in instance.classes for a in actions)
        max_nodes = min(10_000, 3 * 10**9 * n // (steps * (budget + LOOP)))
    slack, best = TIE * instance.max_score, (-math.inf, ())
    stack, nodes = [(math.inf, (), 0.0, np.eye(1, budget + 1, budget)[0])], 0  # all mass on B
    while stack and nodes < max(n, max_nodes):
        upper, plan, earned, left = stack.pop()
        if upper <= best[0] + slack:
            continue
        nodes, i = nodes + 1, len(plan)
        if plan:
            left = _spend(left, instance.classes[i - 1][plan[-1]])
        at_least = left[::-1].cumsum()[::-1]  # P(tokens left >= c)
        children = []
        for k, a in enumerate(instance.classes[i]):
            fits = a.cost <= budget
            score = earned + (a.p * a.reward)[fits] @ at_least[a.cost[fits]]
            children.append((score + _spend(left, a) @ future[i + 1], plan + (k,), score, left))
        children.sort(key=lambda child: -round(child[0] / (slack or 1)))  # stable: ties by index
        if i < n - 1:
            stack += reversed(children)  # the most promising child is looked at next
        elif children[0][0] > best[0] + slack:  # nothing comes after, so the bound is the value
            best = (float(children[0][0]), children[0][1])
    exact = all(upper <= best[0] + slack for upper, *_ in stack)
    return Plan(np.array(best[1], dtype=np.int32), best[0], exact)


def _spend(left, action):
    """Distribution over tokens left, (B + 1,), after paying for an action."""
    out = np.zeros_like(left)
    for c, p in zip(action.costs.tolist(), action.costs_p.tolist(), strict=True):
        c = min(c, len(left))
        out[: len(left) - c] += p * left[c:]
        out[0] += p * left[:c].sum()
    return out


class Estimate(NamedTuple):
    """A value in points and its standard error, 0.0 when the value is exact."""

    value: float
    se: float


def hindsight(instance, exact_limit=10**6, samples=None, seed=0):
    """The prophet's value: E[best score when all outcomes are known before the exam].

    Outcomes are independent across actions and classes. With at most `exact_limit` joint
    outcomes (and 10 times as many table cells) the expectation is exact, otherwise the mean over
    `samples` seeded draws (default 10,000, on large instances fewer, at least 100).
    The exact value is never below the optimal policy's. Returns an `Estimate`.
    """
    support = [math.prod(len(a.p) for a in actions) for actions in instance.classes]
    points = _reachable(instance) if math.prod(support) <= exact_limit else []
    cells = [math.prod(support[i:]) * len(columns) for i, columns in enumerate(points)]
    if not points or max(cells) > 10 * exact_limit:
        return _sampled_hindsight(instance, samples, np.random.default_rng(seed))
    # One row of `best` per joint outcome of the classes i..N, one column per budget that can be
    # left before problem i. All outcomes of the earlier classes share these rows.
    best, weight = np.zeros((1, len(points[-1]))), np.ones(1)
    for i in reversed(range(len(instance))):
        actions = instance.classes[i]
        sizes = [len(a.p) for a in actions]
        strides = np.cumprod([1, *sizes[:0:-1]])[::-1]  # mixed radix: all joint outcomes in order
        pick = np.arange(support[i])[:, None] // strides % sizes
        costs, rewards = realize(actions, pick)
        q = []
        for c, r in zip(costs.T, rewards.T, strict=True):
            left = points[i] - c[:, None]
            after = np.searchsorted(points[i + 1], np.maximum(left, 0))
            q.append(np.where(left >= 0, r[:, None], 0.0) + best[:, after])
        best = np.max(q, axis=0).reshape(-1, len(points[i]))
        p = np.prod([a.p[pick[:, k]] for k, a in enumerate(actions)], axis=0)
        weight = np.outer(weight, p).ravel()
    return Estimate(float(weight @ best[:, 0]), 0.0)


def _sampled_hindsight(instance, samples, rng):
    actions = sum(map(len, instance.classes))
    if samples is None:
        samples = min(10_000, max(100, 10**10 // (actions * (instance.budget + LOOP))))
    parts = np.array_split(np.arange(samples), 1 + samples * actions // 10**6)  # bounds memory
    best = np.concatenate([prophet(instance, draw(instance, len(part), rng)) for part in parts])
    return Estimate(float(best.mean()), float(best.std(ddof=1) / math.sqrt(samples)))


def _reachable(instance):
    """For i = 0..N the budgets, ascending, that can be left before problem i; the first is [B]."""
    points = [np.array([instance.budget])]
    for actions in instance.classes:
        seen = np.zeros(instance.budget + 1, dtype=bool)
        for c in np.unique(np.concatenate([a.costs for a in actions])).tolist():
            seen[np.maximum(points[-1] - c, 0)] = True
        points.append(np.flatnonzero(seen))
    return points


def prophet(instance, draws):
    """Best possible score in each drawn exam, (runs,), for `draws` from `draw`."""
    taken = [realize(actions, pick) for actions, pick in zip(instance.classes, draws, strict=True)]
    costs = zip(*[cost.tolist() for cost, _ in taken], strict=True)
    rewards = zip(*[reward.tolist() for _, reward in taken], strict=True)
    return np.array([offline_value(c, r, instance.budget)
                     for c, r in zip(costs, rewards, strict=True)])


def realize(actions, pick):
    """Costs and rewards, each (runs, K), of one class whose drawn outcomes are `pick`."""
    return (np.stack([a.cost[pick[:, k]] for k, a in enumerate(actions)], axis=1),
            np.stack([a.reward[pick[:, k]] for k, a in enumerate(actions)], axis=1))


def offline_value(costs, rewards, budget):
    """One exam whose outcomes are all known: the deterministic multiple-choice knapsack problem.

    costs, rewards: N lists of K_i numbers. Kellerer, Pferschy, Pisinger, ch. 11: dominated
    actions (no cheaper and no better than another) are passed over, then a DP over the budget.
    Truncation: an action that does not fit leaves V(0), and no action that fits is below that.
    """
    best = np.zeros(budget + 1)
    for cost, reward in zip(costs[:0:-1], rewards[:0:-1], strict=True):  # last to second
        future, best, top = best, np.full(budget + 1, best[0]), -1.0
        for c, r in sorted(zip(cost, reward, strict=True)):
            if c <= budget and r > top:
                after, now = future[: budget + 1 - c], best[c:]
                if top < 0:  # the cheapest action that fits: nothing to compare it with
                    np.add(after, r, out=now)
                else:
                    np.maximum(now, after + r, out=now)
                top = r
    first = zip(costs[0], rewards[0], strict=True)  # met with the whole budget only
    return float(max(r + best[budget - c] if c <= budget else best[0] for c, r in first))


# ---------------------------------------------------------------- order, folly, information
def best_order(instance):
    """The order with the highest optimal value: (order, value), by search over permutations.

    Orders are grown from the last problem backwards, so that equal endings are solved once. On a
    tie the given order stays. Raises ValueError above 7 problems.
    """
    n, budget = len(instance), instance.budget
    _require(n <= 7, f"best_order: {n} problems have too many orders, the limit is 7")
    gain = [expected_reward(actions, budget) for actions in instance.classes]
    best = [tuple(range(n)), solve(instance).value]

    def extend(order, future):
        rest = [i for i in range(n) if i not in order]
        for i in rest:
            actions = instance.classes[i]
            if len(rest) > 1:
                extend((i, *order), (gain[i] + expected_future(actions, future)).max(axis=0))
                continue
            value = max(g[-1] + a.costs_p @ future[np.maximum(budget - a.costs, 0)]
                        for g, a in zip(gain[i], actions, strict=True))
            if value > best[1] + TIE * instance.max_score:
                best[:] = (i, *order), float(value)

    extend((), np.zeros(budget + 1))
    return tuple(best)


def order_regret(instance):
    """1 - V(given order) / V(best order), both solved optimally: the share that no policy can
    win back. (The paper's regret compares measured scores, and so mixes order with folly.)"""
    best = best_order(instance)[1]
    return 1 - solve(instance).value / best if best > 0 else 0.0


def optimality_gap(instance, policy):
    """1 - V(policy) / V(optimal policy) in the given order: the share lost to folly."""
    best = solve(instance).value
    return 1 - float(evaluate(instance, policy)[0, -1]) / best if best > 0 else 0.0


def value_of_information(instance):
    """V(optimal policy) - V(best fixed plan), in points: what looking at the clock is worth.

    Raises ValueError when the best fixed plan could not be proved (see `open_loop`)."""
    plan = open_loop(instance)
    _require(plan.exact, "value_of_information: too many plans for an exact open loop")
    return solve(instance).value - plan.value


# ---------------------------------------------------------------- JSON in, JSON out
def solve_document(doc):
    """Solve the instance in a JSON object (see `Instance.from_dict`); returns a JSON object.

    value, open_loop, greedy (by ROI), hindsight: expected rewards in points; hindsight_se: 0 when
    exact; open_loop_exact: false if open_loop is only a lower bound; first_action: its name;
    order_regret: 1 - V(given order) / V(best order), null above 7 problems.
    """
    instance = Instance.from_dict(doc)
    solution, plan, ahead = solve(instance), open_loop(instance), hindsight(instance)
    return {
        "value": solution.value,
        "open_loop": plan.value,
        "open_loop_exact": plan.exact,
        "greedy": float(evaluate(instance, greedy_roi(instance))[0, -1]),
        "hindsight": ahead.value,
        "hindsight_se": ahead.se,
        "first_action": solution.first_action,
        "order_regret": order_regret(instance) if len(instance) <= 7 else None,
    }
