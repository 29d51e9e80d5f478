"""What the bridges share: a world by name, and its exams as messages for other tools, which encode
them as text: a control token in a statement would be obeyed, and so is refused."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from roi_lib.exams import Environment, Exam, draw_papers, in_orders
from roi_lib.problems import SPLITS, Problem
from roi_lib.store.checkpoints import load_environment
from roi_lib.store.sources import load_pool
from roi_lib.worlds import check_choice, get_world


def open_world(world: str, budget: int, tokenizer=None) -> Environment:
    """The world of that name, with a tokenizer: loaded, a folder or hub id, or (None) its own.
    `ValueError`: unknown world, or a budget that its prompts cannot state."""
    named = tokenizer is None or isinstance(tokenizer, str)
    env = (load_environment(get_world(world), tokenizer=tokenizer) if named
           else Environment(get_world(world), tokenizer))
    env.check_budget(budget)
    return env


def draw_exams(env: Environment, budget: int, style: str, orders: Sequence[str], exams: int,
               problems: int, split: str, seed: int, data: str | None) -> list[tuple[Exam, str]]:
    """Exams, the papers of `python -m roi_lib exam` with the orders taken in turn, and their user
    messages. `ValueError`: an unknown word, no exams, or a control token in a statement;
    `FileNotFoundError`: the datasets are neither below `data` nor on the hub."""
    check_choice("split", split, SPLITS)
    if not orders:
        raise ValueError("name at least one order; without, there are no exams")
    pool = load_pool(env.world, split, Path(data) if data else None)
    sat = in_orders(draw_papers(env.world, exams, problems, split, seed, pool), orders, seed)
    messages = [env.message(exam, budget, style) for exam in sat]
    for exam, message, plain in zip(sat, messages, env.encode_data(messages), strict=True):
        if env.encode(message) != plain:
            raise ValueError("a control token of the tokenizer is in a statement of "
                             f"{', '.join(p.id for p in exam.problems)}; leave that problem out")
    return list(zip(sat, messages, strict=True))


def read_exam(row: Mapping) -> Exam:
    """An exam from what `dataclasses.asdict` made of it, through JSON or Arrow."""
    return Exam(tuple(Problem(**problem) for problem in row["problems"]), row["order"])
