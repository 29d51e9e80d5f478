"""Times a step of our trainer beside one of TRL's GRPOTrainer, on the same exams.

A step is 16 exams x 16 rollouts under B=64 and one update, from the pocket model in float32: with
TRL's own generation, with our rollouts (`training.trl`), and by `rarl.train_step`. They take turns,
so that a busy machine hurts all alike; medians are over the steps, without the first of each turn.
"""

import tempfile
from pathlib import Path

import pandas as pd
import torch
from datasets import Dataset
from transformers import PrinterCallback
from trl import GRPOTrainer

from roi_lib import rarl
from roi_lib.engines import engine_for
from roi_lib.exams import Environment
from roi_lib.experiments.bench_osmckp import timed
from roi_lib.generation import Rollout
from roi_lib.sitting import tabulate
from roi_lib.store.checkpoints import load_environment, load_model
from roi_lib.training.trl import grpo_config, make_trainer
from roi_lib.worlds import POCKET, RARLRecipe, TRLRecipe

RECIPE = RARLRecipe(
    steps=3, exams=16, rollouts=16, budgets=(64,), learning_rate=1e-4, trl=TRLRecipe(
        rows_at_once=256, lora_rank=0, bf16=False, checkpointing=False))  # its fastest way


def plain_trainer(env: Environment, model, recipe: RARLRecipe, work: Path) -> GRPOTrainer:
    """A GRPOTrainer as its documentation has it: it tokenizes the prompts, and generates."""
    n, (budget,) = recipe.rollouts, recipe.budgets
    exams = {env.tokenizer.decode(env.prompt(exam, budget, rarl.STYLE)): exam
             for step in range(recipe.steps)
             for exam in rarl.training_exams(env.world, recipe, step)[0]}

    def reward(prompts, completion_ids, **kwargs) -> list[float]:
        groups = [[Rollout(tuple(ids), True) for ids in completion_ids[i : i + n]]
                  for i in range(0, len(prompts), n)]
        table = tabulate(env, [exams[prompt] for prompt in prompts[::n]], budget, groups)
        table["reward"] = rarl.problem_rewards(table)
        return rarl.exam_rewards(table).ravel().tolist()

    return GRPOTrainer(model, reward, grpo_config(recipe, work), processing_class=env.tokenizer,
                       train_dataset=Dataset.from_dict({"prompt": list(exams)}))


def their_seconds(trainer: GRPOTrainer) -> list[float]:
    """Seconds of each step of a whole run, as TRL logs them (without AdamW's own, a few ms)."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [row["step_time"] for row in trainer.state.log_history if "step_time" in row]


def our_seconds(env: Environment, model, recipe: RARLRecipe) -> list[float]:
    """Seconds of each step of ours."""
    engine = engine_for(model, env.tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=0.0)
    return [timed(rarl.train_step, env, model, engine, optimizer, recipe, step)[0]
            for step in range(recipe.steps)]


def bench(turns: int = 3, recipe: RARLRecipe = RECIPE, start: str = "pocket-mft") -> dict:
    """Seconds a step and their ratio, JSON-ready; a few minutes. `turns` of each, from `start`."""
    env, found = load_environment(POCKET, start), []
    for _ in range(turns):
        one, two, three = (load_model(start, "float32") for _ in range(3))
        with tempfile.TemporaryDirectory() as work:
            found.append(pd.DataFrame({
                "trl": their_seconds(plain_trainer(env, one, recipe, Path(work, "one"))),
                "trl_with_our_rollouts": their_seconds(
                    make_trainer(env, two, recipe, Path(work, "two"))),
                "ours": our_seconds(env, three, recipe)})[1:])
    median = (seconds := pd.concat(found)).median().to_dict()
    return {"seconds_per_step": median, "ratio": median["trl"] / median["ours"],
            "range": seconds.agg(["min", "max"]).to_dict("list"),
            "exams": recipe.exams, "rollouts": recipe.rollouts, "budget": recipe.budgets[0],
            "start": start, "dtype": "float32", "threads": torch.get_num_threads()}
