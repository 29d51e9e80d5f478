"""MFT: labels, rows, training that can be continued, calibration, and what must be refused."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY
from test_training import FULL, fill_disk

from roi_lib import mft
from roi_lib.__main__ import change, main
from roi_lib.checkpoints import CheckpointError, load_model, load_tokenizer, verify_folder
from roi_lib.evaluation import reference_generator, segment_table, sit
from roi_lib.exams import (
    Exam,
    draw_papers,
    order_problems,
    parse_response,
    reference_response,
)
from roi_lib.generation import ReplayGenerator
from roi_lib.mft import Sample, Target
from roi_lib.pretrain import new_model
from roi_lib.runlog import LoggedGenerator, RunLog, model_hash
from roi_lib.tokenizer import train_bpe
from roi_lib.worlds import ORDERS, PAPER, POCKET, TIERS

SMALL = replace(POCKET.mft, problems=8, exams=8, rows=4, rows_at_once=2, dev_exams=2, log_every=2,
                save_every=2)


def right(cost):
    return Sample(f"\\boxed{{{cost}}}", cost, True)


def reference_targets(tokenizer, count=8, world=POCKET, problems=None):
    """Targets from the worked solutions; the dearest are refused."""
    problems = problems or mft.training_problems(world, count)
    extra = mft.tag_tokens(world, tokenizer)
    targets = []
    for p in problems:
        words = reference_response(world, [p])
        cost = len(tokenizer(words, add_special_tokens=False).input_ids) + 1 + extra
        targets.append(mft.align(world, p, [Sample(p.solution, cost, True)]))
    return targets


@pytest.fixture(scope="module")
def targets(tokenizer):
    return reference_targets(tokenizer)


@pytest.mark.parametrize(("samples", "keep", "words", "level"), [
    ([right(40), right(20), right(70)], "shortest", "\\boxed{20}", 0),
    ([right(40), right(20), right(70)], "median", "\\boxed{40}", 1),
    ([right(40), right(20), right(70), right(90)], "median", "\\boxed{40}", 1),
    ([right(128), Sample("\\boxed{5}", 5, False)], "shortest", "\\boxed{128}", 2),
    ([right(129), right(200)], "shortest", mft.SKIP_WORDS, 3),
    ([right(20), right(129), right(130)], "median", "\\boxed{20}", 0),
    ([Sample("\\boxed{5}", 5, False)], "shortest", mft.SKIP_WORDS, 3),
])
def test_one_problem_becomes_one_label(samples, keep, words, level):
    target = mft.align(POCKET, draw_papers(POCKET, 1)[0][0], samples, keep)
    assert (target.words, target.level, target.skip) == (words, level, level == 3)


def test_unknown_choice_of_the_kept_sample():
    with pytest.raises(ValueError, match="keep must be one of shortest, median"):
        mft.align(POCKET, draw_papers(POCKET, 1)[0][0], [right(1)], "longest")


def test_rejection_sampling_counts_the_tag_that_is_to_come(tokenizer):
    problems = mft.training_problems(POCKET, 5)
    exams = [Exam((p,), "easy") for p in problems]
    generator = reference_generator(POCKET, tokenizer, exams, [128], "direct")
    samples = mft.rejection_sample(POCKET, tokenizer, generator, problems, k=2)
    assert [len(s) for s in samples] == [2] * 15
    for problem, (sample, _) in zip(problems, samples, strict=True):
        words = reference_response(POCKET, [problem])
        whole = len(tokenizer(words).input_ids) + 1
        assert sample.correct == (whole <= 128)
        if sample.correct:
            assert sample.words == problem.solution and sample.cost == whole + 3


def test_no_right_sample_at_all(tokenizer):
    problems = mft.training_problems(POCKET, 2)
    class Wrong(dict):
        def __missing__(self, key):
            return tokenizer("Q1. \\boxed{0} 0").input_ids[:1]
    with pytest.raises(ValueError, match="not one of 6 sampled answers is right"):
        mft.rejection_sample(POCKET, tokenizer, ReplayGenerator(Wrong(), tokenizer.eos_token_id),
                             problems, k=1)


def test_a_tokenizer_that_splits_the_tag_badly(tokenizer):
    def longer(words, **options):
        out = tokenizer(words, **options)
        if "Level-3" in words:
            out["input_ids"] = [*out.input_ids, tokenizer.eos_token_id]
        return out
    longer.decode = tokenizer.decode
    assert mft.tag_tokens(POCKET, tokenizer) == 3
    with pytest.raises(ValueError, match="splits the level tags badly"):
        mft.tag_tokens(POCKET, longer)


def test_a_tokenizer_that_does_not_give_the_tag_back(tokenizer):
    def tokenize(words, **options):
        return tokenizer(words, **options)
    tokenize.decode = lambda ids, **options: tokenizer.decode(ids, **options).replace("-", "")
    with pytest.raises(ValueError, match="<predicted_level>Level-0</predicted_level> reads"):
        mft.tag_tokens(POCKET, tokenize)


def test_levels_weigh_more_than_other_tokens(tokenizer):
    weights = mft.token_weights(POCKET, tokenizer, replace(SMALL, tag_weight=7.0))
    heavy = weights.nonzero()[:, 0][weights == 7].tolist()
    assert tokenizer.convert_ids_to_tokens(sorted(heavy)) == [f"Level-{k}" for k in range(4)]
    assert len(weights) == len(tokenizer) and (weights == 1).sum() == len(tokenizer) - 4
    assert mft.token_weights(POCKET, tokenizer, replace(SMALL, tag_weight=1.0)) is None


def test_a_level_of_several_tokens_cannot_weigh_more(tokenizer):
    """In a BPE its digit is a token, but that of every number as well."""
    words = load_tokenizer("gsm8k-bpe")
    assert mft.token_weights(PAPER, words, PAPER.mft) is None
    message = "one token for each level; give --set tag_weight=1"
    with pytest.raises(ValueError, match=message):
        mft.token_weights(PAPER, words, replace(PAPER.mft, tag_weight=2.0))
    beyond = replace(POCKET, level_edges=(*POCKET.level_edges, 256, 512))  # Level-4 is unknown
    with pytest.raises(ValueError, match=message):
        mft.token_weights(beyond, tokenizer, SMALL)


@pytest.mark.parametrize("weight", [1.0, 5.0])
def test_loss_of_a_batch_by_hand(tokenizer, targets, tmp_path, weight):
    """Two rows: nats of the response tokens, levels times the weight, over what is learned."""
    recipe = replace(SMALL, tag_weight=weight)
    rows = [mft.make_row(POCKET, tokenizer, targets[i : i + n], 64) for i, n in ((0, 3), (9, 1))]
    model = new_model(tokenizer, TINY)
    trainer = mft.TagTrainer(
        model, mft.sft_config(replace(recipe, bf16=False), tmp_path), processing_class=tokenizer,
        train_dataset=mft.as_dataset(rows),
        token_weights=mft.token_weights(POCKET, tokenizer, recipe))
    total, learned = 0.0, 0
    levels = set(tokenizer.convert_tokens_to_ids([f"Level-{k}" for k in range(4)]))
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row.prompt + row.response])).logits[0]
        for place, token in enumerate(row.response, start=len(row.prompt)):
            nats = -torch.log_softmax(logits[place - 1], -1)[token]
            total += float(nats) * (weight if token in levels else 1)
            learned += 1
    batch = trainer.data_collator(list(mft.as_dataset(rows)))
    for items, truth in ((None, total / learned), (torch.tensor(400), total / 400)):
        loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
        assert float(loss.detach()) == pytest.approx(truth, rel=1e-5)
    assert [len(row.levels) for row in rows] == [3, 1] and learned == sum(
        len(row.response) for row in rows)


def test_levels_of_a_row_are_those_a_sitting_finds(tokenizer, targets):
    rng = random.Random(0)
    for n in (1, 2, 3, 5):
        chosen = rng.sample(targets, n)
        row = mft.make_row(POCKET, tokenizer, chosen, budget=100)
        segments = parse_response(POCKET, tokenizer, row.response, n).segments
        assert [s.level for s in segments] == row.levels
        assert row.levels == [3 if s.skipped else POCKET.level_of(s.cost) for s in segments]
        assert [s.skipped for s in segments] == [t.skip for t in chosen]
        assert "Budget: 1 00 tokens" in tokenizer.decode(row.prompt)
    assert row.response[-1] == tokenizer.eos_token_id


def test_next_to_an_edge_a_level_depends_on_the_place(tokenizer):
    """33 tokens alone, end-of-sequence included, are 32 where another problem follows."""
    problem, other = draw_papers(POCKET, 1)[0][:2]
    filler = "1 + 1 = 2. " * 3 + "2 . 2 . 2 "
    words = filler + "\\boxed{2}"
    edge = Target(problem, words, 1, 1.0)
    alone = mft.make_row(POCKET, tokenizer, [edge], 64)
    cost = len(alone.response)
    words = ". " * (33 - cost) + words
    edge = Target(problem, words, 1, 1.0)
    assert mft.make_row(POCKET, tokenizer, [edge], 64).levels == [1]
    assert mft.make_row(POCKET, tokenizer, [edge, edge], 64).levels == [0, 1]


def test_curriculum_is_singles_then_exams_and_learns_responses_only(tokenizer, targets):
    rows = mft.curriculum(POCKET, tokenizer, targets, SMALL)
    numbers = [len(row.levels) for row in rows]
    assert numbers[:24] == [1] * 24 and min(numbers[24:]) > 1 and len(rows) == 32
    for row, learned in zip(rows, mft.as_dataset(rows), strict=True):
        assert learned["labels"] == [-100] * len(row.prompt) + row.response


def train(tokenizer, targets, work, recipe=SMALL):
    rows = mft.curriculum(POCKET, tokenizer, targets, recipe)
    return mft.fine_tune(POCKET, tokenizer, new_model(tokenizer, TINY), rows, recipe, work)


@pytest.fixture(scope="module")
def whole_run(tokenizer, targets, tmp_path_factory):
    work = tmp_path_factory.mktemp("whole")
    return train(tokenizer, targets, work).state_dict(), (work / "log.csv").read_text()


def test_F3_a_run_that_was_cut_ends_like_one_that_was_not(tokenizer, targets, whole_run, tmp_path,
                                                          monkeypatch):
    weights, log = whole_run
    def interrupted(self, args, state, *rest, **more):
        if state.global_step == 5:
            raise KeyboardInterrupt
    monkeypatch.setattr(mft.DevLog, "on_step_end", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        train(tokenizer, targets, tmp_path)
    monkeypatch.undo()
    # F1, F2: the newest state is broken, so the one before is taken, and that is said
    (tmp_path / "checkpoint-4" / "optimizer.pt").write_bytes(b"half")
    with pytest.warns(UserWarning, match="passing over an incomplete checkpoint"):
        continued = train(tokenizer, targets, tmp_path).state_dict()
    assert all(torch.equal(continued[name], weights[name]) for name in weights)
    def without_seconds(text):
        return [line.rsplit(",", 1)[0] for line in text.splitlines()]
    assert without_seconds((tmp_path / "log.csv").read_text()) == without_seconds(log)


def check_full_disk(tokenizer, targets, whole_run, work, monkeypatch):
    """The run stops at step 4, step 2 is whole, and the same call goes on to the same weights."""
    with pytest.raises(OSError, match="step 4 could not be written .* make room"):
        train(tokenizer, targets, work)
    monkeypatch.undo()
    verify_folder(work / "checkpoint-2")
    weights = train(tokenizer, targets, work).state_dict()
    assert all(torch.equal(weights[name], whole_run[0][name]) for name in weights)
    verify_folder(work / "checkpoint-8")


@pytest.mark.parametrize("error", FULL[:1] + FULL[2:3], ids=lambda error: type(error).__name__)
@pytest.mark.filterwarnings("ignore:passing over an incomplete checkpoint")
def test_F4_a_disk_full_while_saving_leaves_the_last_checkpoint(
        tokenizer, targets, whole_run, tmp_path, monkeypatch, error):
    fill_disk(monkeypatch, "checkpoint-4/optimizer.pt", error)
    check_full_disk(tokenizer, targets, whole_run, tmp_path, monkeypatch)


def test_F4_a_disk_full_while_logging_leaves_the_last_checkpoint(
        tokenizer, targets, whole_run, tmp_path, monkeypatch):
    def full(self, step, *values, **options):
        if step == 4:
            with self.path.open("a") as stream:
                stream.write("4,0.")
            raise FULL[0]
        real(self, step, *values, **options)

    real = mft.TrainingLog.write
    monkeypatch.setattr(mft.TrainingLog, "write", full)
    check_full_disk(tokenizer, targets, whole_run, tmp_path, monkeypatch)
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == ["2", "4", "6", "8"]


def test_F24_a_loss_that_is_not_finite_stops_the_run(tokenizer, targets, tmp_path):
    model = new_model(tokenizer, TINY)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(float("inf"))
    rows = mft.curriculum(POCKET, tokenizer, targets, SMALL)
    with pytest.raises(FloatingPointError, match="at step 2; lower the learning rate"):
        mft.fine_tune(POCKET, tokenizer, model, rows, SMALL, tmp_path)


def test_a_work_folder_of_another_recipe_is_refused(tmp_path):
    mft.same_recipe(tmp_path, {"samples": 8})
    mft.same_recipe(tmp_path, {"samples": 8})
    with pytest.raises(ValueError, match="holds a run with another samples"):
        mft.same_recipe(tmp_path, {"samples": 4})


def test_calibration_of_a_writer_who_knows_himself(tokenizer):
    """Replays with exact tags: every tag is right, and nothing is skipped that can be solved."""
    papers = draw_papers(POCKET, 12, seed=3)
    exams = [Exam(order_problems(p, ORDERS[i % 3], f"0/{i}"), ORDERS[i % 3])
             for i, p in enumerate(papers)]
    ample = mft.ample_budget(POCKET, exams)
    problems = [p for exam in exams for p in exam.problems]
    singles = [Exam((p,), "easy") for p in problems]
    base = reference_generator(POCKET, tokenizer, exams, [ample], "direct")
    base.responses |= reference_generator(POCKET, tokenizer, singles, [128], "direct").responses
    tagged = {}
    for exam in exams:
        targets = reference_targets(tokenizer, problems=exam.problems)
        row = mft.make_row(POCKET, tokenizer, targets, ample)
        tagged[tuple(row.prompt)] = row.response[:-1]
    result = mft.calibrate(POCKET, tokenizer, base, ReplayGenerator(tagged, tokenizer.eos_token_id),
                           papers, k=1)
    for tier in TIERS:
        assert all(x in (None, 1.0) for x in result["tag_accuracy"][tier])
        assert result["skip_rate"][tier] == result["refused"][tier]
        assert result["answer_accuracy"][tier]["base"] == 1.0
    counts = np.array(result["confusion"])
    assert counts.sum() == np.trace(counts) > 0
    assert result["missed_skips"] == 0


def test_responses_that_never_close_a_tag(tokenizer):
    papers = draw_papers(POCKET, 2)
    class Open(dict):
        def __missing__(self, key):
            return tokenizer("Q1. <predicted_level>Level-1 \\boxed{7}").input_ids
    generator = ReplayGenerator(Open(), tokenizer.eos_token_id)
    with pytest.raises(ValueError, match="not one of 2 responses holds a closed level tag"):
        mft.calibrate(POCKET, tokenizer, generator, generator, papers)


@pytest.mark.parametrize(("setting", "message"), [
    ("sample=4", "the recipe has no 'sample'; choose from problems, samples"),
    ("samples=many", "--set samples=many: the value must be a int"),
    ("samples=4.5", "the value must be a int"),
])
def test_a_recipe_changed_badly(setting, message):
    with pytest.raises(ValueError, match=message):
        change(POCKET.mft, [setting])


def test_a_recipe_changed():
    recipe = change(POCKET.mft, ["samples=4", "keep=median", "learning_rate=1e-4", "bf16=true"])
    assert (recipe.samples, recipe.keep, recipe.learning_rate, recipe.bf16) == (4, "median", 1e-4,
                                                                               True)


def test_paper_world_rows_train_with_adapters(real_data, tmp_path):
    """Real GSM8K, MATH and AIME rows, LoRA, bf16 and checkpointing, on a random model."""
    problems = mft.training_problems(PAPER, 6, root=real_data)
    assert {p.tier for p in problems} == set(TIERS)
    tokenizer = train_bpe((p.text + p.solution for p in problems), size=400)
    targets = reference_targets(tokenizer, world=PAPER, problems=problems)
    recipe = replace(PAPER.mft, exams=8, rows=4, rows_at_once=2, dev_exams=1, log_every=3,
                     lora_rank=2)
    rows = mft.curriculum(PAPER, tokenizer, targets, recipe)
    before = new_model(tokenizer, TINY)
    start = {k: v.clone() for k, v in before.state_dict().items()}
    after = mft.fine_tune(PAPER, tokenizer, before, rows, recipe, tmp_path, real_data)
    changed = {k for k, v in after.state_dict().items() if not torch.equal(v, start[k])}
    assert any("q_proj.weight" in k for k in changed) and not any("embed" in k for k in changed)
    table = segment_table(PAPER, sit(PAPER, tokenizer, mft.TorchGenerator.of(after, tokenizer), [
        Exam(tuple(problems[:1]), "easy")], 60, "roi"))
    assert table["cost"][0] <= 60


# ---------------------------------------------------------------- the command
QUICK = ["samples=1", "exams=8", "rows=4", "rows_at_once=2", "dev_exams=1", "save_every=2",
         "card_papers=0"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Folders of tiny random models, a world each."""
    folders = {}
    for world in (POCKET, PAPER):
        folders[world.name] = tmp_path_factory.mktemp("start") / "tiny"
        new_model(load_tokenizer(world.tokenizer), TINY).save_pretrained(folders[world.name])
    return folders


def header(world, model, seed=0):
    return {"world": world.name, "method": "rejection sampling", "model": model_hash(str(model)),
            "seed": seed}


def sampled(world, path, head, count, root=None, tokenizer=None):
    """Write the samples of a run into its cache: a random model has no right ones of its own."""
    tokenizer = tokenizer or load_tokenizer(world.tokenizer)
    problems = mft.training_problems(world, count, root=root)
    exams = [Exam((p,), "easy") for p in problems]
    writer = reference_generator(world, tokenizer, exams, [world.level_edges[-1]], "direct")
    path.mkdir(parents=True)
    log = RunLog(path / "samples.jsonl", head)
    mft.rejection_sample(world, tokenizer, LoggedGenerator(writer, log), problems, 1)


def command(world, start, tmp_path, *settings, root=None):
    options = [x for setting in (*QUICK, *settings) for x in ("--set", setting)]
    main(["train", "mft", "--world", world.name, "--model", str(start[world.name]), "--work",
          str(tmp_path / "work"), "--out", str(tmp_path / "out"), *options,
          *(["--data", str(root)] if root else [])])


def refused(capsys, tmp_path, *arguments):
    """The one sentence of a refusal; the earlier checkpoint and whatever is in work stay."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"earlier")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.json*") if p.is_file()}
    with pytest.raises(SystemExit) as stop:
        command(*arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("error: ") == 1
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"earlier"
    assert all(p.read_bytes() == content for p, content in before.items())
    return error


def test_pocket_from_a_checkpoint_to_a_checkpoint(start, tmp_path):
    sampled(POCKET, tmp_path / "work", header(POCKET, start["pocket"]), 8)
    command(POCKET, start, tmp_path, "problems=8", "log_every=4")
    verify_folder(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--world pocket`: 32 rows" in card and card.endswith("Not measured (`card_papers=0`).\n")
    assert [r["problems"] for r in json.loads((tmp_path / "out" / "labels.json").read_text())] == [
        r["problems"] for r in json.loads((tmp_path / "work" / "labels.json").read_text())]
    assert (tmp_path / "out" / "log.csv").read_text().count("\n") == 3  # head, steps 4 and 8
    assert not list((tmp_path / "out").glob("tokenizer*")) and "`pocket-tokenizer`" in card
    first = load_model(str(tmp_path / "out"), "float32").state_dict()
    # killed before the checkpoint was in place, the same command ends with the same weights
    (tmp_path / "out").rename(tmp_path / "first")
    command(POCKET, start, tmp_path, "problems=8", "log_every=4")
    again = load_model(str(tmp_path / "out"), "float32").state_dict()
    assert all(torch.equal(again[name], first[name]) for name in first)
    before = load_model(str(start["pocket"]), "float32").state_dict()
    assert not torch.equal(first["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_a_start_with_its_own_tokenizer_hands_it_on(tmp_path):
    """As models of the hub do; their heir read with the world's tokenizer would be nonsense."""
    folder, problems = tmp_path / "start", mft.training_problems(POCKET, 8)
    words = train_bpe((p.text + p.solution for p in problems), size=400)
    new_model(words, TINY).save_pretrained(folder)
    words.save_pretrained(folder)
    words = load_tokenizer(str(folder))  # transformers adds Qwen's end of text, so that ...
    with pytest.raises(CheckpointError, match="they do not belong together"):
        mft.run(POCKET, tmp_path / "out", tmp_path / "work", SMALL, str(folder))
    assert not (tmp_path / "work").exists()
    new_model(words, TINY).save_pretrained(folder)
    sampled(POCKET, tmp_path / "work", header(POCKET, folder), 8, tokenizer=words)
    command(POCKET, {"pocket": folder}, tmp_path, "problems=8", "log_every=4", "tag_weight=1")
    verify_folder(tmp_path / "out")
    found = load_tokenizer(str(tmp_path / "out"), POCKET.tokenizer)
    text = POCKET.prompts["roi"] + problems[0].text
    assert found.get_vocab() == words.get_vocab() and len(found) > 400
    assert found(text).input_ids == words(text).input_ids
    assert found.chat_template == words.chat_template and found.eos_token == words.eos_token
    assert f"Tokenizer: `{folder}`" in (tmp_path / "out" / "README.md").read_text()


def test_paper_command_on_real_rows(start, tmp_path, real_data):
    """GSM8K, MATH and AIME through the whole command: cache, labels, LoRA, bf16, checkpoint."""
    sampled(PAPER, tmp_path / "work", header(PAPER, start["paper"]), 4, real_data)
    command(PAPER, start, tmp_path, "problems=4", "exams=4", "log_every=4", "lora_rank=2",
            root=real_data)
    verify_folder(tmp_path / "out")
    before, after = (load_model(str(folder), "float32").state_dict()
                     for folder in (start["paper"], tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("_proj" in name for name in changed)
    labels = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert [row["family"] for row in labels] == ["gsm8k", "math", "aime"]
    assert labels[0]["solve_rate"] > 0 and sum(row["problems"] for row in labels) == 12
    assert (tmp_path / "out" / "log.csv").read_text().splitlines()[1].startswith("4,")


def test_no_right_sample_ends_the_command(start, tmp_path, capsys):
    error = refused(capsys, tmp_path, POCKET, start, tmp_path, "problems=1")
    assert "not one of 3 sampled answers is right" in error


@pytest.mark.parametrize("changed", [{"model": "another"}, {"world": "paper"}, {"seed": 1}])
def test_samples_of_another_run_are_refused(start, tmp_path, capsys, changed):
    sampled(POCKET, tmp_path / "work", header(POCKET, start["pocket"]) | changed, 1)
    error = refused(capsys, tmp_path, POCKET, start, tmp_path, "problems=1")
    key, = changed
    assert f"samples.jsonl is the log of another run: its {key} is" in error


def test_a_work_folder_of_another_model_is_refused(start, tmp_path, capsys):
    (tmp_path / "work").mkdir()
    mft.same_recipe(tmp_path / "work", {"model": "another"})
    error = refused(capsys, tmp_path, POCKET, start, tmp_path, "problems=1")
    assert "holds a run with another" in error and "model" in error


@pytest.mark.parametrize(("world", "setting", "message"), [
    (POCKET, "keep=longest", "keep must be one of shortest, median, not 'longest'"),
    (PAPER, "tag_weight=3", "one token for each level; give --set tag_weight=1"),
])
def test_a_bad_recipe_is_refused_before_anything_is_written(start, tmp_path, capsys, world,
                                                            setting, message):
    assert message in refused(capsys, tmp_path, world, start, tmp_path, setting)
    assert not (tmp_path / "work").exists()
