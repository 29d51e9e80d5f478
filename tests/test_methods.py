"""Methods: Greedy Knapsack step by step, workers, logs, and what is refused before anything."""

import math
import os
from dataclasses import replace

import pandas as pd
import pytest

from roi_lib.engines import EngineConfig
from roi_lib.exams import draw_papers, tag
from roi_lib.experiments import methods
from roi_lib.experiments.methods import Comparison, alone, find_methods, run_method, run_methods
from roi_lib.generation import Engine, Rollout, within_budget
from roi_lib.rational import BOUNDS
from roi_lib.worlds import ORDERS, POCKET, RULES, Method

PAPERS = draw_papers(POCKET, 4)


class Honest(Engine):
    """Tags problems by their tier, and answers as the solution does; keeps its requests."""

    def __init__(self, env, levels):
        self.env, self.levels, self.asked = env, levels, []

    def write(self, problems):
        words = [f"Q{i}. {tag(self.levels[p.tier]) if self.levels else ''} {p.solution}"
                 for i, p in enumerate(problems, 1)]
        return [*self.env.encode(" ".join(words)), self.env.tokenizer.eos_token_id]

    def stream(self, requests, temperature=1.0):
        for i, request in enumerate(requests):
            self.asked.append(request)
            places = {request.message.find(p.text): p for paper in PAPERS for p in paper}
            ids = self.write([places[place] for place in sorted(places) if place >= 0])
            yield i, [within_budget(ids, request.budget, ids[-1:])]


@pytest.mark.parametrize(("budget", "charged", "hard", "sat"), [
    (64, False, 2, "easy medium"), (160, False, 2, "easy medium hard"), (15, False, 2, ""),
    (64, True, 2, "easy"), (79, True, 2, "easy medium"), (30, True, 2, ""), (20, True, 2, ""),
    (320, False, 3, "easy medium")])  # the skip level is never chosen
def test_greedy_knapsack_against_a_plain_computation(env, budget, charged, hard, sat):
    """Centroids 16, 40, 88; what is chosen is sat in the paper's order, and mapped back."""
    levels, left, rows = {"easy": 0, "medium": 1, "hard": hard}, budget - 15 * charged, []
    comparison, method = Comparison(POCKET, PAPERS), Method("none", "roi", charged=charged)
    honest, untagged = Honest(env, levels), Honest(env, {})
    table, facts = methods.run_knapsack(comparison, method, env, honest, budget)
    assert all(f"Budget: {budget} tokens" in r.message for r in honest.asked[:12])
    assert facts == {"prediction_tokens": 15, "prediction_charged": charged, "unread_levels": 0}
    assert [r.budget for r in honest.asked] == [5] * 12 + [left] * (12 if sat else 0)
    for order in ORDERS:
        for i, exam in enumerate(comparison.exams(order)):
            chosen = [p for p in exam.problems if p.tier in sat.split()]
            ids = honest.write(chosen)[:left] if chosen else []
            segments = iter(env.parse(ids, len(chosen)).segments)
            for position, problem in enumerate(exam.problems, 1):
                s = next(segments) if problem in chosen else None
                level = levels[problem.tier] if not s else -1 if s.level is None else s.level
                rows.append((i, position, problem.id, order, budget, s.cost if s else 0, level,
                             not s, bool(s) and s.answer == problem.answer, bool(s and s.cost),
                             15 * charged + len(ids), 15 * charged, tuple(ids)))
    wanted = pd.DataFrame(rows, columns=("exam position problem order budget cost predicted "
                                         "skipped correct reached tokens preamble ids").split())
    pd.testing.assert_frame_equal(table[wanted.columns], wanted, check_dtype=False)
    assert (table["tokens"] <= budget).all() and (table["real"][table["skipped"]] == 3).all()
    table, facts = methods.run_knapsack(comparison, method, env, untagged, budget)
    assert facts["unread_levels"] == 1 and len(untagged.asked) == 12 and table["skipped"].all()


def test_greedy_knapsack_marks_a_paper_whose_prediction_failed(env):
    class Refusing(Honest):
        def stream(self, requests, temperature=1.0):
            for i, rollouts in super().stream(requests, temperature):
                refused = PAPERS[1][0].text in requests[i].message
                yield i, [Rollout((), False, failed="HTTP 400")] if refused else rollouts

    comparison, levels = Comparison(POCKET, PAPERS), {"easy": 0, "medium": 1, "hard": 2}
    table, facts = methods.run_knapsack(
        comparison, Method("none", "roi", charged=True), env, Refusing(env, levels), 64)
    assert (table["failed"] == "HTTP 400").equals(table["exam"] == 1)
    assert facts["prediction_tokens"] == 15 and facts["unread_levels"] == 0


def same(a, b):
    return a.table.equals(b.table) and a.bounds.equals(b.bounds) and a.facts == b.facts


def test_workers_change_nothing_and_repetitions_neither(small_world):
    """Policies are read from the bounds of the checkpoint's abilities, and those of each method
    that sits the exams stand beside it."""
    comparison = Comparison(small_world, PAPERS[:2])
    names = ["base", "optimal", "base", "best_rule"]
    one, two = (run_methods(comparison, names, [16, 24, 16], workers) for workers in (1, 2))
    assert same(one, two) and len(one.table) == 2 * 2 * 3 * 3
    assert one.policies == two.policies == ["optimal", "best_rule"]
    rows = 2 * 2 * 3 * (len(BOUNDS) + len(RULES))  # papers, budgets, orders
    assert one.bounds.groupby("abilities").size().to_dict() == {"base": rows, "rarl": rows}
    assert [one.outcomes[name].cost.shape for name in ("base", "rarl")] == [
        (2, 3, 1, 4), (2, 3, 3, 4)]
    assert one.outcomes["base"].cost.max() <= 24, "tried under the largest budget"
    assert not len(run_methods(comparison, ["base"], [16], 1).bounds), "nobody asked"


def test_abilities_are_those_of_a_checkpoint_that_answers_in_that_way():
    comparison = Comparison(POCKET, PAPERS)
    found = {name: comparison.abilities(name) for name in POCKET.methods}
    plain = dict.fromkeys(("base", "plan_and_solve", "least_to_most"), "base")
    mft = dict.fromkeys(("mft", "mft_greedy_knapsack", "mft_greedy_knapsack_charged"), "mft")
    assert found == {"replay": "replay", "brief": "brief"} | plain | mft | dict.fromkeys(
        ("rarl", *RULES, "best_rule", "optimal"), "rarl")
    own = replace(comparison, model="some/model")  # for all methods, and so only style tells
    assert {own.abilities(name) for name in plain} == {"base"}
    assert own.abilities("brief") == "brief" == alone(POCKET.method("brief")), "as it answers"
    assert {own.abilities(name) for name in (*mft, "rarl", "optimal")} == {"mft"}


def test_names_of_methods_and_of_groups_of_them(small_world, refusal):
    assert find_methods(POCKET, ["rarl", "rules", "optimal"]) == ["rarl", *RULES, "optimal"]
    assert find_methods(small_world, ["all"]) == [*POCKET.methods][1:], "replay has no checkpoint"
    away = replace(POCKET, methods={"base": Method("no-such-folder", "direct")})
    assert "name methods whose checkpoints the hub has" in refusal(find_methods, away, ["all"])
    assert "must be one of replay, base" in refusal(find_methods, POCKET, ["rules", "rule"])
    assert "there is no method to compare" in refusal(find_methods, POCKET, [])


def test_what_happens_in_a_worker_is_told(small_world, refusal):
    dying = type("Dying", (), {"__reduce__": lambda _: (os._exit, (1,))})()  # when it is unpickled
    comparison = Comparison(small_world, PAPERS[:1], engine=EngineConfig("replay"))
    assert "lacks 3 of 3" in refusal(run_methods, comparison, ["base"], [16], 2)
    comparison = replace(comparison, engine=EngineConfig(options={"max_rows": dying}))
    with pytest.raises(ChildProcessError, match="ended from outside.*--workers 1"):
        run_methods(comparison, ["base"], [16], workers=2)


def test_what_cannot_be_done_is_refused_before_anything_is_sat(small_world, refusal, monkeypatch):
    monkeypatch.setattr(EngineConfig, "make", lambda *_: pytest.fail("an engine was made"))
    methods = small_world.methods | {"mft": Method("no-mft", "roi")}
    world = replace(small_world, methods=methods)
    comparison = Comparison(world, PAPERS, samples=3)
    for names, budgets, words in ((["base", "mft"], [64], "needs the checkpoint data/no-mft"),
                                  (["base", "genius"], [64], "'genius'"),
                                  (["base", "optimal"], [64], "give a multiple of 4"),
                                  (["base"], [64, 4], "budget 4 is smaller"),
                                  (["replay", "base"], [400, 64], "give at most 320 tokens")):
        assert words in refusal(run_methods, comparison, names, budgets)
    for temperature in (-1.0, math.nan, math.inf):
        comparison = Comparison(small_world, PAPERS, temperature=temperature)
        assert "temperature must be 0" in refusal(run_methods, comparison, ["replay"], [64], 2)


def test_a_log_is_replayed_and_that_of_another_run_refused(small_world, tmp_path, refusal):
    comparison = Comparison(small_world, PAPERS[:1], engine=EngineConfig(log=tmp_path))
    first, log = run_method(comparison, "base", 16), tmp_path / "base-16.jsonl"
    replay = replace(comparison, engine=EngineConfig("replay", log=tmp_path))
    assert same(run_method(replay, "base", 16), first)
    replay = replace(replay, papers=PAPERS[:2])
    assert "lacks 3 of 6 responses" in refusal(run_method, replay, "base", 16)
    log.write_text(log.read_text().replace('"model": "', '"model": "0', 1))
    assert "log of another run: its model is '0" in refusal(run_method, comparison, "base", 16)
