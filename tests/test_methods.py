"""Methods: Greedy Knapsack step by step, workers, and what is refused before anything is sat."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from test_cli import run

from roi_lib import methods
from roi_lib.decoding import LlamaRows
from roi_lib.evaluation import make_records, run_method
from roi_lib.exams import Exam, draw_papers, reference_response
from roi_lib.generation import BudgetedGenerator, within_budget
from roi_lib.methods import EngineChoice, Prediction, Sat, Setting, choose, sit_methods, spread
from roi_lib.sitting import segment_table
from roi_lib.worlds import ORDERS, PAPER, POCKET, Method

LEVELS = {"easy": 0, "medium": 1, "hard": 2}


class Honest(BudgetedGenerator):
    """Tags problems by their tier, and answers as the reference does; counts its calls."""

    def __init__(self, tokenizer, papers, levels=LEVELS, tag="<predicted_level>Level-{}"
                 "</predicted_level>"):
        self.tokenizer, self.levels, self.tag = tokenizer, levels, tag
        self.problems = [problem for paper in papers for problem in paper]
        self.asked = []

    def stream(self, requests, temperature=1.0):
        for i, request in enumerate(requests):
            self.asked.append(request)
            places = {request.message.find(p.text): p for p in self.problems
                      if p.text in request.message}
            problems = [places[place] for place in sorted(places)]
            words = reference_response(POCKET, problems).split("\n")
            for n, problem in enumerate(problems):
                words[2 * n] += " " + self.tag.format(self.levels[problem.tier])
            ids = self.tokenizer(" ".join(words)).input_ids + [self.tokenizer.eos_token_id]
            yield i, [within_budget(ids, request.budget, [self.tokenizer.eos_token_id])]


def knapsack(tokenizer, papers, budget, charged=False, **options):
    generator = Honest(tokenizer, papers, **options)
    sittings, facts = methods.sit_knapsack(
        Setting(POCKET, papers), Method("none", "roi", "knapsack", charged), tokenizer, generator,
        budget)
    return generator, sittings, facts


def test_chosen_problems_are_sat_in_paper_order_and_mapped_back(tokenizer):
    """Centroids 16, 48, 96: a budget of 64 holds easy and medium, one of 160 all three."""
    papers = draw_papers(POCKET, 4)
    generator, sittings, facts = knapsack(tokenizer, papers, 64)
    predicting, sitting = generator.asked[:12], generator.asked[12:]
    assert all(r.budget == 5 and "Budget: 64 tokens" in r.message for r in predicting)
    assert len(sitting) == 12 and all("Q2." in r.message and "Q3." not in r.message
                                      for r in sitting)
    assert facts == {"prediction_tokens": 15.0, "prediction_charged": False, "unread_levels": 0.0}
    for order in ORDERS:
        for s in sittings[order]:
            at = {p.tier: n for n, p in enumerate(s.exam.problems)}
            hard = s.response.segments[at["hard"]]
            assert hard.skipped and hard.cost == 0 and hard.level == 2
            assert (s.correct[at["easy"]] or order != "easy") and not s.correct[at["hard"]]
            assert s.response.total == len(s.ids) == sum(x.cost for x in s.response.segments)
    positions = segment_table(POCKET, sittings["hard"])
    assert not positions["reached"][positions["position"] == 1].any()
    assert positions["reached"][positions["position"] == 2].all()
    _, everything, _ = knapsack(tokenizer, papers, 160)
    assert not segment_table(POCKET, everything["hard"])["skipped"].any()


def test_the_skip_level_is_never_chosen_and_unread_tags_neither(tokenizer):
    papers = draw_papers(POCKET, 2)
    _, sittings, _ = knapsack(tokenizer, papers, 500, levels=LEVELS | {"hard": 3})
    assert segment_table(POCKET, sittings["easy"])["skipped"].tolist() == [False, False, True] * 2
    generator, sittings, facts = knapsack(tokenizer, papers, 500, tag="Level-{}")
    assert facts["unread_levels"] == 1 and len(generator.asked) == 6


def test_nothing_chosen_is_an_empty_exam_without_a_model_call(tokenizer):
    papers = draw_papers(POCKET, 2)
    generator, sittings, _ = knapsack(tokenizer, papers, 15)
    assert len(generator.asked) == 6, "the prediction pass alone"
    for s in sittings["hard"]:
        assert s.ids == () and s.finished and s.correct == (False,) * 3 and s.response.total == 0


def test_a_charged_prediction_comes_out_of_the_budget(tokenizer):
    """64 - 15 tokens hold the easy problem only; 79 - 15 the medium one as well."""
    papers = draw_papers(POCKET, 2)
    for budget, sat in ((64, ["easy"]), (79, ["easy", "medium"]), (20, []), (30, [])):
        generator, sittings, facts = knapsack(tokenizer, papers, budget, charged=True)
        assert facts["prediction_charged"]
        for s in sittings["hard"]:
            table = segment_table(POCKET, [s])
            assert sorted(table["tier"][~table["skipped"]]) == sat
            assert s.response.preamble == 15 and s.budget == budget
            assert s.response.total == 15 + len(s.ids) <= budget
        assert all(r.budget == budget - 15 for r in generator.asked[6:])


def test_choice_by_hand():
    exam = Exam(tuple(reversed(draw_papers(POCKET, 1)[0])), "hard")  # hard, medium, easy
    levels = dict(zip((p.id for p in exam.problems), (0, 1, 0), strict=True))
    prediction = Prediction(levels, 15, 0)
    chosen = {budget: choose(POCKET, exam, prediction, budget) for budget in (-3, 15, 16, 32, 80)}
    assert chosen == {-3: [], 15: [], 16: [0], 32: [0, 2], 80: [0, 1, 2]}
    empty = spread(exam, 16, [], None, prediction, 0)
    assert [x.level for x in empty.response.segments] == [0, 1, 0]


def test_workers_change_nothing():
    """Two processes sit two methods: the same tokens, the same bounds, in the same sequence."""
    setting = Setting(POCKET, draw_papers(POCKET, 2))
    one, two = (sit_methods(setting, ["base", "optimal"], [16, 24], workers) for workers in (1, 2))
    assert [(r.method, r.budget) for r in one] == [(r.method, r.budget) for r in two] == [
        ("base", 16), ("base", 24), ("optimal", 16), ("optimal", 24), ("optimal_tagged", 16),
        ("optimal_tagged", 24)]
    records = make_records(setting, one)
    assert records == make_records(setting, two)
    for a, b in zip(one, two, strict=True):
        if isinstance(a, Sat):
            assert a.sittings == b.sittings
        else:
            assert np.array_equal(a.outcomes.cost, b.outcomes.cost)


@pytest.mark.parametrize("name", ["base", "least_to_most", "mft", "mft_greedy_knapsack", "optimal"])
def test_drafts_change_no_token_and_leave_less_to_decode(name, monkeypatch):
    decoded, step = [], LlamaRows.step
    monkeypatch.setattr(LlamaRows, "step",
                        lambda self, token: decoded.append(len(token)) or step(self, token))
    papers, results, counts = draw_papers(POCKET, 12), [], []
    for drafts in (True, False):
        decoded.clear()
        setting = Setting(replace(POCKET, drafts=drafts), papers, samples=4)
        results.append(sit_methods(setting, [name], [24, 64], 1))
        counts.append(sum(decoded))
    for with_drafts, without in zip(*results, strict=True):
        if isinstance(without, Sat):
            assert with_drafts.sittings == without.sittings
        else:
            assert np.array_equal(with_drafts.outcomes.cost, without.outcomes.cost)
    assert 0 < counts[0] < 0.8 * counts[1]


def test_an_error_in_a_worker_comes_back():
    setting = Setting(POCKET, draw_papers(POCKET, 2), temperature=-1.0)
    with pytest.raises(ValueError, match="temperature must be 0"):
        sit_methods(setting, ["base"], [16, 24], workers=2)


class Deadly:
    """Whoever unpickles it dies."""

    def __reduce__(self):
        return os._exit, (1,)


def test_a_killed_worker_is_told():
    setting = Setting(POCKET, draw_papers(POCKET, 1), tokenizer=Deadly())
    with pytest.raises(ChildProcessError, match="ended from outside.*--workers 1"):
        sit_methods(setting, ["base"], [16], workers=2)


def test_a_method_without_its_checkpoint():
    world = replace(POCKET, methods={"base": Method("pocket-base", "direct"),
                                     "mft": Method("no-mft", "roi")})
    with pytest.raises(ValueError, match="'mft' needs the checkpoint data/no-mft.*make it"):
        sit_methods(Setting(world, draw_papers(world, 2)), ["base", "mft"], [64])
    assert methods.available(world) == ["base"]
    assert methods.default_workers(Setting(world, [()] * 500), ["pocket-base"]) >= 1
    assert methods.default_workers(Setting(world, [()] * 50), ["pocket-base"]) == 1
    assert methods.default_workers(
        Setting(world, [()] * 500, choice=EngineChoice("openai")), ["pocket-base"]) == 1


def test_every_method_that_answers_has_a_way():
    for world in (POCKET, PAPER):
        assert {m.way for m in world.methods.values()} <= {*methods.WAYS, "rational"}


def test_logs_of_another_budget_world_or_checkpoint_are_refused(tmp_path):
    papers = draw_papers(POCKET, 1)
    choice = EngineChoice(log=tmp_path)
    first = run_method(POCKET, "base", papers, [16], choice=choice)
    assert run_method(POCKET, "base", papers, [16], choice=replace(choice, name="replay")) == first
    log = tmp_path / "base-16.jsonl"
    log.rename(tmp_path / "base-24.jsonl")
    with pytest.raises(ValueError, match="log of another run: its budget is 16, not 24"):
        run_method(POCKET, "base", papers, [24], choice=choice)
    (tmp_path / "base-24.jsonl").rename(log)
    with pytest.raises(ValueError, match="its world is 'pocket', not 'elsewhere'"):
        run_method(replace(POCKET, name="elsewhere"), "base", papers, [16], choice=choice)
    lines = log.read_text().splitlines()
    head = json.loads(lines[0])
    head["run"]["model"] = "0123"
    log.write_text("\n".join([json.dumps(head), *lines[1:], ""]))
    with pytest.raises(ValueError, match="its model is '0123'"):
        run_method(POCKET, "base", papers, [16], choice=choice)


def test_one_exam_has_no_interval(capsys, tmp_path):
    out = tmp_path / "out.json"
    status, table, note = run(capsys, "exam", "--methods", "replay,base", "--exams", 1, "--budgets",
                              16, "--out", out)
    assert status == 0 and "one exam has no interval" in note and "--" in table
    assert all(r["score_ci"] is None and r["regret_ci"] is None
               for r in json.loads(out.read_text()))
