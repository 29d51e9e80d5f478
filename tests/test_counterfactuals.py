"""Counterfactuals: only the one thing changes, and decisions are read exactly."""

from itertools import cycle, islice

import numpy as np
import pandas as pd
import pytest
import torch

from roi_lib import osmckp
from roi_lib.exams import Environment, draw_papers
from roi_lib.experiments import counterfactuals
from roi_lib.experiments.counterfactuals import (
    BUDGETS,
    FIXED,
    Case,
    cases,
    compare,
    decision_table,
    level_probabilities,
    optimal_levels,
)
from roi_lib.rational import Outcomes, statement_of
from roi_lib.store.checkpoints import load_model, load_tokenizer
from roi_lib.worlds import POCKET, TAG_OPEN

PAPERS = draw_papers(POCKET, 3, seed=2)


@pytest.fixture(scope="module")
def some(env):
    return cases(env, PAPERS, seed=5)


def abilities(some, seed=0):
    """Random outcomes of three efforts, for every statement that the cases hold."""
    found = {statement_of(p): p.tier for case in some for p in case.exam.problems}
    papers = -(-len(found) // 3)
    words, tiers = (np.array([*islice(cycle(x), 3 * papers)]).reshape(papers, 3)
                    for x in (found, found.values()))
    rng, shape, dear = np.random.default_rng(seed), (papers, 3, 3, 5), np.arange(3)[:, None]
    return Outcomes(rng.integers(8, 30, shape) + 25 * dear, rng.random(shape) < 0.3 + 0.3 * dear,
                    words, tiers, 8)


def test_only_the_one_thing_changes(env, some):
    for i, (easy, medium, hard) in enumerate(PAPERS):
        whole, own = (hard, medium, easy), {}
        for case in some:
            own.setdefault(case.question, []).append(case)
        own = {name: all_of[len(all_of) // 3 * i :][: len(all_of) // 3]
               for name, all_of in own.items()}
        assert own["budget"] == [Case("budget", b, own["budget"][0].exam, b) for b in BUDGETS]
        assert own["budget"][0].exam.problems == whole
        rests = (), (easy,), (medium,), (medium, easy)
        assert [(c.exam.problems, c.x) for c in own["behind"]] == [
            ((hard, *rest), ", ".join(p.tier for p in rest) or "nothing") for rest in rests]
        assert {c.exam.problems[1:] for c in own["words"]} == {(medium, easy)}
        words = [c.x for c in own["words"]]
        assert words == sorted({statement_of(c.exam.problems[0]) for c in own["words"]})
        assert words == sorted({statement_of(paper[2]) for paper in PAPERS}), "whose cost is known"
        brief, full = own["spent"]
        assert (brief.x, full.x) == ("brief", "in full") and brief.exam == full.exam
        assert brief.exam.problems == (medium, hard, easy)
        for case, answer in ((brief, medium.brief), (full, medium.solution)):
            first, *rest = env.parse(env.encode(case.opening), 3).segments
            assert (first.answer, first.level) == (medium.answer, POCKET.level_of(first.cost))
            assert first.text.split("</predicted_level>")[1].split() == answer.split()
            assert [s.cost for s in rest] == [0, 0]
        for name, place in (("behind", 0), ("words", 0), ("spent", 1)):
            assert {(c.budget, c.position) for c in own[name]} == {(FIXED, place)}
        assert all(not c.opening for name in ("budget", "behind", "words") for c in own[name])
    assert cases(env, PAPERS, 5) == some
    rest, drawn = ([[c for c in every if (c.question == "words") == words] for every in (
        some, cases(env, PAPERS, 6))] for words in (False, True))
    assert rest[0] == rest[1] and drawn[0] != drawn[1]


def test_probabilities_are_those_of_the_model_one_case_at_a_time(env, model, some, monkeypatch):
    monkeypatch.setattr(counterfactuals, "ROWS", 7)
    chosen = [*some[::4], *(case for case in some if case.question == "spent")]
    found = level_probabilities(env, model, chosen)
    levels = env.tokenizer.convert_tokens_to_ids([f"Level-{k}" for k in range(4)])
    for row, case in zip(found, chosen, strict=True):
        words = f"{case.opening}Q{case.position + 1}. {TAG_OPEN}"
        ids = [*env.prompt(case.exam, case.budget, "roi"), *env.encode(words)]
        with torch.no_grad():
            wanted = model(torch.tensor([ids])).logits[0, -1].softmax(-1)[levels]
        np.testing.assert_allclose(row, wanted, rtol=1e-4)
    assert found.shape == (len(chosen), 4) and (found.sum(1) < 1).all()


def test_optimal_levels_are_what_the_solver_does_with_what_is_left(env, some):
    outcomes, taken = abilities(some), set()
    found = optimal_levels(env, outcomes, some)
    assert (np.sort(found, axis=1) == [0, 0, 0, 1]).all()
    for row, case in zip(found, some, strict=True):
        left, classes = case.budget - len(env.encode(case.opening)), []
        for problem in case.exam.problems[case.position :]:
            alike = outcomes.statement == statement_of(problem)
            cost, right = outcomes.cost[alike], outcomes.correct[alike]
            n = cost.shape[0] * cost.shape[2]
            classes.append([osmckp.Action("skip", [(1, 8, 0)]), *(osmckp.Action("try", np.stack(
                [np.full(n, 1 / n), cost[:, k].ravel(), right[:, k].ravel()], axis=1))
                for k in range(3))])
        action = osmckp.solve(osmckp.Instance(left, classes)).policy[0, left]
        assert row.argmax() == (action - 1 if action else 3), case
        taken.add(int(action))
    assert taken == {0, 1, 2, 3}


def test_what_cannot_be_read_is_refused(env, model, some, refusal):
    whole = abilities(some)
    untagged = Outcomes(whole.cost[:, :, :1], whole.correct[:, :, :1], whole.statement, whole.tier,
                        8)
    assert "are of 1 efforts, and there are 3 levels" in refusal(
        optimal_levels, env, untagged, some)
    words = Environment(POCKET, load_tokenizer("gsm8k-bpe"))
    assert "this tokenizer has none" in refusal(level_probabilities, words, model, some)


def test_decisions_by_hand():
    """The mean level is of what is tried; where nothing is, there is none."""
    exam = PAPERS[0]
    some = [Case("budget", x, exam, 64) for x in (64, 96, 64, 96)]
    table = decision_table(some, np.array([
        [0.1, 0.2, 0.3, 0.4], [0, 0, 0, 1], [0.5, 0.1, 0.0, 0.2], [0, 0, 0, 1]]))
    assert table[["question", "x", "papers"]].to_numpy().tolist() == [
        ["budget", 64, 2], ["budget", 96, 2]]
    assert table["skip"].tolist() == pytest.approx([0.3, 1])
    assert table["level"].tolist() == pytest.approx([(0.2 + 0.6 + 0.1) / 1.2, np.nan], nan_ok=True)
    assert [table["skip_low"][0], table["skip_high"][0]] == pytest.approx([0.2, 0.4])
    assert table["level_low"][0] == pytest.approx(0.1 / 0.6)


def test_models_and_the_exact_policy_are_compared_on_the_same_papers(
        env, small_world, monkeypatch, refusal):
    papers, folder = draw_papers(POCKET, 2, seed=3), small_world.method("rarl").checkpoint
    some, asked = cases(env, papers, 3), []
    outcomes = abilities(some, seed=1)

    def sample(env, engine, papers, budget, samples, style, seed):
        asked.append((papers, budget, samples, style, seed))
        return outcomes

    monkeypatch.setattr(counterfactuals, "sample_outcomes", sample)
    table = compare(small_world, ["mft", f"later={folder}"], 2, seed=3, samples=5)
    assert asked == [(papers, 256, 5, "roi", 3)] and set(table["seed"]) == {3}
    assert table["method"].unique().tolist() == ["mft", "later", "optimal"]
    for name, wanted in (
            *((name, level_probabilities(env, load_model(checkpoint, "float64"), some))
              for name, checkpoint in (("mft", small_world.method("mft").checkpoint),
                                       ("later", folder))),
            ("optimal", optimal_levels(env, outcomes, some))):
        own = table[table["method"] == name].drop(columns=["method", "seed"])
        pd.testing.assert_frame_equal(own.reset_index(drop=True), decision_table(
            some, wanted, 3).round(4))
    assert "method must be one of" in refusal(compare, small_world, ["genius"], 2)
    assert "name a local folder" in refusal(compare, small_world, ["new=no-such-folder"], 2)
