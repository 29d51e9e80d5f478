"""OS-MCKP, the Ordered Stochastic Multiple-Choice Knapsack Problem, solved exactly. Notebook 01.

    Action, Instance           the problem: what each action may cost and earn
    solve, Solution            the optimal policy (Bellman)
    evaluate                   the value of any policy
    greedy_knapsack            the paper's baseline

`experiments.knapsack` has other policies, simulation, and what is lost to what.

An exam has N problems in a fixed order and one token budget B. Each problem is a *class* of
*actions* (skip, quick, careful, ...); exactly one action per class is taken, in order, knowing the
tokens that remain. An action is a finite distribution over (token cost, reward >= 0 in points):

    max over policies  E[ sum_i r_i ]   subject to   sum_i c_i <= B          (arXiv 2601.03822)

A cost above the remaining budget is a *truncation*: no reward, and all that remained is spent.
A *policy* is an int array (N, B + 1): problem x tokens left -> action. A *plan* (N,) has one
action per problem, and is taken for a policy everywhere. Values that differ by at most TIE times
the largest total reward tie; a tie goes to the smaller expected charge, then to the lower index."""

import numpy as np

TIE = 1e-9


def require(condition, message: str) -> None:
    """Raise a ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


class Action:
    """One way to treat a problem. `outcomes`, a list or (S, 3) array of (p, cost, reward), become
    arrays `p`, `cost`, `reward`, sorted; `costs` and `costs_p` are the cost's own distribution."""

    def __init__(self, name: str, outcomes):
        where = f"action {name!r}, field"
        try:
            table = np.array(outcomes, dtype=float)
            p, cost, reward = table.T if table.ndim == 2 else ()
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{where} outcomes: need rows of (p, cost, reward)") from error
        require(np.all(p >= 0) and abs(p.sum() - 1) <= 1e-9,
                f"{where} p: need numbers, 0 or more, that sum to 1, not to {p.sum():.12g}")
        require(np.all((cost >= 0) & (cost <= 2**53) & (cost == np.floor(cost))),
                f"{where} cost: need whole numbers of tokens, from 0 to 2**53")
        require(np.all((reward >= 0) & (reward < np.inf)), f"{where} reward: need finite, not < 0")
        rows, same = np.unique(table[p > 0, 1:], axis=0, return_inverse=True)  # merges equal ones
        self.name, self.p = name, np.bincount(same, p[p > 0]) / p.sum()
        self.cost, self.reward = rows[:, 0].astype(np.int64), rows[:, 1]
        self.costs, same = np.unique(self.cost, return_inverse=True)
        self.costs_p = np.bincount(same, self.p)

    def __repr__(self):
        return (f"Action({self.name!r}, E[cost]={self.p @ self.cost:.4g}, "
                f"E[reward]={self.p @ self.reward:.4g}, {len(self.p)} outcomes)")


SKIP = Action("skip", [(1, 0, 0)])


class Instance:
    """A budget in tokens, and N classes, lists of `Action`s, in order; `max_score` is in points."""

    def __init__(self, budget: int, classes):
        require(isinstance(classes, list | tuple) and classes, "field classes: need at least one")
        for i, actions in enumerate(classes):
            require(isinstance(actions, list | tuple) and actions and all(
                isinstance(a, Action) for a in actions), f"class {i}: need a list of Actions")
        require(budget >= 0 and budget % 1 == 0, f"field budget: need whole tokens, not {budget!r}")
        self.budget, self.classes = int(budget), tuple(map(tuple, classes))
        self.max_score = sum(max(a.reward.max() for a in some) for some in self.classes)

    def __len__(self):
        return len(self.classes)


class Solution:
    """`value_function[i, b]`, (N + 1, B + 1): best expected reward from problem i on with b tokens
    left; `policy[i, b]`, (N, B + 1): the action that earns it."""

    def __init__(self, instance, value_function, policy):
        self.instance, self.value_function, self.policy = instance, value_function, policy
        self.value = float(value_function[0, -1])  # of the whole exam with the full budget, points
        self.first_action = instance.classes[0][policy[0, -1]].name  # to take on the first problem
        self.shadow_price = np.diff(value_function, axis=1)  # of one more token: V(b + 1) - V(b)


def expected_reward(actions, budget: int) -> np.ndarray:
    """E[r 1(c <= b)] of each action at each b = 0..budget, shape (K, budget + 1)."""
    out = [np.bincount(np.minimum(a.cost, budget + 1), a.p * a.reward, budget + 2) for a in actions]
    return np.cumsum(out, axis=1)[:, :-1]


def expected_charge(actions, budget: int) -> np.ndarray:
    """E[min(c, b)] in tokens, shape (K, budget + 1): a truncated action costs what remained."""
    out = [np.bincount(np.minimum(a.costs, budget), a.costs_p, budget + 1) for a in actions]
    above = 1 - np.cumsum(out, axis=1)[:, :-1]  # P(c > t), and E[min(c, b)] is its sum over t < b
    return np.cumsum(np.pad(above, ((0, 0), (1, 0))), axis=1)


def expected_future(actions, future: np.ndarray) -> np.ndarray:
    """E[V(max(b - c, 0))] of each action at each b, for `future` = V (B + 1,); (K, B + 1)."""
    out, above = np.full((len(actions), len(future)), future[0]), future - future[0]
    for row, a in zip(out, actions, strict=True):
        for c, p in zip(a.costs.tolist(), a.costs_p.tolist(), strict=True):
            if c < len(future):  # V(0) for all, V(b - c) - V(0) more where the cost fits
                row[c:] += p * above[: len(future) - c]
    return out


def cheapest_best(q, charge, tolerance):
    """For each column, the cheapest of the actions (rows) within `tolerance` of the best."""
    charge = np.where(q >= q.max(axis=0) - tolerance, charge, np.inf)
    return np.argmax(charge <= charge.min(axis=0) * (1 + TIE) + TIE, axis=0)


def solve(instance: Instance) -> Solution:
    """The optimal policy and its value by backward induction (Bellman), in time N K S B:
    V_i(b) = max_k E[ r_ik 1(c_ik <= b) + V_{i+1}(max(b - c_ik, 0)) ], with V_{N+1} = 0."""
    n, budget = len(instance), instance.budget
    value, policy = np.zeros((n + 1, budget + 1)), np.empty((n, budget + 1), dtype=np.int32)
    tolerance = TIE * instance.max_score
    for i in reversed(range(n)):
        actions = instance.classes[i]
        q = expected_reward(actions, budget) + expected_future(actions, value[i + 1])
        value[i] = q.max(axis=0)
        policy[i] = cheapest_best(q, expected_charge(actions, budget), tolerance)
    return Solution(instance, value, policy)


def as_policy(instance, policy):
    """A policy (N, B + 1) or a plan (N,), checked, as a policy."""
    policy, shape = np.asarray(policy), (len(instance), instance.budget + 1)
    policy = np.broadcast_to(policy[:, None], shape) if policy.shape == shape[:1] else policy
    sizes = np.array([[len(actions)] for actions in instance.classes])
    require(policy.dtype.kind in "iu" and policy.shape == shape and np.all(0 <= policy)
            and np.all(policy < sizes), f"policy: need {shape} or {shape[:1]} numbers of actions")
    return policy


def evaluate(instance: Instance, policy) -> np.ndarray:
    """Value function of a given policy (or plan), shape (N + 1, B + 1); [0, -1] is its value."""
    policy = as_policy(instance, policy)
    value = np.zeros((len(instance) + 1, instance.budget + 1))
    for i, actions in reversed(list(enumerate(instance.classes))):
        q = expected_reward(actions, instance.budget) + expected_future(actions, value[i + 1])
        value[i] = np.take_along_axis(q, policy[i][None], axis=0)[0]
    return value


def greedy_knapsack(levels, budget: int, centroids) -> np.ndarray:
    """The paper's Greedy Knapsack: which problems to sit, bool (N,): the cheapest first, while they
    fit, where predicted level l is taken to cost centroids[l] tokens, or too much."""
    require(min(levels, default=0) >= 0, f"levels: need 0 or more, not {levels}")
    cost = np.append(centroids, np.inf)[np.minimum(levels, len(centroids))]
    order = np.argsort(levels, kind="stable")
    return (np.cumsum(cost[order]) <= budget)[np.argsort(order)]
