"""OS-MCKP: against brute force, against milp, and the laws that must hold on any instance."""

import itertools
import json
import re
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roi_lib import osmckp
from roi_lib.__main__ import main
from roi_lib.bench_osmckp import bench, milp_value, random_instance
from roi_lib.osmckp import SKIP, Action, Instance

fast = settings(max_examples=40, deadline=None)


# ------------------------------------------------------------------ small random instances
@st.composite
def actions(draw, point=False, free=False):
    size = 1 if point else draw(st.integers(1, 3))
    weights = draw(st.lists(st.integers(1, 5), min_size=size, max_size=size))
    costs = draw(st.lists(st.integers(0, 7), min_size=size, max_size=size))
    rewards = draw(st.lists(st.sampled_from([0, 0.5, 1, 1.7]), min_size=size, max_size=size))
    p = np.array(weights) / sum(weights)
    return Action("a", list(zip(p, costs, rewards, strict=True)))


@st.composite
def instances(draw, point=False, skip=False, max_n=3, max_k=3):
    classes = []
    for _ in range(draw(st.integers(1, max_n))):
        options = draw(st.lists(actions(point=point), min_size=1, max_size=max_k))
        classes.append([SKIP, *options] if skip or draw(st.booleans()) else options)
    return Instance(draw(st.integers(0, 10)), classes)


def hand_exam(budget=9):
    """The worked example of notebook 01."""
    hard = Action("try", [(0.5, 3, 1), (0.5, 6, 0)])
    medium = Action("try", [(0.8, 4, 1), (0.2, 4, 0)])
    easy = Action("try", [(0.9, 2, 1), (0.1, 2, 0)])
    return Instance(budget, [[SKIP, hard], [SKIP, medium], [SKIP, easy]])


# ------------------------------------------------------------------ slow and obvious references
def value_by_recursion(instance, i, b, choose):
    """Expected reward from problem i with b tokens; `choose(values, i, b)` picks the action."""
    if i == len(instance):
        return 0.0
    values = []
    for a in instance.classes[i]:
        total = 0.0
        for p, c, r in zip(a.p, a.cost, a.reward, strict=True):
            fits = c <= b
            rest = value_by_recursion(instance, i + 1, b - c if fits else 0, choose)
            total += p * (r * fits + rest)
        values.append(total)
    return choose(values, i, b)


def best_of_all_policies(instance):
    """Enumerate every policy on the states (i, b) that can be reached."""
    states = [[instance.budget]]
    for options in instance.classes:
        after = {max(b - c, 0) for b in states[-1] for a in options for c in a.cost.tolist()}
        states.append(sorted(after))
    cells = [(i, b) for i in range(len(instance)) for b in states[i]]
    sizes = [len(instance.classes[i]) for i, _ in cells]
    if np.prod(sizes, dtype=float) > 400:
        return None
    best = -np.inf
    for choice in itertools.product(*map(range, sizes)):
        table = dict(zip(cells, choice, strict=True))
        best = max(best, value_by_recursion(
            instance, 0, instance.budget, lambda v, i, b, table=table: v[table[i, b]]))
    return best


def plan_values(instance):
    for plan in itertools.product(*[range(len(c)) for c in instance.classes]):
        yield plan, value_by_recursion(instance, 0, instance.budget,
                                       lambda v, i, b, plan=plan: v[plan[i]])


def hindsight_by_enumeration(instance):
    options = [a for c in instance.classes for a in c]
    total = 0.0
    for outcome in itertools.product(*[range(len(a.p)) for a in options]):
        p = np.prod([a.p[s] for a, s in zip(options, outcome, strict=True)])
        known = iter([Action("x", [(1, a.cost[s], a.reward[s])])
                      for a, s in zip(options, outcome, strict=True)])
        classes = [[next(known) for _ in c] for c in instance.classes]
        total += p * value_by_recursion(Instance(instance.budget, classes), 0, instance.budget,
                                        lambda v, i, b: max(v))
    return total


# ------------------------------------------------------------------ the exact solution
@fast
@given(instances(max_n=3, max_k=2))
def test_solve_equals_brute_force_over_all_policies(instance):
    expected = best_of_all_policies(instance)
    if expected is None:  # too many policies: the plain recursion is still an independent check
        expected = value_by_recursion(instance, 0, instance.budget, lambda v, i, b: max(v))
    assert osmckp.solve(instance).value == pytest.approx(expected, abs=1e-9)


@fast
@given(instances())
def test_solve_at_every_budget_and_policy_earns_its_value(instance):
    solution = osmckp.solve(instance)
    for b in range(instance.budget + 1):
        expected = value_by_recursion(instance, 0, b, lambda v, i, b: max(v))
        assert solution.value_function[0, b] == pytest.approx(expected, abs=1e-9)
    value = osmckp.evaluate(instance, solution.policy)
    np.testing.assert_allclose(value, solution.value_function, atol=1e-8)


@fast
@given(instances())
def test_value_never_falls_with_more_budget(instance):
    solution = osmckp.solve(instance)
    assert solution.shadow_price.shape == (len(instance) + 1, instance.budget)
    assert np.all(solution.shadow_price >= -1e-12)


@fast
@given(instances(max_n=3, max_k=2))
def test_hindsight_adaptive_open_loop_greedy_in_order(instance):
    adaptive = osmckp.solve(instance).value
    plan = osmckp.open_loop(instance)
    greedy = osmckp.evaluate(instance, osmckp.greedy_roi(instance))[0, -1]
    hindsight = osmckp.hindsight(instance)
    assert plan.exact and hindsight.se == 0
    assert hindsight.value >= adaptive - 1e-9
    assert adaptive >= max(plan.value, greedy) - 1e-9
    assert osmckp.value_of_information(instance) >= -1e-9
    assert -1e-9 <= osmckp.optimality_gap(instance, osmckp.greedy_roi(instance)) <= 1
    assert 0 <= osmckp.order_regret(instance) <= 1


@fast
@given(instances(max_n=3, max_k=3))
def test_open_loop_equals_brute_force(instance):
    plan = osmckp.open_loop(instance)
    values = dict(plan_values(instance))
    assert plan.value == pytest.approx(max(values.values()), abs=1e-9)
    assert values[tuple(plan.actions.tolist())] == pytest.approx(plan.value, abs=1e-9)
    assert osmckp.evaluate(instance, plan.actions)[0, -1] == pytest.approx(plan.value, abs=1e-9)


def test_open_loop_says_when_it_is_only_a_bound():
    instance = random_instance(8, 60, 4, 5)
    short, full = osmckp.open_loop(instance, max_nodes=9), osmckp.open_loop(instance)
    assert not short.exact and full.exact
    assert short.value <= full.value + 1e-9
    assert osmckp.evaluate(instance, short.actions)[0, -1] == pytest.approx(short.value)


@fast
@given(instances(point=True, skip=True))
def test_point_masses_reduce_to_the_plain_knapsack(instance):
    costs = [[int(a.cost[0]) for a in c] for c in instance.classes]
    rewards = [[float(a.reward[0]) for a in c] for c in instance.classes]
    best = 0.0
    for plan in itertools.product(*[range(len(c)) for c in costs]):
        if sum(costs[i][k] for i, k in enumerate(plan)) <= instance.budget:
            best = max(best, sum(rewards[i][k] for i, k in enumerate(plan)))
    assert osmckp.solve(instance).value == pytest.approx(best, abs=1e-9)
    assert osmckp.open_loop(instance).value == pytest.approx(best, abs=1e-9)
    assert osmckp.hindsight(instance).value == pytest.approx(best, abs=1e-9)
    assert osmckp.offline_value(costs, rewards, instance.budget) == pytest.approx(best, abs=1e-9)
    assert milp_value([np.array(c) for c in costs], [np.array(r) for r in rewards],
                      instance.budget) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("budget", [0, 1, 2, 3, 7, 16, 100])
def test_batch_equals_one_by_one(budget):
    instances = [random_instance(3, budget, 2 + seed % 3, 1 + seed, seed) for seed in range(11)]
    for batch, instance in zip(osmckp.solve_batch(instances, chunk=4), instances, strict=True):
        alone = osmckp.solve(instance)
        assert batch.instance is instance
        np.testing.assert_allclose(batch.value_function, alone.value_function, atol=1e-12)
        np.testing.assert_array_equal(batch.policy, alone.policy)


def test_batch_needs_one_shape_and_may_be_empty():
    assert osmckp.solve_batch([]) == []
    with pytest.raises(ValueError, match="one budget"):
        osmckp.solve_batch([hand_exam(9), hand_exam(8)])


def test_ties_go_to_the_cheaper_action_then_to_the_lower_index():
    dear, cheap = Action("dear", [(1, 5, 1)]), Action("cheap", [(1, 2, 1)])
    wobbly = Action("wobbly", [(0.1, 1, 1), (0.2, 3, 1), (0.7, 2, 1)])
    assert osmckp.solve(Instance(9, [[dear, cheap]])).first_action == "cheap"
    assert osmckp.solve(Instance(9, [[cheap, cheap]])).policy[0, -1] == 0
    # 0.1 + 0.2 + 0.7 is not 1.0 in floats: rounding must not beat the cheaper action
    assert osmckp.solve(Instance(9, [[wobbly, cheap]])).first_action == "cheap"
    # with 1 token nothing can be earned: skip; with 0 tokens both cost nothing: lower index
    assert osmckp.solve(Instance(1, [[dear, SKIP]])).policy.tolist() == [[0, 1]]


def test_hand_made_exam():
    solution = osmckp.solve(hand_exam())
    expected = [[0, 0, .9, .9, .9, .95, 1.7, 1.7, 1.7, 1.8],
                [0, 0, .9, .9, .9, .9, 1.7, 1.7, 1.7, 1.7],
                [0, 0, .9, .9, .9, .9, .9, .9, .9, .9], [0] * 10]
    np.testing.assert_allclose(solution.value_function, expected, atol=1e-12)
    assert solution.first_action == "try"
    assert osmckp.open_loop(hand_exam()).actions.tolist() == [0, 1, 1]
    order, value = osmckp.best_order(hand_exam())
    assert order == (2, 1, 0) and value == pytest.approx(2.2)


# ------------------------------------------------------------------ any policy
def random_policy(instance, seed):
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, len(c), instance.budget + 1) for c in instance.classes])


@fast
@given(instances(), st.integers(0, 99))
def test_distribution_of_any_policy(instance, seed):
    policy = random_policy(instance, seed)
    dist = osmckp.distribution(instance, policy)
    value = value_by_recursion(instance, 0, instance.budget, lambda v, i, b: v[policy[i, b]])
    assert dist.p.sum() == pytest.approx(1, abs=1e-12) and np.all(dist.p > 0)
    assert np.all((dist.spent >= 0) & (dist.spent <= instance.budget))
    assert dist.mean_score == pytest.approx(value, abs=1e-9)
    assert osmckp.evaluate(instance, policy)[0, -1] == pytest.approx(value, abs=1e-9)
    for what in ("score", "spent"):
        values, p = dist.of(what)
        assert np.all(np.diff(values) > 0) and p.sum() == pytest.approx(1, abs=1e-12)


@settings(max_examples=10, deadline=None)
@given(instances(), st.integers(0, 99))
def test_simulation_agrees_within_4_standard_errors(instance, seed):
    policy = random_policy(instance, seed)
    dist = osmckp.distribution(instance, policy)
    runs = osmckp.simulate(instance, policy, runs=4000, seed=seed)
    sd_spent = np.sqrt(dist.p @ (dist.spent - dist.mean_spent) ** 2)
    assert abs(runs.mean_score - dist.mean_score) <= 4 * runs.se + 1e-9
    assert abs(runs.spent.mean() - dist.mean_spent) <= 4 * sd_spent / np.sqrt(4000) + 1e-9
    again = osmckp.simulate(instance, policy, draws=osmckp.draw(instance, 4000, seed))
    np.testing.assert_array_equal(runs.score, again.score)


def test_distribution_refuses_what_would_not_fit():
    instance = random_instance(3, 500, 3, 50)
    with pytest.raises(ValueError, match="use simulate"):
        osmckp.distribution(instance, osmckp.solve(instance).policy, max_states=100)


@pytest.mark.parametrize("policy", [
    np.zeros((3, 9), int), np.zeros(4, int), np.zeros(3), np.full(3, 2), np.full(3, -1)])
def test_bad_policies(policy):
    with pytest.raises(ValueError, match="policy"):
        osmckp.evaluate(hand_exam(), policy)


# ------------------------------------------------------------------ what to compare it with
@settings(max_examples=15, deadline=None)
@given(instances(max_n=2, max_k=2))
def test_exact_hindsight_equals_enumeration(instance):
    expected = hindsight_by_enumeration(instance)
    assert osmckp.hindsight(instance).value == pytest.approx(expected, abs=1e-9)


def test_hindsight_against_milp_and_its_standard_error():
    instance = random_instance(3, 100, 3, 4)
    draws = osmckp.draw(instance, 60, seed=1)
    pairs = [osmckp.realize(a, pick) for a, pick in zip(instance.classes, draws, strict=True)]
    ours = osmckp.prophet(instance, draws)
    for run, value in enumerate(ours):
        costs, rewards = ([pair[j][run] for pair in pairs] for j in (0, 1))
        assert milp_value(costs, rewards, instance.budget) == pytest.approx(value, abs=1e-6)
    exact = osmckp.hindsight(instance)
    sampled = osmckp.hindsight(instance, exact_limit=0, samples=4000, seed=3)
    assert exact.se == 0 < sampled.se
    assert abs(sampled.value - exact.value) <= 4 * sampled.se
    assert sampled == osmckp.hindsight(instance, exact_limit=0, samples=4000, seed=3)


def test_hindsight_is_sampled_where_the_exact_table_would_not_fit():
    sure = [Action(str(k), [(1, 7**k % 997, 1)]) for k in range(10)]
    rng = np.random.default_rng(0)
    wide = [Action(str(k), np.column_stack([np.full(31, 1 / 31), rng.integers(1, 5000, 31),
                                            rng.random(31)])) for k in range(4)]
    instance = Instance(5000, [sure] * 5 + [wide])  # 31^4 outcomes, but thousands of budgets
    assert osmckp.hindsight(instance, samples=20).se > 0


def test_greedy_roi_looks_one_problem_ahead_and_never_at_what_cannot_fit():
    policy = osmckp.greedy_roi(hand_exam())
    assert policy.tolist() == [[0] * 3 + [1] * 7, [0] * 4 + [1] * 6, [0] * 2 + [1] * 8]


def test_greedy_knapsack_of_the_paper():
    assert osmckp.greedy_knapsack([2, 1, 0], 1024).tolist() == [False, True, True]
    assert osmckp.greedy_knapsack([2, 1, 0], 128 + 384 + 768).tolist() == [True] * 3
    assert osmckp.greedy_knapsack([1, 1, 1], 768).tolist() == [True, True, False]
    assert osmckp.greedy_knapsack([3, 3, 0], 4096).tolist() == [False, False, True]
    assert osmckp.greedy_knapsack([0, 1], 60, centroids=(16, 48, 96)).tolist() == [True, False]
    with pytest.raises(ValueError, match="class 1, field level"):
        osmckp.greedy_knapsack([0, -1], 512)


@fast
@given(instances(max_n=3, max_k=2))
def test_best_order_equals_all_permutations(instance):
    order, value = osmckp.best_order(instance)
    values = [osmckp.solve(instance.reordered(o)).value
              for o in itertools.permutations(range(len(instance)))]
    assert value == pytest.approx(max(values), abs=1e-9)
    assert osmckp.solve(instance.reordered(order)).value == pytest.approx(value, abs=1e-9)


def test_best_order_has_a_limit_and_keeps_the_given_order_on_a_tie():
    assert osmckp.best_order(Instance(3, [[SKIP]] * 4))[0] == (0, 1, 2, 3)
    with pytest.raises(ValueError, match="limit is 7"):
        osmckp.best_order(Instance(3, [[SKIP]] * 8))


# ------------------------------------------------------------------ JSON and bad input
def document(budget=9):
    def act(name, *rows):
        return {"name": name, "outcomes": [{"p": p, "cost": c, "reward": r} for p, c, r in rows]}
    return {"budget": budget, "classes": [
        [act("skip", (1, 0, 0)), act("try", (.5, 3, 1), (.5, 6, 0))],
        [act("skip", (1, 0, 0)), act("try", (.8, 4, 1), (.2, 4, 0))],
        [act("skip", (1, 0, 0)), act("try", (.9, 2, 1), (.1, 2, 0))]]}


def test_solve_document():
    answer = osmckp.solve_document(json.loads(json.dumps(document())))
    assert json.loads(json.dumps(answer)) == answer
    numbers = {k: answer[k] for k in ("value", "open_loop", "greedy", "hindsight", "hindsight_se")}
    assert numbers == pytest.approx(
        {"value": 1.8, "open_loop": 1.7, "greedy": 1.8, "hindsight": 2.2, "hindsight_se": 0})
    assert answer["first_action"] == "try" and answer["open_loop_exact"] is True
    assert answer["order_regret"] == pytest.approx(1 - 1.8 / 2.2)


def test_solve_document_above_7_problems():
    doc = document()
    doc["classes"] = doc["classes"] * 3
    answer = osmckp.solve_document(doc)
    assert answer["order_regret"] is None
    assert answer["hindsight"] >= answer["value"] >= answer["open_loop"]


def put(*path):
    """A function that sets doc[path[0]]...[path[-2]] = path[-1]."""
    def change(doc):
        for key in path[:-2]:
            doc = doc[key]
        doc[path[-2]] = path[-1]
    return change


FIRST = ("classes", 1, 1, "outcomes", 0)
BAD = {
    "p does not sum to 1": (put(*FIRST, "p", 0.7), r"class 1, action 1 \('try'\).*field p.*0\.9"),
    "p negative": (put(*FIRST, "p", -0.8), r"class 1.*'try'.*field p.*negative"),
    "p NaN": (put(*FIRST, "p", float("nan")), r"class 1.*'try'.*field p"),
    "p infinite": (put(*FIRST, "p", float("inf")), r"class 1.*'try'.*field p"),
    "p a string": (put(*FIRST, "p", "0.8"), r"class 1.*'try'.*outcome 0.*field p"),
    "cost negative": (put(*FIRST, "cost", -4), r"class 1.*'try'.*field cost.*negative"),
    "cost not whole": (put(*FIRST, "cost", 2.5), r"class 1.*'try'.*field cost.*whole"),
    "cost NaN": (put(*FIRST, "cost", float("nan")), r"class 1.*'try'.*field cost"),
    "cost infinite": (put(*FIRST, "cost", float("inf")), r"class 1.*'try'.*field cost"),
    "cost true": (put(*FIRST, "cost", True), r"class 1.*'try'.*field cost"),
    "cost huge": (put(*FIRST, "cost", 10**400), r"class 1.*'try'.*(cost|outcomes)"),
    "reward NaN": (put(*FIRST, "reward", float("nan")), r"class 1.*'try'.*field reward"),
    "reward infinite": (put(*FIRST, "reward", float("inf")), r"class 1.*'try'.*field reward"),
    "reward negative": (put(*FIRST, "reward", -1), r"class 1.*'try'.*field reward.*negative"),
    "reward null": (put(*FIRST, "reward", None), r"class 1.*'try'.*field reward"),
    "outcome not an object": (put(*FIRST[:-1], 0, 3), r"class 1.*'try'.*outcome 0"),
    "outcome lacks a field": (lambda d: d["classes"][1][1]["outcomes"][0].pop("cost"),
                              r"class 1.*'try'.*field cost: missing"),
    "no outcomes": (put("classes", 1, 1, "outcomes", []), r"class 1.*'try'.*outcomes: empty"),
    "outcomes missing": (lambda d: d["classes"][1][1].pop("outcomes"), r"class 1.*'try'.*outcomes"),
    "name missing": (lambda d: d["classes"][1][1].pop("name"), r"class 1, action 1.*field name"),
    "name a number": (put("classes", 1, 1, "name", 5), r"class 1, action 1.*field name"),
    "empty class": (put("classes", 2, []), r"class 2.*empty"),
    "class no list": (put("classes", 2, {}), r"class 2.*list"),
    "action no object": (put("classes", 2, 0, "skip"), r"class 2, action 0"),
    "no classes": (put("classes", []), r"classes: empty"),
    "classes missing": (lambda d: d.pop("classes"), r"field classes: missing"),
    "budget missing": (lambda d: d.pop("budget"), r"field budget: missing"),
    "budget negative": (put("budget", -1), r"field budget.*negative"),
    "budget not whole": (put("budget", 1.5), r"field budget.*whole"),
    "budget NaN": (put("budget", float("nan")), r"field budget"),
    "budget infinite": (put("budget", float("inf")), r"field budget"),
    "budget beyond memory": (put("budget", 10**15), r"field budget.*memory"),
    "budget a string": (put("budget", "9"), r"field budget"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_documents(case):
    change, message = BAD[case]
    doc = document()
    change(doc)
    with pytest.raises(ValueError, match=message):
        osmckp.solve_document(doc)


@pytest.mark.parametrize(("content", "message"), [
    (b"", "is not JSON"), (b'{"budget": 9', "is not JSON"), (b"\xff\xfe", "is not JSON"),
    (b"[" * 100_000, "is not JSON"), (b'{"budget": ' + b"9" * 5_000 + b"}", "is not JSON"),
    (b"[]", "need a JSON object"), (b"{}", "field budget: missing"),
    (b'{"budget": 1e400, "classes": []}', "field classes: empty|field budget"),
])  # fmt: skip
def test_command_line_refuses_bad_files_in_one_sentence(tmp_path, capsys, content, message):
    path = tmp_path / "exam.json"
    path.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        main(["osmckp", str(path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(message, error) and error.count("\n") == 1


def test_command_line_prints_what_solve_document_returns(tmp_path, capsys):
    path = tmp_path / "exam.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(document()).encode())  # as Windows writes it
    main(["osmckp", str(path)])
    assert json.loads(capsys.readouterr().out) == osmckp.solve_document(document())


@pytest.mark.parametrize("doc", [None, [], 3, "exam"])
def test_document_must_be_an_object(doc):
    with pytest.raises(ValueError, match="JSON object"):
        osmckp.solve_document(doc)


@pytest.mark.parametrize("outcomes", [[], [(1, 2)], [(1, 2, 3, 4)], 7, None, [1, 0, 0], [[]]])
def test_action_needs_rows_of_three(outcomes):
    with pytest.raises(ValueError, match="'x', field outcomes"):
        Action("x", outcomes)


def test_instance_needs_actions_and_a_permutation():
    with pytest.raises(ValueError, match="class 0, action 0"):
        Instance(5, [["skip"]])
    with pytest.raises(ValueError, match="class 1, field actions: need a list"):
        Instance(5, [[SKIP], SKIP])
    with pytest.raises(ValueError, match="field classes"):
        Instance(5, None)
    with pytest.raises(ValueError, match="permutation"):
        hand_exam().reordered([0, 0, 1])


def test_equal_outcomes_merge_and_impossible_ones_go():
    a = Action("x", [(0.25, 4, 1), (0.25, 4, 1), (0.25, 4, 0), (0.25, 2, 1), (0, 1, 1)])
    assert (a.cost.tolist(), a.reward.tolist()) == ([2, 4, 4], [1, 0, 1])
    assert a.p.tolist() == [0.25, 0.25, 0.5]
    assert (a.costs.tolist(), a.costs_p.tolist()) == ([2, 4], [0.25, 0.75])


# ------------------------------------------------------------------ size
def test_memory_grows_with_n_times_b():
    def peak(n, budget):
        instance = random_instance(n, budget, 3, 4)
        tracemalloc.start()
        osmckp.solve(instance)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    assert peak(8, 20_000) < 2.5 * peak(4, 20_000)
    assert peak(4, 40_000) < 2.5 * peak(4, 20_000)


def test_large_sizes_solve():
    solution = osmckp.solve(random_instance(60, 2000, 6, 5))
    assert 0 < solution.value <= 60
    wide = Instance(50, [[SKIP] + [Action(str(k), [(1, k, k / 9)]) for k in range(300)]])
    for value in (osmckp.solve(wide).value, osmckp.open_loop(wide).value,
                  osmckp.hindsight(wide).value, osmckp.best_order(wide)[1]):
        assert value == pytest.approx(50 / 9)


def test_bench_reports_equal_values():
    report = bench(batch=8, exams=4, repeats=1)
    json.dumps(report)
    assert report["batch"]["largest_difference"] < 1e-9
    assert all(row["largest_difference"] < 1e-6 for row in report["offline_vs_milp"])


def test_the_module_needs_no_torch_and_no_scipy():
    code = ("import sys; sys.modules['torch'] = sys.modules['scipy'] = None; "
            "from roi_lib import osmckp; print(osmckp.SKIP.name)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "skip"
