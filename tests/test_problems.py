"""Pocket problems: right answers, disjoint splits, seeded, overlapping costs."""

import random
import re
from itertools import islice

import pytest

from roi_lib.problems import FAMILIES, MAX_NUMBER, problem_stream, sample_problem, split_of
from roi_lib.worlds import POCKET, TIERS

FAMILY_TIERS = [(family, tier) for tier in TIERS for family in POCKET.families[tier]]


def draws(family, tier, split="train", n=400, seed=0):
    rng = random.Random(seed)
    return [sample_problem(family, tier, split, rng) for _ in range(n)]


def solve(family: str, text: str) -> int:
    """The answer from the statement alone, by other means than the family's own."""
    n = [int(x) for x in re.findall(r"\d+", text)]
    if family in ("comparison", "bus"):
        minus = ("fewer", "off")
        signs = [-1 if word in minus else 1 for word in re.findall("more|fewer|on|off", text)]
        return n[0] + sum(s * x for s, x in zip(signs, n[1:], strict=True))
    if family == "boxes":
        signs = [-1 if word == "sold" else 1 for word in re.findall("bought|sold", text)]
        return n[0] * n[1] + sum(s * x for s, x in zip(signs, n[2:], strict=True))
    if family == "shopping":
        return sum(q * price for q, price in zip(n[::2], n[1::2], strict=True))
    if family == "remainders":
        pairs = list(zip(n[::2], n[1::2], strict=True))
        return next(x for x in range(1, 10**6) if all(x % m == r for r, m in pairs))
    start, factor, prime, target = n
    return next(k for k in range(1, prime) if start * pow(factor, k, prime) % prime == target)


@pytest.mark.parametrize(("family", "tier"), FAMILY_TIERS)
def test_answers_are_right_and_solutions_end_in_them(family, tier, tokenizer):
    for p in draws(family, tier):
        assert int(p.answer) == solve(family, p.text)
        assert p.solution.endswith(f"\\boxed{{{p.answer}}}")
        assert all(int(x) <= MAX_NUMBER for x in re.findall(r"\d+", p.text + p.solution))
        for words in (p.text, p.solution, p.plan):
            ids = tokenizer(words, add_special_tokens=False).input_ids
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == words


@pytest.mark.parametrize(("family", "tier"), FAMILY_TIERS)
def test_train_and_test_share_no_problem(family, tier):
    """Not even with other names and things: the numbers alone decide the split."""
    def skeletons(split):
        return {tuple(re.findall(r"\d+|more|fewer|bought|sold|on\b|off", p.text))
                for p in draws(family, tier, split, 2_000)}
    train, test = skeletons("train"), skeletons("test")
    assert len(test) > 50 and not train & test


def test_a_tenth_is_for_testing():
    share = sum(split_of("bus", (i,)) == "test" for i in range(10_000)) / 10_000
    assert 0.09 < share < 0.11


def test_streams_are_seeded():
    def first(seed, split="train"):
        return [p.id for p in islice(problem_stream(POCKET, "hard", split, seed), 20)]
    assert first(1) == first(1) != first(2)
    assert not set(first(1)) & set(first(1, "test"))
    with pytest.raises(ValueError, match="split must be one of"):
        first(1, "validation")


def test_costs_overlap_within_and_across_tiers(tokenizer):
    """At least two families a tier; no family can be told from its cost, nor its cost from it."""
    costs = {family: sorted(len(tokenizer(p.solution).input_ids) for p in draws(family, tier))
             for family, tier in FAMILY_TIERS}
    middle = {family: (c[20], c[-20]) for family, c in costs.items()}
    for tier in TIERS:
        one, two = (middle[family] for family in POCKET.families[tier])
        shared = min(one[1], two[1]) - max(one[0], two[0])
        assert shared > 0.5 * max(one[1] - one[0], two[1] - two[0])
    assert middle["bus"][0] <= middle["comparison"][1] + 2
    assert middle["cycle"][0] < middle["bus"][1] < middle["cycle"][1]
    assert set(FAMILIES) == {family for family, _ in FAMILY_TIERS}
