"""Times a step of our trainer beside one of TRL's GRPOTrainer, on the same exams.

A step is 16 exams x 16 rollouts under B=64 and one update in float32: by TRL alone, by TRL with our
rollouts (`training.trl`), and by `rarl.train_step`. They take turns, so that a busy machine hurts
all alike; medians are over the steps, without the first of each turn."""

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from datasets import Dataset
from transformers import PrinterCallback
from trl import GRPOTrainer

from roi_lib import rarl
from roi_lib.engines import engine_for
from roi_lib.exams import Environment
from roi_lib.generation import Rollout
from roi_lib.sitting import tabulate
from roi_lib.store.checkpoints import load_environment, load_model
from roi_lib.training.trl import grpo_config, make_trainer
from roi_lib.worlds import POCKET, RARLRecipe, TRLRecipe

RECIPE = RARLRecipe(
    steps=3, exams=16, rollouts=16, budgets=(64,), budget_for="exam", learning_rate=1e-4,
    trl=TRLRecipe(  # its fastest way
        rows_at_once=256, lora_rank=0, bf16=False, checkpointing=False))


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


def bench(turns: int = 3, recipe: RARLRecipe = RECIPE, start: str = "pocket-mft") -> dict:
    """Seconds a step and their ratio, JSON-ready; a few minutes. `turns` of each, from `start`."""
    env, found = load_environment(POCKET, start), []
    for _ in range(turns):
        seconds, model = {}, load_model(start, "float32")
        with TemporaryDirectory() as work:
            for name, make in (("trl", plain_trainer), ("trl_with_our_rollouts", make_trainer)):
                trainer = make(env, load_model(start, "float32"), recipe, Path(work, name))
                trainer.remove_callback(PrinterCallback)
                trainer.train()  # logs the time of each step, but for AdamW's own, a few ms
                seconds[name] = pd.DataFrame(trainer.state.log_history)["step_time"].dropna()
        engine = engine_for(model, env.tokenizer)
        optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=0.0)
        seconds["ours"] = []
        for step in range(recipe.steps):
            begin = time.perf_counter()
            rarl.train_step(env, model, engine, optimizer, recipe, step)
            seconds["ours"].append(time.perf_counter() - begin)
        found.append(pd.DataFrame(seconds)[1:])
    median = (table := pd.concat(found)).median().to_dict()
    return {"seconds_per_step": median, "ratio": median["trl"] / median["ours"],
            "range": table.agg(["min", "max"]).to_dict("list"),
            "exams": recipe.exams, "rollouts": recipe.rollouts, "budget": recipe.budgets[0],
            "start": start, "dtype": "float32", "threads": torch.get_num_threads()}
