"""Replays of responses that exist already, under the same hard budget. Of the reference solutions:
their Score is what the budget alone costs."""

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest

from roi_lib.exams import SKIP_WORDS, Environment, Exam
from roi_lib.generation import Engine, Request, Stream, within_budget
from roi_lib.problems import Problem
from roi_lib.worlds import TIERS, World

#: What a problem of a tier costs about, in tokens, for who rates a whole exam (Least-to-Most).
TIER_COSTS = dict(zip(TIERS, (16, 48, 96), strict=True))


def reference_response(world: World, problems: Sequence[Problem], style: str = "direct",
                       skip: Sequence[bool] = (), budget: int | None = None,
                       left: Callable[[str], int] = lambda text: 0) -> str:
    """The solutions in order, under their headers, as a faultless writer would write them: in full,
    or with a style `brief` or `at_once` with less effort; where a problem's flag in `skip` is set,
    a skip instead. A rated style has a rating before each answer, a counted one the tokens that are
    `left` behind the text so far. Plan-and-Solve opens with a plan of all problems, Least-to-Most
    with a rating of each; given a `budget`, it compares with it what the tiers cost together, and
    skips the hard problems where that is more. Every token counts."""
    headers = [world.header.format(i=i) for i in range(1, len(problems) + 1)]
    opening = {"plan_and_solve": ("Plan", [p.plan or "solve" for p in problems]),
               "least_to_most": ("Rating", [p.tier for p in problems])}
    parts = []
    if style in opening:
        title, words = opening[style]  # `Q1` without its dot is taken for no header
        notes = [f"{h.strip('#. ')} {word}" for h, word in zip(headers, words, strict=True)]
        parts.append(f"{title}: {'; '.join(notes)}.")
    if style == "least_to_most" and budget is not None:
        cost = sum(TIER_COSTS[p.tier] for p in problems)
        parts[0] += f" {cost} {'<=>'[(cost > budget) - (cost < budget) + 1]} {budget}."
        skip = [cost > budget and p.tier == TIERS[-1] for p in problems]
    for header, p, skipped in zip_longest(headers, problems, skip, fillvalue=False):
        answer = {"brief": p.brief or p.solution, "at_once": f"\\boxed{{{p.answer}}}"}
        effort = style.removeprefix("rated").removeprefix("counted").lstrip("_")
        words = SKIP_WORDS if skipped else answer.get(effort, p.solution)
        if style.startswith("rated"):
            words = f"({p.tier}) {words}"
        elif style.startswith("counted"):
            words = "({}) {}".format(left("\n".join(parts)), words)
        parts.append(f"{header}\n{words}")
    return "\n".join(parts)


class ReplayEngine(Engine):
    """Plays back `responses`, prompt -> response as token ids, under the same hard budget; `eos_id`
    closes each, and is charged as usual."""

    def __init__(self, responses: Mapping[tuple[int, ...], Sequence[int]], eos_id: int) -> None:
        self.responses, self.eos_id = responses, eos_id

    def stream(self, requests: Sequence[Request], temperature: float = 1.0) -> Stream:
        """See `Engine`; every rollout of a request is the same. `KeyError`: an unknown prompt."""
        for i, request in enumerate(requests):
            ids = (*self.responses[request.prompt], self.eos_id)[: request.budget]
            yield i, [within_budget(ids, request.budget, [self.eos_id])] * request.n


def reference_engine(env: Environment, exams: Sequence[Exam], budgets: Sequence[int],
                     style: str = "direct") -> ReplayEngine:
    """An engine that writes out the reference solutions of these exams under these budgets."""
    answers = env.encode_data([reference_response(env.world, e.problems, style) for e in exams])
    prompts = env.prompts([env.message(e, budget, style) for e in exams for budget in budgets])
    known = [ids for ids in answers for _ in budgets]
    return ReplayEngine(dict(zip(prompts, known, strict=True)), env.tokenizer.eos_token_id)
