"""Times the OS-MCKP solver, and the hindsight problem beside scipy's mixed-integer program.

The instances are random but seeded; times are the best of a few repeats, in milliseconds.
"""

import time

import numpy as np
from scipy.optimize import LinearConstraint, milp

from roi_lib import osmckp
from roi_lib.osmckp import SKIP, Action, Instance


def random_instance(n: int, budget: int, k: int, s: int) -> Instance:
    """N classes of SKIP and k - 1 actions with s outcomes each; costs up to 0.7 B, rewards 0/1."""
    rng = np.random.default_rng(0)

    def act(name):
        cost = rng.integers(1, max(2, int(0.7 * budget)), s)
        return Action(name, np.column_stack([rng.dirichlet(np.ones(s)), cost, rng.random(s) < 0.7]))

    return Instance(budget, [[SKIP] + [act(f"effort {j}") for j in range(1, k)] for _ in range(n)])


def milp_value(owner: np.ndarray, cost: np.ndarray, reward: np.ndarray, budget: int) -> float:
    """One exam with known outcomes, by scipy.optimize.milp with gap 0: class, cost and reward of
    each action."""
    one_each = (owner == np.unique(owner)[:, None]).astype(float)
    return -milp(-reward, integrality=np.ones(len(owner)), bounds=(0, 1), constraints=[
        LinearConstraint(one_each, 1, 1), LinearConstraint(cost[None], -np.inf, budget)],
        options={"mip_rel_gap": 0}).fun


def timed(function, *arguments) -> tuple:
    """Seconds of one call, and its result."""
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def best_ms(repeats: int, function, *arguments) -> tuple:
    """The shortest time of a few calls, and the last result."""
    times, results = zip(*(timed(function, *arguments) for _ in range(repeats)), strict=True)
    return 1e3 * min(times), results[-1]


def offline(n: int, budget: int, exams: int, repeats: int) -> dict:
    """The dynamic program for known outcomes beside milp, on the same draws."""
    instance = random_instance(n, budget, 4, 64)
    draws = osmckp.draw(instance, exams)
    known = [np.array([(i, action.cost[pick[run, k]], action.reward[pick[run, k]])
                       for i, pick in enumerate(draws)
                       for k, action in enumerate(instance.classes[i])], float).T
             for run in range(exams)]
    dp_ms, dp = best_ms(repeats, osmckp.hindsight_scores, instance, draws)
    milp_ms, ip = best_ms(1, lambda: [milp_value(*one, budget) for one in known])
    return {"exams": exams, "N": n, "B": budget, "K": 4, "dp_ms_per_exam": dp_ms / exams,
            "milp_ms_per_exam": milp_ms / exams, "speedup": milp_ms / dp_ms,
            "largest_difference": float(np.abs(dp - np.array(ip)).max())}


def bench(exams: int = 200, repeats: int = 5) -> dict:
    """All timings as one JSON-ready dict; about ten seconds."""
    ms, solution = best_ms(repeats, osmckp.solve, random_instance(3, 4096, 4, 256))
    return {"one_instance": {"N": 3, "B": 4096, "K": 4, "S": 256, "ms": ms, "target_ms": 25,
                             "value": solution.value},
            "offline_vs_milp": [offline(n, 1024, exams, repeats) for n in (3, 12)]}
