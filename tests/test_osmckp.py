"""OS-MCKP: against brute force, against milp, and the laws that must hold on any instance."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, milp

from roi_lib import osmckp
from roi_lib.experiments import knapsack
from roi_lib.experiments.knapsack import read_instance, solve_document
from roi_lib.osmckp import SKIP, Action, Instance

fast = settings(max_examples=40, deadline=None)
ROW = st.tuples(st.integers(1, 5), st.integers(0, 7), st.sampled_from([0, 0.5, 1, 1.7]))


def action(rows):
    total = sum(weight for weight, _, _ in rows)
    return Action("a", [(weight / total, cost, reward) for weight, cost, reward in rows])


@st.composite
def instances(draw, outcomes=3, max_n=3, max_k=3):
    a = st.lists(ROW, min_size=1, max_size=outcomes).map(action)
    some = st.lists(a, min_size=1, max_size=max_k)
    classes = draw(st.lists(some | some.map(lambda c: [SKIP, *c]), min_size=1, max_size=max_n))
    return Instance(draw(st.integers(0, 10)), classes)


def random_instance(n, budget, k, s):
    """SKIP and k - 1 actions with s outcomes a class; costs up to 0.7 of the budget."""
    rng = np.random.default_rng(0)
    rows = [[np.column_stack([rng.dirichlet(np.ones(s)), rng.integers(1, int(0.7 * budget), s),
                              rng.random(s) < 0.7]) for _ in range(k - 1)] for _ in range(n)]
    return Instance(budget, [[SKIP, *(Action("try", outcomes) for outcomes in c)] for c in rows])


def hand_exam():
    """The worked example of notebook 01."""
    outcomes = [[(0.5, 3, 1), (0.5, 6, 0)], [(0.8, 4, 1), (0.2, 4, 0)], [(0.9, 2, 1), (0.1, 2, 0)]]
    return Instance(9, [[SKIP, Action("try", rows)] for rows in outcomes])


def expected(instance, i=0, b=None, choose=lambda values, i, b: max(values)):
    """By brute force: expected reward from problem i with b tokens; `choose` picks the action."""
    if i == len(instance):
        return 0.0
    b = instance.budget if b is None else b
    return choose([sum(p * (r * (c <= b) + expected(instance, i + 1, max(b - c, 0), choose))
                       for p, c, r in zip(a.p, a.cost, a.reward, strict=True))
                   for a in instance.classes[i]], i, b)


def milp_value(known, budget):
    """The multiple-choice knapsack by scipy; `known`: N lists of (cost, reward)."""
    cost, reward = np.array([action for some in known for action in some], dtype=float).T
    owner = np.repeat(np.arange(len(known)), [len(some) for some in known])
    limits = [LinearConstraint((owner == np.arange(len(known))[:, None]).astype(float), 1, 1),
              LinearConstraint(np.minimum(cost, budget + 1)[None], -np.inf, budget)]
    return -milp(-reward, integrality=np.ones(len(owner)), bounds=(0, 1), constraints=limits,
                 options={"mip_rel_gap": 0}).fun


@fast
@given(instances())
def test_solve_equals_brute_force_at_every_budget(instance):
    solution = osmckp.solve(instance)
    values = [expected(instance, 0, b) for b in range(instance.budget + 1)]
    np.testing.assert_allclose(solution.value_function[0], values, atol=1e-9)
    np.testing.assert_allclose(osmckp.evaluate(instance, solution.policy), solution.value_function,
                               atol=1e-8)
    assert solution.shadow_price.shape == (len(instance) + 1, instance.budget)
    assert np.all(solution.shadow_price >= -1e-12)  # the value never falls with more budget


@fast
@given(instances(max_k=2))
def test_hindsight_adaptive_open_loop_greedy_in_order(instance):
    adaptive, greedy = osmckp.solve(instance).value, knapsack.greedy_roi(instance)
    plan, hindsight = knapsack.open_loop(instance), knapsack.hindsight(instance)
    assert hindsight.se == 0 and hindsight.value >= adaptive - 1e-9
    assert adaptive >= max(plan.value, osmckp.evaluate(instance, greedy)[0, -1]) - 1e-9
    assert knapsack.value_of_information(instance) == pytest.approx(adaptive - plan.value)
    assert -1e-9 <= knapsack.optimality_gap(instance, greedy) <= 1
    assert 0 <= knapsack.order_regret(instance) <= 1


@fast
@given(instances(outcomes=1))
def test_point_masses_reduce_to_the_plain_knapsack(instance):
    instance = Instance(instance.budget, [[SKIP, *c] for c in instance.classes])
    known = [[(a.cost[0], a.reward[0]) for a in c] for c in instance.classes]
    best = pytest.approx(milp_value(known, instance.budget), abs=1e-6)
    for way in (osmckp.solve, knapsack.open_loop, knapsack.hindsight):
        assert way(instance).value == best


def test_ties_go_to_the_cheaper_action_then_to_the_lower_index():
    dear, cheap = Action("dear", [(1, 5, 0.1 + 0.2)]), Action("cheap", [(1, 2, 0.3)])
    # 0.1 + 0.2 is above 0.3 in floats: rounding must not beat the cheaper action
    assert osmckp.solve(Instance(9, [[dear, cheap]])).first_action == "cheap"
    assert osmckp.solve(Instance(9, [[cheap, cheap]])).policy[0, -1] == 0
    # with 1 token nothing can be earned: skip; with 0 tokens both cost nothing: lower index
    assert osmckp.solve(Instance(1, [[dear, SKIP]])).policy.tolist() == [[0, 1]]


def test_hand_made_exam():
    first = [0, 0, .9, .9, .9, .95, 1.7, 1.7, 1.7, 1.8]
    np.testing.assert_allclose(osmckp.solve(hand_exam()).value_function[0], first, atol=1e-12)
    assert knapsack.open_loop(hand_exam()).actions.tolist() == [0, 1, 1]
    assert knapsack.greedy_roi(hand_exam()).tolist() == [
        [0] * 3 + [1] * 7, [0] * 4 + [1] * 6, [0] * 2 + [1] * 8]  # skips only what cannot fit
    assert knapsack.best_order(hand_exam()) == ((2, 1, 0), pytest.approx(2.2))
    assert knapsack.best_order(Instance(3, [[SKIP]] * 4))[0] == (0, 1, 2, 3)  # a tie: as given


def test_after_a_truncation_only_free_actions_earn():
    exam = Instance(3, [[Action("long", [(1, 5, 1)])], [Action("free", [(1, 0, 0.5)])]])
    assert osmckp.solve(exam).value == 0.5 == knapsack.offline_value([[5], [0]], [[1], [0.5]], 3)


def test_scores_that_differ_by_rounding_are_one_score():
    a, b = Action("a", [(0.5, 1, 0.1), (0.5, 1, 0.3)]), Action("b", [(1, 1, 0.2)])
    scores, p = knapsack.distribution(Instance(9, [[a], [b], [a]]), [0, 0, 0]).of("score")
    np.testing.assert_allclose((scores, p), ([0.4, 0.6, 0.8], [0.25, 0.5, 0.25]))


def test_large_sizes():
    large = random_instance(60, 2000, 6, 5)
    assert 0 < osmckp.solve(large).value <= large.max_score
    wide = Instance(50, [[SKIP] + [Action(str(k), [(1, k, k / 9)]) for k in range(300)]])
    for way in (osmckp.solve, knapsack.open_loop, knapsack.hindsight):
        assert way(wide).value == pytest.approx(50 / 9)


@fast
@given(instances(), st.integers(0, 99))
def test_distribution_and_simulation_of_any_policy(instance, seed):
    rng, size = np.random.default_rng(seed), instance.budget + 1
    policy = np.stack([rng.integers(0, len(c), size) for c in instance.classes])
    dist = knapsack.distribution(instance, policy)
    value = expected(instance, choose=lambda values, i, b: values[policy[i, b]])
    assert dist.mean_score == pytest.approx(value) == osmckp.evaluate(instance, policy)[0, -1]
    assert np.all(dist.p > 0) and np.all((dist.spent >= 0) & (dist.spent <= instance.budget))
    for values, p in (dist.of("score"), dist.of("spent")):
        assert np.all(np.diff(values) > 1e-9) and p.sum() == pytest.approx(1, abs=1e-12)
    draws = knapsack.draw(instance, 4000, seed)
    runs = knapsack.simulate(instance, policy, draws=draws)
    sd_spent = np.sqrt(dist.p @ (dist.spent - dist.mean_spent) ** 2)
    assert abs(runs.mean_score - dist.mean_score) <= 5 * runs.se + 1e-9
    assert abs(runs.spent.mean() - dist.mean_spent) <= 5 * sd_spent / np.sqrt(4000) + 1e-9
    assert np.array_equal(runs.score, knapsack.simulate(instance, policy, 4000, seed).score)


def test_bad_policies():
    for policy in (np.zeros((3, 9), int), np.zeros(4, int), np.zeros(3), [2, 2, 2], [-1, 0, 0]):
        with pytest.raises(ValueError, match="policy"):
            osmckp.evaluate(hand_exam(), policy)


@fast
@given(instances())
def test_open_loop_equals_brute_force_over_all_plans(instance):
    plan = knapsack.open_loop(instance)
    values = {p: expected(instance, choose=lambda values, i, b, p=p: values[p[i]])
              for p in itertools.product(*(range(len(c)) for c in instance.classes))}
    best = pytest.approx(max(values.values()), abs=1e-9)
    assert plan.value == best == values[tuple(plan.actions.tolist())]
    assert osmckp.evaluate(instance, plan.actions)[0, -1] == best


def test_open_loop_refuses_too_many_plans():
    with pytest.raises(ValueError, match="more than 10,000 plans"):
        knapsack.open_loop(random_instance(8, 60, 4, 5))


@settings(max_examples=15, deadline=None)
@given(instances(max_n=2, max_k=2))
def test_exact_hindsight_equals_brute_force_over_known_outcomes(instance):
    total = 0.0
    for joint in itertools.product(*(range(len(a.p)) for some in instance.classes for a in some)):
        luck = iter(joint)
        drawn = [[(a, next(luck)) for a in some] for some in instance.classes]
        known = [[Action("a", [(1, a.cost[s], a.reward[s])]) for a, s in some] for some in drawn]
        total += np.prod([a.p[s] for some in drawn for a, s in some]) * expected(
            Instance(instance.budget, known))
    assert knapsack.hindsight(instance) == (pytest.approx(total, abs=1e-9), 0.0)


def test_hindsight_against_milp_and_its_standard_error():
    instance = random_instance(3, 100, 3, 4)
    draws = knapsack.draw(instance, 60, seed=1)
    for run, value in enumerate(knapsack.hindsight_scores(instance, draws)):
        known = [[(a.cost[s], a.reward[s]) for a, s in zip(some, pick[run], strict=True)]
                 for some, pick in zip(instance.classes, draws, strict=True)]
        assert milp_value(known, instance.budget) == pytest.approx(value, abs=1e-6)
    exact = knapsack.hindsight(instance)
    sampled = knapsack.hindsight(instance, exact_limit=0, samples=4000, seed=3)
    assert exact.se == 0 < sampled.se and abs(sampled.value - exact.value) <= 4 * sampled.se


def test_greedy_knapsack_of_the_paper():
    for levels, budget, sits in [([2, 1, 0], 1024, [0, 1, 1]), ([2, 1, 0], 1280, [1, 1, 1]),
                                 ([1, 1, 1], 768, [1, 1, 0]), ([3, 3, 0], 4096, [0, 0, 1])]:
        assert osmckp.greedy_knapsack(levels, budget, (128, 384, 768)).tolist() == sits
    with pytest.raises(ValueError, match="levels"):
        osmckp.greedy_knapsack([0, -1], 512, (128, 384, 768))


@fast
@given(instances(max_k=2))
def test_best_order_equals_all_permutations(instance):
    order, value = knapsack.best_order(instance)
    orders = itertools.permutations(range(len(instance)))
    values = {o: expected(Instance(instance.budget, [instance.classes[i] for i in o]))
              for o in orders}
    assert max(values.values()) == pytest.approx(value, abs=1e-9) == values[order]


def write(folder, *path_and_value):
    """The hand-made exam as a JSON file, with one value changed."""
    doc = spot = {"budget": 7, "classes": [[{"name": a.name, "outcomes": [
        {"p": p, "cost": int(c), "reward": r} for p, c, r in zip(a.p, a.cost, a.reward, strict=True)
    ]} for a in some] for some in hand_exam().classes]}
    *path, last, value = path_and_value
    for key in path:
        spot = spot[key]
    spot[last] = value
    (folder / "exam.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(doc).encode())  # as Windows
    return folder / "exam.json"


def test_solve_document(tmp_path):
    answer = solve_document(read_instance(write(tmp_path, "budget", 9.0)))
    assert json.loads(json.dumps(answer)) == answer == {
        "value": pytest.approx(1.8), "open_loop": pytest.approx(1.7),
        "greedy": pytest.approx(1.8), "hindsight": pytest.approx(2.2), "hindsight_se": 0,
        "first_action": "try", "order_regret": pytest.approx(1 - 1.8 / 2.2)}
    answer = solve_document(Instance(9, hand_exam().classes * 3))  # more than 7 problems
    assert answer["order_regret"] is None and answer["hindsight"] >= answer["value"]


ACTION, TRY = ("classes", 1, 1), r"exam\.json: class 1, action 1,.*"
ROWS = (*ACTION, "outcomes")
BAD = {
    TRY + "field p": [(*ROWS, 0, "p", x) for x in (0.7, -0.8, np.nan, np.inf, "0.8", None)],
    TRY + "field cost": [(*ROWS, 0, "cost", x) for x in (-4, 2.5, np.nan, np.inf, True)],
    TRY + "field reward": [(*ROWS, 0, "reward", x) for x in (-1, np.nan, np.inf, None, [])],
    TRY + "field outcomes": [(*ROWS, []), (*ROWS, 5), (*ROWS, 0, "cost", 10**400),
                             (*ACTION, {"name": "try"})],
    TRY + "field p.* in 3": [(*ROWS, 0, 3)], TRY + "field cost.*{'p': 1}": [(*ROWS, 0, {"p": 1})],
    TRY + "field name": [(*ACTION, "name", 5), (*ACTION, {"outcomes": []})],
    "class 2, action 0": [("classes", 2, 0, "skip")],
    "class 2.*list": [("classes", 2, []), ("classes", 2, {}), ("classes", 2, 5)],
    "field classes": [("classes", []), ("classes", None)],
    "field budget": [("budget", x) for x in (-1, 1.5, np.nan, np.inf, "9", None, 10**15)],
}


@pytest.mark.parametrize(("where", "change"), [(k, c) for k in BAD for c in BAD[k]])
def test_bad_documents(tmp_path, where, change):
    with pytest.raises(ValueError, match=where):
        read_instance(write(tmp_path, *change))


@pytest.mark.parametrize(("content", "message"), [
    (b"", "no JSON"), (b'{"budget": 9', "no JSON"), (b"\xff\xfe", "no JSON"),
    (b"[" * 100_000, "no JSON"), (b'{"budget": ' + b"9" * 5_000 + b"}", "no JSON"),
    (b"[]", "holds no object"), (b"{}", "classes: missing"),
    (b'{"classes": []}', "budget: missing")])
def test_bad_files_are_refused_in_one_sentence(tmp_path, content, message):
    path = tmp_path / "exam.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_instance(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_actions_are_merged_and_checked_and_instances_too():
    a = Action("x", [(0.25, 4, 1), (0.25, 4, 1), (0.25, 4, 0), (0.25, 2, 1), (0, 1, 1)])
    assert (a.cost.tolist(), a.reward.tolist()) == ([2, 4, 4], [1, 0, 1])
    assert a.p.tolist() == [0.25, 0.25, 0.5]
    assert (a.costs.tolist(), a.costs_p.tolist()) == ([2, 4], [0.25, 0.75])
    for outcomes in ([], [(1, 2)], [(1, 2, 3, 4)], [(1, 0)] * 3, 7, None, [1, 0, 0], [[]]):
        with pytest.raises(ValueError, match="'x', field outcomes"):
            Action("x", outcomes)
    for classes, where in (([["skip"]], "class 0"), ([[SKIP], SKIP], "class 1"), ([], "classes")):
        with pytest.raises(ValueError, match=where):
            Instance(5, classes)
    with pytest.raises(ValueError, match="7 at most"):
        knapsack.best_order(Instance(3, [[SKIP]] * 8))
