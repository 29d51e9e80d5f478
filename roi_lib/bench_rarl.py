"""Times a step of our trainer beside one of TRL's GRPOTrainer, on the same exams.

Run as `python -m roi_lib bench rarl --out FILE`. A step is 16 exams x 16 rollouts under B=64 and
one update, from the pocket model in float32. TRL samples with its own generation (transformers'
`generate`) and updates all rows in one pass; ours is `rarl.train_step`. A third line is TRL's
update with our rollouts (`rarl_trl`), which tells how much either half is worth. The three take
turns, so that a busy machine hurts all alike; seconds are medians over the steps, without the
first of each turn.
"""

import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOTrainer

from roi_lib.checkpoints import load_model, load_tokenizer
from roi_lib.exams import encode_prompt, exam_prompt
from roi_lib.generation import Rollout, TorchGenerator
from roi_lib.rarl import STYLE, group_rewards, mark, train_step, training_exams
from roi_lib.rarl_trl import grpo_config, make_trainer
from roi_lib.worlds import POCKET, RARLRecipe, TRLRecipe, World

START = "pocket-mft"
#: TRL takes all rows in one pass: its fastest way at this size.
RECIPE = RARLRecipe(
    steps=3, exams=16, rollouts=16, budgets=(64,), learning_rate=1e-4,
    trl=TRLRecipe(rows_at_once=256, lora_rank=0, bf16=False, checkpointing=False))


class Clock(TrainerCallback):
    """Measures the steps of TRL's trainer, rollouts included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        """The step's rollouts come after this."""
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """The update is done."""
        self.seconds.append(time.perf_counter() - self.start)


def reward_of_text(world: World, tokenizer, recipe: RARLRecipe):
    """TRL's reward function for its own generation: parse, grade and reward its token ids."""
    exams = {}
    for step in range(recipe.steps):
        drawn, budget = training_exams(world, recipe, step)
        exams |= {prompt_text(world, tokenizer, e, budget): (e, budget) for e in drawn}

    def reward(prompts, completion_ids, **kwargs) -> list[float]:
        found = []
        for i in range(0, len(prompts), recipe.rollouts):
            exam, budget = exams[prompts[i]]
            group = [Rollout(tuple(ids), True) for ids in completion_ids[i : i + recipe.rollouts]]
            found += group_rewards(world, mark(world, tokenizer, exam, budget, group))
        return found

    return reward


def prompt_text(world: World, tokenizer, exam, budget: int) -> str:
    """The whole prompt, control tokens included, as the text that TRL tokenizes by itself."""
    return tokenizer.decode(encode_prompt(tokenizer, exam_prompt(world, exam, budget, STYLE)))


def trl_with_its_own_generation(world: World, tokenizer, model, recipe: RARLRecipe, work: Path):
    """A plain GRPOTrainer, as its documentation has it."""
    prompts = []
    for step in range(recipe.steps):
        drawn, budget = training_exams(world, recipe, step)
        prompts += [prompt_text(world, tokenizer, e, budget) for e in drawn]
    return GRPOTrainer(model, reward_of_text(world, tokenizer, recipe),
                       grpo_config(recipe, work),
                       train_dataset=Dataset.from_dict({"prompt": prompts}),
                       processing_class=tokenizer)


def trl_seconds(trainer: GRPOTrainer) -> list[float]:
    """Seconds of each step of a whole training run."""
    clock = Clock()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(clock)
    trainer.train()
    return clock.seconds


def our_seconds(world: World, tokenizer, model, recipe: RARLRecipe) -> list[float]:
    """Seconds of each step of ours."""
    generator = TorchGenerator.of(model, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.0)
    seconds = []
    for step in range(recipe.steps):
        start = time.perf_counter()
        train_step(world, tokenizer, model, generator, optimizer, recipe, step)
        seconds.append(time.perf_counter() - start)
    return seconds


def bench(turns: int = 3, recipe: RARLRecipe = RECIPE, start: str = START) -> dict:
    """All measurements as one JSON-ready dict; a few minutes.

    Args:
        turns: of all three trainers; each does `recipe.steps` steps a turn.
        start: the checkpoint that every turn begins with.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    world, tokenizer = POCKET, load_tokenizer(POCKET.tokenizer)
    seconds: dict[str, list[float]] = {"trl": [], "trl_with_our_rollouts": [], "ours": []}
    for _ in range(turns):
        with tempfile.TemporaryDirectory() as folder:
            work, model = Path(folder), partial(load_model, start, "float32")
            seconds["trl"] += trl_seconds(trl_with_its_own_generation(
                world, tokenizer, model(), recipe, work / "trl"))[1:]
            seconds["trl_with_our_rollouts"] += trl_seconds(make_trainer(
                world, tokenizer, model(), recipe, work / "both"))[1:]
            seconds["ours"] += our_seconds(world, tokenizer, model(), recipe)[1:]
    median = {name: float(np.median(s)) for name, s in seconds.items()}
    return {"seconds_per_step": median, "ratio": median["trl"] / median["ours"],
            "range": {name: [min(s), max(s)] for name, s in seconds.items()},
            "exams": recipe.exams, "rollouts": recipe.rollouts, "budget": recipe.budgets[0],
            "start": start, "dtype": "float32", "threads": torch.get_num_threads()}
