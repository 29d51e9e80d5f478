"""RARL from a checkpoint to a checkpoint, in both worlds, with a model of no ability."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import TINY
from test_rarl import tiny

from roi_lib import rarl_run
from roi_lib.__main__ import change, main
from roi_lib.checkpoints import CheckpointError, load_model, load_tokenizer, verify_folder
from roi_lib.evaluation import run_method
from roi_lib.exams import draw_papers
from roi_lib.pretrain import new_model
from roi_lib.rarl_loop import fingerprint
from roi_lib.tokenizer import train_bpe
from roi_lib.worlds import POCKET

QUICK = ["--set", "steps=2", "--set", "exams=2", "--set", "rollouts=4"]


@pytest.fixture(scope="module")
def start(tokenizer, tmp_path_factory):
    """The folder of a tiny random model."""
    folder = tmp_path_factory.mktemp("start")
    tiny(tokenizer).save_pretrained(folder)
    return folder


def command(*arguments):
    main([str(a) for a in arguments])


def test_pocket_from_a_checkpoint_to_a_checkpoint(start, tmp_path, capsys):
    work, out = tmp_path / "work", tmp_path / "pocket-rarl"
    arguments = ["train", "rarl", "--model", start, *QUICK, "--set", "keep=0,2", "--seed", 3,
                 "--papers", 4, "--work", work, "--out", out]
    command(*arguments)
    verify_folder(out)
    model = load_model(str(out), "float32")
    for step, same in ((0, load_model(str(start), "float32")), (2, model)):
        folder = work / "kept" / f"step-{step:06d}"
        verify_folder(folder)
        assert fingerprint(load_model(str(folder), "float32")) == fingerprint(same)
    assert not list(out.glob("tokenizer*"))  # it is read with the world's
    card, records = (out / "README.md").read_text(), json.loads((out / "exam.json").read_text())
    assert "--world pocket --seed 3" in card and '"seed": 3' in card and card.count("rarl  ") == 6
    assert [r["method"] for r in records] == ["start"] * 6 + ["rarl"] * 6
    assert len((out / "log.csv").read_text().splitlines()) == 3
    # what the card says is what `exam` finds
    papers = draw_papers(POCKET, 4, seed=rarl_run.PAPERS_SEED)
    again = run_method(POCKET, "mft", papers, POCKET.budgets, str(out), seed=rarl_run.PAPERS_SEED)
    for ours, theirs in zip(records[6:], again, strict=True):
        assert {k: theirs[k] for k in ("score", "score_ci", "mean_tokens", "skip_rate")}.items() \
            <= ours.items()
    # a finished run does nothing again
    capsys.readouterr()
    command(*arguments)
    assert "step 2/2" not in capsys.readouterr().out
    assert fingerprint(load_model(str(out), "float32")) == fingerprint(model)


def test_a_start_with_its_own_tokenizer_hands_it_on(tmp_path):
    start, out = tmp_path / "start", tmp_path / "out"
    texts = [p.text + p.solution for paper in draw_papers(POCKET, 20) for p in paper]
    words = train_bpe(texts, size=400)
    tiny(words).save_pretrained(start)
    words.save_pretrained(start)
    arguments = ["train", "rarl", "--model", start, *QUICK, "--papers", 2, "--work",
                 tmp_path / "work", "--out", out]
    words = load_tokenizer(str(start))  # transformers adds Qwen's end of text, so that ...
    with pytest.raises(CheckpointError, match="they do not belong together"):
        rarl_run.train_model(POCKET, str(start), POCKET.rarl, tmp_path / "work")
    tiny(words).save_pretrained(start)
    command(*arguments)
    verify_folder(out)
    found = load_tokenizer(str(out), POCKET.tokenizer)
    assert found.get_vocab() == words.get_vocab() and len(found) > 400
    assert found(texts[0]).input_ids == words(texts[0]).input_ids
    assert f"tokenizer `{start}`" in (out / "README.md").read_text()


@pytest.mark.parametrize(("arguments", "words"), [
    (["--world", "moon"], "unknown world 'moon'"),
    (["--model", "no/such/folder/here"], "name a local folder"),
    (["--engine", "colocate"], "engine 'colocate' needs TRL's trainer"),
    (["--set", "speed=3"], "the recipe has no 'speed'; choose from steps, exams"),
    (["--set", "trl.lora_rank=3"], "the recipe has no 'trl.lora_rank'"),
    (["--set", "steps=many"], "--set steps=many: the value must be a int"),
    (["--set", "keep=-9"], "step -9 cannot be kept"),
    (["--set", "reward=luck"], "reward must be one of"),
])
def test_bad_arguments_are_refused_in_one_sentence(start, tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        command("train", "rarl", "--model", start, "--work", tmp_path / "work", "--out",
                tmp_path / "out", *arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_settings_reach_tuples_and_recipes_inside():
    recipe = change(POCKET.rarl, ["budgets=64", 'orders=["hard",1],["easy",2]', "keep=0,30"])
    assert recipe.budgets == (64,) and recipe.keep == (0, 30)
    assert recipe.orders == (("hard", 1), ("easy", 2))
    from roi_lib.worlds import PAPER

    assert change(PAPER.rarl, ["trl.rows_at_once=2"]).trl == replace(PAPER.rarl.trl, rows_at_once=2)


def test_paper_world_on_real_exams(real_data, tmp_path, monkeypatch, recwarn):
    """The paper world's own problems, prompts, grader and trainer (TRL, LoRA)."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    monkeypatch.setattr("roi_lib.rarl.group_rewards",
                        lambda world, sittings, *_: [float(sum(s.ids) % 4) for s in sittings])
    words = load_tokenizer("gsm8k-bpe")
    torch.manual_seed(0)
    new_model(words, TINY).save_pretrained(tmp_path / "start")
    command("train", "rarl", "--world", "paper", "--model", tmp_path / "start", "--data", real_data,
            *QUICK, "--set", "budgets=40,64", "--set", "trl.rows_at_once=4", "--set",
            "trl.lora_rank=2", "--set", "trl.bf16=false", "--set", "keep=0,2", "--set",
            "learning_rate=0.01", "--papers", 2, "--work", tmp_path / "work", "--out",
            tmp_path / "paper-rarl")
    verify_folder(tmp_path / "paper-rarl")
    before, after = (load_model(str(tmp_path / name), "float32").state_dict()
                     for name in ("start", "paper-rarl"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("_proj" in name for name in changed)
    assert len((tmp_path / "paper-rarl" / "log.csv").read_text().splitlines()) == 3
    assert (tmp_path / "work" / "kept" / "step-000002" / "adapter_model.safetensors").is_file()
    records = json.loads((tmp_path / "paper-rarl" / "exam.json").read_text())
    assert [r["budget"] for r in records[:6]] == [512] * 3 + [1024] * 3
