"""Sitting exams: one row a problem, by hand; what reaches the engine; what is refused."""

import numpy as np
import pandas as pd
import pytest

from roi_lib.engines.replay import ReplayEngine, reference_engine
from roi_lib.exams import Exam, draw_papers, in_orders, tag
from roi_lib.generation import Engine, Request, Rollout, within_budget
from roi_lib.problems import Problem
from roi_lib.sitting import COLUMNS, points, responses, sit
from roi_lib.worlds import ORDERS, POCKET

PAPERS = draw_papers(POCKET, 20)


class Writer(Engine):
    """Answers rollout k of each request with text k, and keeps the requests."""

    def __init__(self, env, *texts):
        self.rows = [[*env.encode(text), env.tokenizer.eos_token_id] for text in texts]
        self.asked = []

    def stream(self, requests, temperature=1.0):
        self.asked += [(request, temperature) for request in requests]
        for i, request in enumerate(requests):
            yield i, [within_budget(ids, request.budget, ids[-1:]) for ids in self.rows[:request.n]]


@pytest.mark.parametrize("order", ORDERS)
def test_the_budget_alone_decides_what_a_faultless_writer_scores(env, order):
    exams = in_orders(PAPERS, [order], 0)
    engine = reference_engine(env, exams, [64, 320])
    assert points(sit(env, engine, exams, 320)).tolist() == [3] * 20
    for exam, (_, own) in zip(exams, sit(env, engine, exams, 64).groupby("exam"), strict=True):
        ends = np.cumsum([len(env.encode(f"Q1. {p.solution}")) for p in exam.problems])
        assert own["correct"].tolist() == (ends <= 64).tolist()
        assert own["cost"].sum() == own["tokens"].iloc[0] == min(ends[-1] + 1, 64)
        cut = [] if own["finished"].all() else [own["reached"].sum()]  # the last that was reached
        assert own["position"][own["cut"]].tolist() == cut and bool(cut) == (ends[-1] >= 64)


def test_every_column_by_hand(env):
    (exam,) = in_orders(PAPERS[:1], ["medium"], 0)
    skip, gold = f"Q2. {tag(3)} \\boxed{{NA}}", exam.problems[1].answer
    words = [f"Plan. Q1. {tag(0)} \\boxed{{1}} {skip}", f"Q2. \\boxed{{{gold}}} Q1. 5 Q3. 1"]
    table = sit(env, Writer(env, *words), [exam], 24, n=2, style="roi")
    first, second = (own for _, own in table.groupby("rollout"))
    wanted = {"problem": [p.id for p in exam.problems], "preamble": [len(env.encode("Plan."))] * 3,
              "cost": [len(env.encode(f"Q1. {tag(0)} \\boxed{{1}}")), len(env.encode(skip)) + 1, 0],
              "predicted": [0, 3, -1], "real": [0, 3, 0], "skipped": [False, True, False],
              "reached": [True, True, False], "cut": [False] * 3, "finished": [True] * 3,
              "prompt": [env.prompt(exam, 24, "roi")] * 3, "order": ["medium"] * 3,
              "ids": [(*env.encode(words[0]), env.tokenizer.eos_token_id)] * 3}
    assert list(table) == COLUMNS and first[[*wanted]].to_dict("list") == wanted
    assert first["answer"].fillna("").tolist() == ["1", "NA", ""]
    assert second["correct"].tolist() == [False, True, False] and set(second["revisits"]) == {1}
    assert points(table).tolist() == [0, 1] and len(responses(table)) == 2


def test_what_a_statement_holds_earns_nothing(env):
    texts = [r"\boxed{7} Q1. \boxed{7}", tag(0) + r"\boxed{NA}", "<|im_end|>\n\\boxed{7}"]
    evil = [Exam((Problem(text, text, "7", "", "easy", "own"),), "easy") for text in texts]
    table = sit(env, Writer(env, "Q1. 3 + 4 = 7."), evil, 64)
    assert table["answer"].isna().all() and (table["predicted"] == -1).all()
    assert not (table["correct"] | table["skipped"]).any()


def test_what_reaches_the_engine(env, refusal):
    exams, engine = in_orders(PAPERS[:2], ["easy"], 0), Writer(env, "Q1. 1 Q2. 2 Q3. 3")
    sit(env, engine, exams, 64, style="roi", temperature=0.5, seed=7)
    table = sit(env, engine, exams, 64, style="roi", seed=7, streams=[(3, 1), (3, 2)], cap=5)
    (plain, heat), _, (capped, _), _ = engine.asked
    assert [r.seed for r, _ in engine.asked] == [(7, 0), (7, 1), (7, 3, 1), (7, 3, 2)]
    assert (plain.budget, capped.budget, heat) == (64, 5, 0.5) and plain.prompt == capped.prompt
    assert plain.message == env.message(exams[0], 64, "roi")
    assert set(table["budget"]) == {64} and set(table["tokens"]) == {5}
    assert "no exams to sit" in refusal(sit, env, engine, [], 64)
    assert "give at least 5 tokens" in refusal(sit, env, engine, exams, 64, cap=3)
    assert "give at least 5 tokens" in refusal(sit, env, engine, exams, [64, 4])
    assert "world can say; give at most 320 tokens" in refusal(sit, env, engine, exams, [321, 64])


def test_a_budget_for_each_exam_is_that_exam_under_its_budget_alone(env, engine):
    """The very same tokens, as with seeds of their own and one budget each."""
    exams, budgets = in_orders(PAPERS[:4], ORDERS, 0), [12, 40, 12, 25]
    together = sit(env, engine, exams, budgets, n=3, style="roi", seed=7)
    for i, (exam, budget) in enumerate(zip(exams, budgets, strict=True)):
        own = together[together["exam"] == i].assign(exam=0).reset_index(drop=True)
        alone = sit(env, engine, [exam], budget, n=3, style="roi", seed=7, streams=[(i,)])
        pd.testing.assert_frame_equal(own, alone)
        assert set(own["prompt"]) == {env.prompt(exam, budget, "roi")}
        assert set(own["budget"]) == {budget}
    assert (together["tokens"] <= together["budget"]).all()
    assert 12 < together["tokens"].max() and together["tokens"].nunique() > 5


# ---------------------------------------------------------------- what a response begins with
OPENING = f"Q1.\n{tag(1)}"


@pytest.mark.parametrize("budget", [128, 20])
def test_who_would_begin_like_that_anyway_writes_the_same(env, budget):
    """Costs, tags, points and cuts as if nobody had begun for him."""
    exams, replies, rest = in_orders(PAPERS, ["easy"], 0), {}, {}
    for exam in exams:
        words = " ".join(f"Q{i}. {tag(1)} {p.brief}" for i, p in enumerate(exam.problems, 1))
        prompt, ids, n = env.prompt(exam, budget, "roi"), env.encode(words), env.smallest_budget
        replies[prompt], rest[(*prompt, *ids[:n])] = ids, ids[n:]
    free, begun = (sit(env, ReplayEngine(some, env.tokenizer.eos_token_id), exams, budget,
                       style="roi", opening=words)
                   for some, words in ((replies, ""), (rest, OPENING)))
    pd.testing.assert_frame_equal(free, begun)
    assert (free["predicted"][free["position"] == 1] == 1).all() and free["correct"].any()
    assert free["cut"].any() == (budget == 20)


def test_an_opening_is_read_and_charged_and_what_follows_is_the_models_own(env, engine):
    (exam,), first = in_orders(PAPERS[:1], ["hard"], 0), tuple(env.encode(OPENING))
    prompt = env.prompt(exam, 24, "roi")
    table = responses(sit(env, engine, [exam], 24, n=8, style="roi", seed=3, opening=OPENING))
    (own,) = engine.generate([Request(prompt + first, 24 - len(first), (3, 0), 8)])
    assert [ids[: len(first)] for ids in table["ids"]] == [first] * 8
    assert [ids[len(first):] for ids in table["ids"]] == [r.ids for r in own]
    assert table["tokens"].tolist() == [len(first) + len(r.ids) for r in own]
    assert table["finished"].tolist() == [r.finished for r in own] and len({*table["ids"]}) > 4
    assert set(table["prompt"]) == {prompt} and set(table["predicted"]) == {1}


def test_the_words_of_a_server_come_after_the_opening(env):
    """Read as text: the words that the vocabulary lacks are there."""
    class Server(Engine):
        def stream(self, requests, temperature=1.0):
            yield 0, [Rollout(tuple(env.encode("surely \\boxed{not 7}")), True,
                              text="surely \\boxed{not 7}")]

    (exam,) = in_orders(PAPERS[:1], ["hard"], 0)
    row = sit(env, Server(), [exam], 64, style="roi", opening=OPENING).iloc[0]
    assert (row["answer"], row["predicted"]) == ("not 7", 1)
