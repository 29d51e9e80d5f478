"""RARL from a checkpoint to a checkpoint, in both worlds; runs that are killed, and bad input."""

import random
import re
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
from conftest import SMALL_RARL, SMALL_TRL, TRAIN, log_of, tiny_model

from roi_lib.exams import draw_papers
from roi_lib.rarl import training_exams
from roi_lib.store.checkpoints import load_model, load_tokenizer, weights_hash
from roi_lib.store.files import lock, verify_folder
from roi_lib.training.rarl import COLUMNS, PAPERS_SEED, measure, train, train_rarl
from roi_lib.worlds import PAPER, POCKET

pytestmark = pytest.mark.usefixtures("paid")


@pytest.fixture
def run(env):
    """A short training run from the same start; returns its final weights."""
    def go(work, on_step=None, **changes):
        model, recipe = tiny_model(env.tokenizer).float(), replace(SMALL_RARL, **changes)
        return weights_hash(train(env, model, recipe, work, on_step=on_step))

    return go


@pytest.fixture
def start(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "start")
    return str(tmp_path / "start")


def test_a_killed_run_ends_with_the_weights_of_the_unkilled(run, tmp_path):
    """kill -9 at random moments of the training, saving included."""
    def stamp():
        return (work / "log.csv").exists() and (work / "log.csv").stat().st_mtime_ns

    begin, work, ends = time.monotonic(), tmp_path / "killed", []
    weights, whole = run(tmp_path / "whole"), time.monotonic() - begin
    for _ in range(2):
        before = stamp()
        process = subprocess.Popen([sys.executable, "-c", TRAIN, "rarl", str(work)],
                                   stderr=subprocess.DEVNULL)
        while process.poll() is None and stamp() == before:
            time.sleep(0.002)  # until it has begun, or goes on
        time.sleep(random.random() * whole)
        process.kill()
        ends.append(process.wait())
    assert -9 in ends, "every run was over before its kill"
    assert run(work) == weights and list(log_of(work)["step"]) == [1, 2, 3, 4, 5, 6]
    pd.testing.assert_frame_equal(log_of(work), log_of(tmp_path / "whole"))


def test_a_save_that_fails_leaves_the_last_checkpoint(run, tmp_path, monkeypatch):
    real, saved = safetensors.torch.save_file, []

    def full(*arguments, **options):
        saved.append(arguments)
        if len(saved) > 3:  # two files a checkpoint: the second one's optimizer does not fit
            raise OSError(28, "No space left on device")
        real(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(safetensors.torch, "save_file", full)
        run(tmp_path / "work", steps=4)
    verify_folder(tmp_path / "work" / "step-000002")
    assert run(tmp_path / "work", steps=4) == run(tmp_path / "clean", steps=4)


def test_another_recipe_or_process_is_refused(run, tmp_path, refusal):
    run(tmp_path, steps=1)
    assert "another learning_rate, which" in refusal(run, tmp_path, steps=1, learning_rate=2e-3)
    with lock(tmp_path):
        assert "another process is writing" in refusal(run, tmp_path, steps=1)


def test_log_live_rows_and_progress(run, tmp_path, capsys):
    rows, work = [], tmp_path / "work"
    run(work, rows.append, steps=3)
    assert "3/3" in capsys.readouterr().err
    assert [row["budget"] for row in rows] == [
        np.mean(training_exams(POCKET, SMALL_RARL, step)[1]) for step in range(3)]
    assert list(pd.read_csv(work / "log.csv")) == list(COLUMNS) == list(rows[0])
    assert log_of(work)["logprob_gap"].isna().tolist() == [False, True, False]


def test_pocket_from_a_checkpoint_to_a_checkpoint(env, small_world, run, start, tmp_path):
    def kill(row):
        raise KeyboardInterrupt  # after a step; the minutes go on counting

    work, out, short = tmp_path / "work", tmp_path / "out", {"steps": 2, "save_every": 1}
    with pytest.raises(KeyboardInterrupt):
        run(work, kill, **short)
    pd.read_csv(work / "log.csv").assign(seconds=600.0).to_csv(work / "log.csv", index=False)
    train_rarl(small_world, out, work, replace(SMALL_RARL, **short), start, n_papers=4)
    verify_folder(out)
    card, records = (out / "README.md").read_text(), pd.read_csv(out / "exam.csv")
    assert "--world pocket" in card and float(re.search(r"([\d.]+) minutes", card)[1]) >= 10
    assert card.count("\n  rarl ") == 9
    assert list(records["method"]) == ["start"] * 9 + ["rarl"] * 9 and len(log_of(out)) == 2
    assert list(records["budget"][:9]) == [64] * 3 + [128] * 3 + [256] * 3
    papers = draw_papers(POCKET, 4, seed=PAPERS_SEED)
    again = measure(env, load_model(str(out)), papers, "again", tmp_path)
    for name in ("score", "score_low", "tokens", "skip_rate", "skip_hard", "skips_tagged_right"):
        assert list(records[name][9:].fillna(-1)) == pytest.approx(again[name].fillna(-1))


@pytest.mark.parametrize("recipe", [SMALL_RARL, SMALL_TRL])
def test_without_steps_the_start_is_measured_and_keeps_its_tokenizer(
        small_world, start, tmp_path, recipe):
    load_tokenizer("gsm8k-bpe").save_pretrained(start)
    words, out = load_tokenizer(start), tmp_path / "out"
    tiny_model(words).float().save_pretrained(start)
    recipe = replace(recipe, steps=0, budgets=(64,))
    train_rarl(small_world, out, tmp_path / "work", recipe, start, n_papers=2)
    assert pd.read_csv(out / "exam.csv")["score"].nunique() == 1
    assert weights_hash(load_model(str(out))) == weights_hash(load_model(start))
    assert load_tokenizer(str(out), small_world.tokenizer).get_vocab() == words.get_vocab()


def test_bad_input_is_refused_before_the_first_step(small_world, start, tmp_path, refusal):
    def refused(recipe=SMALL_RARL, checkpoint=start, **options):
        return refusal(train_rarl, small_world, out, tmp_path / "work", recipe, checkpoint,
                       **options)

    out, config = tmp_path / "out", tmp_path / "start" / "generation_config.json"
    assert "reward must be one of level, answer" in refusal(replace, SMALL_RARL, reward="luck")
    assert "name a local folder" in refused(checkpoint="no/such/folder/here")
    assert "engine 'colocate' needs TRL's trainer" in refused(engine="colocate")
    assert "budget 2 is smaller" in refused(replace(SMALL_RARL, budgets=(64, 2)))
    assert "at most 320 tokens" in refused(replace(SMALL_RARL, budgets=(64, 400)))
    config.write_text('{"do_sample": false, "temperature": 0.5}')
    assert "mend its generation_config.json first" in refused()
    load_tokenizer("gsm8k-bpe").save_pretrained(start)
    assert "they do not belong together" in refused()
    out = tmp_path / "start"
    assert "is not replaced" in refused() and not (tmp_path / "work").exists()


def test_paper_world_on_real_exams(real_data, tmp_path):
    """The paper world's own problems, prompts, grader and trainer (TRL, LoRA)."""
    start, work, out = (tmp_path / name for name in ("start", "work", "out"))
    tiny_model(load_tokenizer("gsm8k-bpe")).float().save_pretrained(start)
    recipe = replace(SMALL_TRL, steps=2, budgets=(40, 64), learning_rate=0.01,
                     trl=replace(PAPER.rarl.trl, rows_at_once=4, lora_rank=2, bf16=False))
    train_rarl(PAPER, out, work, recipe, str(start), n_papers=2, root=real_data)
    assert weights_hash(load_model(str(out))) != weights_hash(load_model(str(start)))
    assert list(pd.read_csv(out / "exam.csv")["budget"][:6]) == [512] * 3 + [1024] * 3
