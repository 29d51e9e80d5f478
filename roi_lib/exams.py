"""Exams: papers of N problems, their orders, their prompts, and what a response means.

    draw_papers, order_problems, in_orders   papers, and the orders in which they are sat
    Environment                              world and tokenizer, bound once: prompts, ids, parsing
    Segment, Response                        a response cut into one segment a problem

A paper is a tuple of problems; an `Exam` is a paper in the order in which it must be answered:
`easy` (easy to hard), `hard` (hard to easy) or `medium` (a seeded shuffle that is neither).
Notebook 02."""

import random
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import cycle, islice

from roi_lib.problems import Problem, closing_brace, problem_stream
from roi_lib.worlds import ORDERS, SKIP_ANSWER, TAG_CLOSE, TAG_OPEN, TIERS, World, check_choice


@dataclass(frozen=True)
class Exam:
    """One paper: problems in the order in which they must be answered, and its order's name."""

    problems: tuple[Problem, ...]
    order: str


def draw_papers(world: World, n_papers: int, n_problems: int = 3, split: str = "test",
                seed: int = 0, pool: Sequence[Problem] | None = None,
                tiers: Sequence[str] | None = None) -> list[tuple[Problem, ...]]:
    """Papers of `n_problems` each, tiers in turn (one of each for three), from easy to hard; or of
    these `tiers`, one a problem. `pool`: to draw from, where problems are not generated."""
    tiers = tiers or [TIERS[i % len(TIERS)] for i in range(n_problems)]
    if n_papers < 1 or not tiers:
        raise ValueError(f"cannot draw {n_papers} papers of {n_problems} problems: "
                         "both numbers must be at least 1")
    for tier in tiers:
        check_choice("tier", tier, TIERS)
    streams = {tier: problem_stream(world, tier, split, seed, pool) for tier in tiers}
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
    the two sequences of tiers (of all permutations, where there are no others)."""
    check_choice("order", order, ORDERS)
    easy = sorted(problems, key=lambda p: TIERS.index(p.tier))
    hard = sorted(problems, key=lambda p: -TIERS.index(p.tier))
    if order != "medium":
        return tuple(easy if order == "easy" else hard)
    sorted_tiers = [[p.tier for p in direction] for direction in (easy, hard)]
    rng, shuffled = random.Random(f"{seed}/medium"), list(problems)
    mixable = len(problems) > 2 and len(set(sorted_tiers[0])) > 1
    while True:
        rng.shuffle(shuffled)
        if not mixable or [p.tier for p in shuffled] not in sorted_tiers:
            return tuple(shuffled)


def in_orders(papers: Sequence[Sequence[Problem]], orders: Sequence[str], seed: int) -> list[Exam]:
    """An exam of each paper, the orders taken in turn; `seed` is of the medium ones."""
    return [Exam(order_problems(paper, order, f"{seed}/{i}"), order)
            for i, (paper, order) in enumerate(zip(papers, cycle(orders), strict=False))]


SKIP_WORDS = f"\\boxed{{{SKIP_ANSWER}}}"  # what gives a problem up


def tag(level: int) -> str:
    """The words that predict a level."""
    return f"{TAG_OPEN}Level-{level}{TAG_CLOSE}"


@dataclass(frozen=True)
class Segment:
    """What a response holds for one problem."""

    cost: int  # tokens charged to the problem: header, tag, working, answer
    text: str  # the words of its segment ("" where the response never reached it)
    answer: str | None  # content of the first closed `\\boxed{}` (None: none, or an empty one)
    level: int | None  # predicted level of the first well-formed tag before that box

    @property
    def skipped(self) -> bool:
        """Whether the problem was given up on purpose."""
        return self.answer == SKIP_ANSWER


@dataclass(frozen=True)
class Response:
    """A response cut into segments: `preamble + sum(costs) == total`, all in tokens. What follows a
    header that goes back to a problem already left is charged to it, but never read."""

    segments: tuple[Segment, ...]  # one a problem, in the order of the paper
    preamble: int  # tokens before the first header (a plan, an assessment)
    total: int  # all tokens of the response
    revisits: int  # headers that do not lead forward


def boxed(text: str) -> tuple[str, int] | None:
    """Content and position of the first closed, non-empty `\\boxed{}`, braces balanced: the first,
    not the last, for a row of guesses must not earn what only one of them would."""
    if not (box := re.search(r"\\boxed\s*\{", text)):
        return None
    end = closing_brace(text, box.end() - 1)
    content = "" if end is None else text[box.end() : end].strip()
    return (content, box.start()) if content else None


_TAG = re.compile(re.escape(TAG_OPEN) + r"\s*Level-(\d{1,3})\s*" + re.escape(TAG_CLOSE))
#: What a model thinks before it answers; its chat template may have opened it in the prompt.
_THOUGHT = re.compile(r"(?s)<think>.*?(?:</think>|\Z)|\A(?:(?!<think>).)*</think>")
_MESSAGE = "roi-lib-user-message"


@dataclass(frozen=True)
class Environment:
    """A world and a tokenizer, bound once: what turns exams into token ids, and back. It is made by
    `store.checkpoints.load_environment`."""

    world: World
    tokenizer: object  # any tokenizer of transformers

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without any added ones."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def encode_data(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts in which `<|im_end|>` and the like are words, no control tokens."""
        return self.tokenizer(list(texts), add_special_tokens=False,
                              split_special_tokens=True).input_ids if texts else []

    def message(self, exam: Exam, budget: int, style: str = "direct") -> str:
        """The user message of an exam: instruction with the budget in tokens, then the statements
        (white space folded; what no encoding knows is `?`)."""
        check_choice("style", style, self.world.prompts)
        if not exam.problems:
            raise ValueError("an exam needs at least one problem")
        statements = "\n".join(f"{self.world.header.format(i=i)} {' '.join(p.text.split())}"
                               for i, p in enumerate(exam.problems, start=1))
        return self.world.prompts[style].format(
            budget=budget, n=len(exam.problems),
            problems=statements.encode(errors="replace").decode())

    @cached_property
    def _template(self) -> tuple[list[int], list[int]]:
        """Token ids of the chat template before and after the user message."""
        chat = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": _MESSAGE}], tokenize=False, add_generation_prompt=True)
        before, after = map(self.encode, chat.split(_MESSAGE))
        return before, after

    def prompts(self, messages: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids of user messages in the chat template, ready for generation. The template has
        its control tokens, the messages none: a statement's `<|im_end|>` stays plain text."""
        before, after = self._template
        return [tuple(before + ids + after) for ids in self.encode_data(messages)]

    def prompt(self, exam: Exam, budget: int, style: str = "direct") -> tuple[int, ...]:
        """The same of one exam; see `message`."""
        return self.prompts([self.message(exam, budget, style)])[0]

    @cached_property
    def level_ids(self) -> list[int]:
        """Ids of the levels, where each is one token of the tags; [] where it takes several."""
        ids = [self.tokenizer.get_vocab().get(f"Level-{level}")
               for level in range(self.world.skip_level + 1)]
        return ids if all(i in self.encode(tag(level)) for level, i in enumerate(ids)) else []

    def opening(self, level: int, number: int = 1) -> str:
        """Words that begin the answer to problem `number` with the tag of a level, and so make a
        model try it with that effort; `ValueError`: the world has no such level."""
        if not 0 <= level <= self.world.skip_level:
            raise ValueError(f"the {self.world.name} world has the levels 0 to "
                             f"{self.world.skip_level}, not {level}")
        return f"{self.world.header.format(i=number)}\n{tag(level)}"

    @cached_property
    def smallest_budget(self) -> int:
        """Tokens of one header with one tag: under a smaller budget nothing can be said."""
        return len(self.encode(self.opening(self.world.skip_level)))

    def check_budget(self, *budgets: int) -> None:
        """Refuse budgets under which nothing can be said, or that the world cannot state, with a
        `ValueError`."""
        if min(budgets) < self.smallest_budget:
            raise ValueError(f"budget {min(budgets)} is smaller than one level tag with its header;"
                             f" give at least {self.smallest_budget} tokens")
        if max(budgets) > self.world.largest_budget:
            raise ValueError(f"budget {max(budgets)} is more than the {self.world.name} world can "
                             f"say; give at most {self.world.largest_budget} tokens")

    def read_segment(self, cost: int, text: str) -> Segment:
        """Answer and predicted level of one problem's words."""
        answer, end = boxed(text) or (None, len(text))
        found = _TAG.search(text, 0, end)
        known = found and int(found[1]) <= self.world.skip_level
        return Segment(cost, text, answer, int(found[1]) if known else None)

    def parse(self, ids: Sequence[int], n: int, text: str = "") -> Response:
        """Cut a response to an exam of `n` problems into segments with token-exact costs.

        A segment runs from its header to the next one (a single problem needs none). Text and
        tokens are matched by decoding prefixes of `ids`. `text`: the words as a server sent them,
        of which `ids` are the encoding; words without tokens are read, too."""
        places = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True,
                                return_offsets_mapping=True).offset_mapping if text else []

        @cache
        def end_of(k: int) -> int:
            """Where in the text token `k` ends."""
            if not places:
                return len(self.tokenizer.decode(ids[: k + 1], skip_special_tokens=True))
            return places[k][1] if k < len(places) else len(text)  # an end-of-sequence

        text = (text[: end_of(len(ids) - 1)] if places and ids else
                self.tokenizer.decode(ids, skip_special_tokens=True))
        text = _THOUGHT.sub(lambda thought: " " * len(thought[0]), text)  # charged, never read
        headers = [m for m in re.finditer(self.world.header_pattern, text) if 1 <= int(m[1]) <= n]
        if n == 1 and not headers:
            return Response((self.read_segment(len(ids), text),), 0, len(ids), 0)
        numbers = [int(header[1]) for header in headers]
        begins = [header.start() for header in headers] + [len(text)]
        starts = [bisect_right(range(len(ids)), begin, key=end_of) for begin in begins[:-1]]
        starts.append(len(ids))
        texts, costs, revisits = [""] * n, [0] * n, 0
        for i, number in enumerate(numbers):
            costs[number - 1] += starts[i + 1] - starts[i]
            forward = number > max(numbers[:i], default=0)
            still_here = set(numbers[numbers.index(number) : i]) == {number}
            revisits += not forward
            if forward or still_here:
                texts[number - 1] += text[begins[i] : begins[i + 1]]
        segments = tuple(map(self.read_segment, costs, texts))
        return Response(segments, starts[0], len(ids), revisits)
