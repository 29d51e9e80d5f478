"""Whole exams for anybody's `GRPOTrainer`: a dataset and a reward function.

    dataset, reward = roi_exam(tokenizer, budget=64)
    trainer = GRPOTrainer(model, reward, GRPOConfig(max_completion_length=64, ...), dataset)

One exam is one generation, so `max_completion_length` is the hard cut; what a sampler writes beyond
the budget is not read."""

from collections.abc import Callable, Sequence
from pathlib import Path

from datasets import Dataset

from roi_lib.exams import Environment, draw_papers, in_orders
from roi_lib.generation import within_budget
from roi_lib.rarl import STYLE, exam_rewards, problem_rewards
from roi_lib.sitting import tabulate
from roi_lib.store.sources import load_pool
from roi_lib.worlds import ORDERS, get_world


def roi_exam(tokenizer, budget: int, world: str = "pocket", exams: int = 1_000, problems: int = 3,
             orders: Sequence[str] = ORDERS, seed: int = 0, split: str = "train",
             style: str = STYLE, variant: str = "level",
             root: Path | None = None) -> tuple[Dataset, Callable]:
    """A dataset of exams (columns prompt, a chat, and exam, its number), and the reward of RARL.

    `tokenizer`: the model's, whose tokens are charged. `variant`: see `rarl.problem_rewards`.
    `root`: folder of the paper world's datasets. `ValueError`: a bad budget, order, or split."""
    env = Environment(get_world(world), tokenizer)
    env.check_budget(budget)
    papers = draw_papers(env.world, exams, problems, split, seed, load_pool(env.world, split, root))
    drawn, ends = in_orders(papers, orders, seed), [tokenizer.eos_token_id]
    dataset = Dataset.from_list([
        {"prompt": [{"role": "user", "content": env.message(exam, budget, style)}], "exam": i}
        for i, exam in enumerate(drawn)])

    def exam_reward(completion_ids, exam, **columns) -> list[float]:
        rollouts = [[within_budget(ids, budget, ends)] for ids in completion_ids]
        table = tabulate(env, [drawn[i] for i in exam], budget, rollouts)
        return exam_rewards(table.assign(reward=problem_rewards(table, variant)))[:, 0].tolist()

    return dataset, exam_reward
