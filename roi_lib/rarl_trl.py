"""RARL through TRL's `GRPOTrainer`: for models that need LoRA, vLLM, or several GPUs.

The exams, rollouts, rewards and log columns are those of `rarl`; TRL does the update, and a test
holds the two gradients together. `rollout_func` is experimental in TRL 1.16, so everything that
touches TRL's inside is in this file. What has to be set against TRL's defaults, and why, stands
in `grpo_config`.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
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
from roi_lib.rarl import (
    COLUMNS,
    STYLE,
    RARLConfig,
    StepLog,
    budgets_of,
    describe,
    roll_out,
    training_exams,
)
from roi_lib.training import folder_lock
from roi_lib.worlds import World

#: Our words for TRL's: how advantages are scaled, and what a row's loss is divided by.
SCALE_REWARDS = {"none": "none", "std": "group"}
LOSS_TYPE = {"constant": "dr_grpo", "length": "grpo"}


@dataclass(frozen=True)
class TRLOptions:
    """How the update is spread over the machine; none of it changes what is learned.

    Attributes:
        rows_at_once: rollouts a forward pass and device.
        lora_rank: rank of the adapters on every linear layer; 0 trains all weights.
        bf16: multiply in bfloat16.
        checkpointing: recompute activations in the backward pass, for less memory.
        vllm: None samples with the torch engine; "colocate" and "server" with TRL's vLLM.
        vllm_url: address of a running `trl vllm-serve`, for "server".
        vllm_memory: share of a GPU's memory for "colocate".
    """

    rows_at_once: int = 8
    lora_rank: int = 32
    bf16: bool = True
    checkpointing: bool = True
    vllm: str | None = None
    vllm_url: str | None = None
    vllm_memory: float = 0.3

    def __post_init__(self) -> None:
        if self.vllm not in (None, "colocate", "server"):
            raise ValueError(f"vllm must be None, colocate or server, not {self.vllm!r}")


def grpo_config(world: World, config: RARLConfig, options: TRLOptions, work: Path) -> GRPOConfig:
    """The recipe in TRL's terms.

    Raises:
        ValueError: the rollouts of a step do not divide into whole groups on every process.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # as accelerate and torchrun set it
    rows = config.exams * config.rollouts
    if config.exams % processes or rows % (processes * options.rows_at_once):
        raise ValueError(f"{config.exams} exams x {config.rollouts} rollouts do not divide among "
                         f"{processes} processes at {options.rows_at_once} rows at once; change "
                         "exams or rows_at_once")
    vllm = {} if options.vllm is None else {
        "use_vllm": True, "vllm_mode": options.vllm, "vllm_server_base_url": options.vllm_url,
        "vllm_gpu_memory_utilization": options.vllm_memory,
        # the default, sequence_mask, drops whole responses, and the longer ones first
        "vllm_importance_sampling_mode": "token_truncate"}
    return GRPOConfig(
        output_dir=str(work), max_steps=config.steps, seed=config.seed, shuffle_dataset=False,
        per_device_train_batch_size=options.rows_at_once,
        gradient_accumulation_steps=rows // (processes * options.rows_at_once),
        num_generations=config.rollouts, num_iterations=1,
        # Dr. GRPO takes both: the loss type alone would still divide by the standard deviation
        loss_type=LOSS_TYPE[config.normalizer], scale_rewards=SCALE_REWARDS[config.scale],
        max_completion_length=max(budgets_of(world, config)),  # the constant normaliser
        beta=0.0, mask_truncated_completions=False,  # a response cut by the budget must count
        temperature=config.temperature, top_p=1.0, top_k=0,
        learning_rate=config.learning_rate, lr_scheduler_type="constant", weight_decay=0.0,
        max_grad_norm=config.max_grad_norm, bf16=options.bf16,
        gradient_checkpointing=options.checkpointing, logging_steps=1,
        save_steps=config.save_every, save_total_limit=2, report_to="none", disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False, **vllm)


def exam_dataset(
    world: World, config: RARLConfig, pool: list[Problem] | None = None
) -> Dataset:
    """The prompts of all steps in their order: those of `rarl.train` with the same recipe."""
    messages = []
    for step in range(config.steps):
        exams, budget = training_exams(world, config, step, pool)
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
        self, world: World, tokenizer, config: RARLConfig, pool: list[Problem] | None = None
    ) -> None:
        self.world, self.tokenizer, self.config, self.pool = world, tokenizer, config, pool
        self.row: dict[str, float] = {}  # what `describe` says of the last rollouts here

    def __call__(self, prompts: list[str], trainer: GRPOTrainer) -> dict:
        """Rollouts of this process's prompts, each of which comes `config.rollouts` times.

        Raises:
            ValueError: the prompts are not the step's exams in whole groups.
        """
        step, n = trainer.state.global_step, self.config.rollouts
        exams, budget = training_exams(self.world, self.config, step, self.pool)
        by_message = {exam_prompt(self.world, e, budget, STYLE): e for e in exams}
        own = prompts[::n]
        if [m for m in own for _ in range(n)] != prompts or not set(own) <= set(by_message):
            raise ValueError(f"the prompts of step {step} are not its exams, {n} times each; give "
                             "the trainer `exam_dataset` of the same recipe, not shuffled")
        model = trainer.accelerator.unwrap_model(trainer.model)
        generator = self._generator(trainer, model)
        model.eval()
        groups = roll_out(self.world, self.tokenizer, generator, [by_message[m] for m in own],
                          budget, self.config, step)
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
    """Writes `log.csv` with the columns of `rarl`, and marks whole checkpoints as whole.

    With several processes, what the rollouts say is that of the first one's share.
    """

    def __init__(self, rollouts: ExamRollouts, path: Path, last_step: int) -> None:
        self.rollouts, self.first, self.rows = rollouts, last_step, []
        self.log = StepLog(path, tuple(COLUMNS), last_step)
        self.before = float(self.log.last.get("seconds") or 0)
        self.seconds = 0.0

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """One row a step."""
        if "grad_norm" not in logs or not state.is_world_process_zero:
            return
        step = state.global_step
        norm = float(logs["grad_norm"])
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient is {norm} at step {step}, budget "
                                     f"{self.rollouts.row['budget']}; lower the learning rate")
        self.seconds += float(logs["step_time"])
        self.rows.append({
            "step": step, **self.rollouts.row, "grad_norm": norm,
            "no_spread": float(logs["frac_reward_zero_std"]), "entropy": float(logs["entropy"]),
            "logprob_gap": float(logs.get("sampling/sampling_logp_difference/mean", math.nan)),
            "seconds": self.before + self.seconds})
        self.log.append(self.rows[-1])
        if step % self.rollouts.config.log_every == 0 or step == state.max_steps:
            self.log.show(self.rows, state.max_steps, self.seconds / (step - self.first))
            self.rows = []

    def on_save(self, args, state, control, **kwargs) -> None:
        """The manifest comes last: a checkpoint without it was not written to the end (F1)."""
        if state.is_world_process_zero:
            write_manifest(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def make_trainer(
    world: World, tokenizer, model, config: RARLConfig, options: TRLOptions, work: Path,
    pool: list[Problem] | None = None, last_step: int = 0,
) -> GRPOTrainer:
    """A trainer that does what `rarl.train` does, with TRL's update."""
    rollouts = ExamRollouts(world, tokenizer, config, pool)
    adapters = LoraConfig(r=options.lora_rank, lora_alpha=2 * options.lora_rank, lora_dropout=0.0,
                          target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = GRPOTrainer(
        model, exam_reward, grpo_config(world, config, options, work),
        train_dataset=exam_dataset(world, config, pool), processing_class=tokenizer,
        rollout_func=rollouts, peft_config=adapters if options.lora_rank else None,
        callbacks=[StepReport(rollouts, work / "log.csv", last_step)])
    trainer.remove_callback(PrinterCallback)  # it prints what the log prints
    return trainer


def check_recipe(work: Path, config: RARLConfig) -> None:
    """Keep the recipe beside the run; refuse to continue with another.

    Raises:
        ValueError: `work` holds a run with another recipe.
    """
    path, recipe = work / "recipe.json", json.loads(json.dumps(asdict(config)))
    if path.is_file() and json.loads(path.read_text()) != recipe:
        raise ValueError(f"{work} holds a run with another recipe; choose another --work")
    path.write_text(json.dumps(recipe, indent=1) + "\n")


def train(
    world: World, tokenizer, model, config: RARLConfig, options: TRLOptions, work: Path,
    pool: list[Problem] | None = None,
):
    """Train with TRL; continue from the newest whole checkpoint below `work`.

    Start it with `accelerate launch` for several GPUs. Saves fall on step boundaries, where the
    rollouts of a step have all been used (TRL resumes exactly only there).

    Returns:
        The model, adapters merged, in eval mode.

    Raises:
        ValueError: another recipe's run, another process, or rows that do not divide.
        FloatingPointError: NaN or infinite logits or gradient; names the step.
    """
    first = int(os.environ.get("RANK", "0")) == 0
    if not first:
        return _train(world, tokenizer, model, config, options, work, pool)
    with folder_lock(work):
        check_recipe(work, config)
        return _train(world, tokenizer, model, config, options, work, pool)


def _train(world, tokenizer, model, config, options, work, pool):
    state = newest_complete(work, "checkpoint-")
    if state:
        print(f"continuing from {state}")
    step = int(state.name.split("-")[1]) if state else 0
    trainer = make_trainer(world, tokenizer, model, config, options, work, pool, step)
    trainer.train(resume_from_checkpoint=str(state) if state else None)
    model = trainer.accelerator.unwrap_model(trainer.model)
    return (model.merge_and_unload() if options.lora_rank else model).eval()
