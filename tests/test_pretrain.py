"""Pre-training: the data, runs that go on, and the numbers on the card."""

import random
import re
from dataclasses import replace
from itertools import islice

import pandas as pd
import pytest
import torch

from roi_lib.engines.replay import reference_engine, reference_response
from roi_lib.exams import Exam, draw_papers, in_orders
from roi_lib.store.checkpoints import load_model
from roi_lib.training import common
from roi_lib.training import pretrain as module
from roi_lib.training.recipes import PretrainRecipe
from roi_lib.worlds import POCKET

TINY = PretrainRecipe(hidden=32, layers=2, heads=2, kv_heads=1, intermediate=48, batch_tokens=512,
                      rows_at_once=16, steps=4, save_every=2, log_every=1)


@pytest.fixture(autouse=True)
def few_papers(monkeypatch):
    monkeypatch.setattr(module, "CARD_PAPERS", 8)
    monkeypatch.setattr(module, "READ", (144, 164))


def test_batches_learn_responses_only_and_go_on_where_they_stopped(env):
    batches = list(islice(module.batches(env, TINY), 60))  # blocks of fewer batches
    for (ids, labels), again in zip(batches[43:], module.batches(env, TINY, skip=43), strict=False):
        assert torch.equal(ids, again[0]) and torch.equal(labels, again[1])
    for ids, labels in batches:
        assert ids.numel() <= 512 and ids.shape == labels.shape
        for row, learned in zip(ids, labels, strict=True):
            words = env.tokenizer.decode(row[learned != -100])
            assert "Budget" in env.tokenizer.decode(row[learned == -100])
            assert "\\boxed" in words and words.endswith("<|im_end|>") and "Budget" not in words
            assert torch.equal(row[learned != -100], learned[learned != -100])


@pytest.mark.parametrize("style", POCKET.prompts)
def test_rows_answer_with_the_effort_asked_for_and_give_up_by_rule(env, style):
    """Least-to-Most gives up the hard problems exactly where the rated costs exceed the budget, and
    no other style any; never a tag; problems of the training split."""
    recipe, rng, skipped = replace(TINY, styles=((style, 1.0),)), random.Random(1), []
    for _ in range(60):
        ids, labels = module.sample_row(env, recipe, rng)
        start = labels.count(-100)
        user, words = (env.tokenizer.decode(part) for part in (ids[:start], ids[start:-1]))
        budget = int(re.search(r"Budget: (\d+) tokens\. <", user)[1])
        n = len(re.findall(r"Q\d+\.", user))
        answers = [s.answer for s in env.parse(ids[start:], n).segments]
        assert 32 <= budget <= 320 and None not in answers and "Level" not in words
        tiers = re.findall(r"Q\d+ (easy|medium|hard)", words)
        rated = sum({"easy": 16, "medium": 48, "hard": 96}[tier] for tier in tiers)
        skips = [tier == "hard" and rated > budget for tier in tiers] or [False] * n
        assert [answer == "NA" for answer in answers] == skips
        skipped += [skip for skip, tier in zip(skips, tiers, strict=False) if tier == "hard"]
        assert len(ids) <= recipe.longest_row and ids[-1] == env.tokenizer.eos_token_id
        if style == "at_once":
            assert words.split() == [w for i, a in enumerate(answers, 1)
                                     for w in (f"Q{i}.", f"\\boxed{{{a}}}")]
        assert len(re.findall(r"Q\d+\. \((easy|medium|hard)\) ", words)) == n * style.startswith(
            "rated")
        counts = [int(c) for c in re.findall(r"Q\d+\. \((\d+)\) ", words)]
        costs = [segment.cost for segment in env.parse(ids[start:], n).segments]
        before = [sum(costs[:i]) for i in range(n)] if style.startswith("counted") else []
        assert counts == [max(budget - spent, 0) for spent in before], "what is left of the budget"
        in_full = re.search(r"\d = \d", words) is not None
        assert in_full == (style != "at_once" and not style.endswith("brief")) or all(skips)
    assert {*skipped} == ({True, False} if style == "least_to_most" else set())


def test_a_killed_run_ends_like_an_unbroken_one(tmp_path, monkeypatch, refusal):
    module.pretrain(POCKET, tmp_path / "whole", tmp_path / "work-1", TINY)

    def die(logs, where):
        if where == "step 3":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(common, "check_finite", die)
        with pytest.raises(KeyboardInterrupt):
            module.pretrain(POCKET, tmp_path / "parts", tmp_path / "work-2", TINY)
    log = tmp_path / "work-2" / "log.csv"
    pd.read_csv(log).assign(seconds=6_000.0).to_csv(log, index=False)
    module.pretrain(POCKET, tmp_path / "parts", tmp_path / "work-2", TINY)
    whole, parts = (load_model(str(tmp_path / name)).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    one, two = (pd.read_csv(tmp_path / name / "log.csv") for name in ("work-1", "work-2"))
    pd.testing.assert_frame_equal(one.drop(columns="seconds"), two.drop(columns="seconds"))
    assert len(one) == 4 and two["seconds"].is_monotonic_increasing
    assert ": 4 steps" in (card := (tmp_path / "parts" / "README.md").read_text())
    assert float(re.search(r", ([\d.]+) minutes on", card)[1]) >= 100, "of both parts"
    assert "another run" not in card and "holds a run with another steps" in refusal(
        module.pretrain, POCKET, tmp_path / "out", tmp_path / "work-2", replace(TINY, steps=6))


def test_no_steps_publish_the_start(env, tmp_path, refusal):
    module.pretrain(POCKET, tmp_path / "out", tmp_path / "work", replace(TINY, steps=0))
    found = load_model(str(tmp_path / "out")).state_dict()
    start = module.new_model(env.tokenizer, TINY).state_dict()
    assert all(torch.equal(found[name], start[name]) for name in start)
    assert ": 0 steps" in (tmp_path / "out" / "README.md").read_text()
    (tmp_path / "out" / "notes").write_text("somebody's")
    assert "name another --out" in refusal(
        module.pretrain, POCKET, tmp_path / "out", tmp_path / "new", TINY)
    assert not (tmp_path / "new").exists()
    assert "steps at least 0" in refusal(replace, TINY, steps=-1)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="loss is nan at step .*lower the learning rate"):
        module.pretrain(POCKET, tmp_path / "out", tmp_path / "work", replace(TINY, adamw_lr=1e30))
    assert not (tmp_path / "out").exists()


def test_the_card_of_a_faultless_writer(env, model, monkeypatch):
    """Everything is right; at once an answer has five tokens and its end; and hard problems are
    given up up to the 160 tokens at which a paper of one problem a tier is rated."""
    papers = in_orders(draw_papers(POCKET, 8, seed=1), ["medium"], 1)
    alone, engine = [Exam((p,), "medium") for exam in papers for p in exam.problems], None
    for style in module.EFFORTS:
        some = reference_engine(env, alone + papers, [module.CARD_BUDGET], style)
        engine = engine or some
        engine.responses |= some.responses
    for exam in papers:
        for budget in module.READ:
            words = reference_response(POCKET, exam.problems, "least_to_most", (), budget)
            engine.responses[env.prompt(exam, budget, "least_to_most")] = env.encode(words)
            words = reference_response(POCKET, exam.problems, "counted", left=lambda text, b=budget:
                                       b - len(env.encode(text)) + 3)  # not faultless
            engine.responses[env.prompt(exam, budget, "counted")] = env.encode(words)
    monkeypatch.setattr(module, "engine_for", lambda *_: engine)
    words = module.measure(env, model)
    for family in ("marbles", "tram", "rounds"):
        (row,) = re.findall(rf"{family} +([\d. ]+)\n", words)
        right, tokens = row.split()[::2], [float(number) for number in row.split()[1::2]]
        assert right == ["1.0"] * 6 and tokens[-2] == 6 and 5 <= tokens[-1] <= 6
        assert tokens[0] > tokens[2] > tokens[4] and tokens[1] > tokens[3] > tokens[5]
    assert len(re.findall(r"\n[123] +3\.0 +3\.0", words)) == 3
    assert re.findall(r"\n +144 +164\nskipped +1.0 +0.0\n", words)
