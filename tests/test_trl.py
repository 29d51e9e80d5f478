"""TRL's GRPOTrainer and our trainer: the same rollouts, the same gradient."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT, SMALL_TRL, TRAIN, log_of, tiny_model
from transformers import TrainerCallback, TrainerState

from roi_lib import rarl
from roi_lib.engines import engine_for
from roi_lib.experiments import benches
from roi_lib.generation import Request
from roi_lib.store.checkpoints import weights_hash
from roi_lib.store.files import newest_complete, verify_folder
from roi_lib.training import rarl as own
from roi_lib.training import trl
from roi_lib.worlds import PAPER, POCKET

pytestmark = pytest.mark.usefixtures("paid")
NAN = float("nan")


def gradient(model):
    """Of all that is learned, in one: embeddings are not."""
    return torch.cat([p.grad.flatten() for name, p in model.named_parameters()
                      if "embed_tokens" not in name])


class Gradient(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = gradient(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("change", [{}, {"scale": "std", "normalizer": "length"}])
def test_trl_and_we_have_the_same_gradient(env, tmp_path, dtype, change):
    recipe, theirs = replace(SMALL_TRL, steps=1, max_grad_norm=1e9, **change), Gradient()
    trainer = trl.make_trainer(env, tiny_model(env.tokenizer).to(dtype), recipe, tmp_path)
    trainer.add_callback(theirs)
    trainer.train()
    model = tiny_model(env.tokenizer).to(dtype)
    exams, budgets = rarl.training_exams(POCKET, recipe, 0)
    table = rarl.roll_out(env, engine_for(model, env.tokenizer), exams, budgets, recipe, 0)

    def distance(recipe):
        rarl.batch_gradient(model, table, recipe)
        ours = gradient(model)
        return float((theirs.found - ours).abs().max() / ours.abs().max())

    other = {} if change else {"scale": "std"}
    assert distance(recipe) < 1e-5 < 0.01 < distance(replace(SMALL_TRL, **other))


@pytest.fixture(scope="module")
def unbroken(env, paid, tmp_path_factory):
    work = tmp_path_factory.mktemp("trl") / "work"
    return work, trl.train(env, tiny_model(env.tokenizer).float(), SMALL_TRL, work)


def test_steps_of_trl_are_steps_of_ours(env, tiny, unbroken, tmp_path):
    ours = own.train(env, tiny, SMALL_TRL, tmp_path)
    torch.testing.assert_close(unbroken[1].state_dict(), ours.state_dict(), atol=2e-4, rtol=0)
    logs = log_of(unbroken[0]), log_of(tmp_path)
    theirs, ours = (list(log["grad_norm"]) for log in logs)
    assert theirs == pytest.approx(ours, rel=1e-3)
    other = ["grad_norm", "entropy", "level_entropy", "logprob_gap"]
    pd.testing.assert_frame_equal(*(log.drop(columns=other) for log in logs))


def test_two_processes_do_what_one_does(tiny, unbroken, tmp_path):
    """As `accelerate launch` starts them, on the CPU; each samples its own half of the exams."""
    (tmp_path / "train.py").write_text(TRAIN)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc_per_node", "2", str(tmp_path / "train.py"), "trl", str(tmp_path)],
                   check=True, timeout=600)
    verify_folder(tmp_path / "checkpoint-4")
    assert "rng_state_1.pth" in (tmp_path / "checkpoint-4" / "manifest.json").read_text()
    together = tiny.from_pretrained(tmp_path / "checkpoint-4").state_dict()
    torch.testing.assert_close(unbroken[1].state_dict(), together, atol=1e-5, rtol=0)
    assert len(log_of(tmp_path)) == 4


def test_lora_trains_the_adapters_alone(env, tiny, tmp_path):
    recipe = replace(SMALL_TRL, trl=replace(SMALL_TRL.trl, lora_rank=2, checkpointing=True))
    before = tiny_model(env.tokenizer).float().state_dict()
    after = trl.train(env, tiny, recipe, tmp_path).merge_and_unload().state_dict()
    names = {name for name in before if not torch.equal(before[name], after[name])}
    assert names and all("_proj" in name for name in names)


def test_a_run_whose_save_failed_goes_on_as_if_it_had_not(
        env, tiny, unbroken, tmp_path, monkeypatch, refusal):
    real = torch.save

    def full(content, path, *rest, **options):
        if str(path).endswith("checkpoint-4/optimizer.pt"):
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        real(content, path, *rest, **options)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="make room and run the same"):
        patch.setattr(torch, "save", full)
        trl.train(env, tiny, SMALL_TRL, tmp_path)
    assert newest_complete(tmp_path, "checkpoint-").name == "checkpoint-2"
    again = trl.train(env, tiny_model(env.tokenizer).float(), SMALL_TRL, tmp_path)
    verify_folder(tmp_path / "checkpoint-4")
    assert weights_hash(again) == weights_hash(unbroken[1])
    pd.testing.assert_frame_equal(log_of(tmp_path), log_of(unbroken[0]))
    assert "another start" in refusal(trl.train, env, again, SMALL_TRL, tmp_path)


def test_a_gradient_that_is_no_number_stops_before_it_is_saved(env, tiny, tmp_path):
    passes = []

    def spoil(gradient):
        passes.append(gradient)  # two a step: the sixth is the last of step 3
        return gradient * (NAN if len(passes) == 6 else 1)

    tiny.model.norm.weight.register_hook(spoil)
    with pytest.raises(FloatingPointError, match="nan at step 3; lower"):
        trl.train(env, tiny, replace(SMALL_TRL, save_every=1), tmp_path)
    assert newest_complete(tmp_path, "checkpoint-").name == "checkpoint-2"
    assert not (tmp_path / "checkpoint-3").exists()


def test_a_sampler_that_is_another_policy_is_noticed(env, tmp_path, recwarn):
    """As TRL logs it with vLLM; without vLLM it says nothing, and nothing is told."""
    rollouts, state = trl.ExamRollouts(env, SMALL_TRL), TrainerState(max_steps=6)
    rollouts.row = dict.fromkeys(own.COLUMNS, 1.0)
    report = trl.StepReport(rollouts)
    report.on_train_begin(SimpleNamespace(output_dir=tmp_path), state, None)
    logs = {"loss": 0.0, "grad_norm": 0.1, "frac_reward_zero_std": 0.0, "entropy": 0.5}
    for told, gap in ((0, {}), (0, {trl.GAP: 0.009}), (1, {trl.GAP: 0.02}), (2, {trl.GAP: NAN})):
        report.on_log(None, state, None, logs | gap)
        assert sum("sampler and trainer disagree" in str(w.message) for w in recwarn) == told
    assert log_of(tmp_path)["logprob_gap"].fillna(-1).tolist() == [-1, 0.009, 0.02, -1]


def test_settings_that_hurt_by_default_are_set(tmp_path, monkeypatch, refusal):
    found = trl.grpo_config(replace(PAPER.rarl, trl=SMALL_TRL.trl), tmp_path)
    assert (found.loss_type, found.scale_rewards, found.beta) == ("dr_grpo", "none", 0.0)
    assert found.num_iterations == 1 and not found.mask_truncated_completions
    assert (found.top_p, found.top_k, found.max_completion_length) == (1.0, 0, 1024)
    assert not found.bf16 and not found.gradient_checkpointing and not found.shuffle_dataset
    assert found.per_device_train_batch_size * found.gradient_accumulation_steps == 256
    assert found.steps_per_generation == found.gradient_accumulation_steps
    with_vllm = trl.grpo_config(PAPER.rarl, tmp_path, "colocate")
    assert with_vllm.use_vllm and with_vllm.vllm_importance_sampling_mode == "token_truncate"
    assert "torch, colocate, server" in refusal(trl.grpo_config, SMALL_TRL, tmp_path, "both")
    processes = load_config_from_file(str(ROOT / "docs" / "accelerate.yaml")).num_processes
    assert PAPER.rarl.exams % processes == 64 % processes == 0
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "not divide among 3 processes" in refusal(trl.grpo_config, SMALL_TRL, tmp_path)


def test_prompts_are_those_of_our_own_trainer_and_failed_rollouts_go_unscored(
        env, tiny, tmp_path, monkeypatch, refusal):
    trainer = trl.make_trainer(env, tiny, SMALL_TRL, tmp_path)
    prompts = trainer.train_dataset["prompt"]
    steps = [rarl.training_exams(POCKET, SMALL_TRL, step) for step in range(4)]
    assert prompts[:] == [env.message(exam, budget, "roi") for step in steps
                          for exam, budget in zip(*step, strict=True)]
    assert len({"Budget: 16 " in prompt for prompt in prompts}) == 2
    monkeypatch.setattr(rarl, "problem_rewards", lambda table, *_: (table["rollout"] / 3).where(
        table["rollout"] > 0))
    out = trainer.rollout_func([m for m in prompts[:2] for _ in range(4)], trainer)
    assert trainer.reward_funcs[0](out["reward"]) == [None, 1.0, 2.0, 3.0] * 2
    assert all(out["completion_ids"]) and out["logprobs"] is None
    assert "the prompts of step 0 are not its exams, 4 times each" in refusal(
        trainer.rollout_func, [m for m in prompts[2:4] for _ in range(4)], trainer)


def test_vllm_of_the_trainer_is_cut_at_the_budget(env):
    def generate(prompts, images, n):
        answers = [[7, 8, 9, 10], [7, eos, 9, 9]]
        return prompts, answers, [[[-0.5]] * 4 for _ in answers], None

    eos, vllm = env.tokenizer.eos_token_id, SimpleNamespace(generate=generate)
    engine = trl.TrainerVLLM(SimpleNamespace(vllm_generation=vllm), [eos])
    (first, second), = engine.generate([Request((1, 2), 3, n=2)])
    assert first.ids == (7, 8, 9) and not first.finished and first.overrun == 1
    assert second.ids == (7, eos) and second.finished and vllm.max_completion_length == 3
    assert engine.logprobs == [[-0.5] * 3, [-0.5] * 2]


def test_the_benchmark_measures_all_three_on_the_same_prompts(env, tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    recipe = replace(SMALL_TRL, steps=2, budgets=(16,))
    result = benches.rarl(1, recipe, str(tmp_path))
    assert set(result["seconds_per_step"]) == {"trl", "trl_with_our_rollouts", "ours"}
    trainer = benches.plain_trainer(env, tiny, recipe, tmp_path / "work")
    ids, *_ = trainer._tokenize_prompts(trainer.train_dataset["prompt"][:2])
    exams, budgets = rarl.training_exams(POCKET, recipe, 0)
    assert [*map(tuple, ids)] == [env.prompt(exam, budget, "roi")
                                  for exam, budget in zip(exams, budgets, strict=True)]
