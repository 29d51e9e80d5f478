"""Pocket problems: right answers at every effort, disjoint splits, stated lengths, costs."""

import operator
import random
import re
from itertools import accumulate, count, islice

import pytest

from roi_lib.problems import (
    FAMILIES,
    MAX_NUMBER,
    POPULARITY,
    TABLES,
    problem_stream,
    sample_problem,
    split_of,
)
from roi_lib.worlds import POCKET, TIERS

FAMILY_TIERS = [(family, tier) for tier in TIERS for family in POCKET.families[tier]]
#: Rounds to go; left, sign, right, value; the value modulo a number.
CALCULATION = re.compile(r"(?:(\d+): )?(\d+) ([+*-]|mod) (\d+) = (\d+)(?: ≡ (\d+))?\.")
SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "mod": operator.mod}
STATED = {  # what the words say of the length, by other means than the family's own
    "marbles": lambda text, n: text.count(" than "), "tram": lambda text, n: n[1],
    "shelves": lambda text, n: 1 + text.count("Then"), "market": lambda text, n: len(n) // 2,
    "residues": lambda text, n: n[0], "rounds": lambda text, n: n[3]}
#: Tokens of a solution in full, without its header, and of one in brief, by the length stated.
IN_FULL = {"marbles": lambda n: 6 * n + 3, "shelves": lambda n: 6 * n + 3,
           "tram": lambda n: 6 * n + 3, "market": lambda n: 6 * (2 * n - 1) + 3,
           "rounds": lambda n: 10 * n + 3}
#: In brief, by the number of running values; of the other families 2 n + 2.
IN_BRIEF = {"residues": lambda n: 4 * n + 4, "rounds": lambda n: 4 * n}


def draws(family, tier, split="train", n=400, seed=0):
    rng = random.Random(seed)
    return [sample_problem(family, tier, split, rng) for _ in range(n)]


def solve(family: str, text: str) -> list[int]:
    """Running values and answer from the statement alone, by other means than the family's own."""
    n = [int(x) for x in re.findall(r"\d+", text)]
    minus = ("fewer", "off", "sold")
    signs = [-1 if word in minus else 1
             for word in re.findall(r"more than|fewer|\bon\b|off|bought|sold", text)]
    if family == "marbles":
        return list(accumulate([n[0], *map(operator.mul, signs, n[1:])]))[1:]
    if family == "shelves":
        return list(accumulate([n[0] * n[1], *map(operator.mul, signs, n[2:])]))
    if family == "tram":
        assert len(signs) == len(n[2:]) == n[1]
        return list(accumulate([n[0], *map(operator.mul, signs, n[2:])]))[1:]
    if family == "market":
        return list(accumulate(map(operator.mul, n[::2], n[1::2])))
    if family == "residues":
        factor, remainder, modulus = n
        answer = next(x for x in count() if x % modulus == remainder and x % factor == 0)
        return [x for x in range(answer + 1) if x % modulus == remainder]
    start, factor, modulus, times = n
    return [start * pow(factor, k, modulus) % modulus for k in range(1, times + 1)]


@pytest.mark.parametrize(("family", "tier"), FAMILY_TIERS)
def test_answers_running_values_and_lengths_follow_from_the_statement(family, tier, tokenizer):
    for p in draws(family, tier):
        *before, answer = solve(family, p.text)
        assert p.answer == str(answer) and p.solution.endswith(f" \\boxed{{{answer}}}")
        notes = [f"{value}," for value in before]
        if family == "rounds":
            notes = [f"{p.length - i}: {note}" for i, note in enumerate(notes)]
        if family == "residues":  # each candidate with its remainder, the last one's is 0
            notes = [f"{x}: {x % p.length}," for x in (*before, answer)]
        assert p.brief == " ".join(["=", *notes, f"\\boxed{{{answer}}}"])
        assert p.length == STATED[family](p.text, [int(x) for x in re.findall(r"\d+", p.text)])
        for words in (p.text, p.solution, p.brief, p.plan):
            assert all(int(x) <= MAX_NUMBER for x in re.findall(r"\d+", words))
            ids = tokenizer(words, add_special_tokens=False).input_ids
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == words


@pytest.mark.parametrize(("family", "tier"), FAMILY_TIERS)
def test_every_calculation_in_full_is_right_and_leads_to_the_next(family, tier):
    for p in draws(family, tier):
        steps, rest = CALCULATION.findall(p.solution), CALCULATION.sub("", p.solution)
        assert rest.split() == [f"\\boxed{{{p.answer}}}"], "nothing but calculations and a box"
        stated, reached = re.findall(r"\d+", p.text), []
        for done, (to_go, left, sign, right, value, modulo) in enumerate(steps):
            assert SIGNS[sign](int(left), int(right)) == int(value)
            assert not modulo or int(value) % int(stated[2]) == int(modulo)
            assert to_go == (str(p.length - done) if family == "rounds" else "")
            reached += [left] if sign == "mod" else [modulo or value]
        if family == "residues":
            found = [value for _, _, sign, _, value, _ in steps if sign == "mod"]
            assert found.index("0") == len(found) - 1 > 0, "the search ends where it is right"
        values = iter(reached)
        assert all(str(value) in values for value in solve(family, p.text)), "in this order"


@pytest.mark.parametrize(("family", "tier"), FAMILY_TIERS)
def test_train_and_test_share_no_problem(family, tier):
    """Not even with other names and things: the numbers alone decide the split."""
    def skeletons(split):
        return {tuple(re.findall(r"\d+|more|fewer|bought|sold|on\b|off", p.text))
                for p in draws(family, tier, split, 2_000)}
    train, test = skeletons("train"), skeletons("test")
    assert len(test) > 50 and not train & test


def test_a_tenth_is_for_testing():
    share = sum(split_of("tram", (i,)) == "test" for i in range(10_000)) / 10_000
    assert 0.09 < share < 0.11


def test_streams_are_seeded():
    def first(seed, split="train"):
        return [p.id for p in islice(problem_stream(POCKET, "hard", split, seed), 20)]
    assert first(1) == first(1) != first(2)
    assert not set(first(1)) & set(first(1, "test"))
    with pytest.raises(ValueError, match="split must be one of"):
        first(1, "validation")


def test_the_statement_gives_away_what_it_costs_but_for_residues(tokenizer):
    """Tokens of an answer without its header; at once it is the box alone, three tokens."""
    def cost(words):
        return len(tokenizer(words, add_special_tokens=False).input_ids)

    for family, tier in FAMILY_TIERS:
        problems, spread = draws(family, tier), {}
        for p in problems:
            spread.setdefault(p.length, set()).add(cost(p.solution))
            assert cost(p.brief) == IN_BRIEF.get(family, lambda n: 2 * n + 2)(
                len(solve(family, p.text)))
            assert cost(f"\\boxed{{{p.answer}}}") == 3
        if family == "residues":
            assert spread.keys() == {*range(4, 14)}
            for a, costs in spread.items():  # six tokens for the one that is right, 12 a miss
                assert costs <= {12 * k + 9 for k in range(1, a)} and len(costs) >= a - 3
        else:
            assert spread == {n: {IN_FULL[family](n)} for n in spread} and len(spread) >= 3


def test_tiers_are_told_by_their_costs_in_the_mean_only(tokenizer):
    """Two families a tier, which overlap; and the hard ones are sometimes cheap."""
    costs = {family: sorted(len(tokenizer(p.solution).input_ids) for p in draws(family, tier))
             for family, tier in FAMILY_TIERS}
    middle = {family: (c[20], c[200], c[-20]) for family, c in costs.items()}
    for tier in TIERS:
        one, two = (middle[family] for family in POCKET.families[tier])
        assert min(one[2], two[2]) - max(one[0], two[0]) > 0.4 * max(one[2] - one[0],
                                                                     two[2] - two[0])
    easy, medium, hard = (min(middle[f][1] for f in POCKET.families[tier]) for tier in TIERS)
    assert easy < medium <= hard and middle["residues"][0] <= middle["tram"][0]
    assert set(FAMILIES) == {family for family, _ in FAMILY_TIERS}


def test_popular_tables_come_often_and_every_one_now_and_then():
    """Zipf's law: the share of a rank is as one over it."""
    assert len({*TABLES}) == len(TABLES) == 59 and all(m != f for m, f in TABLES)
    drawn = [tuple(int(x) for x in re.findall(r"\d+", p.text)[1:3])
             for p in draws("rounds", "hard", n=3_000)]
    shares = [drawn.count((factor, modulus)) / 3_000 for modulus, factor in TABLES]
    for rank in (1, 2, 4, 8):
        assert shares[rank - 1] == pytest.approx(1 / rank / sum(POPULARITY), rel=0.2)
    assert min(shares) > 0
