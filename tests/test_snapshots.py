"""The models that a run kept: which exam is shown, and what is counted of the others."""

import json
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import SMALL_RARL, tiny_model

from roi_lib.engines.replay import ReplayEngine
from roi_lib.exams import draw_papers, in_orders, tag
from roi_lib.experiments import snapshots
from roi_lib.training.rarl import train
from roi_lib.worlds import POCKET

PAPERS = draw_papers(POCKET, 4, seed=3)
HARD = in_orders(PAPERS, ["hard"], 0)


@torch.no_grad()
def test_probabilities_of_a_skip_are_those_of_its_tokens_one_by_one(env, model):
    routes = snapshots.skip_routes(env, model, HARD[0], 64)
    for level in range(4):
        chances, ids = [], list(env.prompt(HARD[0], 64, "roi"))
        for token in env.encode(f"Q1.\n{tag(level)} \\boxed{{NA}}"):
            logits = model(torch.tensor([ids])).logits[0, -1]
            chances.append(logits.softmax(-1)[token].item())
            ids.append(token)
        opening = chances[: len(env.encode(f"Q1.\n{tag(level)}"))]
        assert routes["skip"][level] == pytest.approx(math.prod(chances), rel=1e-6)
        assert routes["tag"][level] == pytest.approx(math.prod(opening), rel=1e-6)


def test_the_exam_shown_is_the_first_whose_first_problem_takes_all(env, refusal):
    words = ["Q1. \\boxed{NA}", "Q1. 1 Q2. 1" + " + 1" * 40, *["Q1. 1" + " + 1" * 40] * 2]
    engine = ReplayEngine({env.prompt(exam, 64, "roi"): env.encode(text) for exam, text in zip(
        HARD, words, strict=True)}, env.tokenizer.eos_token_id)
    assert snapshots.find_example(env, engine, PAPERS) == 2
    assert "give more --papers" in refusal(snapshots.find_example, env, engine, PAPERS[:2])


def test_hard_problems_are_counted_by_position():
    """Right with the right tag, a skip under its own tag and another, cut, and never reached."""
    hard = pd.DataFrame({
        "position": [3] * 5 + [1], "skipped": [False, True, True, False, False, False],
        "predicted": [1, 3, 2, 1, -1, -1], "real": [1, 3, 3, 1, 0, 0],
        "correct": [True] + [False] * 5, "answer": ["5", "NA", "NA", None, None, None],
        "reached": [True] * 4 + [False] * 2}).assign(tier="hard", failed="")
    assert snapshots.hard_problems(pd.concat([hard, hard.assign(tier="easy")])) == [
        {"position": 1, "problems": 1, "skipped": 0, "tagged": None, "tried": 0, "right": None,
         "level": None, "reward": 0},
        {"position": 3, "problems": 5, "skipped": 0.4, "tagged": 0.5, "tried": 0.4, "right": 0.5,
         "level": 1, "reward": 0.2}]


def test_every_model_that_was_kept_is_looked_at(env, monkeypatch, tmp_path, refusal):
    for name, kept, dtype in (("none", (), "float"), ("0", (0,), "float"), ("1", (1,), "float"),
                              ("other", (), "double")):
        train(env, getattr(tiny_model(env.tokenizer), dtype)(), replace(
            SMALL_RARL, steps=1, snapshots=kept), tmp_path / name)
    for names, words in (("none", "name the --work"), ("none other", "different starts")):
        assert words in refusal(snapshots.find_snapshots, [tmp_path / n for n in names.split()])
    (tmp_path / "1" / "snapshots" / "step-best").mkdir()  # a user's own
    (tmp_path / "none" / "recipe.json").write_text("[]")
    assert "recipe.json is cut" in refusal(snapshots.find_snapshots, [tmp_path / "none"])
    monkeypatch.setattr(snapshots, "find_example", lambda *_: 1)
    monkeypatch.setattr(snapshots, "load_environment", lambda _: env)
    found = snapshots.snapshot_report(POCKET, [tmp_path / "1", tmp_path / "0"], 4, seed=3)
    assert found["ids"] == [p.id for p in HARD[1].problems] and found["budget"] == 64
    assert [step["step"] for step in found["steps"]] == [0, 1]
    for step in found["steps"]:
        assert sum(p["cost"] for p in step["problems"]) <= len(step["ids"]) <= 64
        assert sum(row["problems"] for row in step["hard"]) == 4 * 3 * 2  # orders, budgets
    assert json.loads(json.dumps(found)) == found
