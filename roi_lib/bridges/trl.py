"""The exam for TRL: a dataset and a reward function for anybody's plain `GRPOTrainer`. One exam is
one generation, which `max_completion_length` cuts at the budget. Prompts are messages: GRPOTrainer
takes no ids. (`training.trl` is the paper's RARL; this is for trainings of others.)"""

from collections.abc import Callable, Sequence
from dataclasses import asdict

from datasets import Dataset

from roi_lib.bridges.papers import draw_exams, open_world, read_exam
from roi_lib.generation import within_budget
from roi_lib.rarl import STYLE, exam_rewards, problem_rewards
from roi_lib.sitting import tabulate
from roi_lib.worlds import ORDERS, check_choice


def roi_exam(world: str = "paper", budget: int = 512, exams: int = 256,
             orders: Sequence[str] = ORDERS, style: str = STYLE, reward: str = "level",
             seed: int = 0, split: str = "train", data: str | None = None, tokenizer=None,
             problems_per_exam: int = 3) -> tuple[Dataset, list[Callable]]:
    """A dataset with a row an exam, and its reward function: `rarl.exam_rewards`, the sum over
    problems of [right answer, and predicted level = level of the real cost in tokens]; or with
    `reward` "answer" without the condition on the level.

    `budget`: in tokens; what a response has beyond it is not read. It stands in the rows: datasets
    of several budgets can be joined. `orders`: of the papers, taken in turn. `data`: folder with
    the paper world's datasets (None: the hub). `tokenizer`: the trainer's, loaded or by name (None:
    the world's own); the reward function refuses ids of another. `ValueError`: see `draw_exams`."""
    check_choice("reward", reward, ("level", "answer"))
    if reward == "level" and style != STYLE:
        raise ValueError(f"style {style} asks for no tags to be rewarded; give reward='answer'")
    env = open_world(world, budget, tokenizer)
    rows = draw_exams(env, budget, style, orders, exams, problems_per_exam, split, seed, data)

    def exam_reward(completions, completion_ids, exam, budget, **_) -> list[float]:
        texts = env.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        for (message,), text in zip(completions, texts, strict=True):
            # a response template of the tokenizer may have taken thoughts and white space away
            if (message["content"] or "").strip() not in text:
                raise ValueError("the trainer has another tokenizer: name it to roi_exam, too")
        rollouts = [[within_budget(ids, b, [env.tokenizer.eos_token_id])]
                    for ids, b in zip(completion_ids, budget, strict=True)]
        table = tabulate(env, [read_exam(row) for row in exam], budget, rollouts)
        table["reward"] = problem_rewards(table, reward)
        return exam_rewards(table).ravel().tolist()

    return Dataset.from_list([
        {"prompt": [{"role": "user", "content": message}], "exam": asdict(exam), "budget": budget}
        for exam, message in rows]), [exam_reward]
