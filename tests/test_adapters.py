"""Adapters in place of weights, and runs that are given little time."""

import json
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pandas as pd
import psutil
import pytest
import torch
from conftest import ROOT, SMALL_RARL, SMALL_TRL, log_of, tiny_model
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from roi_lib import rarl as core
from roi_lib.__main__ import main
from roi_lib.engines import EngineConfig, LoggedEngine, RunLog, engine_for
from roi_lib.engines.llama import sample_in_blocks
from roi_lib.engines.vllm import vllm_installed
from roi_lib.exams import draw_papers, in_orders
from roi_lib.generation import Request, sample_token
from roi_lib.sitting import sit
from roi_lib.store import checkpoints
from roi_lib.store.checkpoints import (
    load_adapters,
    load_environment,
    load_model,
    merge_adapters,
    model_hash,
    weights_hash,
)
from roi_lib.store.deadline import Deadline, OutOfTime
from roi_lib.training import common, rarl, trl
from roi_lib.training.mft import train_mft
from roi_lib.worlds import PAPER, POCKET

NOW = Deadline.after(0)
IDS = torch.tensor([[5, 6, 7, 8, 9]])


# ---------------------------------------------------------------- little time
def again_and_again(run):
    """What a run returns in the end, if it is begun anew each time it stops; and how often."""
    for tries in count(1):
        try:
            return run(), tries
        except OutOfTime:
            assert tries < 20


def test_a_deadline_is_minutes_from_now(refusal):
    assert NOW.over and not Deadline.after(1).over and not Deadline.after(None).over
    Deadline.after(1).check("nothing")
    with pytest.raises(OutOfTime, match="3 of 4"):
        NOW.check("3 of 4")
    assert "0 or more" in refusal(Deadline.after, -1)
    assert "0 or more" in refusal(Deadline.after, float("nan"))


def test_a_log_goes_on_where_time_ran_out(env, engine, tmp_path):
    requests = [Request(env.prompt(exam, 24), 24, (i,)) for i, exam in enumerate(
        in_orders(draw_papers(POCKET, 4), ["hard"], 0))]

    def answers(deadline, name):
        log = RunLog(tmp_path / name, {"world": "pocket"})
        return LoggedEngine(engine, log, deadline=deadline).generate(requests)

    with pytest.raises(OutOfTime, match="1 of 4 responses are in .*short"):
        answers(NOW, "short")
    found, tries = again_and_again(lambda: answers(NOW, "short"))
    assert tries == 3 and found == answers(Deadline.after(None), "long")
    assert sorted((tmp_path / "short").read_text().splitlines()) == sorted(
        (tmp_path / "long").read_text().splitlines())


def test_tokens_are_counted_while_they_are_made(env, engine, tmp_path):
    told = []
    engine.on_tokens = told.append
    (exam,) = in_orders(draw_papers(POCKET, 1), ["hard"], 0)
    table = sit(env, engine, [exam], 24, n=3)
    del engine.on_tokens
    assert sum(told) == table.drop_duplicates("rollout")["tokens"].sum() and told[0] == 3


@pytest.mark.parametrize("train, recipe", [(rarl.train, SMALL_RARL), (trl.train, SMALL_TRL)])
def test_training_in_pieces_is_training_in_one(paid, env, tmp_path, train, recipe):
    def run(name, *deadline):
        arguments = (env, tiny_model(env.tokenizer).float(), recipe, tmp_path / name, None)
        return train(*arguments, *deadline) if train is rarl.train else train(
            *arguments, *(["torch", None, *deadline] if deadline else []))

    pieces, tries = again_and_again(lambda: run("pieces", *(
        [None, NOW] if train is rarl.train else [NOW])))
    assert tries == recipe.steps
    assert weights_hash(pieces) == weights_hash(run("whole"))
    pd.testing.assert_frame_equal(log_of(tmp_path / "pieces"), log_of(tmp_path / "whole"))


def test_the_command_line_says_that_there_is_more_to_do(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["exam", "--exams", "4", "--budgets", "64", "--minutes", "0", "--workers", "1",
              "--log", str(tmp_path)])
    assert ended.value.code == 75
    told = capsys.readouterr().err
    assert "1 of 12 responses are in" in told and "the same command goes on" in told


# ---------------------------------------------------------------- adapters
def perturbed(model, rank=2):
    """The model with adapters that change what it says."""
    model = get_peft_model(model, common.lora(model, rank))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    return model.eval()


@pytest.fixture
def published(env, tmp_path):
    """A base, and adapters on it as a training publishes them: two folders."""
    base, out, work = tmp_path / "base", tmp_path / "out", tmp_path / "work"
    tiny_model(env.tokenizer).bfloat16().save_pretrained(base)
    env.tokenizer.save_pretrained(base)
    common.TrainingLog(work, ["step", "seconds"]).append({"step": 1})
    model = perturbed(load_model(str(base)))
    logits = model(IDS).logits
    common.publish(out, model, work, SMALL_RARL, str(base), {}, "", "About.", "hand")
    return base, out, logits


def test_adapters_alone_are_published_and_merge_into_their_base(published, env):
    base, out, logits = published
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "base.json", "log.csv",
        "manifest.json"]
    weights = load_file(out / "adapter_model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    facts = json.loads((out / "base.json").read_text())
    assert facts == {"name": str(base), "sha256": weights_hash(load_model(str(base)))}
    assert f"base_model: {base}" in (out / "README.md").read_text()
    before = load_model(str(base))(IDS).logits
    for model in (load_model(str(out)), load_adapters(str(out))):
        assert (model(IDS).logits - logits).abs().max() < 0.1 < (before - logits).abs().max()
    merged = load_model(str(out), "float32")
    assert not isinstance(merged, PeftModel) and all(p.requires_grad for p in merged.parameters())
    assert load_environment(POCKET, str(out)).tokenizer.get_vocab() == env.tokenizer.get_vocab()
    assert model_hash(str(out)) != model_hash(str(base))


def test_merged_adapters_are_a_checkpoint_for_every_engine(published, env, tmp_path, refusal):
    base, out, logits = published
    merge_adapters(str(out), tmp_path / "merged")
    assert (load_model(str(tmp_path / "merged"))(IDS).logits - logits).abs().max() < 0.1
    assert load_model(str(tmp_path / "merged")).dtype == torch.bfloat16
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    assert "nothing to merge" in refusal(merge_adapters, str(base), tmp_path / "other")
    if vllm_installed():
        assert f"roi_lib merge {out} OUT" in refusal(EngineConfig("vllm").make, str(out),
                                                     env.tokenizer, "float32")


def test_adapters_of_another_base_are_told(published, env, refusal):
    base, out, _ = published
    tiny_model(env.tokenizer, seed=1).bfloat16().save_pretrained(base)
    with pytest.warns(UserWarning, match="trained on other weights"):
        load_model(str(out))
    wide = tiny_model(env.tokenizer).config
    wide.intermediate_size = 64
    type(tiny_model(env.tokenizer))(wide).bfloat16().save_pretrained(base)
    with pytest.warns(UserWarning, match="trained on other weights"):
        assert "do not fit" in refusal(load_model, str(out))


def test_rarl_goes_on_with_the_adapters_of_mft(paid, published, tmp_path):
    base, out, _ = published
    recipe = replace(SMALL_TRL, steps=2, learning_rate=1e-2, budgets=(16, 24), trl=replace(
        SMALL_TRL.trl, lora_rank=2, bf16=True))
    rarl.train_rarl(POCKET, tmp_path / "rarl", tmp_path / "rarl-work", recipe, str(out), 1)
    before, after = (load_file(folder / "adapter_model.safetensors")
                     for folder in (out, tmp_path / "rarl"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert (out / "base.json").read_text() == (tmp_path / "rarl" / "base.json").read_text()


def test_the_engine_decodes_with_adapters_as_with_merged_weights(env):
    model = perturbed(tiny_model(env.tokenizer))
    exams = in_orders(draw_papers(POCKET, 3), ["hard"], 0)
    live = sit(env, engine_for(model, env.tokenizer), exams, 24)
    merged = sit(env, engine_for(model.merge_and_unload(), env.tokenizer), exams, 24)
    pd.testing.assert_frame_equal(live, merged)
    plain = sit(env, engine_for(tiny_model(env.tokenizer), env.tokenizer), exams, 24)
    assert list(plain["ids"]) != list(live["ids"])


def test_the_engine_of_a_folder_takes_adapters(published, env):
    engine = EngineConfig().make(str(published[1]), env.tokenizer, "float32")
    assert core.STYLE == "roi" and len(engine.generate([Request((5, 6), 4)])[0][0].ids) <= 4


# ---------------------------------------------------------------- the recipe on paper
def test_the_table_of_the_recipe_is_the_recipe():
    text = (ROOT / "docs" / "recipe.md").read_text()
    rows = {}
    for part in text.split("\n## ")[1:]:
        cells = [line.split("|")[1:4] for line in part.splitlines() if line.startswith("| ")]
        rows[part.splitlines()[0]] = {name.strip(): ours.strip() for name, _, ours in cells}
    mft, rarl_rows, trl_rows = (rows[title] for title in (
        "MFT (`PAPER.mft`)", "RARL (`PAPER.rarl`)", "TRL (`PAPER.rarl.trl`)"))
    for recipe, told in ((PAPER.mft, mft), (PAPER.rarl, rarl_rows), (PAPER.rarl.trl, trl_rows)):
        fields = {name: str(value) for name, value in vars(recipe).items() if name != "trl"}
        assert fields.items() <= told.items()
    exam = rows["The exam"]
    for name in ("budgets", "level_edges", "centroids"):
        assert exam[name] == str(getattr(PAPER, name))


def test_what_does_not_fit_is_refused_before_it_is_loaded(tmp_path, monkeypatch, refusal):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=2**26))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(checkpoints, "load_model", None)  # nothing is loaded
    for train, recipe, fits in ((train_mft, POCKET.mft, "rows_at_once 1"), (
            rarl.train_rarl, replace(POCKET.rarl, trl=PAPER.rarl.trl), "cpu2")):
        told = refusal(train, POCKET, tmp_path / "out", tmp_path / "work", recipe, "pocket-base")
        assert f"what would fit: {fits}" in told, told
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- half precision
@pytest.mark.parametrize("vocabulary", [256, 300])
def test_sampling_in_blocks_follows_the_same_distribution(vocabulary):
    """Each uniform number gives the token that the plain way gives, but for float32's rounding."""
    torch.manual_seed(0)
    logits = torch.randn(1, vocabulary).bfloat16()
    logits[0, 130:140] = -torch.inf  # these have no weight
    uniform = torch.cat((torch.rand(4_000).double(), torch.tensor([0.0, 1.0]).double()))
    plain = sample_token(logits.expand(len(uniform), -1).float(), uniform, 0.7)
    fast = sample_in_blocks(logits.expand(len(uniform), -1), uniform, 0.7)
    assert (plain == fast).double().mean() > 0.999 and len(set(fast.tolist())) > 50
    assert not ((130 <= fast) & (fast < 140)).any() and fast.max() < vocabulary
    assert torch.equal(sample_in_blocks(logits, uniform[:1], 0), logits.argmax(-1))
