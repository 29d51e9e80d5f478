"""Meta-Cognitive Fine-Tuning (MFT): predict what a problem will cost, then solve it or skip it.

Stage one of the method (paper, section on MFT), step by step:

    rejection_sample   answers of the base model to each training problem, graded
    align              one problem's answers -> what is taught: an answer with its level, or a skip
    best_combination   several problems' answers -> the combination that a budget rewards most
    make_row           one or several of these -> one training row whose tags are exact
    curriculum         the rows: every problem alone, then exams in mixed orders

`training.mft` fine-tunes on the rows, and measures the model. Notebook 04."""

import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd

from roi_lib.exams import SKIP_WORDS, Environment, Exam, tag
from roi_lib.generation import Engine
from roi_lib.problems import Problem
from roi_lib.rational import statement_of
from roi_lib.sitting import sit
from roi_lib.worlds import TAG_OPEN, TIERS, MFTRecipe, World


def tag_tokens(env: Environment) -> int:
    """Tokens of one tag. `ValueError`: the tokenizer does not give the tag back, or one level's tag
    is longer than another's, so that a tag would change the very cost that it names."""
    tags = [tag(level) for level in range(env.world.skip_level + 1)]
    ids = [env.encode(words) for words in tags]
    texts = ["".join(env.tokenizer.decode(i, skip_special_tokens=True).split()) for i in ids]
    if texts != tags or len({len(i) for i in ids}) > 1:
        raise ValueError(f"the tokenizer splits the level tags badly ({tags[0]} reads {texts[0]!r} "
                         f"and takes {len(ids[0])} tokens, {tags[-1]} {len(ids[-1])}); "
                         "take another tokenizer, or other tags")
    return len(ids[0])


@dataclass(frozen=True)
class Sample:
    """One sampled answer to a problem sat alone."""

    words: str  # the answer, without its header
    cost: int  # tokens of the answer with its header and with the tag that it will get
    correct: bool  # right, and ended within the top level's edge, tag included
    style: str = "direct"  # the prompting style that it answers


def rejection_sample(env: Environment, engine: Engine, problems: Sequence[Problem], k: int = 8,
                     seed: int = 0, styles: Sequence[str] = ("direct",),
                     temperature: float = 1.0) -> list[list[Sample]]:
    """`k` graded answers to every problem and prompting style, alone.

    The budget is the top level's edge: an answer that needs more would be skipped anyway. Of
    several styles, one stands for each level. An `engines.logs.LoggedEngine` keeps all.
    `ValueError`: not one of them is right."""
    extra = tag_tokens(env)
    exams = [Exam((problem,), "easy") for problem in problems for _ in range(k)]
    table = pd.concat([sit(env, engine, exams, env.world.level_edges[-1], seed=seed, style=style,
                           temperature=temperature).assign(style=style) for style in styles])
    if not table["correct"].any():
        raise ValueError(f"not one of {len(table)} sampled answers is right: there is nothing "
                         "to teach; look at some answers, and check model, prompt and grader")
    samples: list[list[Sample]] = [[] for _ in problems]
    for row in table.itertuples():
        (segment,) = env.parse(row.ids, 1).segments
        words = re.sub(env.world.header_pattern, "", segment.text, count=1).strip()
        fits = row.cost + extra <= env.world.level_edges[-1]
        good = row.correct and row.finished and fits and TAG_OPEN not in words
        samples[row.exam // k].append(Sample(words, row.cost + extra, bool(good), row.style))
    return one_style_a_level(env.world, problems, samples)


def one_style_a_level(world: World, problems: Sequence[Problem],
                      samples: Sequence[Sequence[Sample]]) -> list[list[Sample]]:
    """The samples without those whose level another style reaches with more right answers to
    problems that are alike in words: else a tag would not say how a problem is worked. Where none
    is left, they stay, and are no good."""
    right: Counter = Counter()
    for problem, some in zip(problems, samples, strict=True):
        for s in some:
            right[statement_of(problem), world.level_of(s.cost), s.style] += s.correct
    best = {key[:2]: key[2] for key, _ in sorted(right.items(), key=lambda item: item[1])}
    return [[s for s in some if best[statement_of(problem), world.level_of(s.cost)] == s.style]
            or [replace(s, correct=False) for s in some]
            for problem, some in zip(problems, samples, strict=True)]


@dataclass(frozen=True)
class Target:
    """What MFT teaches for one problem."""

    problem: Problem
    words: str  # the answer that is taught, or a skip
    level: int  # its level when the problem stands alone
    solve_rate: float  # share of the samples that are right within the top level

    @property
    def skip(self) -> bool:
        """Whether the problem is refused."""
        return self.words == SKIP_WORDS


def align(world: World, problem: Problem, samples: Sequence[Sample], target="shortest",
          budget: float = math.inf) -> Target:
    """Tag alignment and refusal learning: one problem's samples -> what is taught.

    Of the right answers within the top level and the budget one is taught: the "shortest" (thrift;
    long luck is dropped), the "median" by cost (what the model usually spends), or "any", drawn by
    the problem's id: the level then stands for an effort. Where there is none, the problem is
    refused."""
    good = sorted((s for s in samples if s.correct and s.cost <= budget), key=lambda s: s.cost)
    rate = len(good) / len(samples)
    if not good:
        return Target(problem, SKIP_WORDS, world.skip_level, rate)
    taught = random.Random(problem.id).choice(good) if target == "any" else good[
        0 if target == "shortest" else (len(good) - 1) // 2]
    return Target(problem, taught.words, world.level_of(taught.cost), rate)


SKIPPED = 0.3  # share of the problems skipped in a combination drawn by chance


def best_combination(world: World, problems: Sequence[Problem], samples: Sequence[Sequence[Sample]],
                     budget: int, skip_cost: int, draws: int, rng: random.Random) -> list[Target]:
    """Rejection sampling of a whole exam: of `draws` combinations of sampled answers (right or
    wrong) and skips, the one with the most points under `budget` tokens, and of those the one that
    spends most on them: what is left over earns nothing, and what costs more is seldom mere luck.

    `skip_cost` is that of a skip with header and tag. A wrong answer, or one that the budget cuts,
    is a skip in what is taught. The choice is made in hindsight: who learns it has seen the luck
    of these samples, and will be bolder than pays."""
    best, most = [], (-1, 0)
    for _ in range(draws):
        chosen = [None if rng.random() < SKIPPED else rng.choice(some) for some in samples]
        left, kept = budget, []
        for sample in chosen:
            left -= sample.cost if sample else skip_cost
            kept.append(sample if sample and sample.correct and left >= 0 else None)
        costs = [sample.cost for sample in kept if sample]
        if (worth := (len(costs), sum(costs))) > most:
            best, most = kept, worth
    return [Target(problem, SKIP_WORDS, world.skip_level, 0.0) if sample is None else
            Target(problem, sample.words, world.level_of(sample.cost), 1.0)
            for problem, sample in zip(problems, best, strict=True)]


@dataclass(frozen=True)
class Row:
    """One training row: token ids of prompt and response, and the response's levels."""

    prompt: list[int]
    response: list[int]
    levels: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


def make_row(env: Environment, targets: Sequence[Target], budget: int) -> Row:
    """The row that answers these problems in this order under `budget` tokens.

    Levels are read off the row's own tokens, tags and end-of-sequence included: next to an edge a
    problem may cost another level in an exam than alone. `ValueError`: no levels agree."""
    world = env.world
    prompt = env.prompt(Exam(tuple(t.problem for t in targets), "medium"), budget, "roi")
    levels, words = [t.level for t in targets], [t.words for t in targets]
    for _ in range(len(targets) + 2):
        text = "\n".join(f"{world.header.format(i=i)}\n{tag(level)} {answer}" for i, (level, answer)
                         in enumerate(zip(levels, words, strict=True), start=1))
        response = [*env.encode(text), env.tokenizer.eos_token_id]
        segments = env.parse(response, len(targets)).segments
        real = [world.skip_level if answer == SKIP_WORDS else world.level_of(segment.cost)
                for answer, segment in zip(words, segments, strict=True)]
        if real == levels:
            return Row(list(prompt), response, levels)
        levels = real
        words = [SKIP_WORDS if level == world.skip_level else answer
                 for level, answer in zip(levels, words, strict=True)]
    raise ValueError(f"the tags of {targets[0].problem.id} do not settle on the costs they name")


def curriculum(env: Environment, problems: Sequence[Problem], samples: Sequence[Sequence[Sample]],
               recipe: MFTRecipe) -> list[Row]:
    """All rows of the recipe's steps: every problem alone, then exams of several, in mixed orders;
    what those teach, `best_combination` chooses under the budget of the prompt."""
    rng, world = random.Random(f"{recipe.seed}/mft"), env.world

    def alone(i: int, budget: int) -> Target:
        return align(world, problems[i], samples[i], recipe.target, budget)

    skip_cost = len(env.encode(f"{env.opening(world.skip_level)} {SKIP_WORDS}"))
    by_tier = {tier: [i for i, p in enumerate(problems) if p.tier == tier] for tier in TIERS}
    tiers = [tier for tier in TIERS if by_tier[tier]]
    singles, exams = [], []
    for i in range(len(problems)):
        budget = rng.choice(recipe.budgets)
        singles.append(make_row(env, [alone(i, budget)], budget))
    for _ in range(recipe.exams):
        n, budget = rng.choices(*zip(*recipe.sizes, strict=True))[0], rng.choice(recipe.budgets)
        drawn = [rng.choice(by_tier[tier]) for tier in rng.choices(tiers, k=n)]
        taught = best_combination(
            world, [problems[i] for i in drawn], [samples[i] for i in drawn], budget, skip_cost,
            recipe.combinations, rng) if recipe.combinations else [alone(i, 10**9) for i in drawn]
        exams.append(make_row(env, taught, budget))
    rows = []
    for made in (singles, exams):
        rows += in_batches_of_like_length(
            [row for row in made if len(row) <= recipe.max_length], recipe.rows, rng)
    return rows if recipe.steps < 0 else rows[: recipe.steps * recipe.rows]


def in_batches_of_like_length(rows: list[Row], size: int, rng: random.Random) -> list[Row]:
    """Shuffled rows in whole batches of `size` that need little padding; the odd rest is left."""
    rng.shuffle(rows)
    rows = rows[: len(rows) // size * size or len(rows)]
    batches = []
    for start in range(0, len(rows), 16 * size):
        block = sorted(rows[start : start + 16 * size], key=Row.__len__)
        batches += [block[i : i + size] for i in range(0, len(block), size)]
    rng.shuffle(batches)
    return [row for batch in batches for row in batch]
