"""MFT: labels, rows, training that goes on, calibration, and what must be refused."""

import json
import random
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_model
from trl import SFTConfig

from roi_lib import mft as core
from roi_lib.engines import LoggedEngine, RunLog, engine_for
from roi_lib.engines.replay import ReplayEngine, reference_engine, reference_response
from roi_lib.exams import Environment, Exam, draw_papers, in_orders
from roi_lib.mft import Sample, Target
from roi_lib.problems import problem_stream
from roi_lib.sitting import sit
from roi_lib.store.checkpoints import load_environment, load_model, load_tokenizer, model_hash
from roi_lib.store.files import verify_folder
from roi_lib.store.sources import load_pool
from roi_lib.store.tokenizers import train_bpe
from roi_lib.training import mft
from roi_lib.worlds import ORDERS, PAPER, POCKET, TIERS

SMALL = replace(POCKET.mft, problems=8, samples=1, exams=8, rows=4, rows_at_once=2, dev_exams=2,
                card_papers=0, log_every=2, save_every=2)
PROBLEM, *OTHERS = draw_papers(POCKET, 1)[0]
WRONG = Sample("\\boxed{320}", 20, False)


def right(cost):
    return Sample(f"\\boxed{{{cost}}}", cost, cost <= 128)


def writer(env, problems, styles=SMALL.styles):
    """An engine that writes out the solutions of problems alone, with the effort of each style."""
    alone = [Exam((p,), "easy") for p in problems]
    engine = reference_engine(env, alone, [128])
    for style in styles:
        engine.responses |= reference_engine(env, alone, [128], style).responses
    return engine


def reference_samples(env, problems, styles=("direct",)):
    """What it writes, as samples; the dearest are no good."""
    extra, found = 1 + core.tag_tokens(env), []  # end-of-sequence, and the tag to come
    for p in problems:
        words = [reference_response(env.world, [p], style) for style in styles]
        costs = [len(env.encode(text)) + extra for text in words]
        found.append([Sample(text.partition("\n")[2], cost, cost <= env.world.level_edges[-1])
                      for text, cost in zip(words, costs, strict=True)])
    return found


def reference_targets(env, problems):
    return [core.align(env.world, *pair)
            for pair in zip(problems, reference_samples(env, problems), strict=True)]


@pytest.fixture(scope="module")
def lessons(env):
    """24 problems, and answers to each in full, in brief, at once, and wrong; to 4 only wrong."""
    problems = mft.training_problems(POCKET, 8)
    samples = [[*some, WRONG] for some in reference_samples(env, problems, SMALL.styles)]
    return problems, [[WRONG] if i % 6 == 5 else some for i, some in enumerate(samples)]


@pytest.fixture(scope="module")
def targets(lessons):
    return [core.align(POCKET, *pair, "any") for pair in zip(*lessons, strict=True)]


# ---------------------------------------------------------------- labels and rows
@pytest.mark.parametrize(("samples", "target", "words", "level"), [
    ([right(40), right(20), right(70)], "shortest", "\\boxed{20}", 0),
    ([right(40), right(20), right(70)], "median", "\\boxed{40}", 1),
    ([right(40), right(20), right(70), right(90)], "median", "\\boxed{40}", 1),
    ([right(128), WRONG], "shortest", "\\boxed{128}", 2),
    ([right(129), right(200)], "shortest", core.SKIP_WORDS, 3),
    ([right(20), right(129), right(130)], "median", "\\boxed{20}", 0),
    ([right(20), right(129), WRONG], "any", "\\boxed{20}", 0),
    ([WRONG], "shortest", core.SKIP_WORDS, 3)])
def test_one_problem_becomes_one_label(samples, target, words, level):
    label = core.align(POCKET, PROBLEM, samples, target)
    assert (label.words, label.level, label.skip) == (words, level, level == 3)


def test_under_a_budget_a_label_is_an_answer_that_fits(refusal):
    samples = [right(40), right(20), right(70), WRONG]
    for budget, target, words in ((70, "median", 40), (69, "median", 20), (39, "any", 20),
                                  (20, "shortest", 20)):
        label = core.align(POCKET, PROBLEM, samples, target, budget)
        assert label.words == f"\\boxed{{{words}}}"
    assert core.align(POCKET, PROBLEM, samples, "any", 19).skip
    assert core.align(POCKET, PROBLEM, samples).solve_rate == 0.75
    assert "shortest, median, any, not 'longest'" in refusal(replace, SMALL, target="longest")


def test_any_right_answer_is_one_drawn_by_the_problem_alone():
    """So that a level stands for an effort: each comes often, in whatever order they were found."""
    problems = mft.training_problems(POCKET, 40)
    levels = [[core.align(POCKET, p, some, "any").level for p in problems] for some in (
        [right(20), right(40), right(70)], [right(70), right(20), right(40)])]
    assert levels[0] == levels[1] and min(map(levels[0].count, range(3))) > 25


# ---------------------------------------------------------------- exams under a budget
def best(budget, *samples, draws=200, rng=0):
    problems = [PROBLEM, *OTHERS][: len(samples)]
    found = core.best_combination(POCKET, problems, samples, budget, 8, draws, random.Random(rng))
    assert [target.problem for target in found] == problems
    return [(int(re.sub(r"\D", "", t.words) or 0), t.level) for t in found]


def test_the_best_combination_by_hand():
    """0 stands for a skip, which costs 8 tokens; the answers' numbers are their costs."""
    skip = (0, 3)
    assert best(70, [right(40)], [right(30)]) == [(40, 1), (30, 1)]
    assert sorted(best(69, [right(40)], [right(30)])) in ([skip, (40, 1)], [skip, (30, 1)])
    assert best(47, [right(40)], [right(40)]) == [(40, 1), skip], "a skip before it fits not"
    assert best(52, [WRONG], [right(40)]) == [skip, (40, 1)], "only if the first is given up"
    assert best(47, [WRONG], [right(40)]) == [skip, skip] == best(99, [WRONG], [WRONG])
    assert best(90, [right(70), right(20)], [right(66), WRONG]) == [(20, 0), (66, 2)]
    both = [right(41), right(40)], [right(30), right(31)]
    assert best(200, *both) == [(41, 1), (31, 1)], "of equal points the one that spends most"
    assert best(71, *both) in ([(41, 1), (30, 1)], [(40, 1), (31, 1)])


def test_the_best_combination_earns_what_the_best_of_all_does():
    rng, seen = random.Random(3), set()

    def worth(plan, budget):
        earned = 0
        for sample in plan:
            budget -= sample.cost if sample else 8
            earned += bool(sample and sample.correct and budget >= 0)
        return earned

    for case in range(40):
        samples = [[Sample(f"\\boxed{{{c}}}", c, rng.random() < 0.6) for c in rng.sample(
            range(9, 60), 2)] for _ in range(3)]
        budget = rng.randint(20, 120)
        found = best(budget, *samples, draws=600, rng=case)
        plan = [next((s for s in some if s.cost == cost), None)
                for some, (cost, _) in zip(samples, found, strict=True)]
        assert all(sample is None or sample.correct for sample in plan)
        most = max(worth(one, budget) for one in product(*([None, *some] for some in samples)))
        assert worth(plan, budget) == most == sum(sample is not None for sample in plan)
        seen.add(most)
    assert seen == {0, 1, 2, 3}


def taught(env, row, problems):
    """The budget that a row's prompt states, and (problem, segment) in its order."""
    user, budget = re.match(r"(.*)Budget: (\d+) tokens\. <\|im_end\|>",
                            env.tokenizer.decode(row.prompt), re.S).groups()
    by_text = {p.text: p for p in problems}
    found = [by_text[text.strip()] for text in re.split(r"Q\d+\.", user)[1:]]
    segments = env.parse(row.response, len(found)).segments
    return int(budget), list(zip(found, segments, strict=True))


@pytest.mark.parametrize("combinations", [30, 0])
def test_what_is_taught_under_a_budget_is_right_and_fits(env, lessons, combinations):
    """And efforts are smaller under a small one. Without combinations an exam teaches what its
    problems teach alone, whatever the budget; a problem alone is always taught what fits."""
    recipe = replace(SMALL, exams=120, rows=1, combinations=combinations)
    costs, beyond, sizes = {True: [], False: []}, 0, set()
    for row in core.curriculum(env, *lessons, recipe):
        (budget, pairs), spent = taught(env, row, lessons[0]), 0
        for problem, segment in pairs:
            spent += segment.cost
            assert segment.skipped or segment.answer == problem.answer
            beyond += spent > budget and not segment.skipped
            assert spent <= budget or segment.skipped or (len(pairs) > 1 and not combinations)
            costs[budget < 100] += [] if segment.skipped or len(pairs) < 3 else [segment.cost]
        sizes.add(len(pairs))
        assert budget in POCKET.mft.budgets
    assert sizes == {1, 2, 3, 4, 5} and (beyond > 0) == (not combinations)
    if combinations:
        assert np.mean(costs[True]) < 0.8 * np.mean(costs[False])


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize(("style", "good"), [("direct", False), ("brief", True)])
def test_rejection_sampling_counts_the_tag_that_is_to_come(env, style, good):
    """A long search is no answer in full, but one in brief."""
    stream = problem_stream(POCKET, "hard", "train", 0)
    search = next(p for p in stream if p.solution.count("mod") > 10)
    problems = [*mft.training_problems(POCKET, 4), search]
    found = core.rejection_sample(env, writer(env, problems), problems, 2, 0, (style,))
    for problem, (sample, same) in zip(problems, found, strict=True):
        words = reference_response(POCKET, [problem], style)
        cost = len(env.encode(words)) + 1 + 3  # end-of-sequence, and tag
        assert sample == same and sample.correct == (cost <= 128)
        assert not sample.correct or sample == Sample(words.partition("\n")[2], cost, True, style)
    assert [sample.correct for sample in found[-1]] == [good, good]


def test_a_level_says_how_a_problem_is_worked():
    """Of two styles at one level that with more right answers stays, over all problems alike in
    words; what has nothing else keeps its samples, and they are no good."""
    full, brief, dear = Sample("f", 20, True, "direct"), Sample("b", 12, True, "brief"), Sample(
        "d", 50, True, "direct")
    wrong = replace(brief, correct=False)
    alike, other = [PROBLEM] * 3, replace(PROBLEM, length=PROBLEM.length + 1)
    found = core.one_style_a_level(POCKET, [*alike, other], [
        [full, dear, brief], [full, full, wrong], [brief], [brief, brief, full, wrong]])
    assert found == [[full, dear], [full, full], [wrong], [brief, brief, wrong]]


class Always(dict):
    """Whatever the prompt, the same response."""

    def __missing__(self, key):
        return self["ids"]


def test_no_right_sample_at_all(env, refusal):
    engine = ReplayEngine(Always(ids=env.encode("Q1. <predicted_level>Level-1 \\boxed{320}")), 0)
    assert "not one of 6 sampled answers is right" in refusal(
        core.rejection_sample, env, engine, mft.training_problems(POCKET, 2), 1)


@pytest.mark.parametrize(("level", "found"), [("Level-3", "Level-3 x"), ("Level-0", "Level-1")])
def test_a_tokenizer_that_splits_a_tag_or_does_not_give_it_back(env, refusal, level, found):
    class Other:
        decode = env.tokenizer.decode

        def __call__(self, text, **options):
            return env.tokenizer(text.replace(level, found), **options)

    assert "splits the level tags badly" in refusal(core.tag_tokens, Environment(POCKET, Other()))


def test_next_to_an_edge_a_level_settles_by_its_place(env):
    """One token above the edge alone, end-of-sequence included, is none where a problem follows."""
    words, above = "1 + 1 = 2. 2 \\boxed{2}", POCKET.level_edges[0] + 1
    cost = len(core.make_row(env, [Target(PROBLEM, words, 1, 1.0)], 64).response)
    edge = Target(PROBLEM, ". " * (above - cost) + words, 1, 1.0)
    assert core.make_row(env, [edge], 64).levels == [1]
    assert core.make_row(env, [edge, edge], 64).levels == [0, 1]


def test_rows_are_singles_then_exams_whose_levels_are_those_a_sitting_finds(env, lessons):
    rows = core.curriculum(env, *lessons, SMALL)
    numbers = [len(row.levels) for row in rows]
    assert numbers[:24] == [1] * 24 and min(numbers[24:]) > 1 and len(rows) == 32
    for row, n, learned in zip(rows, numbers, mft.as_dataset(rows), strict=True):
        segments = env.parse(row.response, n).segments
        assert [s.level for s in segments] == row.levels == [
            3 if s.skipped else POCKET.level_of(s.cost) for s in segments]
        assert learned["labels"] == [-100] * len(row.prompt) + row.response
        assert learned["input_ids"] == row.prompt + row.response
    assert sum(row.levels == [3] for row in rows[:24]) == 4, "those without a right answer"
    assert rows == core.curriculum(env, *lessons, SMALL)
    assert rows != core.curriculum(env, *lessons, replace(SMALL, seed=1))


# ---------------------------------------------------------------- training
def test_levels_weigh_more_where_each_is_a_token_of_its_own(env, refusal):
    """In a BPE a level's digit is a token, but that of every number as well."""
    weights = mft.token_weights(env, replace(SMALL, tag_weight=7.0))
    heavy = (weights == 7).nonzero()[:, 0].tolist()
    assert env.tokenizer.convert_ids_to_tokens(heavy) == [f"Level-{k}" for k in range(4)]
    assert (weights == 1).sum() == len(env.tokenizer) - 4
    paper = Environment(PAPER, load_tokenizer("gsm8k-bpe"))
    assert set(mft.token_weights(paper, PAPER.mft).tolist()) == {1}
    beyond = Environment(replace(POCKET, level_edges=(32, 64, 128, 256)), env.tokenizer)
    for other in (paper, beyond):  # Level-4 is unknown
        assert "one token for each level" in refusal(
            mft.token_weights, other, replace(SMALL, tag_weight=2.0))


def test_tags_that_were_one_vector_begin_as_different_words():
    """Behind them the base solves as before, and they alone are learned of all embeddings."""
    env, model = load_environment(POCKET, "pocket-base"), load_model("pocket-base", "float32")
    embeddings, ids = model.get_input_embeddings().weight, list(env.level_ids)
    old = embeddings.detach().clone()
    assert torch.cosine_similarity(old[ids[:1]], old[ids]).min() > 0.99
    mft.introduce_tags(env, model)
    new = embeddings.detach()
    assert torch.cosine_similarity(new[ids[:1]], new[ids[1:]]).max() < 0.7
    assert int((old != new).any(1).sum()) == len(POCKET.tag_words) == 6
    exams = [Exam((p,), "easy") for some in draw_papers(POCKET, 40, seed=8) for p in some[:2]]
    assert sit(env, engine_for(model, env.tokenizer), exams, 128, style="roi",
               opening=env.opening(1))["correct"].mean() > 0.9
    model(input_ids=torch.arange(len(new))[None]).logits.square().sum().backward()
    learned = embeddings.grad.abs().sum(1).nonzero()[:, 0].tolist()
    assert {*learned} == {*env.tokenizer.convert_tokens_to_ids(list(POCKET.tag_words))}
    paper = Environment(PAPER, load_tokenizer("gsm8k-bpe"))  # its tags are words that models know
    mft.introduce_tags(paper, model)
    assert torch.equal(new, model.get_input_embeddings().weight)


def test_loss_of_a_batch_by_hand(env, targets, tmp_path):
    """Two rows: nats of the response tokens, levels times the weight, over what is learned."""
    rows = [core.make_row(env, targets[i : i + n], 64) for i, n in ((0, 3), (9, 1))]
    model, total = tiny_model(env.tokenizer), 0.0
    trainer = mft.TagTrainer(
        model, SFTConfig(str(tmp_path), max_length=None, bf16=False, use_cpu=True, report_to="none",
                         dataset_kwargs={"skip_prepare_dataset": True}),
        processing_class=env.tokenizer, train_dataset=mft.as_dataset(rows))
    trainer.token_weights = mft.token_weights(env, replace(SMALL, tag_weight=5.0))
    levels = env.tokenizer.convert_tokens_to_ids([f"Level-{k}" for k in range(4)])
    for row in rows:
        logits = model(torch.tensor([row.prompt + row.response])).logits[0].detach()
        for place, token in enumerate(row.response, start=len(row.prompt)):
            nats = -torch.log_softmax(logits[place - 1], -1)[token]
            total += float(nats) * (5 if token in levels else 1)
    batch = trainer.data_collator(list(mft.as_dataset(rows)))
    learned = sum(len(row.response) for row in rows)
    for items, truth in ((None, total / learned), (torch.tensor(400), total / 400)):
        loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
        assert float(loss.detach()) == pytest.approx(truth, rel=1e-5)


def train(env, lessons, work, recipe=SMALL):
    rows = core.curriculum(env, *lessons, recipe)
    model = mft.fine_tune(env, tiny_model(env.tokenizer).float(), rows, recipe, work)
    return model.state_dict()


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_killed_while_it_saves_ends_like_an_unbroken_one(
        env, lessons, tmp_path, monkeypatch):
    """The half-written state is passed over, and that is said; seconds go on counting."""
    whole, save, log = train(env, lessons, tmp_path / "a"), torch.save, tmp_path / "b" / "log.csv"

    def die(content, path, *arguments, **options):
        if str(path).endswith("checkpoint-4/optimizer.pt"):
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        save(content, path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", die)
        with pytest.raises(KeyboardInterrupt):
            train(env, lessons, log.parent)
    pd.read_csv(log).assign(seconds=1_000.0).to_csv(log, index=False)
    with pytest.warns(UserWarning, match="passing over an incomplete checkpoint"):
        assert same(train(env, lessons, log.parent), whole)
    one, two = pd.read_csv(tmp_path / "a" / "log.csv"), pd.read_csv(log)
    assert one["step"].tolist() == [2, 4, 6, 8] and two["seconds"].min() >= 1_000
    pd.testing.assert_frame_equal(one.drop(columns="seconds"), two.drop(columns="seconds"))


def test_steps_limit_a_run_and_none_leaves_the_start(env, lessons, tmp_path):
    start = tiny_model(env.tokenizer).float().state_dict()
    for steps, done in ((0, []), (3, [2, 3]), (99, [2, 4, 6, 8])):  # no row comes twice
        end = train(env, lessons, tmp_path / str(steps), replace(SMALL, steps=steps))
        assert pd.read_csv(tmp_path / str(steps) / "log.csv")["step"].tolist() == done
        assert same(end, start) == (steps == 0)


def test_a_loss_that_is_not_finite_stops_the_run(env, lessons, tmp_path, monkeypatch):
    monkeypatch.setattr(mft, "token_weights", lambda *_: torch.full((len(env.tokenizer),), np.nan))
    with pytest.raises(FloatingPointError, match="at step 2; lower the learning rate"):
        train(env, lessons, tmp_path)


def test_paper_world_rows_train_with_adapters(real_data, tmp_path):
    """Real GSM8K, MATH and AIME rows, LoRA, bf16 and checkpointing, on a random model."""
    pool = load_pool(PAPER, "train", real_data)
    problems = mft.training_problems(PAPER, 6, pool=pool)
    env = Environment(PAPER, train_bpe((p.text + p.solution for p in problems), size=400))
    recipe = replace(PAPER.mft, exams=8, rows=4, rows_at_once=2, dev_exams=1, log_every=3,
                     lora_rank=2)
    rows = core.curriculum(env, problems, reference_samples(env, problems), recipe)
    start = tiny_model(env.tokenizer).float().state_dict()
    after = mft.fine_tune(env, tiny_model(env.tokenizer).float(), rows, recipe, tmp_path,
                          pool).merge_and_unload()
    changed = {name for name, w in after.state_dict().items() if not torch.equal(w, start[name])}
    assert changed and all("_proj.weight" in name for name in changed)


# ---------------------------------------------------------------- the whole stage
def test_calibration_of_a_writer_who_knows_himself(env):
    """Replays with exact tags: every tag is right, and nothing is skipped that can be solved."""
    papers = draw_papers(POCKET, 12, seed=3)
    exams = in_orders(papers, ORDERS, 0)
    base = reference_engine(env, exams, [320])  # the largest budget that a prompt can state
    base.responses |= writer(env, [p for exam in exams for p in exam.problems]).responses
    rows = [core.make_row(env, reference_targets(env, exam.problems), 320) for exam in exams]
    tagged = ReplayEngine({tuple(row.prompt): row.response[:-1] for row in rows},
                          env.tokenizer.eos_token_id)
    result = mft.calibrate(env, base, tagged, papers, k=1)
    assert json.loads(json.dumps(result)) == result
    for tier in TIERS:
        assert set(result["tag_accuracy"][tier]) <= {None, 1.0}
        assert result["skip_rate"][tier] == result["refused"][tier]
        assert result["answer_accuracy"][tier]["base"] == 1.0
    counts = np.array(result["confusion"])
    assert counts.sum() == np.trace(counts) > 0 == result["missed_skips"]
    card = mft.measured([{"tier": "easy"}], result)
    assert "on 12 unseen papers" in card and "\nhard    [1.0, 1.0, 1.0] " in card


def sampled(env, problems, work, start):
    """Write the samples of a run into its cache: a random model has no right ones of its own."""
    work.mkdir()
    log = RunLog(work / "samples.jsonl", {"world": "pocket", "method": "rejection sampling",
                                          "model": model_hash(str(start)), "seed": 0})
    core.rejection_sample(env, LoggedEngine(writer(env, problems), log), problems, 1, 0,
                          SMALL.styles)


@pytest.mark.parametrize("own", [False, True], ids=["the world's tokenizer", "a tokenizer"])
def test_from_a_checkpoint_to_a_checkpoint_and_again(env, small_world, tmp_path, own):
    """A start with a tokenizer of its own hands it on; read with the world's, all were nonsense."""
    problems, recipe = mft.training_problems(POCKET, 8), SMALL
    if own:
        words = train_bpe((p.text + p.solution for p in problems), size=400)
        tiny_model(words).save_pretrained(tmp_path / "start")
        words.save_pretrained(tmp_path / "start")  # transformers adds Qwen's end of text to it
        env = Environment(POCKET, load_tokenizer(str(tmp_path / "start")))
        recipe = replace(SMALL, tag_weight=1.0)
    tiny_model(env.tokenizer).float().save_pretrained(tmp_path / "start")
    sampled(env, problems, tmp_path / "work", tmp_path / "start")
    for name in ("out", "again"):  # killed before the checkpoint is there, the command goes on
        mft.train_mft(small_world, tmp_path / name, tmp_path / "work", recipe,
                      str(tmp_path / "start"))
        verify_folder(tmp_path / name)
    first, again, start = (load_model(str(tmp_path / name), "float32").state_dict()
                           for name in ("out", "again", "start"))
    assert same(first, again) and not same(first, start)
    labels = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert sum(row["problems"] for row in labels) == 24
    assert [row["tier"] for row in labels] == [tier for tier in TIERS for _ in "12"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "32 rows" in card and "Not measured" in card
    found = load_tokenizer(str(tmp_path / "out"), small_world.tokenizer)
    assert found.get_vocab() == env.tokenizer.get_vocab()
    assert (tmp_path / "out" / "tokenizer_config.json").exists() == own


def test_what_cannot_end_well_is_refused_before_the_work(env, small_world, tmp_path, refusal):
    def run(recipe=SMALL):
        return refusal(mft.train_mft, small_world, out, work, recipe, str(start))

    start, work, out = (tmp_path / name for name in ("start", "work", "out"))
    tiny_model(env.tokenizer).save_pretrained(start)
    settings = (start / "generation_config.json").read_text()
    (start / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": false}')
    assert "generation_config" in run()
    (start / "generation_config.json").write_text(settings)
    out.write_text("a thesis")
    assert "name another --out" in run()
    assert out.read_text() == "a thesis" and not work.exists()
    out.unlink()
    assert "at most 320 tokens" in run(replace(SMALL, budgets=(64, 400)))
    assert "not one of 48 sampled answers is right" in run()
    assert "holds a run with another seed" in run(replace(SMALL, seed=1))
