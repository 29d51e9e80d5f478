"""Methods: Greedy Knapsack step by step, workers, logs, and what is refused before anything."""

import json
import os
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from roi_lib.engines import EngineConfig
from roi_lib.engines.replay import reference_response
from roi_lib.exams import draw_papers, tag
from roi_lib.experiments.methods import (
    Comparison,
    default_workers,
    find_methods,
    run_knapsack,
    run_method,
    run_methods,
)
from roi_lib.generation import Engine, within_budget
from roi_lib.worlds import ORDERS, PAPER, POCKET, Method

LEVELS = {"easy": 0, "medium": 1, "hard": 2}
PAPERS = draw_papers(POCKET, 4)


class Honest(Engine):
    """Tags problems by their tier, and answers as the reference does; keeps its requests."""

    def __init__(self, env, levels, tags):
        self.env, self.levels, self.tags, self.asked = env, levels, tags, []

    def write(self, problems):
        """Token ids of its answer to these problems."""
        words = reference_response(POCKET, problems).split("\n")
        for n, problem in enumerate(problems):
            words[2 * n] += f" {tag(self.levels[problem.tier])}" if self.tags else ""
        return [*self.env.encode(" ".join(words)), self.env.tokenizer.eos_token_id]

    def stream(self, requests, temperature=1.0):
        for i, request in enumerate(requests):
            self.asked.append(request)
            places = {request.message.find(p.text): p for paper in PAPERS for p in paper}
            ids = self.write([places[place] for place in sorted(places) if place >= 0])
            yield i, [within_budget(ids, request.budget, ids[-1:])]


def knapsack(env, budget, charged=False, levels=LEVELS, tags=True):
    engine = Honest(env, levels, tags)
    table, facts = run_knapsack(Comparison(POCKET, PAPERS), Method("none", "roi", charged=charged),
                                env, engine, budget)
    return engine, table, facts


@pytest.mark.parametrize(("budget", "charged", "sat"), [
    (64, False, "easy medium"), (160, False, "easy medium hard"), (15, False, ""),
    (64, True, "easy"), (79, True, "easy medium"), (30, True, ""), (20, True, "")])
def test_greedy_knapsack_against_a_plain_computation(env, budget, charged, sat):
    """Centroids 16, 48, 96; what is chosen is sat in the paper's order, and mapped back."""
    engine, table, facts = knapsack(env, budget, charged)
    predicting, sitting = engine.asked[:12], engine.asked[12:]
    assert all(r.budget == 5 and f"Budget: {budget} tokens" in r.message for r in predicting)
    assert facts == {"prediction_tokens": 15, "prediction_charged": charged, "unread_levels": 0}
    left, rows = budget - 15 * charged, []
    assert len(sitting) == (12 if sat else 0), "nothing chosen: no call"
    assert all(r.budget == left for r in sitting)
    for order in ORDERS:
        for i, exam in enumerate(Comparison(POCKET, PAPERS).exams(order)):
            chosen = [p for p in exam.problems if p.tier in sat.split()]
            ids = engine.write(chosen)[:left] if chosen else []
            segments = iter(env.parse(ids, len(chosen)).segments)
            for position, problem in enumerate(exam.problems, 1):
                s = next(segments) if problem in chosen else None
                level = LEVELS[problem.tier] if not s else -1 if s.level is None else s.level
                rows.append((i, position, problem.id, problem.tier, order, s.cost if s else 0,
                             level, not s, bool(s) and s.answer == problem.answer,
                             bool(s and s.cost), 15 * charged + len(ids), tuple(ids)))
    columns = ("exam position problem tier order cost predicted skipped correct reached tokens "
               "ids").split()
    pd.testing.assert_frame_equal(table[columns], pd.DataFrame(rows, columns=columns),
                                  check_dtype=False)
    assert (table["tokens"] <= budget).all() and table["correct"].any() == bool(sat)
    assert (table["budget"] == budget).all() and (table["preamble"] == 15 * charged).all()
    assert (table["real"][table["skipped"]] == 3).all()


def test_the_skip_level_is_never_chosen_and_unread_tags_neither(env):
    _, table, _ = knapsack(env, 500, levels=LEVELS | {"hard": 3})
    assert (table["skipped"] == (table["tier"] == "hard")).all()
    engine, table, facts = knapsack(env, 500, tags=False)
    assert facts["unread_levels"] == 1 and len(engine.asked) == 12 and table["skipped"].all()


# ---------------------------------------------------------------- methods side by side
def same(a, b):
    """Whether two results are equal in all that they hold."""
    pd.testing.assert_frame_equal(a.table, b.table)
    pd.testing.assert_frame_equal(a.bounds, b.bounds)
    return a.facts == b.facts and (a.outcomes is None or (a.outcomes.cost == b.outcomes.cost).all())


def test_workers_change_nothing_and_repetitions_neither():
    """Two processes sit two methods: the same tokens, the same bounds, in the same sequence."""
    comparison = Comparison(POCKET, PAPERS[:2])
    names, budgets = ["base", "rational", "base"], [16, 24, 16]
    one, two = (run_methods(comparison, names, budgets, workers) for workers in (1, 2))
    assert same(one, two) and "prompt" not in one.table
    rows = one.table.groupby(["budget", "order"], sort=False).size().to_dict()
    assert list(rows.items()) == [((b, order), 2 * 3) for b in (16, 24) for order in ORDERS]
    assert list(one.bounds.index.unique("method")) == ["rational", "rational_tagged"]
    assert one.bounds.index.is_unique and len(one.bounds) == 2 * 2 * 3 * 2


class Deadly:
    """Whoever unpickles it dies."""

    def __reduce__(self):
        return os._exit, (1,)


def test_what_happens_in_a_worker_is_told(refusal):
    comparison = Comparison(POCKET, PAPERS[:1], temperature=-1.0)
    assert "temperature must be 0" in refusal(run_methods, comparison, ["base"], [16], 2)
    comparison = Comparison(POCKET, PAPERS[:1], tokenizer=Deadly())
    with pytest.raises(ChildProcessError, match="ended from outside.*--workers 1"):
        run_methods(comparison, ["base"], [16], workers=2)


def test_what_cannot_be_done_is_refused_before_anything_is_sat(refusal, monkeypatch):
    monkeypatch.setattr(EngineConfig, "make", lambda *_: pytest.fail("an engine was made"))
    world = replace(POCKET, methods={"base": Method("pocket-base", "direct"),
                                     "mft": Method("no-mft", "roi"),
                                     "rational": Method("pocket-base", "direct", "rational")})
    comparison = Comparison(world, PAPERS)
    for names, words in ((["base", "mft"], "'mft' needs the checkpoint data/no-mft"),
                         (["base", "genius"], "'genius'")):
        assert words in refusal(run_methods, comparison, names, [64])
    few = replace(comparison, samples=3)
    assert "give a multiple of 4" in refusal(run_methods, few, ["base", "rational"], [64])
    assert "budget 4 is smaller" in refusal(run_methods, comparison, ["base"], [64, 4], 1)
    assert find_methods(world, ["all"]) == ["base", "rational"]


def test_processes_are_started_where_they_pay(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    many, few = (Comparison(POCKET, [()] * n) for n in (500, 50))
    server = replace(many, engine=EngineConfig("openai"))
    assert default_workers(many, ["pocket-base"]) == 4
    for comparison, name in ((few, "pocket-base"), (server, "pocket-base"), (many, "hub/id")):
        assert default_workers(comparison, [name]) == 1


def test_every_method_has_a_strategy_and_a_prompt():
    for world in (POCKET, PAPER):
        assert {m.strategy for m in world.methods.values()} == {"whole", "knapsack", "rational"}
        assert {m.style for m in world.methods.values()} <= set(world.prompts)


# ---------------------------------------------------------------- logs
def test_a_log_is_replayed_and_that_of_another_run_refused(tmp_path, refusal):
    comparison = Comparison(POCKET, PAPERS[:1], engine=EngineConfig(log=tmp_path))
    first, log = run_method(comparison, "base", [16]), tmp_path / "base-16.jsonl"
    replay = replace(comparison, engine=EngineConfig("replay", log=tmp_path))
    assert same(run_method(replay, "base", [16]), first)
    replay = replace(replay, papers=PAPERS[:2])
    assert "lacks 1 of 2 responses" in refusal(run_method, replay, "base", [16])
    log.rename(tmp_path / "base-24.jsonl")
    assert "its budget is 16, not 24" in refusal(run_method, comparison, "base", [24])
    (tmp_path / "base-24.jsonl").rename(log)
    other = replace(comparison, world=replace(POCKET, name="elsewhere"))
    assert "its world is 'pocket', not 'elsewhere'" in refusal(run_method, other, "base", [16])
    head, *rest = log.read_text().splitlines()
    head = json.loads(head)
    head["run"]["model"] = "0123"
    log.write_text("\n".join([json.dumps(head), *rest, ""]))
    assert "its model is '0123'" in refusal(run_method, comparison, "base", [16])


def test_places_say_where_each_problem_of_the_paper_stands():
    comparison = Comparison(POCKET, PAPERS)
    for order in ORDERS:
        for paper, exam, row in zip(PAPERS, comparison.exams(order), comparison.places(order),
                                    strict=True):
            assert tuple(np.take(np.array(paper, object), row)) == exam.problems
