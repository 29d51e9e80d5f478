"""Solutions to the exercises, and answers that must be rejected; used by test_exercises.py."""

import numpy as np

from roi_lib.osmckp import SKIP, Action, Instance


def gain(outcomes, b):
    return sum(p * reward for p, cost, reward in outcomes if cost <= b)


def backup(actions, future):
    def one(outcomes, b):
        return sum(p * ((reward if cost <= b else 0) + future[max(b - cost, 0)])
                   for p, cost, reward in outcomes)
    return [max(one(outcomes, b) for outcomes in actions) for b in range(len(future))]


def backup_without_truncation(actions, future):
    return [max(sum(p * (reward + future[b - cost]) for p, cost, reward in outcomes if cost <= b)
                for outcomes in actions) for b in range(len(future))]


def finished(costs, budget):
    spent = solved = 0
    for cost in costs:
        spent += cost
        solved += spent <= budget
    return solved


def regret(easy, other):
    return 1 - sum(other) / sum(easy)


def finished_if_skipping(costs, budget):
    solved = 0
    for cost in costs:
        if cost <= budget:
            budget, solved = budget - cost, solved + 1
    return solved


def cut(ids, budget, eos):
    ids = ids[: ids.index(eos) + 1] if eos in ids else ids
    return ids[:budget], len(ids) <= budget and ids[-1] == eos


def cut_without_end(ids, budget, eos):
    return ids[:budget], eos in ids[:budget]


def invert(probabilities, u):
    for token, p in enumerate(probabilities):
        if u < p:
            return token
        u -= p


def costs(starts, total):
    return [starts[0], *(b - a for a, b in zip(starts, [*starts[1:], total], strict=True))]


def charges(costs, budget):
    paid = []
    for cost in costs:
        paid.append(min(cost, budget - sum(paid)))
    return paid


def charges_of_finished(costs, budget):
    return [cost if sum(costs[: i + 1]) <= budget else 0 for i, cost in enumerate(costs)]


def triple_share(one, other):
    one, other = (set(zip(w, w[1:], w[2:], strict=False)) for w in (one, other))
    return len(one & other) / len(one | other)


SOLUTIONS = {
    "00.1": finished,
    "00.2": regret,
    "01.1": 1.4,
    "01.2": gain,
    "01.3": backup,
    "01.4": Instance(20, [[SKIP, Action("glance", [(0.1, 1, 1), (0.9, 1, 0)]),
                           Action("careful", [(1, 20, 1)])]]),
    "02.1": 10,
    "02.2": charges,
    "02.3": triple_share,
    "03.1": cut,
    "03.2": invert,
    "03.3": costs,
    "03.4": lambda lengths: (len(lengths) * max(lengths), sum(lengths)),
}

WRONG = {
    "00.1": [2, finished_if_skipping, lambda costs, budget: len(costs)],
    "00.2": [0.5, lambda easy, other: sum(easy) - sum(other),
             lambda easy, other: (sum(easy) - sum(other)) / sum(other) if sum(other) else 0.0],
    "01.1": [1.3, 1.8, "a"],
    "01.2": [3, lambda outcomes, b: 0.5, lambda outcomes, b: sum(p * r for p, c, r in outcomes),
             lambda outcomes, b: sum(p * r for p, c, r in outcomes if c < b)],
    "01.3": [backup_without_truncation, lambda actions, future: future,
             lambda actions, future: np.zeros(3), lambda actions, future: future[99]],
    "01.4": [7, Instance(20, [[SKIP], [SKIP]]), Instance(21, [[SKIP]]), Instance(20, [[SKIP]]),
             Instance(20, [[SKIP, Action("try", [(1, 9, 1)])]])],
    "02.1": [12, 24, "a"],
    "02.2": [3, charges_of_finished, lambda costs, budget: costs],
    "02.3": [0.5, lambda one, other: len(set(one) & set(other)) / len(set(one) | set(other)),
             lambda one, other: float(one == other)],
    "03.1": [1, cut_without_end, lambda ids, budget, eos: (ids[:budget], len(ids) <= budget)],
    "03.2": [0.5, lambda p, u: int(np.argmax(p)), lambda p, u: int((np.cumsum(p) > u).sum())],
    "03.3": [[1], lambda starts, total: [b - a for a, b in zip(starts, [*starts[1:], total],
                                                               strict=True)]],
    "03.4": [7, lambda lengths: (sum(lengths), sum(lengths)), lambda lengths: (max(lengths), 1)],
}
