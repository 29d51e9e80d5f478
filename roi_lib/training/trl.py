"""RARL through TRL's `GRPOTrainer`, for models that need LoRA, vLLM, or several GPUs. Exams,
rollouts, rewards and log are those of `training.rarl`; a test holds the two gradients together."""

import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from roi_lib.engines import engine_for
from roi_lib.exams import Environment, Exam
from roi_lib.generation import Engine, Request, Stream, all_eos_ids, within_budget
from roi_lib.rarl import STYLE, exam_rewards, roll_out, training_exams
from roi_lib.sitting import responses
from roi_lib.store.checkpoints import weights_hash
from roi_lib.store.deadline import NEVER, Deadline
from roi_lib.training import common
from roi_lib.training.rarl import COLUMNS, SHOWN, check_gap, describe
from roi_lib.worlds import RARLRecipe, check_choice

GAP = "sampling/sampling_logp_difference/mean"  # of vLLM and trainer, as TRL's log has it


def grpo_config(recipe: RARLRecipe, work: Path, engine: str = "torch",
                vllm_url: str | None = None) -> GRPOConfig:
    """The recipe in TRL's terms. `ValueError`: rows that do not divide, or no such engine."""
    trl, rows = recipe.trl, recipe.exams * recipe.rollouts
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # as accelerate and torchrun set it
    check_choice("engine", engine, ("torch", "colocate", "server"))
    if recipe.exams % processes or rows % (processes * trl.rows_at_once):
        raise ValueError(f"{recipe.exams} exams x {recipe.rollouts} rollouts do not divide among "
                         f"{processes} processes; change exams or trl.rows_at_once")
    return GRPOConfig(
        output_dir=str(work), max_steps=recipe.steps, seed=recipe.seed, shuffle_dataset=False,
        per_device_train_batch_size=trl.rows_at_once, num_generations=recipe.rollouts,
        gradient_accumulation_steps=rows // (processes * trl.rows_at_once), num_iterations=1,
        # Dr. GRPO takes both: the loss type alone would still divide by the standard deviation
        loss_type="dr_grpo" if recipe.normalizer == "constant" else "grpo",
        scale_rewards="none" if recipe.scale == "none" else "group",
        max_completion_length=max(recipe.budgets),  # the constant normaliser
        beta=0.0, mask_truncated_completions=False,  # a response cut by the budget must count
        temperature=recipe.temperature, top_p=1.0, top_k=0, weight_decay=0.0,
        learning_rate=recipe.learning_rate, lr_scheduler_type="linear",
        max_grad_norm=recipe.max_grad_norm, bf16=trl.bf16, ddp_find_unused_parameters=False,
        gradient_checkpointing=trl.checkpointing, logging_steps=1, disable_tqdm=True,
        logging_nan_inf_filter=False,  # else a loss of NaN is logged as the mean of the others
        save_steps=recipe.save_every, save_total_limit=2, report_to=trl.report_to,
        use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False,
        use_vllm=engine != "torch", vllm_mode="server" if engine == "server" else "colocate",
        vllm_server_base_url=vllm_url, vllm_gpu_memory_utilization=trl.vllm_memory,
        # the default, sequence_mask, drops whole responses, and the longer ones first
        vllm_importance_sampling_mode="token_truncate")


class TrainerVLLM(Engine):
    """A trainer's own vLLM, at its temperature; `logprobs`: of the last call, a list a rollout."""

    def __init__(self, trainer: GRPOTrainer, eos_ids: Sequence[int]) -> None:
        self.engine, self.eos_ids, self.logprobs = trainer.vllm_generation, eos_ids, []

    def stream(self, requests: Sequence[Request], temperature: float = 1.0) -> Stream:
        """See `Engine`; all requests have the same number of rollouts."""
        self.engine.max_completion_length, n = max(r.budget for r in requests), requests[0].n
        rows = [request for request in requests for _ in range(n)]
        _, ids, scores, _ = self.engine.generate([list(r.prompt) for r in rows], None, n)
        rollouts = [within_budget(list(tokens), request.budget, self.eos_ids)
                    for tokens, request in zip(ids, rows, strict=True)]
        self.logprobs = [[token[0] for token in row[: len(rollout.ids)]]
                         for row, rollout in zip(scores, rollouts, strict=True)]
        yield from enumerate(rollouts[i : i + n] for i in range(0, len(rollouts), n))


class ExamRollouts:
    """TRL's `rollout_func` (experimental in TRL 1.16): sits the step's exams, and rewards them."""

    def __init__(self, env: Environment, recipe: RARLRecipe, pool=None) -> None:
        self.env, self.recipe, self.pool, self.row = env, recipe, pool, {}

    def step(self, step: int) -> tuple[list[Exam], list[int], list[str]]:
        """Exams, their budgets in tokens, and user messages of a step."""
        exams, budgets = training_exams(self.env.world, self.recipe, step, self.pool)
        return exams, budgets, [self.env.message(exam, budget, STYLE)
                                for exam, budget in zip(exams, budgets, strict=True)]

    def __call__(self, prompts: list[str], trainer: GRPOTrainer) -> dict:
        """Rollouts of this process's prompts; `ValueError`: they are not exams of the step in whole
        groups. `FloatingPointError`: NaN or infinite logits; names the step."""
        step, n = trainer.state.global_step, self.recipe.rollouts
        (exams, budgets, messages), own = self.step(step), prompts[::n]
        if [m for m in own for _ in range(n)] != prompts or not set(own) <= set(messages):
            raise ValueError(f"the prompts of step {step} are not its exams, {n} times each; give "
                             "the trainer those of the same recipe, not shuffled")
        numbers, words = [messages.index(message) for message in own], self.env.tokenizer
        model = trainer.accelerator.unwrap_model(trainer.model).eval()
        engine = engine_for(model, words) if not trainer.use_vllm else TrainerVLLM(
            trainer, all_eos_ids(model.generation_config, words))
        table = roll_out(self.env, engine, [exams[i] for i in numbers],
                         [budgets[i] for i in numbers], self.recipe, step, numbers)
        model.train()
        self.row = describe(table, self.recipe.budgets)
        whole = responses(table)
        return {
            "prompt_ids": list(map(list, whole["prompt"])),
            # TRL takes no empty response: an end alone stands for a failed rollout
            "completion_ids": [list(ids) or [words.eos_token_id] for ids in whole["ids"]],
            "logprobs": [row or [0.0] for row in engine.logprobs] if trainer.use_vllm else None,
            "reward": [None if math.isnan(r) else r for r in exam_rewards(table).ravel().tolist()]}


class StepReport(common.Report):
    """Log and bar as in `training.rarl`; rows tell of the first process's rollouts."""

    columns = list(COLUMNS)

    def __init__(self, rollouts: ExamRollouts, deadline: Deadline = NEVER) -> None:
        super().__init__(deadline)
        self.rollouts = rollouts

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """One row a step; `FloatingPointError`: NaN or infinite loss or gradient."""
        if "grad_norm" not in logs or not state.is_world_process_zero:
            return
        row, step = self.rollouts.row, state.global_step
        common.check_finite(logs, f"step {step}")
        # TRL measures the gap with vLLM; our torch engine samples with the trainer's own weights
        gap = check_gap(float(logs[GAP])) if GAP in logs else math.nan
        self.log.append(row | {
            "step": step, "grad_norm": float(logs["grad_norm"]), "entropy": float(logs["entropy"]),
            "level_entropy": math.nan,
            "no_spread": float(logs["frac_reward_zero_std"]), "logprob_gap": gap})
        self.training_bar.set_postfix({name: self.log.rows[-1][name] for name in SHOWN})


def make_trainer(env: Environment, model, recipe: RARLRecipe, work: Path, pool=None,
                 engine: str = "torch", vllm_url: str | None = None,
                 deadline: Deadline = NEVER) -> GRPOTrainer:
    """A trainer that does what `training.rarl.train` does, with TRL's update. Who samples: our
    `engine` torch; TRL's vLLM, colocate or server (a running `trl vllm-serve` at `vllm_url`)."""
    def exam_reward(reward, **kwargs) -> list[float | None]:
        return reward  # which the rollouts brought along

    model.get_input_embeddings().requires_grad_(False)  # as LoRA does, and as in `training.rarl`
    rollouts = ExamRollouts(env, recipe, pool)
    prompts = [m for step in range(recipe.steps) for m in rollouts.step(step)[2]]
    trainer = GRPOTrainer(
        model, exam_reward, grpo_config(recipe, work, engine, vllm_url),
        train_dataset=Dataset.from_dict({"prompt": prompts}), processing_class=env.tokenizer,
        rollout_func=rollouts, peft_config=common.lora(model, recipe.trl.lora_rank),
        callbacks=[StepReport(rollouts, deadline)])
    trainer.remove_callback(PrinterCallback)  # it prints what the log holds
    return trainer


def train(env: Environment, model, recipe: RARLRecipe, work: Path, *options):
    """As `training.rarl.train`, with the trainer and the `options` of `make_trainer`; `accelerate
    launch` spreads it over GPUs. Saves fall on step boundaries: TRL resumes exactly only there."""
    first = int(os.environ.get("RANK", "0")) == 0  # of several processes, this one has the lock
    folder = common.run_folder(work, recipe, env.world, start=weights_hash(model))
    with folder if first else nullcontext():
        return common.run_trainer(make_trainer(env, model, recipe, work, *options))
