"""Times the OS-MCKP solver, and the hindsight problem beside scipy's mixed-integer program."""

import timeit

import numpy as np
from scipy.optimize import LinearConstraint, milp

from roi_lib import osmckp
from roi_lib.experiments import knapsack
from roi_lib.osmckp import SKIP, Action, Instance


def random_instance(n: int, budget: int, k: int, s: int) -> Instance:
    """N classes of SKIP and k - 1 actions with s outcomes each; costs up to 0.7 B, rewards 0/1."""
    rng = np.random.default_rng(0)

    def act(name):
        cost = rng.integers(1, max(2, int(0.7 * budget)), s)
        return Action(name, np.column_stack([rng.dirichlet(np.ones(s)), cost, rng.random(s) < 0.7]))

    return Instance(budget, [[SKIP] + [act(f"effort {j}") for j in range(1, k)] for _ in range(n)])


def milp_value(owner: np.ndarray, cost: np.ndarray, reward: np.ndarray, budget: int) -> float:
    """One exam with known outcomes (class, cost, reward of each action), by milp with gap 0."""
    one_each = (owner == np.unique(owner)[:, None]).astype(float)
    return -milp(-reward, integrality=np.ones(len(owner)), bounds=(0, 1), constraints=[
        LinearConstraint(one_each, 1, 1), LinearConstraint(cost[None], -np.inf, budget)],
        options={"mip_rel_gap": 0}).fun


def best_ms(function, repeats: int) -> float:
    """The shortest time of a few calls."""
    return 1e3 * min(timeit.repeat(function, number=1, repeat=repeats))


def offline(n: int, budget: int, exams: int, repeats: int) -> dict:
    """The dynamic program for known outcomes beside milp, on the same draws."""
    instance = random_instance(n, budget, 4, 64)
    draws = knapsack.draw(instance, exams)
    known = [np.array([(i, action.cost[pick[run, k]], action.reward[pick[run, k]])
                       for i, pick in enumerate(draws)
                       for k, action in enumerate(instance.classes[i])], float).T
             for run in range(exams)]
    dp_ms = best_ms(lambda: knapsack.hindsight_scores(instance, draws), repeats) / exams
    milp_ms = best_ms(lambda: [milp_value(*one, budget) for one in known], 1) / exams
    best = knapsack.hindsight_scores(instance, draws)
    difference = best - [milp_value(*x, budget) for x in known]
    return {"exams": exams, "N": n, "B": budget, "K": 4, "dp_ms_per_exam": dp_ms,
            "milp_ms_per_exam": milp_ms, "speedup": milp_ms / dp_ms,
            "largest_difference": float(np.abs(difference).max())}


def bench(exams: int = 200, repeats: int = 5) -> dict:
    """All timings as one JSON-ready dict; about ten seconds."""
    instance = random_instance(3, 4096, 4, 256)
    ms = best_ms(lambda: osmckp.solve(instance), repeats)
    return {"one_instance": {"N": 3, "B": 4096, "K": 4, "S": 256, "ms": ms, "target_ms": 25,
                             "value": osmckp.solve(instance).value},
            "offline_vs_milp": [offline(n, 1024, exams, repeats) for n in (3, 12)]}
