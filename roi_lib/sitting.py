"""Sitting: exams through a generator, the parser and the grader.

`sit` lets exams be sat under one hard budget; a `Sitting` is one exam as sat; `segment_table` has
one entry a problem, column by column.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest

import numpy as np

from roi_lib.exams import (
    Exam,
    Response,
    encode_prompts,
    exam_prompt,
    parse_response,
    reference_response,
)
from roi_lib.generation import BudgetedGenerator, ReplayGenerator, Request
from roi_lib.grading import grade
from roi_lib.worlds import TAG_CLOSE, TAG_OPEN, World


@dataclass(frozen=True)
class Sitting:
    """One exam as sat: the paper, the response cut into segments, and each problem's mark.

    Attributes:
        exam: the paper.
        budget: the hard budget in tokens.
        ids: the response as token ids.
        finished: whether the response ended by itself.
        response: the segments.
        correct: one mark a position.
        overrun: tokens that the back end sent beyond the budget; they were cut.
        failed: why there is no response ("" where there is one).
    """

    exam: Exam
    budget: int
    ids: tuple[int, ...]
    finished: bool
    response: Response
    correct: tuple[bool, ...]
    overrun: int = 0
    failed: str = ""


def smallest_budget(world: World, tokenizer) -> int:
    """Tokens of one header with one tag: under a smaller budget nothing can be said."""
    words = f"{world.header.format(i=1)} {TAG_OPEN}Level-{world.skip_level}{TAG_CLOSE}"
    return len(tokenizer(words, add_special_tokens=False).input_ids)


def check_budget(world: World, tokenizer, budget: int) -> None:
    """Refuse a budget under which nothing can be said.

    Raises:
        ValueError: the budget is smaller than a header with a level tag.
    """
    least = smallest_budget(world, tokenizer)
    if budget < least:
        raise ValueError(f"budget {budget} is smaller than one level tag with its header; "
                         f"give at least {least} tokens")


def sit(
    world: World,
    tokenizer,
    generator: BudgetedGenerator,
    exams: Sequence[Exam],
    budget: int,
    style: str = "direct",
    temperature: float = 1.0,
    seed: int = 0,
    drafts: Sequence[Sequence[int]] = (),
) -> list[Sitting]:
    """Sit every exam once under one hard budget in tokens.

    Args:
        drafts: a guess of each response, which changes nothing but the time it takes (see
            `generation.Request`).

    Raises:
        ValueError: no exams, or a budget smaller than a header with a tag.
    """
    if not exams:
        raise ValueError("there are no exams to sit")
    check_budget(world, tokenizer, budget)
    messages = [exam_prompt(world, exam, budget, style) for exam in exams]
    unique = list(dict.fromkeys(messages))
    prompts = dict(zip(unique, map(tuple, encode_prompts(tokenizer, unique)), strict=True))
    requests = [Request(prompts[m], budget, (seed, i), message=m, draft=tuple(draft))
                for i, (m, draft) in enumerate(zip_longest(messages, drafts, fillvalue=()))]
    rollouts = [rollout for (rollout,) in generator.generate(requests, temperature)]
    responses = [parse_response(world, tokenizer, rollout.ids, len(exam.problems))
                 for exam, rollout in zip(exams, rollouts, strict=True)]
    points = iter(grade(world, [
        pair for exam, response in zip(exams, responses, strict=True)
        for pair in zip(exam.problems, response.segments, strict=True)]))
    sittings = []
    for exam, rollout, response in zip(exams, rollouts, responses, strict=True):
        correct = tuple(islice(points, len(exam.problems)))
        sittings.append(Sitting(exam, budget, rollout.ids, rollout.finished, response, correct,
                                rollout.overrun, rollout.failed))
    return sittings


def segment_table(world: World, sittings: Sequence[Sitting]) -> dict[str, np.ndarray]:
    """One entry a problem sat, column by column.

    Columns: `tier`, `family`; `position` (from 1); `cost` in tokens; `predicted` level (-1: no
    tag); `real` level of the cost (a skip is at the skip level by definition; an unfinished
    segment counts with what it spent); `skipped`; `correct`; `reached` (any token spent on it);
    `cut` (the budget ended the response here).
    """
    last = [max((i for i, x in enumerate(s.response.segments, 1) if x.cost), default=0)
            for s in sittings]
    rows = [
        (problem.tier, problem.family, position, segment.cost,
         -1 if segment.level is None else segment.level,
         world.skip_level if segment.skipped else world.level_of(segment.cost),
         segment.skipped, correct, segment.cost > 0, position == end and not s.finished)
        for s, end in zip(sittings, last, strict=True)
        for position, (problem, segment, correct) in enumerate(
            zip(s.exam.problems, s.response.segments, s.correct, strict=True), start=1)
    ]
    names = ("tier", "family", "position", "cost", "predicted", "real", "skipped", "correct",
             "reached", "cut")
    return {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True),
                                                           strict=True)}


def confusion(world: World, predicted: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Counts [predicted level, real level]; entries without a prediction (-1) are left out."""
    levels = world.skip_level + 1
    given = predicted >= 0
    flat = np.bincount(predicted[given] * levels + real[given], minlength=levels * levels)
    return flat.reshape(levels, levels)


def reference_ids(
    world: World, tokenizer, exams: Sequence[Exam], style: str,
    levels: Sequence[Sequence[int]] = (),
) -> list[tuple[int, ...]]:
    """The reference solutions of these exams as token ids, without end-of-sequence.

    Args:
        levels: of the problems of each exam, to be written as tags.
    """
    words = [reference_response(world, exam.problems, style, levels=tags)
             for exam, tags in zip_longest(exams, levels, fillvalue=())]
    encoded = tokenizer(words, add_special_tokens=False, split_special_tokens=True)
    return [tuple(ids) for ids in encoded.input_ids]


def reference_drafts(
    world: World, tokenizer, exams: Sequence[Exam], style: str,
    levels: Sequence[Sequence[int]] = (),
) -> list[tuple[int, ...]]:
    """The reference solutions as drafts (see `generation.Request`), in a world that has drafts.

    Args:
        levels: see `reference_ids`.
    """
    if not world.drafts:
        return [()] * len(exams)
    return reference_ids(world, tokenizer, exams, style, levels)


def reference_generator(
    world: World, tokenizer, exams: Sequence[Exam], budgets: Sequence[int], style: str
) -> ReplayGenerator:
    """A generator that writes out the reference solutions of these exams under these budgets."""
    responses = {}
    for exam, ids in zip(exams, reference_ids(world, tokenizer, exams, style), strict=True):
        messages = [exam_prompt(world, exam, budget, style) for budget in budgets]
        for prompt in encode_prompts(tokenizer, messages):
            responses[tuple(prompt)] = ids
    return ReplayGenerator(responses, tokenizer.eos_token_id)
