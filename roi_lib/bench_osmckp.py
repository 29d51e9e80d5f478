"""Times the OS-MCKP solver: one instance, a batch, memory, and scipy's milp on offline instances.

Run as `python -m roi_lib bench osmckp --out FILE`. One thread is enough; times are the best of a
few repeats, in milliseconds. The instances are random but seeded.
"""

import time
import tracemalloc

import numpy as np
from scipy.optimize import LinearConstraint, milp

from roi_lib import osmckp
from roi_lib.osmckp import SKIP, Action, Instance


def random_instance(n, budget, k, s, seed=0):
    """N classes of SKIP and k - 1 actions with s outcomes each; costs up to 0.7 B, rewards 0/1."""
    rng = np.random.default_rng(seed)

    def act(name):
        cost = rng.integers(1, max(2, int(0.7 * budget)), s)
        return Action(name, np.column_stack([rng.dirichlet(np.ones(s)), cost, rng.random(s) < 0.7]))

    return Instance(budget, [[SKIP] + [act(f"effort {j}") for j in range(1, k)] for _ in range(n)])


def milp_value(costs, rewards, budget):
    """The offline multiple-choice knapsack by scipy.optimize.milp with gap 0, for one exam.

    costs, rewards: lists of N arrays (K_i,). Costs that never fit are cut to budget + 1.
    """
    owner = np.repeat(np.arange(len(costs)), [len(c) for c in costs])
    one_each = (owner == np.arange(len(costs))[:, None]).astype(float)
    spend = np.minimum(np.concatenate(costs), budget + 1)[None]
    result = milp(-np.concatenate(rewards), integrality=np.ones(len(owner)), bounds=(0, 1),
                  constraints=[LinearConstraint(one_each, 1, 1),
                               LinearConstraint(spend, -np.inf, budget)],
                  options={"mip_rel_gap": 0})
    return -result.fun


def _best_ms(function, repeats):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times), result


def _peak_mib(instance):
    tracemalloc.start()
    osmckp.solve(instance)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def _one(repeats):
    instance = random_instance(3, 4096, 4, 256)
    ms, solution = _best_ms(lambda: osmckp.solve(instance), repeats)
    return {"N": 3, "B": 4096, "K": 4, "S": 256, "ms": ms, "target_ms": 25,
            "value": solution.value}


def _batch(count, repeats):
    instances = [random_instance(3, 1024, 4, 64, seed) for seed in range(count)]
    alone_ms, alone = _best_ms(lambda: [osmckp.solve(x) for x in instances], repeats)
    batch_ms, batch = _best_ms(lambda: osmckp.solve_batch(instances), repeats)
    gap = max(abs(a.value - b.value) for a, b in zip(alone, batch, strict=True))
    return {"instances": count, "N": 3, "B": 1024, "K": 4, "S": 64, "one_by_one_ms": alone_ms,
            "batch_ms": batch_ms, "speedup": alone_ms / batch_ms, "largest_difference": gap}


def _memory():
    rows = []
    for n, budget in [(3, 4096), (3, 8192), (6, 4096), (6, 8192)]:
        peak = _peak_mib(random_instance(n, budget, 4, 16))
        rows.append({"N": n, "B": budget, "K": 4, "S": 16, "peak_mib": peak})
    return rows


def _offline(n, budget, exams, repeats):
    instance = random_instance(n, budget, 4, 64)
    draws = osmckp.draw(instance, exams)
    pairs = [osmckp.realize(actions, pick) for actions, pick
             in zip(instance.classes, draws, strict=True)]
    rows = [tuple([pair[what][run] for pair in pairs] for what in (0, 1)) for run in range(exams)]
    dp_ms, dp = _best_ms(lambda: osmckp.prophet(instance, draws), repeats)
    milp_ms, ip = _best_ms(lambda: [milp_value(*row, budget) for row in rows], 1)
    return {"exams": exams, "N": n, "B": budget, "K": 4, "dp_ms_per_exam": dp_ms / exams,
            "milp_ms_per_exam": milp_ms / exams, "speedup": milp_ms / dp_ms,
            "largest_difference": float(np.abs(dp - np.array(ip)).max())}


def bench(batch=1000, exams=200, repeats=5):
    """All timings as one JSON-ready dict. About 10 seconds at the default sizes."""
    return {
        "one_instance": _one(repeats),
        "batch": _batch(batch, max(1, repeats // 2)),
        "memory_linear_in_NB": _memory(),
        "offline_vs_milp": [_offline(3, 1024, exams, repeats), _offline(12, 1024, exams, repeats)],
    }
