"""RARL through TRL's `GRPOTrainer`: for models that need LoRA, vLLM, or several GPUs.

The exams, rollouts, rewards and log columns are those of `rarl`; TRL does the update, and a test
holds the two gradients together. `rollout_func` is experimental in TRL 1.16, so everything that
touches TRL's inside is in this file. What has to be set against TRL's defaults, and why, stands
in `grpo_config`.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from roi_lib.checkpoints import newest_complete, write_manifest
from roi_lib.exams import exam_prompt
from roi_lib.generation import (
    BudgetedGenerator,
    Request,
    Rollout,
    TorchGenerator,
    all_eos_ids,
    within_budget,
)
from roi_lib.problems import Problem
from roi_lib.rarl import STYLE, roll_out, training_exams
from roi_lib.rarl_loop import COLUMNS, StepLog, describe, fingerprint, keep, warn_of_gap
from roi_lib.training import check_finite, folder_lock, lora, same_recipe, writing
from roi_lib.worlds import RARLRecipe, World

#: Our words for TRL's: how advantages are scaled, and what a row's loss is divided by.
SCALE_REWARDS = {"none": "none", "std": "group"}
LOSS_TYPE = {"constant": "dr_grpo", "length": "grpo"}
#: Who samples: our torch engine; TRL's vLLM in the trainer's process, or behind `trl vllm-serve`.
ENGINES = ("torch", "colocate", "server")
#: Mean difference of vLLM's and the trainer's log-probabilities, as TRL's log has it.
GAP = "sampling/sampling_logp_difference/mean"


def grpo_config(
    recipe: RARLRecipe, work: Path, engine: str = "torch", vllm_url: str | None = None
) -> GRPOConfig:
    """The recipe in TRL's terms; see `train`.

    Raises:
        ValueError: an unknown engine, or the rollouts of a step do not divide into whole groups on
            every process.
    """
    trl, rows = recipe.trl, recipe.exams * recipe.rollouts
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # as accelerate and torchrun set it
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; choose from {', '.join(ENGINES)}")
    if recipe.exams % processes or rows % (processes * trl.rows_at_once):
        raise ValueError(f"{recipe.exams} exams x {recipe.rollouts} rollouts do not divide among "
                         f"{processes} processes at {trl.rows_at_once} rows at once; change "
                         "exams or trl.rows_at_once")
    vllm = {} if engine == "torch" else {
        "use_vllm": True, "vllm_mode": engine, "vllm_server_base_url": vllm_url,
        "vllm_gpu_memory_utilization": trl.vllm_memory,
        # the default, sequence_mask, drops whole responses, and the longer ones first
        "vllm_importance_sampling_mode": "token_truncate"}
    return GRPOConfig(
        output_dir=str(work), max_steps=recipe.steps, seed=recipe.seed, shuffle_dataset=False,
        per_device_train_batch_size=trl.rows_at_once,
        gradient_accumulation_steps=rows // (processes * trl.rows_at_once),
        num_generations=recipe.rollouts, num_iterations=1,
        # Dr. GRPO takes both: the loss type alone would still divide by the standard deviation
        loss_type=LOSS_TYPE[recipe.normalizer], scale_rewards=SCALE_REWARDS[recipe.scale],
        max_completion_length=max(recipe.budgets),  # the constant normaliser
        beta=0.0, mask_truncated_completions=False,  # a response cut by the budget must count
        temperature=recipe.temperature, top_p=1.0, top_k=0,
        learning_rate=recipe.learning_rate, lr_scheduler_type="constant", weight_decay=0.0,
        max_grad_norm=recipe.max_grad_norm, bf16=trl.bf16,
        gradient_checkpointing=trl.checkpointing, logging_steps=1,
        save_steps=recipe.save_every, save_total_limit=2, report_to="none", disable_tqdm=True,
        logging_nan_inf_filter=False,  # else a loss of NaN is logged as the mean of the others
        ddp_find_unused_parameters=False,
        use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False, **vllm)


def exam_dataset(
    world: World, recipe: RARLRecipe, pool: list[Problem] | None = None
) -> Dataset:
    """The prompts of all steps in their order: those of `rarl_loop.train` with the same recipe."""
    messages = []
    for step in range(recipe.steps):
        exams, budget = training_exams(world, recipe, step, pool)
        messages += [exam_prompt(world, exam, budget, STYLE) for exam in exams]
    return Dataset.from_dict({"prompt": messages})


class TrainerVLLM(BudgetedGenerator):
    """The vLLM that a GRPOTrainer keeps in step with its weights, behind our interface.

    `logprobs` holds, after a call, what vLLM says of each token it drew: one list a rollout.
    """

    def __init__(self, trainer: GRPOTrainer, eos_ids: Sequence[int]) -> None:
        self.engine, self.eos_ids = trainer.vllm_generation, eos_ids
        self.logprobs: list[list[float]] = []

    def stream(
        self, requests: Sequence[Request], temperature: float = 1.0
    ) -> Iterator[tuple[int, list[Rollout]]]:
        """See `BudgetedGenerator`; the temperature is the trainer's."""
        self.engine.max_completion_length = max(r.budget for r in requests)
        prompts = [list(r.prompt) for r in requests for _ in range(r.n)]
        _, ids, logprobs, _ = self.engine.generate(prompts, None, requests[0].n)
        answers = iter(zip(ids, logprobs, strict=True))
        self.logprobs = []
        for i, request in enumerate(requests):
            rollouts = []
            for _ in range(request.n):
                tokens, scores = next(answers)
                rollouts.append(within_budget(list(tokens), request.budget, self.eos_ids))
                self.logprobs.append([s[0] for s in scores][: len(rollouts[-1].ids)])
            yield i, rollouts


class ExamRollouts:
    """TRL's `rollout_func`: sits the step's exams under their budget, and rewards them.

    Rewards travel with the rollouts under the key `reward`; `exam_reward` hands them to TRL.
    """

    def __init__(
        self, world: World, tokenizer, recipe: RARLRecipe, pool: list[Problem] | None = None
    ) -> None:
        self.world, self.tokenizer, self.recipe, self.pool = world, tokenizer, recipe, pool
        self.row: dict[str, float] = {}  # what `describe` says of the last rollouts here

    def __call__(self, prompts: list[str], trainer: GRPOTrainer) -> dict:
        """Rollouts of this process's prompts, each of which comes `recipe.rollouts` times.

        Raises:
            ValueError: the prompts are not the step's exams in whole groups; a budget smaller than
                a header with a tag.
            FloatingPointError: NaN or infinite logits; names the step.
        """
        step, n = trainer.state.global_step, self.recipe.rollouts
        exams, budget = training_exams(self.world, self.recipe, step, self.pool)
        places = {exam_prompt(self.world, e, budget, STYLE): i for i, e in enumerate(exams)}
        own = prompts[::n]
        if [m for m in own for _ in range(n)] != prompts or not set(own) <= set(places):
            raise ValueError(f"the prompts of step {step} are not its exams, {n} times each; give "
                             "the trainer `exam_dataset` of the same recipe, not shuffled")
        model = trainer.accelerator.unwrap_model(trainer.model)
        generator = self._generator(trainer, model)
        model.eval()
        numbers = [places[message] for message in own]
        groups = roll_out(self.world, self.tokenizer, generator, [exams[i] for i in numbers],
                          budget, self.recipe, step, numbers)
        model.train()
        self.row = {"budget": budget, **describe(self.world, groups)}
        end = [self.tokenizer.eos_token_id]  # TRL takes no empty response: for failed rollouts
        return {
            "prompt_ids": [list(g.prompt) for g in groups for _ in g.sittings],
            "completion_ids": [list(s.ids) or end for g in groups for s in g.sittings],
            "logprobs": [row or [0.0] for row in generator.logprobs] if trainer.use_vllm else None,
            "reward": [None if math.isnan(r) else r for g in groups for r in g.rewards],
        }

    def _generator(self, trainer: GRPOTrainer, model) -> BudgetedGenerator:
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        if trainer.use_vllm:
            return TrainerVLLM(trainer, all_eos_ids(base.generation_config, self.tokenizer))
        return TorchGenerator.of(base, self.tokenizer)


def exam_reward(reward: list[float | None], **kwargs) -> list[float | None]:
    """TRL's reward function: what `ExamRollouts` has found already."""
    return reward


class StepReport(TrainerCallback):
    """Writes `log.csv` as `rarl_loop` does, keeps models, and marks whole checkpoints as whole.

    With several processes, the first one writes; what it says of rollouts is of its own share.
    """

    def __init__(self, rollouts: ExamRollouts, path: Path, last_step: int) -> None:
        self.rollouts, self.path, self.first, self.rows = rollouts, path, last_step, []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """One row a step.

        Raises:
            FloatingPointError: NaN or infinite loss or gradient; names step and budget.
        """
        if "grad_norm" not in logs or not state.is_world_process_zero:
            return
        step = state.global_step
        check_finite(logs, f"step {step}, budget {self.rollouts.row['budget']}")
        gap = float(logs.get(GAP, math.nan))
        if GAP in logs:  # TRL measures it with vLLM; our torch engine samples with these weights
            warn_of_gap(gap)
        self.seconds += float(logs["step_time"])
        self.rows.append({
            "step": step, **self.rollouts.row, "grad_norm": float(logs["grad_norm"]),
            "no_spread": float(logs["frac_reward_zero_std"]), "entropy": float(logs["entropy"]),
            "logprob_gap": gap, "seconds": self.before + self.seconds})
        self.log.append(self.rows[-1])
        if step % self.rollouts.recipe.log_every == 0 or step == state.max_steps:
            self.log.show(self.rows, state.max_steps, self.seconds / (step - self.first))
            self.rows = []

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        """Open the log, without the rows that come again; the start is kept as step 0."""
        if not state.is_world_process_zero:
            return
        self.log = StepLog(self.path, tuple(COLUMNS), self.first)
        self.before, self.seconds = float(self.log.last.get("seconds") or 0), 0.0
        if self.first == 0:
            self.on_step_end(args, state, control, model)

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        """Keep the model (of a model with adapters: those) after the steps `recipe.keep`."""
        if state.global_step in self.rollouts.recipe.keep and state.is_world_process_zero:
            keep(Path(args.output_dir), model, state.global_step)

    def on_save(self, args, state, control, **kwargs) -> None:
        """The manifest comes last: a checkpoint without it was not written to the end (F1)."""
        args.distributed_state.wait_for_everyone()  # each process has its own file there
        if state.is_world_process_zero:
            write_manifest(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def make_trainer(
    world: World, tokenizer, model, recipe: RARLRecipe, work: Path,
    pool: list[Problem] | None = None, engine: str = "torch", vllm_url: str | None = None,
    last_step: int = 0,
) -> GRPOTrainer:
    """A trainer that does what `rarl_loop.train` does, with TRL's update; see `train`.

    Raises:
        ValueError: see `grpo_config`.
    """
    rollouts = ExamRollouts(world, tokenizer, recipe, pool)
    trainer = GRPOTrainer(
        model, exam_reward, grpo_config(recipe, work, engine, vllm_url),
        train_dataset=exam_dataset(world, recipe, pool), processing_class=tokenizer,
        rollout_func=rollouts, peft_config=lora(recipe.trl.lora_rank),
        callbacks=[StepReport(rollouts, work / "log.csv", last_step)])
    trainer.remove_callback(PrinterCallback)  # it prints what the log prints
    return trainer


def train(
    world: World, tokenizer, model, recipe: RARLRecipe, work: Path,
    pool: list[Problem] | None = None, engine: str = "torch", vllm_url: str | None = None,
):
    """Train with TRL; continue from the newest whole checkpoint below `work`.

    Start it with `accelerate launch` for several GPUs. Saves fall on step boundaries, where the
    rollouts of a step have all been used (TRL resumes exactly only there).

    Args:
        pool: problems instead of the world's generated ones (see `rarl_run.problem_pool`).
        engine: who samples, see `ENGINES`.
        vllm_url: address of a running `trl vllm-serve`, for "server".

    Returns:
        The model, adapters merged, in eval mode.

    Raises:
        ValueError: another recipe's run, another process, an unknown engine, rows that do not
            divide, or a budget smaller than a header with a tag.
        FloatingPointError: NaN or infinite logits, loss or gradient; names the step.
        OSError: the disk is full; names the step.
    """
    if int(os.environ.get("RANK", "0")) > 0:  # the first process holds the lock
        return _train(world, tokenizer, model, recipe, work, pool, engine, vllm_url)
    with folder_lock(work):
        same_recipe(work, asdict(recipe) | {"world": world.name, "start": fingerprint(model)})
        return _train(world, tokenizer, model, recipe, work, pool, engine, vllm_url)


def _train(world, tokenizer, model, recipe, work, pool, engine, vllm_url):
    state = newest_complete(work, "checkpoint-")
    if state:
        print(f"continuing from {state}")
    trainer = make_trainer(world, tokenizer, model, recipe, work, pool, engine, vllm_url,
                           int(state.name.split("-")[1]) if state else 0)
    with writing(work, lambda: trainer.state.global_step):
        trainer.train(resume_from_checkpoint=str(state) if state else None)
    model = trainer.accelerator.unwrap_model(trainer.model)
    return (model.merge_and_unload() if recipe.trl.lora_rank else model).eval()
