"""Checkpoints are whole or refused; a continued pre-training equals an unbroken one."""

import dataclasses
import json
import warnings

import pytest
import torch
from conftest import ROOT, TINY
from transformers import AutoModelForCausalLM, AutoTokenizer

from roi_lib.checkpoints import (
    CheckpointError,
    check_tokenizer,
    load_config,
    load_model,
    load_tokenizer,
    newest_complete,
    tokenizer_name,
    verify_folder,
    write_folder,
    write_manifest,
)
from roi_lib.pretrain import pretrain
from roi_lib.worlds import DATA, PAPER, POCKET

SHIPPED = sorted(path.parent for path in DATA.glob("*/manifest.json"))


def write(folder, **files):
    write_folder(folder, lambda path: [(path / name).write_text(text)
                                       for name, text in files.items()])


def test_F1_a_killed_save_leaves_the_earlier_folder(tmp_path):
    write(tmp_path / "step-1", weights="one")

    def killed(path):
        (path / "weights").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "step-1", killed)
    verify_folder(tmp_path / "step-1")
    assert (tmp_path / "step-1" / "weights").read_text() == "one"
    write(tmp_path / "step-1", weights="two")
    assert (tmp_path / "step-1" / "weights").read_text() == "two"


def test_F1_F2_the_newest_complete_folder_is_taken_and_the_broken_named(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path / f"step-{step}", weights=f"weights {step}", rng="state")
    (tmp_path / "step-3" / "rng").unlink()
    (tmp_path / "step-2" / "weights").write_text("weights X")
    with pytest.warns(UserWarning) as told:
        assert newest_complete(tmp_path) == tmp_path / "step-1"
    assert "step-3/rng is missing" in str(told[0].message)
    assert "step-2/weights differs" in str(told[1].message)
    assert newest_complete(tmp_path / "nowhere") is None


def test_F1_F4_a_manifest_cut_short_is_no_manifest(tmp_path):
    for step in (1, 2):
        write(tmp_path / f"step-{step}", weights="w")
    (tmp_path / "step-2" / "manifest.json").write_text('{\n "weights": {')
    with pytest.warns(UserWarning, match="step-2/manifest.json is cut short"):
        assert newest_complete(tmp_path) == tmp_path / "step-1"


def test_F1_a_folder_that_a_trainer_saves_once_more_is_whole(tmp_path):
    write(tmp_path / "step-1", weights="damaged")
    (tmp_path / "step-1" / "weights").write_text("new")
    write_manifest(tmp_path / "step-1")
    verify_folder(tmp_path / "step-1")


def test_F2_a_truncated_file_is_refused(tmp_path):
    write(tmp_path / "model", weights="0123456789")
    (tmp_path / "model" / "weights").write_text("01234")
    with pytest.raises(CheckpointError, match="cut short"):
        load_model(str(tmp_path / "model"))
    (tmp_path / "model" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="not written to the end"):
        verify_folder(tmp_path / "model")


def test_F34_a_pickle_is_refused(tmp_path, model):
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_model(str(tmp_path))


def test_F3_a_continued_run_equals_an_unbroken_one(tmp_path, monkeypatch):
    monkeypatch.setattr("roi_lib.pretrain.CARD_PAPERS", 12)
    pretrain(POCKET, tmp_path / "whole", tmp_path / "work-1", TINY)

    class Killed(Exception):
        pass

    def die(*args):
        raise Killed

    with monkeypatch.context() as patch:
        from roi_lib import pretrain as module
        real = module.train_step
        patch.setattr(module, "train_step", lambda *a: die() if a[-1] == 3 else real(*a))
        with pytest.raises(Killed):
            pretrain(POCKET, tmp_path / "parts", tmp_path / "work-2", TINY)
    assert not (tmp_path / "parts").exists()
    pretrain(POCKET, tmp_path / "parts", tmp_path / "work-2", TINY)
    one, two = (load_model(str(tmp_path / name)).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(one[key], two[key]) for key in one)

    def losses(work):
        return [line.split(",")[:3] for line in (work / "log.csv").read_text().splitlines()]
    assert losses(tmp_path / "work-1") == losses(tmp_path / "work-2") and len(losses(
        tmp_path / "work-1")) == 5


def test_another_recipe_does_not_continue_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr("roi_lib.pretrain.CARD_PAPERS", 12)
    pretrain(POCKET, tmp_path / "out", tmp_path / "work", TINY)
    other = dataclasses.replace(TINY, steps=6)
    with pytest.raises(ValueError, match="another recipe"):
        pretrain(POCKET, tmp_path / "out", tmp_path / "work", other)


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_shipped_folders_match_their_hashes(folder):
    verify_folder(folder)


def test_shipped_base_is_a_small_qwen2_that_transformers_loads():
    model = AutoModelForCausalLM.from_pretrained(DATA / "pocket-base")
    assert model.config.model_type == "qwen2" and model.num_parameters() <= 3_000_000
    card = (DATA / "pocket-base" / "README.md").read_text()
    assert all(family in card for tier in POCKET.families.values() for family in tier)


def test_shipped_tokenizer_is_the_one_the_code_builds(tokenizer):
    shipped = AutoTokenizer.from_pretrained(DATA / POCKET.tokenizer)
    words = "Q1. <predicted_level>Level-1</predicted_level> 3 + 4 = 7. \\boxed{7} Ana 128"
    assert shipped(words).input_ids == tokenizer(words).input_ids
    assert shipped.get_vocab() == tokenizer.get_vocab()
    assert shipped.chat_template == tokenizer.chat_template
    assert len(load_tokenizer("pocket-base", POCKET.tokenizer)) == len(tokenizer)


def test_a_tokenizer_comes_with_its_checkpoint_or_from_the_world(tmp_path):
    assert tokenizer_name("Qwen/Qwen2.5-7B-Instruct", PAPER.tokenizer) == "Qwen/Qwen2.5-7B-Instruct"
    assert tokenizer_name("pocket-base", POCKET.tokenizer) == POCKET.tokenizer
    assert tokenizer_name(str(tmp_path), "gsm8k-bpe") == "gsm8k-bpe"
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert tokenizer_name(str(tmp_path), "gsm8k-bpe") == str(tmp_path)


def test_a_tokenizer_larger_than_its_model_is_refused():
    config = load_config("pocket-base")
    check_tokenizer(config, load_tokenizer(POCKET.tokenizer), "pocket-base")
    with pytest.raises(CheckpointError, match="'pocket-base' knows 264 tokens, but the tokenizer "
                                              "4,096: they do not belong together"):
        check_tokenizer(config, load_tokenizer("gsm8k-bpe"), "pocket-base")


def test_F29_no_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CheckpointError, match="name a local folder"):
            load_tokenizer("some-org/some-model")


def test_pins_are_the_same_everywhere():
    import tomllib

    import yaml
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = project["dependencies"] + project["optional-dependencies"]["dev"]
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert sorted(pins) == sorted(p for p in conda[-1]["pip"] if not p.startswith("-e"))
    assert all("==" in pin for pin in pins)


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")),
                         ids=lambda path: path.name)
def test_notebooks_were_executed_in_order(path):
    """nbval does not compare cells that were never executed."""
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not any(o["output_type"] == "error" or o.get("name") == "stderr" for o in outputs)
    for place in ("/root/", "/home/", "/tmp/", "/work/"):
        assert place not in json.dumps(outputs), "a machine's path stands in an output"


def test_printed_figures_are_those_of_the_commands():
    """README and notebook 00 print what `make exam`, the main table and the model card say."""
    from roi_lib.evaluation import exam_table
    table = exam_table(json.loads((DATA / "exam-base.json").read_text()))
    readme = (ROOT / "README.md").read_text()
    assert table in readme
    cells = json.loads((ROOT / "notebooks" / "00_start_here.ipynb").read_text())["cells"]
    printed = ["".join(o.get("text", "")) for c in cells for o in c.get("outputs", [])]
    assert table + "\n" in printed
    records = json.loads((DATA / "main-table" / "records.json").read_text())
    assert exam_table([r for r in records if r["order"] == "hard"]) in readme
    card = (DATA / "pocket-base" / "README.md").read_text().splitlines()
    heads = ("| tier", "| easy", "| medium", "| hard")
    families = [line for line in card if line.startswith(heads)]
    assert len(families) == 7 and all(line in readme for line in families)
