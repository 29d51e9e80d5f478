"""Sitting exams: prompt, generate under the budget, parse, grade; all of it in one table.

`sit` sends exams through an engine, the parser and the grader, `tabulate` responses that exist
already. Everything else is read from their table, a pandas DataFrame with a row a problem sat:

    exam, rollout, position    which exam of the call, which response to it, which problem (from 1)
    problem, tier, family      id, tier and family of the problem
    order, budget              of the exam
    cost                       tokens charged to the problem: header, tag, working, answer
    predicted                  level of its tag (-1: no tag)
    real                       level of its cost (a skip is at the skip level by definition; an
                               unfinished segment counts with what it spent)
    answer                     content of its box (None: no answer)
    skipped, correct           given up on purpose; the point earned
    reached, cut               any token spent on it; the budget ended the response here
    tokens, preamble           of the whole response, and before its first header
    finished, revisits         whether it ended by itself; headers that do not lead forward
    overrun, failed            tokens that a back end sent beyond the budget; why there is none
    prompt, ids                token ids of the prompt and of the response

What is from `tokens` on belongs to the response, and stands in each of its rows. Notebook 02."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from roi_lib.exams import Environment, Exam
from roi_lib.generation import Engine, Request, Rollout
from roi_lib.grading import grade

COLUMNS = ["exam", "rollout", "position", "problem", "tier", "family", "order", "budget", "cost",
           "predicted", "real", "answer", "skipped", "correct", "reached", "cut", "tokens",
           "preamble", "finished", "revisits", "overrun", "failed", "prompt", "ids"]


def sit(env: Environment, engine: Engine, exams: Sequence[Exam], budget: int | Sequence[int],
        n: int = 1, style: str = "direct", temperature: float = 1.0, seed: int = 0,
        streams: Sequence[tuple[int, ...]] | None = None, cap: int | None = None,
        opening: str = "") -> pd.DataFrame:
    """Sit every exam `n` times under a hard budget in tokens; the table is described above.

    Args:
        budget: of all exams, or one an exam.
        style: key of the world's prompts.
        streams: what fixes each exam's random numbers together with the seed; its number.
        cap: end the responses after so many tokens already; the prompt still states the budget.
        opening: words that every response is made to begin with, and that are charged like its own.

    Raises:
        ValueError: no exams, or a budget that `Environment.check_budget` refuses.
        FloatingPointError: the model gave NaN or infinite logits."""
    if not exams:
        raise ValueError("there are no exams to sit")
    budgets = np.broadcast_to(budget, len(exams)).tolist()
    env.check_budget(cap or min(budgets), *budgets)
    messages = [env.message(exam, b, style) for exam, b in zip(exams, budgets, strict=True)]
    unique, first = list(dict.fromkeys(messages)), tuple(env.encode(opening)) if opening else ()
    prompts = dict(zip(unique, env.prompts(unique), strict=True))
    requests = [Request(prompts[message] + first, (cap or b) - len(first), (seed, *stream), n,
                        "" if first else message)
                for message, b, stream in zip(messages, budgets, streams or [
                    (i,) for i in range(len(exams))], strict=True)]
    rollouts = [[replace(r, ids=first + r.ids, text=r.text and opening + r.text) for r in some]
                for some in engine.generate(requests, temperature)]
    return tabulate(env, exams, budgets, rollouts, [prompts[message] for message in messages])


def tabulate(env: Environment, exams: Sequence[Exam], budget: int | Sequence[int],
             rollouts: Sequence[Sequence[Rollout]],
             prompts: Sequence[tuple[int, ...]] | None = None) -> pd.DataFrame:
    """The table of responses, a list of rollouts an exam; equal responses are read once."""
    world, rows, pairs = env.world, [], []
    budgets = np.broadcast_to(budget, len(exams)).tolist()
    for i, (exam, some) in enumerate(zip(exams, rollouts, strict=True)):
        n = len(exam.problems)
        responses = {own: env.parse(own[0], n, own[1]) for own in {(r.ids, r.text) for r in some}}
        for k, r in enumerate(some):
            response = responses[r.ids, r.text]
            last = max((p for p, s in enumerate(response.segments) if s.cost), default=-1)
            whole = (response.total + r.hidden, response.preamble + r.hidden, r.finished,
                     response.revisits, r.overrun, r.failed, prompts[i] if prompts else (), r.ids)
            for p, (problem, s) in enumerate(zip(exam.problems, response.segments, strict=True)):
                pairs.append((problem.answer, s.answer))
                rows.append((
                    i, k, p + 1, problem.id, problem.tier, problem.family, exam.order, budgets[i],
                    s.cost, -1 if s.level is None else s.level,
                    world.skip_level if s.skipped else world.level_of(s.cost), s.answer, s.skipped,
                    False, s.cost > 0, p == last and not r.finished, *whole))
    table = pd.DataFrame(rows, columns=COLUMNS)
    table["correct"] = grade(world, pairs)
    return table


def points(table: pd.DataFrame) -> np.ndarray:
    """Number of problems solved, one a response, in the sequence of exams and rollouts; NaN where
    there is no response."""
    solved = table["correct"].astype(float).where(table["failed"] == "")
    return solved.groupby([table["exam"], table["rollout"]]).sum(min_count=1).to_numpy()


def responses(table: pd.DataFrame) -> pd.DataFrame:
    """One row a response: what the table says of all of it."""
    return table.drop_duplicates(["exam", "rollout"])
