"""Solutions to the exercises, and answers that must be rejected; used by test_exercises.py."""

from itertools import product

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


def finished_if_skipping(costs, budget):
    solved = 0
    for cost in costs:
        if cost <= budget:
            budget, solved = budget - cost, solved + 1
    return solved


def cut(ids, budget, eos):
    ids = ids[: ids.index(eos) + 1] if eos in ids else ids
    return ids[:budget], len(ids) <= budget and ids[-1] == eos


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


def triple_share(one, other):
    one, other = (set(zip(w, w[1:], w[2:], strict=False)) for w in (one, other))
    return len(one & other) / len(one | other)


def label(samples, edges):
    good = [cost for cost, correct in samples if correct and cost <= edges[-1]]
    return sum(min(good) > edge for edge in edges) if good else len(edges)


def label_below_edge(samples, edges):
    good = [cost for cost, correct in samples if correct and cost < edges[-1]]
    return sum(min(good) >= edge for edge in edges) if good else len(edges)


def weighted_loss(nats, kinds, weight):
    learned = [(n, weight if kind == "level" else 1)
               for n, kind in zip(nats, kinds, strict=True) if kind != "prompt"]
    return sum(n * w for n, w in learned) / len(learned)


def weighted_mean(nats, kinds, weight):
    weights = [{"prompt": 0, "word": 1, "level": weight}[kind] for kind in kinds]
    return float(np.average(nats, weights=weights))


def most_points(samples, skip, budget):
    ways = product(*([(skip, False), *some] for some in samples))
    return max(sum(right and sum(cost for cost, _ in way[: i + 1]) <= budget
                   for i, (_, right) in enumerate(way)) for way in ways)


def false_and_missed(skipped, rates):
    out = [rate for skip, rate in zip(skipped, rates, strict=True) if skip]
    tried = [rate for skip, rate in zip(skipped, rates, strict=True) if not skip]
    return sum(out) / len(out), tried.count(0) / len(tried)


def exam_reward(levels, costs, right, edges):
    return sum(ok and level == sum(cost > edge for edge in edges)
               for level, cost, ok in zip(levels, costs, right, strict=True))


def advantage(rewards):
    known = [r for r in rewards if r is not None]
    return [0.0 if r is None else r - sum(known) / len(known) for r in rewards]


def push(lengths, advantages, longest, normalizer):
    return [a / (longest if normalizer == "constant" else length) / len(lengths)
            for a, length in zip(advantages, lengths, strict=True)]


def regret_of(easy, other):
    return (sum(easy) - sum(other)) / sum(easy) if sum(easy) else float("nan")


def mean_of_regrets(easy, other):
    known = [(e, o) for e, o in zip(easy, other, strict=True) if e]
    return sum((e - o) / e for e, o in known) / len(known) if known else float("nan")


def paired_error(a, b):
    return np.std(np.subtract(a, b), ddof=1) / np.sqrt(len(a))


def better(cost, p, sure, budget):
    gamble = p + (cost + sure <= budget) if cost <= budget else 0
    return max(gamble, float(sure <= budget))


def tokens_left(costs, budget):
    return [max(budget - sum(costs[:i]), 0) for i in range(len(costs))]


def level_errors(predicted, real):
    given = [(p, r) for p, r in zip(predicted, real, strict=True) if p >= 0]
    return (sum(p == r for p, r in given) / len(given), sum(p < r for p, r in given) / len(given))


def misjudged(tried, rational):
    pairs = list(zip(tried, rational, strict=True))
    return pairs.count((True, False)) / len(pairs), pairs.count((False, True)) / len(pairs)


def papers_needed(deviation, half):
    return int(np.ceil((1.96 * deviation / half) ** 2))


SOLUTIONS = {
    "00.1": finished,
    "00.2": regret_of,
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
    "04.1": label,
    "04.2": weighted_loss,
    "04.3": most_points,
    "04.4": false_and_missed,
    "05.1": exam_reward,
    "05.2": advantage,
    "05.3": push,
    "05.4": lambda q, n: 1 - q**n - (1 - q)**n,
    "06.1": regret_of,
    "06.2": paired_error,
    "06.3": lambda best, score, order: (best["easy"] - best[order], best[order] - score),
    "06.4": better,
    "07.1": tokens_left,
    "07.2": level_errors,
    "07.3": misjudged,
    "08.1": lambda layers, kv_heads, head_size, size: 2 * layers * kv_heads * head_size * size,
    "08.2": lambda weights, size, speed, width: size * speed / (2 * width),
    "08.3": papers_needed,
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
    "02.2": [3, lambda costs, budget: costs, lambda costs, budget: [
        cost if sum(costs[: i + 1]) <= budget else 0 for i, cost in enumerate(costs)]],
    "02.3": [0.5, lambda one, other: len(set(one) & set(other)) / len(set(one) | set(other)),
             lambda one, other: float(one == other)],
    "03.1": [1, lambda ids, budget, eos: (ids[:budget], eos in ids[:budget]),
             lambda ids, budget, eos: (ids[:budget], len(ids) <= budget)],
    "03.2": [0.5, lambda p, u: int(np.argmax(p)), lambda p, u: int((np.cumsum(p) > u).sum())],
    "03.3": [[1], lambda starts, total: [b - a for a, b in zip(starts, [*starts[1:], total],
                                                               strict=True)]],
    "03.4": [7, lambda lengths: (sum(lengths), sum(lengths)), lambda lengths: (max(lengths), 1)],
    "04.1": [1, label_below_edge, lambda samples, edges: label(
        [(cost, True) for cost, _ in samples], edges)],
    "04.2": [1.5, weighted_mean, lambda nats, kinds, weight: sum(nats) / len(nats)],
    "04.3": [2, lambda samples, skip, budget: most_points(samples, 0, budget),
             lambda samples, skip, budget: sum(any(right for _, right in some) for some in samples),
             lambda samples, skip, budget: most_points(
                 [[(cost, True) for cost, _ in some] for some in samples], skip, budget)],
    "04.4": [0.3, lambda skipped, rates: false_and_missed(skipped, rates)[::-1],
             lambda skipped, rates: (sum(rates) / len(rates), 0.0)],
    "05.1": [2, lambda levels, costs, right, edges: sum(right),
             lambda levels, costs, right, edges: exam_reward(
                 levels, [c + 1 for c in costs], right, edges)],
    "05.2": [[0.0], lambda rewards: [r or 0 for r in rewards],
             lambda rewards: advantage([r or 0 for r in rewards])],
    "05.3": [1, lambda lengths, advantages, longest, normalizer: advantages,
             lambda lengths, advantages, longest, normalizer: push(
                 lengths, advantages, longest, "constant"),
             lambda lengths, advantages, longest, normalizer: [
                 a / longest / len(lengths) for a in advantages]],
    "05.4": [0.5, lambda q, n: 1 - q**n, lambda q, n: n * q * (1 - q)],
    "06.1": [0.5, mean_of_regrets, lambda easy, other: -regret_of(easy, other)],
    "06.2": [0.1, lambda a, b: np.hypot(np.std(a, ddof=1), np.std(b, ddof=1)) / np.sqrt(len(a)),
             lambda a, b: np.std(np.subtract(a, b)) / np.sqrt(len(a))],
    "06.3": [(0, 0), lambda best, score, order: (0.0, best["easy"] - score),
             lambda best, score, order: (best[order] - score, best["easy"] - best[order])],
    "06.4": [1, lambda cost, p, sure, budget: p + (cost + sure <= budget),
             lambda cost, p, sure, budget: max(p, 1)],
    "07.1": [[64], lambda costs, budget: tokens_left([*costs, 0], budget)[1:],
             lambda costs, budget: [budget - sum(costs[:i]) for i in range(len(costs))]],
    "07.2": [(1, 0), lambda predicted, real: (
        np.equal(predicted, real).mean(), np.less(predicted, real).mean())],
    "07.3": [(0, 0), lambda tried, rational: misjudged(rational, tried)],
    "08.1": [4, lambda layers, kv_heads, head_size, size: layers * kv_heads * head_size * size,
             lambda layers, kv_heads, head_size, size: 2 * layers * kv_heads * head_size],
    "08.2": [1.5, lambda weights, size, speed, width: size * speed / width,
             lambda weights, size, speed, width: weights * size / width],
    "08.3": [9, lambda deviation, half: round((1.96 * deviation / half) ** 2),
             lambda deviation, half: papers_needed(deviation, 2 * half)],
}
