"""TRL's GRPOTrainer and our trainer: the same rollouts, the same gradient."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import test_rarl
import torch
from conftest import ROOT
from test_rarl import difference, naive_gradient, spread, tiny
from test_training import FULL, fill_disk
from transformers import TrainerCallback, TrainerState

from roi_lib import bench_rarl, rarl, rarl_loop
from roi_lib.checkpoints import load_model, newest_complete, verify_folder
from roi_lib.exams import encode_prompt, exam_prompt
from roi_lib.generation import Request, TorchGenerator
from roi_lib.rarl import batch_gradient, roll_out, training_exams
from roi_lib.rarl_loop import COLUMNS, fingerprint
from roi_lib.rarl_trl import (
    GAP,
    ExamRollouts,
    StepReport,
    TrainerVLLM,
    exam_dataset,
    exam_reward,
    grpo_config,
    make_trainer,
    train,
)
from roi_lib.worlds import PAPER, POCKET, TRLRecipe

TRL = TRLRecipe(rows_at_once=4, lora_rank=0, bf16=False, checkpointing=False)
SMALL = replace(test_rarl.SMALL, trl=TRL)
UNCLIPPED = replace(SMALL, steps=1, max_grad_norm=1e9)


@pytest.fixture(autouse=True)
def rewards(monkeypatch):
    """Rewards that a random model earns; TRL's word that `rollout_func` is young is known."""
    monkeypatch.setattr(rarl, "group_rewards", spread)
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


class Gradients(TrainerCallback):
    """Keeps the gradient of the first update."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.of = {name: p.grad.clone() for name, p in model.named_parameters()}


def trl_gradient(tokenizer, recipe, work, dtype):
    """The gradient of TRL's first update from the tiny model, and the model before it."""
    kept = Gradients()
    trainer = make_trainer(POCKET, tokenizer, tiny(tokenizer, dtype), recipe, work)
    trainer.add_callback(kept)
    trainer.train()
    return kept.of


def first_groups(tokenizer, recipe, dtype):
    """The rollouts of step 0, as both trainers make them."""
    model = tiny(tokenizer, dtype)
    exams, budget = training_exams(POCKET, recipe, 0)
    return model, roll_out(POCKET, tokenizer, TorchGenerator.of(model, tokenizer), exams, budget,
                           recipe, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("change", [{}, {"scale": "std", "normalizer": "length"}])
def test_trl_and_we_have_the_same_gradient(tokenizer, tmp_path, dtype, change):
    recipe = replace(UNCLIPPED, **change)
    theirs = trl_gradient(tokenizer, recipe, tmp_path, dtype)
    model, groups = first_groups(tokenizer, recipe, dtype)
    batch_gradient(model, groups, recipe)
    assert difference(model, theirs) < 1e-5
    by_hand = naive_gradient(model, groups, 24, recipe.scale, recipe.normalizer)
    assert max(float(g.abs().max()) for g in by_hand.values()) > 1e-3
    assert difference(model, theirs) < 1e-5  # .grad is the hand-written one now
    other = {"scale": "std"} if not change else {"scale": "none", "normalizer": "constant"}
    batch_gradient(model, groups, replace(recipe, **other))
    assert difference(model, theirs) > 0.01


def test_two_steps_of_trl_are_two_steps_of_ours(tokenizer, tmp_path):
    recipe = replace(SMALL, steps=2)
    theirs = train(POCKET, tokenizer, tiny(tokenizer), recipe, tmp_path / "trl")
    ours = tiny(tokenizer)
    rarl_loop.train(POCKET, tokenizer, ours, recipe, tmp_path / "ours")
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=0)
    rows = [(tmp_path / name / "log.csv").read_text().splitlines() for name in ("trl", "ours")]
    assert rows[0][0] == rows[1][0] and len(rows[0]) == len(rows[1]) == 3
    same = [c for c in COLUMNS if c not in ("grad_norm", "entropy", "logprob_gap", "seconds")]
    for theirs, ours in zip(*(r[1:] for r in rows), strict=True):
        theirs, ours = (dict(zip(COLUMNS, row.split(","), strict=True))
                        for row in (theirs, ours))
        assert [theirs[c] for c in same] == [ours[c] for c in same]
        assert float(theirs["grad_norm"]) == pytest.approx(float(ours["grad_norm"]), rel=1e-3)


TWO = """
import os, sys, time
from pathlib import Path
from roi_lib import rarl_trl
from roi_lib.tokenizer import build_tokenizer
from test_rarl_trl import POCKET, SMALL, rarl, replace, spread, tiny, train
if os.environ["RANK"] == "1":
    rarl_trl.StepLog = None  # the log is the first process's
    save = rarl_trl.GRPOTrainer._save_rng_state
    rarl_trl.GRPOTrainer._save_rng_state = lambda *a: (time.sleep(1), save(*a))
rarl.group_rewards, tokenizer = spread, build_tokenizer(POCKET)
model = train(POCKET, tokenizer, tiny(tokenizer), replace(SMALL, steps=2), Path(sys.argv[1]))
if os.environ["RANK"] == "0":
    model.save_pretrained(Path(sys.argv[1]) / "final")
"""


def test_two_processes_end_with_the_weights_of_one(tokenizer, tmp_path):
    """As `accelerate launch` starts them, on the CPU; each samples its own half of the exams.

    The second is slow to save, and its file must be in the manifest all the same.
    """
    alone = train(POCKET, tokenizer, tiny(tokenizer), replace(SMALL, steps=2), tmp_path / "one")
    (tmp_path / "two.py").write_text(TWO)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc_per_node", "2", str(tmp_path / "two.py"), str(tmp_path / "two")],
                   check=True, env=environment, timeout=600)
    verify_folder(tmp_path / "two" / "checkpoint-2")
    assert "rng_state_1.pth" in json.loads(
        (tmp_path / "two" / "checkpoint-2" / "manifest.json").read_text())
    assert len((tmp_path / "two" / "log.csv").read_text().splitlines()) == 3
    together = load_model(str(tmp_path / "two" / "final"), "float32")
    for a, b in zip(alone.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert fingerprint(together) != fingerprint(tiny(tokenizer))


def test_the_accelerate_file_fits_the_recipe():
    from accelerate.commands.config.config_args import load_config_from_file

    found = load_config_from_file(str(ROOT / "docs" / "accelerate.yaml"))
    assert found.num_processes == 4 and found.mixed_precision == "bf16"
    recipe, rows = PAPER.rarl, PAPER.rarl.exams * PAPER.rarl.rollouts
    assert recipe.exams % found.num_processes == 0
    assert rows % (found.num_processes * recipe.trl.rows_at_once) == 0


def test_lora_trains_the_adapters_and_merges_them(tokenizer, tmp_path):
    recipe = replace(SMALL, steps=2, trl=replace(TRL, lora_rank=2, checkpointing=True))
    before = tiny(tokenizer)
    model = train(POCKET, tokenizer, tiny(tokenizer), recipe, tmp_path)
    names = {n for n, p in model.named_parameters()
             if not torch.equal(p, dict(before.named_parameters())[n])}
    assert names and all("_proj" in name for name in names)


def test_F3_a_continued_trl_run_equals_an_unbroken_one(tokenizer, tmp_path, monkeypatch):
    whole = fingerprint(train(POCKET, tokenizer, tiny(tokenizer),
                              replace(SMALL, steps=4), tmp_path / "whole"))
    recipe, calls = replace(SMALL, steps=4), []
    real = rarl.training_exams

    def killed(self, prompts, trainer):
        calls.append(prompts)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return rollouts(self, prompts, trainer)

    rollouts = ExamRollouts.__call__
    monkeypatch.setattr(ExamRollouts, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        train(POCKET, tokenizer, tiny(tokenizer), recipe, tmp_path / "killed")
    assert newest_complete(tmp_path / "killed", "checkpoint-").name == "checkpoint-2"
    monkeypatch.setattr(ExamRollouts, "__call__", rollouts)
    again = train(POCKET, tokenizer, tiny(tokenizer), recipe, tmp_path / "killed")
    assert fingerprint(again) == whole and real is rarl.training_exams
    assert len((tmp_path / "killed" / "log.csv").read_text().splitlines()) == 5
    with pytest.raises(ValueError, match="another recipe"):
        train(POCKET, tokenizer, tiny(tokenizer), SMALL, tmp_path / "killed")


@pytest.fixture(scope="module")
def four_steps(tokenizer, tmp_path_factory):
    """The folder of a finished run of four steps, and the hash of its weights."""
    work = tmp_path_factory.mktemp("trl") / "work"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rarl, "group_rewards", spread)
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        model = train(POCKET, tokenizer, tiny(tokenizer), replace(SMALL, steps=4), work)
    return work, fingerprint(model)


def goes_on(tokenizer, work, four_steps):
    """The same call again ends with the weights of the unbroken run, its log and states whole."""
    model = train(POCKET, tokenizer, tiny(tokenizer), replace(SMALL, steps=4), work)
    verify_folder(work / "checkpoint-4")
    lines = (work / "log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == ["1", "2", "3", "4"]
    return fingerprint(model) == four_steps[1]


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "model.safetensors",
                                  "manifest.json"])
def test_F1_F2_a_damaged_checkpoint_is_passed_over(tokenizer, four_steps, tmp_path, name):
    work = shutil.copytree(four_steps[0], tmp_path / "work")
    path = work / "checkpoint-4" / name
    if name == "rng_state.pth":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.warns(UserWarning, match="passing over an incomplete checkpoint.*checkpoint-4"):
        assert goes_on(tokenizer, work, four_steps)


@pytest.mark.parametrize("error", FULL[:1] + FULL[2:3], ids=lambda error: type(error).__name__)
@pytest.mark.filterwarnings("ignore:passing over an incomplete checkpoint")
def test_F4_a_disk_full_while_saving_leaves_the_last_checkpoint(
        tokenizer, four_steps, tmp_path, monkeypatch, error):
    with monkeypatch.context() as patch:
        fill_disk(patch, "checkpoint-4/optimizer.pt", error)
        with pytest.raises(OSError, match="step 4 could not be written .* make room"):
            train(POCKET, tokenizer, tiny(tokenizer), replace(SMALL, steps=4), tmp_path)
    verify_folder(tmp_path / "checkpoint-2")
    assert goes_on(tokenizer, tmp_path, four_steps)


def test_F4_a_disk_full_while_logging_leaves_the_last_checkpoint(
        tokenizer, four_steps, tmp_path, monkeypatch):
    def full(self, row):
        if row["step"] == 4:
            with self.path.open("a") as stream:
                stream.write("4,16,1.")
            raise FULL[0]
        append(self, row)

    append = rarl_loop.StepLog.append
    with monkeypatch.context() as patch:
        patch.setattr(rarl_loop.StepLog, "append", full)
        with pytest.raises(OSError, match="step 4 could not be written .* make room"):
            train(POCKET, tokenizer, tiny(tokenizer), replace(SMALL, steps=4), tmp_path)
    verify_folder(tmp_path / "checkpoint-2")
    assert goes_on(tokenizer, tmp_path, four_steps)


def test_F24_a_gradient_that_is_no_number_stops_before_it_is_saved(
        tokenizer, four_steps, tmp_path):
    """Two backward passes a step: the sixth is the last of step 3."""
    model, passes = tiny(tokenizer), []

    def spoil(gradient):
        passes.append(gradient)
        return gradient * (float("nan") if len(passes) == 6 else 1)

    model.model.norm.weight.register_hook(spoil)
    recipe = replace(SMALL, steps=4)
    with pytest.raises(FloatingPointError, match="the gradient is nan at step 3, budget 16; lower"):
        train(POCKET, tokenizer, model, replace(recipe, save_every=1), tmp_path / "a")
    assert newest_complete(tmp_path / "a", "checkpoint-").name == "checkpoint-2"
    assert not (tmp_path / "a" / "checkpoint-3").exists()


def test_F24_a_loss_that_is_no_number_stops_the_run(tokenizer, tmp_path, monkeypatch):
    """An infinite reward; the trainer must not log another loss in its place."""
    def rewards(world, sittings, *rest):
        return [math.inf, *spread(world, sittings)[1:]]

    monkeypatch.setattr(rarl, "group_rewards", rewards)
    with pytest.raises(FloatingPointError, match="the loss is (nan|inf) at step 1, budget 16"):
        train(POCKET, tokenizer, tiny(tokenizer), SMALL, tmp_path)


def test_F24_a_broken_model_stops_with_the_step(tokenizer, tmp_path):
    model = tiny(tokenizer)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="step 0, sampling 2 exams under budget 16: the"):
        train(POCKET, tokenizer, model, SMALL, tmp_path)


@pytest.mark.parametrize("gap", [0.02, float("nan")])
def test_F27_a_sampler_that_is_another_policy_is_noticed(tokenizer, tmp_path, gap, recwarn):
    """As TRL logs it with vLLM; without vLLM it says nothing, and nothing is told."""
    rollouts = ExamRollouts(POCKET, tokenizer, replace(SMALL, keep=()))
    rollouts.row = {c: 1.0 for c in COLUMNS} | {"budget": 24}
    report, state = StepReport(rollouts, tmp_path / "log.csv", 0), TrainerState(max_steps=6)
    report.on_train_begin(None, state, None)
    state.global_step = 1
    logs = {"loss": 0.0, "grad_norm": 0.1, "step_time": 1.0, "frac_reward_zero_std": 0.0,
            "entropy": 0.5}
    report.on_log(None, state, None, logs)
    state.global_step = 2
    report.on_log(None, state, None, logs | {GAP: 0.009})
    assert not [w for w in recwarn if "disagree" in str(w.message)]
    state.global_step = 3
    with pytest.warns(UserWarning, match=f"sampler and trainer disagree by {gap} nats"):
        report.on_log(None, state, None, logs | {GAP: gap})
    rows = [line.split(",") for line in report.log.path.read_text().splitlines()]
    column = rows[0].index("logprob_gap")
    assert [row[column] for row in rows[1:]] == ["", "0.009", "0.02" if gap == 0.02 else ""]


def test_settings_that_hurt_by_default_are_set(tmp_path):
    recipe = grpo_config(replace(PAPER.rarl, trl=TRL), tmp_path)
    assert (recipe.loss_type, recipe.scale_rewards, recipe.beta) == ("dr_grpo", "none", 0.0)
    assert recipe.num_iterations == 1 and not recipe.mask_truncated_completions
    assert (recipe.top_p, recipe.top_k, recipe.max_completion_length) == (1.0, 0, 1024)
    assert not recipe.bf16 and not recipe.gradient_checkpointing and not recipe.shuffle_dataset
    assert recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps == 256
    assert recipe.steps_per_generation == recipe.gradient_accumulation_steps
    with_vllm = grpo_config(replace(PAPER.rarl, trl=TRL), tmp_path, "colocate")
    assert with_vllm.use_vllm and with_vllm.vllm_mode == "colocate"
    assert with_vllm.vllm_importance_sampling_mode == "token_truncate"


def test_rows_that_do_not_divide_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="do not divide among 1 processes at 7 rows"):
        grpo_config(replace(SMALL, trl=replace(TRL, rows_at_once=7)), tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="among 3 processes"):
        grpo_config(SMALL, tmp_path)
    with pytest.raises(ValueError, match="unknown engine 'both'; choose from torch, colocate"):
        grpo_config(SMALL, tmp_path, "both")


def test_the_dataset_is_the_exams_of_our_own_trainer():
    prompts = exam_dataset(POCKET, SMALL)["prompt"]
    exams, budget = training_exams(POCKET, SMALL, 3)
    assert prompts[6:8] == [exam_prompt(POCKET, e, budget, "roi") for e in exams]


def test_prompts_of_another_step_are_refused(tokenizer, tmp_path):
    trainer = make_trainer(POCKET, tokenizer, tiny(tokenizer), SMALL, tmp_path)
    prompts = exam_dataset(POCKET, SMALL)["prompt"]
    with pytest.raises(ValueError, match="the prompts of step 0 are not its exams, 4 times each"):
        trainer.rollout_func([p for p in prompts[2:4] for _ in range(4)], trainer)


def test_F22_failed_rollouts_reach_trl_as_unscored(tokenizer, tmp_path, monkeypatch):
    nothing = float("nan")
    monkeypatch.setattr(rarl, "group_rewards", lambda *a: [nothing, 1.0, 2.0, 3.0])
    trainer = make_trainer(POCKET, tokenizer, tiny(tokenizer), SMALL, tmp_path)
    prompts = exam_dataset(POCKET, SMALL)["prompt"]
    out = trainer.rollout_func([p for p in prompts[:2] for _ in range(4)], trainer)
    assert exam_reward(out["reward"]) == [None, 1.0, 2.0, 3.0] * 2
    assert all(out["completion_ids"]) and out["logprobs"] is None


def test_vllm_of_the_trainer_is_cut_at_the_budget(tokenizer):
    eos = tokenizer.eos_token_id

    class Engine:
        max_completion_length = 99

        def generate(self, prompts, images, n):
            answers = [[7, 8, 9, 10], [7, eos, 9, 9]] * (len(prompts) // 2)
            return prompts, answers, [[[-0.5]] * 4 for _ in answers], None

    engine = Engine()
    generator = TrainerVLLM(type("Trainer", (), {"vllm_generation": engine})(), [eos])
    (first, second), = generator.generate([Request((1, 2), 3, n=2)])
    assert first.ids == (7, 8, 9) and not first.finished and first.overrun == 1
    assert second.ids == (7, eos) and second.finished
    assert engine.max_completion_length == 3
    assert generator.logprobs == [[-0.5] * 3, [-0.5] * 2]


def test_the_benchmark_measures_all_three(tokenizer, tmp_path, monkeypatch):
    tiny(tokenizer).save_pretrained(tmp_path)
    recipe = replace(SMALL, steps=2, budgets=(16,))
    monkeypatch.setattr(bench_rarl, "group_rewards", spread)
    result = bench_rarl.bench(1, recipe, str(tmp_path))
    assert set(result["seconds_per_step"]) == {"trl", "trl_with_our_rollouts", "ours"}
    assert min(result["seconds_per_step"].values()) > 0 < result["ratio"]


def test_the_benchmark_gives_trl_the_same_prompts(tokenizer, tmp_path):
    exams, budget = training_exams(POCKET, SMALL, 0)
    texts = [bench_rarl.prompt_text(POCKET, tokenizer, e, budget) for e in exams]
    trainer = bench_rarl.trl_with_its_own_generation(
        POCKET, tokenizer, tiny(tokenizer), replace(SMALL, steps=1), tmp_path)
    ids, *_ = trainer._tokenize_prompts(texts)
    assert ids == [encode_prompt(tokenizer, exam_prompt(POCKET, e, budget, "roi")) for e in exams]
