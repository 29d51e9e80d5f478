"""Replays: responses that exist already, under the same hard budget.

    reference_response   the worked solutions of an exam, as a faultless writer would write them
    ReplayEngine         plays back given responses
    reference_engine     one that plays back the reference solutions: its Score is what the budget
                         alone costs
"""

from collections.abc import Mapping, Sequence
from itertools import zip_longest

from roi_lib.exams import Environment, Exam
from roi_lib.generation import Engine, Request, Stream, within_budget
from roi_lib.problems import Problem
from roi_lib.worlds import SKIP_ANSWER, World


def reference_response(
    world: World, problems: Sequence[Problem], style: str = "direct", skip: Sequence[bool] = ()
) -> str:
    """The worked solutions in order, under their headers; what a faultless writer would write.

    Plan-and-Solve opens with a plan of all problems, Least-to-Most with a rating of each; both
    cost tokens like any other.

    Args:
        skip: one flag a problem; where it is set, a skip stands in for the solution.
    """
    headers = [world.header.format(i=i) for i in range(1, len(problems) + 1)]
    names = [header.strip("#. ") for header in headers]  # to be taken for no header
    parts = []
    if style == "plan_and_solve":
        plans = [f"{name} {p.plan or 'solve'}" for name, p in zip(names, problems, strict=True)]
        parts.append(f"Plan: {'; '.join(plans)}.")
    if style == "least_to_most":
        ratings = [f"{name} {p.tier}" for name, p in zip(names, problems, strict=True)]
        parts.append(f"Rating: {'; '.join(ratings)}.")
    for header, p, skipped in zip_longest(headers, problems, skip, fillvalue=False):
        words = f"\\boxed{{{SKIP_ANSWER}}}" if skipped else p.solution
        parts.append(f"{header}\n{words}")
    return "\n".join(parts)


class ReplayEngine(Engine):
    """Plays back responses that exist already, under the same hard budget.

    Args:
        responses: prompt as token ids -> response as token ids, without end-of-sequence.
        eos_id: the end-of-sequence id that closes each response, charged as usual.
    """

    def __init__(self, responses: Mapping[tuple[int, ...], Sequence[int]], eos_id: int) -> None:
        self.responses, self.eos_id = responses, eos_id

    def stream(self, requests: Sequence[Request], temperature: float = 1.0) -> Stream:
        """See `Engine`; every rollout of a request is the same. `KeyError`: an unknown prompt."""
        for i, request in enumerate(requests):
            ids = (*self.responses[request.prompt], self.eos_id)[: request.budget]
            yield i, [within_budget(ids, request.budget, [self.eos_id])] * request.n


def reference_engine(
    env: Environment, exams: Sequence[Exam], budgets: Sequence[int], style: str = "direct"
) -> ReplayEngine:
    """An engine that writes out the reference solutions of these exams under these budgets."""
    words = [reference_response(env.world, exam.problems, style) for exam in exams]
    answers = env.encode_data(words)
    prompts = env.prompts([env.message(exam, budget, style)
                           for exam in exams for budget in budgets])
    known = [ids for ids in answers for _ in budgets]
    return ReplayEngine(dict(zip(prompts, known, strict=True)), env.tokenizer.eos_token_id)
