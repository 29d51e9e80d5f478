"""MFT: labels, rows, training that goes on, calibration, and what must be refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_model
from trl import SFTConfig

from roi_lib import mft as core
from roi_lib.engines import LoggedEngine, RunLog
from roi_lib.engines.replay import ReplayEngine, reference_engine, reference_response
from roi_lib.exams import Environment, Exam, draw_papers, in_orders
from roi_lib.mft import Sample, Target
from roi_lib.store.checkpoints import load_model, load_tokenizer, model_hash
from roi_lib.store.files import verify_folder
from roi_lib.store.sources import load_pool
from roi_lib.store.tokenizers import train_bpe
from roi_lib.training import mft
from roi_lib.worlds import ORDERS, PAPER, POCKET, TIERS

SMALL = replace(POCKET.mft, problems=8, samples=1, exams=8, rows=4, rows_at_once=2, dev_exams=2,
                card_papers=0, log_every=2, save_every=2)
PROBLEM = draw_papers(POCKET, 1)[0][0]


def right(cost):
    return Sample(f"\\boxed{{{cost}}}", cost, True)


def reference_targets(env, problems):
    """Targets from the worked solutions; the dearest are refused."""
    extra = 1 + core.tag_tokens(env)  # end-of-sequence, and the tag to come
    return [core.align(env.world, p, [Sample(
        p.solution, len(env.encode(reference_response(env.world, [p]))) + extra, True)])
        for p in problems]


@pytest.fixture(scope="module")
def targets(env):
    return reference_targets(env, core.training_problems(POCKET, 8))


# ---------------------------------------------------------------- labels and rows
@pytest.mark.parametrize(("samples", "target", "words", "level"), [
    ([right(40), right(20), right(70)], "shortest", "\\boxed{20}", 0),
    ([right(40), right(20), right(70)], "median", "\\boxed{40}", 1),
    ([right(40), right(20), right(70), right(90)], "median", "\\boxed{40}", 1),
    ([right(128), Sample("\\boxed{5}", 5, False)], "shortest", "\\boxed{128}", 2),
    ([right(129), right(200)], "shortest", core.SKIP_WORDS, 3),
    ([right(20), right(129), right(130)], "median", "\\boxed{20}", 0),
    ([Sample("\\boxed{5}", 5, False)], "shortest", core.SKIP_WORDS, 3)])
def test_one_problem_becomes_one_label(samples, target, words, level):
    label = core.align(POCKET, PROBLEM, samples, target)
    assert (label.words, label.level, label.skip) == (words, level, level == 3)


def test_rejection_sampling_counts_the_tag_that_is_to_come(env):
    problems = core.training_problems(POCKET, 5)
    engine = reference_engine(env, [Exam((p,), "easy") for p in problems], [128])
    samples = core.rejection_sample(env, engine, problems, k=2)
    assert [len(s) for s in samples] == [2] * 15
    for problem, (sample, _) in zip(problems, samples, strict=True):
        whole = len(env.encode(reference_response(POCKET, [problem]))) + 1
        assert sample.correct == (whole <= 128)
        if sample.correct:
            assert sample.words == problem.solution and sample.cost == whole + 3


class Always(dict):
    """Whatever the prompt, the same response."""

    def __missing__(self, key):
        return self["ids"]


def test_no_right_sample_and_no_tag_at_all(env, refusal):
    engine = ReplayEngine(Always(ids=env.encode("Q1. <predicted_level>Level-1 \\boxed{7}")), 0)
    assert "not one of 6 sampled answers is right" in refusal(
        core.rejection_sample, env, engine, core.training_problems(POCKET, 2), 1)
    with pytest.warns(UserWarning, match="not one of 2 responses holds a closed level tag"):
        refusal(mft.calibrate, env, engine, engine, draw_papers(POCKET, 2))


@pytest.mark.parametrize(("level", "found"), [("Level-3", "Level-3 x"), ("Level-0", "Level-1")])
def test_a_tokenizer_that_splits_a_tag_or_does_not_give_it_back(env, refusal, level, found):
    class Other:
        decode = env.tokenizer.decode

        def __call__(self, text, **options):
            return env.tokenizer(text.replace(level, found), **options)

    assert "splits the level tags badly" in refusal(core.tag_tokens, Environment(POCKET, Other()))


def test_next_to_an_edge_a_level_settles_by_its_place(env):
    """33 tokens alone, end-of-sequence included, are 32 where another problem follows."""
    words = "1 + 1 = 2. " * 3 + "2 . 2 . 2 \\boxed{2}"
    cost = len(core.make_row(env, [Target(PROBLEM, words, 1, 1.0)], 64).response)
    edge = Target(PROBLEM, ". " * (33 - cost) + words, 1, 1.0)
    assert core.make_row(env, [edge], 64).levels == [1]
    assert core.make_row(env, [edge, edge], 64).levels == [0, 1]


def test_rows_are_singles_then_exams_whose_levels_are_those_a_sitting_finds(env, targets):
    rows = core.curriculum(env, targets, SMALL)
    numbers = [len(row.levels) for row in rows]
    assert numbers[:24] == [1] * 24 and min(numbers[24:]) > 1 and len(rows) == 32
    for row, n, learned in zip(rows, numbers, mft.as_dataset(rows), strict=True):
        segments = env.parse(row.response, n).segments
        assert [s.level for s in segments] == row.levels == [
            3 if s.skipped else POCKET.level_of(s.cost) for s in segments]
        assert learned["labels"] == [-100] * len(row.prompt) + row.response
        assert learned["input_ids"] == row.prompt + row.response
    skips = sum(row.levels.count(3) for row in rows[:24])
    assert skips == sum(target.skip for target in targets) > 0


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


def train(env, targets, work, recipe=SMALL):
    rows = core.curriculum(env, targets, recipe)
    model = mft.fine_tune(env, tiny_model(env.tokenizer).float(), rows, recipe, work)
    return model.state_dict()


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_killed_while_it_saves_ends_like_an_unbroken_one(
        env, targets, tmp_path, monkeypatch):
    """The half-written state is passed over, and that is said; seconds go on counting."""
    whole, save, log = train(env, targets, tmp_path / "a"), torch.save, tmp_path / "b" / "log.csv"

    def die(content, path, *arguments, **options):
        if str(path).endswith("checkpoint-4/optimizer.pt"):
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        save(content, path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", die)
        with pytest.raises(KeyboardInterrupt):
            train(env, targets, log.parent)
    pd.read_csv(log).assign(seconds=1_000.0).to_csv(log, index=False)
    with pytest.warns(UserWarning, match="passing over an incomplete checkpoint"):
        assert same(train(env, targets, log.parent), whole)
    one, two = pd.read_csv(tmp_path / "a" / "log.csv"), pd.read_csv(log)
    assert one["step"].tolist() == [2, 4, 6, 8] and two["seconds"].min() >= 1_000
    pd.testing.assert_frame_equal(one.drop(columns="seconds"), two.drop(columns="seconds"))


def test_steps_limit_a_run_and_none_leaves_the_start(env, targets, tmp_path):
    start = tiny_model(env.tokenizer).float().state_dict()
    for steps, done in ((0, []), (3, [2, 3]), (99, [2, 4, 6, 8])):  # no row comes twice
        end = train(env, targets, tmp_path / str(steps), replace(SMALL, steps=steps))
        assert pd.read_csv(tmp_path / str(steps) / "log.csv")["step"].tolist() == done
        assert same(end, start) == (steps == 0)


def test_a_loss_that_is_not_finite_stops_the_run(env, targets, tmp_path, monkeypatch):
    monkeypatch.setattr(mft, "token_weights", lambda *_: torch.full((len(env.tokenizer),), np.nan))
    with pytest.raises(FloatingPointError, match="at step 2; lower the learning rate"):
        train(env, targets, tmp_path)


def test_paper_world_rows_train_with_adapters(real_data, tmp_path):
    """Real GSM8K, MATH and AIME rows, LoRA, bf16 and checkpointing, on a random model."""
    pool = load_pool(PAPER, "train", real_data)
    problems = core.training_problems(PAPER, 6, pool=pool)
    env = Environment(PAPER, train_bpe((p.text + p.solution for p in problems), size=400))
    recipe = replace(PAPER.mft, exams=8, rows=4, rows_at_once=2, dev_exams=1, log_every=3,
                     lora_rank=2)
    rows = core.curriculum(env, reference_targets(env, problems), recipe)
    start = tiny_model(env.tokenizer).float().state_dict()
    after = mft.fine_tune(env, tiny_model(env.tokenizer).float(), rows, recipe, tmp_path, pool)
    changed = {name for name, w in after.state_dict().items() if not torch.equal(w, start[name])}
    assert changed and all("_proj.weight" in name for name in changed)


# ---------------------------------------------------------------- the whole stage
def test_calibration_of_a_writer_who_knows_himself(env):
    """Replays with exact tags: every tag is right, and nothing is skipped that can be solved."""
    papers = draw_papers(POCKET, 12, seed=3)
    exams = in_orders(papers, ORDERS, 0)
    base = reference_engine(env, exams, [768])
    base.responses |= reference_engine(
        env, [Exam((p,), "easy") for exam in exams for p in exam.problems], [128]).responses
    rows = [core.make_row(env, reference_targets(env, exam.problems), 768) for exam in exams]
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
    writer = reference_engine(env, [Exam((p,), "easy") for p in problems], [128])
    log = RunLog(work / "samples.jsonl", {"world": "pocket", "method": "rejection sampling",
                                          "model": model_hash(str(start)), "seed": 0})
    core.rejection_sample(env, LoggedEngine(writer, log), problems, 1)


@pytest.mark.parametrize("own", [False, True], ids=["the world's tokenizer", "a tokenizer"])
def test_from_a_checkpoint_to_a_checkpoint_and_again(env, tmp_path, own):
    """A start with a tokenizer of its own hands it on; read with the world's, all were nonsense."""
    problems, recipe = core.training_problems(POCKET, 8), SMALL
    if own:
        words = train_bpe((p.text + p.solution for p in problems), size=400)
        tiny_model(words).save_pretrained(tmp_path / "start")
        words.save_pretrained(tmp_path / "start")  # transformers adds Qwen's end of text to it
        env = Environment(POCKET, load_tokenizer(str(tmp_path / "start")))
        recipe = replace(SMALL, tag_weight=1.0)
    tiny_model(env.tokenizer).float().save_pretrained(tmp_path / "start")
    sampled(env, problems, tmp_path / "work", tmp_path / "start")
    for name in ("out", "again"):  # killed before the checkpoint is there, the command goes on
        mft.train_mft(POCKET, tmp_path / name, tmp_path / "work", recipe, str(tmp_path / "start"))
        verify_folder(tmp_path / name)
    first, again, start = (load_model(str(tmp_path / name), "float32").state_dict()
                           for name in ("out", "again", "start"))
    assert same(first, again) and not same(first, start)
    labels = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert sum(row["problems"] for row in labels) == 24
    assert [row["tier"] for row in labels] == [tier for tier in TIERS for _ in "12"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "32 rows" in card and "Not measured" in card
    found = load_tokenizer(str(tmp_path / "out"), POCKET.tokenizer)
    assert found.get_vocab() == env.tokenizer.get_vocab()
    assert (tmp_path / "out" / "tokenizer_config.json").exists() == own


def test_what_cannot_end_well_is_refused_before_the_work(env, tmp_path, refusal):
    def run(recipe=SMALL):
        return refusal(mft.train_mft, POCKET, out, work, recipe, str(start))

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
    assert "not one of 24 sampled answers is right" in run()
    assert "holds a run with another seed" in run(replace(SMALL, seed=1))
