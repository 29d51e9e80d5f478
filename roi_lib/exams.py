"""Exams: papers of N problems, their orders, their prompts, and what a response means.

A paper (`Exam`) is a tuple of problems in the order in which they must be answered. The same
problems are sat in three orders: `easy` (easy to hard), `hard` (hard to easy) and `medium` (a
seeded shuffle that is neither). A response is cut into one `Segment` a problem, whose costs in
tokens, with those of the preamble before the first header, add up to the whole response.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice
from pathlib import Path

from roi_lib.problems import Problem, closing_brace
from roi_lib.sources import problem_stream
from roi_lib.worlds import ORDERS, SKIP_ANSWER, TAG_CLOSE, TAG_OPEN, TIERS, World


@dataclass(frozen=True)
class Exam:
    """One paper: problems in the order in which they must be answered, and its order's name."""

    problems: tuple[Problem, ...]
    order: str


def draw_papers(
    world: World,
    n_papers: int,
    n_problems: int = 3,
    split: str = "test",
    seed: int = 0,
    root: Path | None = None,
    problems: list[Problem] | None = None,
    tiers: Sequence[str] | None = None,
) -> list[tuple[Problem, ...]]:
    """Papers of `n_problems` each, tiers in turn (one of each for three), from easy to hard.

    Args:
        root: local folder of the datasets (see `sources.load_problems`).
        problems: a pool of your own instead of the world's sources.
        tiers: the mix instead, one tier a problem; `n_problems` does not count then.

    Raises:
        ValueError: fewer than one paper or problem, an unknown tier, or one without enough
            problems.
    """
    if tiers is not None:
        n_problems = len(tiers)
    if n_papers < 1 or n_problems < 1:
        raise ValueError(f"cannot draw {n_papers} papers of {n_problems} problems: "
                         "both numbers must be at least 1")
    tiers = tiers or [TIERS[i % len(TIERS)] for i in range(n_problems)]
    unknown = set(tiers) - set(TIERS)
    if unknown:
        raise ValueError(f"unknown tier {min(unknown)!r}; choose from {', '.join(TIERS)}")
    streams = {tier: problem_stream(world, tier, split, seed, root, problems) for tier in tiers}
    papers = []
    for _ in range(n_papers):
        paper: dict[str, Problem] = {}
        for tier in sorted(tiers, key=TIERS.index):
            fresh = (p for p in islice(streams[tier], 1_000) if p.id not in paper)
            problem = next(fresh, None)
            if problem is None:
                raise ValueError(f"there are not enough {tier} problems for one paper")
            paper[problem.id] = problem
        papers.append(tuple(paper.values()))
    return papers


def order_problems(problems: Sequence[Problem], order: str, seed: str) -> tuple[Problem, ...]:
    """The same problems as `order` has them (paper, evaluation set-up).

    `easy` sorts by tier from easy to hard, `hard` the other way round; both keep the given order
    within a tier. `medium` is a permutation drawn with `seed` among those that give neither of
    the two sequences of tiers (of all permutations, where there are no others).

    Raises:
        ValueError: unknown order.
    """
    if order not in ORDERS:
        raise ValueError(f"unknown order {order!r}; choose from {', '.join(ORDERS)}")
    easy = sorted(problems, key=lambda p: TIERS.index(p.tier))
    hard = sorted(problems, key=lambda p: -TIERS.index(p.tier))
    if order != "medium":
        return tuple(easy if order == "easy" else hard)
    sorted_tiers = [[p.tier for p in way] for way in (easy, hard)]
    rng, shuffled = random.Random(f"{seed}/medium"), list(problems)
    mixable = len(problems) > 2 and len(set(sorted_tiers[0])) > 1
    while True:
        rng.shuffle(shuffled)
        if not mixable or [p.tier for p in shuffled] not in sorted_tiers:
            return tuple(shuffled)


def in_orders(
    papers: Sequence[Sequence[Problem]], orders: Sequence[str], seed: int
) -> list[Exam]:
    """An exam of each paper, the orders taken in turn; `seed` is of the medium ones.

    Raises:
        ValueError: unknown order.
    """
    return [Exam(order_problems(paper, order, f"{seed}/{i}"), order)
            for i, (paper, order) in enumerate(zip(papers, cycle(orders), strict=False))]


def problem_block(world: World, problems: Sequence[Problem]) -> str:
    """The statements under their headers, one line each.

    White space inside is folded, and what no encoding knows (a lone surrogate) becomes `?`.
    """
    lines = "\n".join(
        f"{world.header.format(i=i)} {' '.join(p.text.split())}"
        for i, p in enumerate(problems, start=1)
    )
    return lines.encode(errors="replace").decode()


def exam_prompt(world: World, exam: Exam, budget: int, style: str = "direct") -> str:
    """The user message of an exam: instruction with the budget in tokens, then the statements.

    Raises:
        ValueError: empty exam, or a prompting style that the world does not have.
    """
    if not exam.problems:
        raise ValueError("an exam needs at least one problem")
    if style not in world.prompts:
        raise ValueError(f"world {world.name} has no prompting style {style!r}; "
                         f"choose from {', '.join(world.prompts)}")
    return world.prompts[style].format(
        budget=budget, n=len(exam.problems), problems=problem_block(world, exam.problems)
    )


def tag(level: int) -> str:
    """The words that predict a level."""
    return f"{TAG_OPEN}Level-{level}{TAG_CLOSE}"


def reference_response(
    world: World, problems: Sequence[Problem], style: str = "direct", skip: Sequence[bool] = (),
    levels: Sequence[int] = (),
) -> str:
    """The worked solutions in order, under their headers; what a faultless writer would write.

    Plan-and-Solve opens with a plan of all problems, Least-to-Most with a rating of each; both
    cost tokens like any other.

    Args:
        skip: one flag a problem; where it is set, a skip stands in for the solution.
        levels: one a problem, to be written as its tag.
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
    tags = [f"{tag(level)} " for level in levels] or [""] * len(problems)
    skip = skip or [False] * len(problems)
    for header, first, p, skipped in zip(headers, tags, problems, skip, strict=True):
        words = f"\\boxed{{{SKIP_ANSWER}}}" if skipped else p.solution
        parts.append(f"{header}\n{first}{words}")
    return "\n".join(parts)


_SENTINEL = "roi-lib-user-message"


def encode_prompt(tokenizer, message: str) -> list[int]:
    """Token ids of one user message in the tokenizer's chat template, ready for generation.

    The template is encoded with its control tokens, the message without: a statement that holds
    `<|im_end|>` stays plain text (FAULTS F14).
    """
    return encode_prompts(tokenizer, [message])[0]


def encode_prompts(tokenizer, messages: Sequence[str]) -> list[list[int]]:
    """The same for many messages at once, which takes a fraction of the time."""
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": _SENTINEL}], tokenize=False, add_generation_prompt=True
    )
    before, after = tokenizer(chat.split(_SENTINEL), add_special_tokens=False).input_ids
    encoded = tokenizer(list(messages), add_special_tokens=False, split_special_tokens=True)
    return [before + ids + after for ids in encoded.input_ids]


@dataclass(frozen=True)
class Segment:
    """What a response holds for one problem.

    Attributes:
        cost: tokens charged to the problem: header, tag, working, answer.
        text: the words of its segment ("" where the response never reached it).
        answer: content of the first closed `\\boxed{}` (None: no such box, or an empty one).
        level: the predicted level of the first well-formed tag before that box, or None.
    """

    cost: int
    text: str
    answer: str | None
    level: int | None

    @property
    def skipped(self) -> bool:
        """Whether the problem was given up on purpose."""
        return self.answer == SKIP_ANSWER


@dataclass(frozen=True)
class Response:
    """A response cut into segments: `preamble + sum(costs) == total`, all in tokens.

    Attributes:
        segments: one a problem, in the order of the paper.
        preamble: tokens before the first header (a plan, an assessment).
        total: all tokens of the response.
        revisits: headers that do not lead forward. What follows a header that goes back to a
            problem already left is charged to it, but never read for an answer: no revisiting.
    """

    segments: tuple[Segment, ...]
    preamble: int
    total: int
    revisits: int


def boxed(text: str) -> tuple[str, int] | None:
    """Content and position of the first closed, non-empty `\\boxed{}`, braces balanced.

    The first one counts, not the last: an exam has no revisiting, and a row of guesses must not
    earn what only one of them would.
    """
    start = text.find("\\boxed{")
    if start < 0:
        return None
    begin = start + len("\\boxed")
    end = closing_brace(text, begin)
    content = "" if end is None else text[begin + 1 : end].strip()
    return (content, start) if content else None


_TAG = re.compile(re.escape(TAG_OPEN) + r"\s*Level-(\d+)\s*" + re.escape(TAG_CLOSE))


def read_segment(world: World, cost: int, text: str) -> Segment:
    """Answer and predicted level of one problem's words."""
    box = boxed(text)
    answer, end = box if box else (None, len(text))
    tag = _TAG.search(text, 0, end)
    level = int(tag[1]) if tag and int(tag[1]) <= world.skip_level else None
    return Segment(cost, text, answer, level)


def parse_response(world: World, tokenizer, ids: Sequence[int], n: int) -> Response:
    """Cut a response to an exam of `n` problems into segments with token-exact costs.

    A segment runs from its header to the next one. Text and tokens are matched by decoding
    prefixes of `ids`; nothing is ever encoded again. A response to a single problem may leave
    its header out.
    """
    text = tokenizer.decode(ids, skip_special_tokens=True)
    headers = [m for m in re.finditer(world.header_pattern, text) if 1 <= int(m[1]) <= n]
    if n == 1 and not headers:
        return Response((read_segment(world, len(ids), text),), 0, len(ids), 0)

    @cache
    def end_of(k: int) -> int:
        """Where in the text token `k` ends."""
        return len(tokenizer.decode(ids[: k + 1], skip_special_tokens=True)) if k >= 0 else 0

    def token_at(position: int) -> int:
        """Index of the token that holds the character at `position`, by interpolation."""
        low, high = -1, len(ids) - 1  # it is above the first of these, and not above the second
        while high - low > 1:
            share = (position - end_of(low)) / (end_of(high) - end_of(low))
            k = min(max(low + round(share * (high - low)), low + 1), high - 1)
            low, high = (k, high) if end_of(k) <= position else (low, k)
        return high

    numbers = [int(header[1]) for header in headers]
    places = [header.start() for header in headers] + [len(text)]
    starts = [token_at(place) for place in places[:-1]] + [len(ids)]
    texts, costs, revisits = [""] * n, [0] * n, 0
    for i, number in enumerate(numbers):
        costs[number - 1] += starts[i + 1] - starts[i]
        forward = number > max(numbers[:i], default=0)
        still_here = set(numbers[numbers.index(number) : i]) == {number}
        revisits += not forward
        if forward or still_here:
            texts[number - 1] += text[places[i] : places[i + 1]]
    segments = tuple(read_segment(world, c, t) for c, t in zip(costs, texts, strict=True))
    return Response(segments, starts[0], len(ids), revisits)
