"""The models that a run kept: which exam is shown, and what is counted of the others."""

import csv
import json
import math
from dataclasses import replace

import pytest
import torch
from roi_lib.ablations import COLUMNS
from roi_lib.moments import first_dry, hard_problems, moments, skip_routes
from roi_lib.rarl_loop import train
from test_rarl import SKIP, SMALL, honest, sat, tiny

from roi_lib.__main__ import main
from roi_lib.exams import Exam, draw_papers, encode_prompt, exam_prompt, order_problems
from roi_lib.generation import ReplayGenerator
from roi_lib.worlds import ORDERS, POCKET, TAG_CLOSE, TAG_OPEN


@pytest.fixture(scope="module")
def exam():
    return Exam(draw_papers(POCKET, 1, split="train")[0], "easy")


def test_probabilities_of_a_skip_are_those_of_its_tokens_one_by_one(tokenizer, exam):
    model = tiny(tokenizer, torch.float64)
    routes = skip_routes(POCKET, tokenizer, model, exam, 64)
    prompt = encode_prompt(tokenizer, exam_prompt(POCKET, exam, 64, "roi"))
    for level in range(4):
        chances, ids = [], list(prompt)
        words = f"Q1.\n{TAG_OPEN}Level-{level}{TAG_CLOSE} \\boxed{{NA}}"
        for token in tokenizer(words, add_special_tokens=False).input_ids:
            chances.append(model(torch.tensor([ids])).logits[0, -1].softmax(-1)[token].item())
            ids.append(token)
        assert routes["skip"][level] == pytest.approx(math.prod(chances), rel=1e-6)
        assert routes["tag"][level] == pytest.approx(math.prod(chances[:5]), rel=1e-6)


def test_the_exam_shown_is_the_first_whose_first_problem_takes_all(tokenizer):
    papers = draw_papers(POCKET, 4, seed=3)
    exams = [Exam(order_problems(paper, "hard", ""), "hard") for paper in papers]
    words = ["Q1. \\boxed{NA}", "Q1. 1" + " + 1" * 20 + "\nQ2. 1" + " + 1" * 40,
             "Q1. 1" + " + 1" * 40, "Q1. 2" + " + 1" * 40]
    responses = {
        tuple(encode_prompt(tokenizer, exam_prompt(POCKET, e, 64, "roi"))):
            tokenizer(text, add_special_tokens=False).input_ids
        for e, text in zip(exams, words, strict=True)}
    generator = ReplayGenerator(responses, tokenizer.eos_token_id)
    assert first_dry(POCKET, tokenizer, generator, papers) == 2
    with pytest.raises(ValueError, match="on none of 2 papers .* give more --papers"):
        first_dry(POCKET, tokenizer, generator, papers[:2])


def test_hard_problems_are_counted_by_position(tokenizer, exam):
    right = honest(tokenizer, exam)
    free = SKIP.replace("Level-3", "Level-2")  # a skip under another tag
    sittings = sat(tokenizer, exam, right, [*right[:2], SKIP], [*right[:2], free],
                   [*right[:2], right[2].replace("\\boxed{", "\\boxed{1")])
    (row,) = hard_problems(POCKET, sittings)
    assert row == {"position": 3, "problems": 4, "skipped": 0.5, "tagged": 0.5, "tried": 0.5,
                   "right": 0.5, "level": 1.0, "reward": 0.25}
    cut = sat(tokenizer, exam, right, budget=20)
    assert hard_problems(POCKET, cut)[0]["right"] is None


def test_all_kept_models_are_looked_at_and_the_table_of_seeds_is_made(
        tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("roi_lib.moments.first_dry", lambda *a: 1)
    monkeypatch.setattr("roi_lib.moments.load_tokenizer", lambda name: tokenizer)
    work = tmp_path / "work"
    train(POCKET, tokenizer, tiny(tokenizer), replace(SMALL, steps=1, keep=()), tmp_path / "none")
    with pytest.raises(ValueError, match="none has no kept models; name the --work"):
        moments(POCKET, [tmp_path / "none"])
    train(POCKET, tokenizer, tiny(tokenizer), replace(SMALL, steps=1, keep=(1,)), work)
    short = tmp_path / "short"
    train(POCKET, tokenizer, tiny(tokenizer), replace(SMALL, steps=1, keep=(0,)), short)
    train(POCKET, tokenizer, tiny(tokenizer, torch.float64), replace(SMALL, steps=1, keep=()),
          tmp_path / "other")
    with pytest.raises(ValueError, match="had different starts"):
        moments(POCKET, [work, tmp_path / "other"])
    out = tmp_path / "moments.json"
    main(["moments", "--work", str(work), str(short), "--papers", "2", "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["ids"] == [p.id for p in order_problems(draw_papers(POCKET, 2, seed=1)[1],
                                                         "hard", "")]
    assert [s["step"] for s in found["steps"]] == [0, 1] and found["budget"] == 64
    for step in found["steps"]:
        assert sum(p["cost"] for p in step["problems"]) <= len(step["ids"]) <= 64
        assert sum(h["problems"] for h in step["hard"]) == 2 * len(ORDERS) * 2
    assert "step 1: a skip opens the exam with probability" in capsys.readouterr().out

    record = {"order": "hard", "budget": 64, "n_exams": 9, "seed": 1, "score": 1.5,
              "score_ci": [1, 2], "regret": None, "regret_ci": None, "mean_tokens": 60.0,
              "skip_by_tier": {"easy": 0, "medium": 0, "hard": 0.5},
              "answers_tagged_right": 1.0, "skips_tagged_right": None}
    for seed in range(2):
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "log.csv").write_text(f"step\n{seed}\n")
        (tmp_path / str(seed) / "exam.json").write_text(json.dumps(
            [record | {"method": "start"}, record | {"method": "rarl", "score": seed}]))
    main(["seeds", *(f"{seed}={tmp_path / str(seed)}" for seed in range(2)),
          "--out", str(tmp_path / "seeds.csv")])
    with (tmp_path / "seeds.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert tuple(rows[0]) == COLUMNS
    assert [(r["variant"], r["seed"], r["score"]) for r in rows] == [
        ("start", "", "1.5"), ("rarl", "0", "0"), ("rarl", "1", "1")]
    assert (tmp_path / "seeds" / "1.csv").read_text() == "step\n1\n"
