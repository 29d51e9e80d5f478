"""Does a model decide? The same papers with one thing changed, and what it does at one problem.

    budget    only the stated budget changes; the hard problem comes first
    behind    only what comes after the hard problem changes
    words     only the hard problem's family or stated length changes
    spent     only what the first answer cost changes; the hard problem comes second

What a model does is read exactly, without sampling: the probability of each level where its next
tag stands (`level_probabilities`). Beside it the exact policy by statement, with its abilities."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from roi_lib.engines import engine_for
from roi_lib.evaluation import with_interval
from roi_lib.exams import Environment, Exam, draw_papers
from roi_lib.osmckp import Instance, solve
from roi_lib.problems import Problem, sample_problem
from roi_lib.rarl import STYLE, pad_right
from roi_lib.rational import Outcomes, sample_outcomes, statement_of
from roi_lib.store.checkpoints import load_environment, load_model
from roi_lib.worlds import TAG_OPEN, TIERS, World

BUDGETS = (48, 64, 80, 96, 112, 128, 160, 192, 224, 256)
FIXED = 96  # tokens, where the budget does not change
ROWS = 256  # at a time


@dataclass(frozen=True)
class Case:
    """One exam of one condition, at the moment of a decision."""

    question: str  # what is changed
    x: object  # to what
    exam: Exam
    budget: int
    opening: str = ""  # what has been answered so far
    position: int = 0  # of the problem to decide about, from 0


def cases(env: Environment, papers: Sequence[Sequence[Problem]], seed: int = 0) -> list[Case]:
    """Every paper, of one problem a tier, under every condition."""
    world, rng, found = env.world, random.Random(f"{seed}/counterfactuals"), []
    known = {statement_of(p) for paper in papers for p in paper if p.tier == TIERS[-1]}
    by_words: dict[str, list[Problem]] = {words: [] for words in sorted(known)}
    for _ in range(40 * len(papers)):
        problem = sample_problem(rng.choice(world.families[TIERS[-1]]), TIERS[-1], "test", rng)
        by_words.get(statement_of(problem), []).append(problem)
    for paper in papers:
        easy, medium, last = sorted(paper, key=lambda p: TIERS.index(p.tier))
        whole = last, medium, easy
        found += [Case("budget", b, Exam(whole, "hard"), b) for b in BUDGETS]
        for rest in ((), (easy,), (medium,), (medium, easy)):
            words = ", ".join(p.tier for p in rest) or "nothing"
            found.append(Case("behind", words, Exam((last, *rest), "hard"), FIXED))
        found += [Case("words", words, Exam((rng.choice(some), medium, easy), "hard"), FIXED)
                  for words, some in by_words.items() if some]
        for effort, words in (("brief", medium.brief), ("in full", medium.solution)):
            cost = len(env.encode(f"{env.opening(0)} {words}"))  # all tags are of one length
            found.append(Case("spent", effort, Exam((medium, last, easy), "medium"), FIXED,
                              f"{env.opening(world.level_of(cost))} {words}\n", 1))
    return found


@torch.inference_mode()
def level_probabilities(env: Environment, model, some: Sequence[Case]) -> np.ndarray:
    """Probability of each level, skip last, at the case's next tag, [cases, levels]; they sum to
    less than 1 where the model might write something else. `ValueError`: a level takes several
    tokens."""
    if not env.level_ids:
        raise ValueError("decisions are read from the level's token, and this tokenizer has none")
    found, ids = [], []
    for case in some:
        header = env.world.header.format(i=case.position + 1)
        ids.append(env.prompt(case.exam, case.budget, STYLE) + tuple(
            env.encode(f"{case.opening}{header}\n{TAG_OPEN}")))
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), ROWS):
        rows = [ids[i] for i in order[start : start + ROWS]]
        padded, mask = pad_right(rows, model.device)
        hidden = model.model(input_ids=padded, use_cache=False).last_hidden_state
        ends = hidden[torch.arange(len(rows)), mask.sum(1).long() - 1]
        found.append(torch.softmax(model.lm_head(ends).float(), -1)[:, env.level_ids])
    return torch.cat(found)[np.argsort(order)].cpu().numpy()


def optimal_levels(env: Environment, outcomes: Outcomes, some: Sequence[Case]) -> np.ndarray:
    """The same of the exact policy by statement: 1 for the level that it takes, [cases, levels].
    `ValueError`: the outcomes are of a model without tags."""
    known, solved = outcomes.by_statement(), {}
    if (efforts := outcomes.cost.shape[2]) != env.world.skip_level:
        raise ValueError(f"the outcomes are of {efforts} efforts, and there are "
                         f"{env.world.skip_level} levels; sample them with style \"roi\"")
    found = np.zeros((len(some), env.world.skip_level + 1))
    for row, case in zip(found, some, strict=True):
        words = tuple(map(statement_of, case.exam.problems[case.position :]))
        left = case.budget - len(env.encode(case.opening))
        if words not in solved:
            solved[words] = solve(Instance(max(BUDGETS), [known[word] for word in words])).policy
        row[(solved[words][0, left] - 1) % len(row)] = 1  # action 0 is the skip, the last level
    return found


def decision_table(some: Sequence[Case], probabilities: np.ndarray, seed: int = 0) -> pd.DataFrame:
    """A row a condition: probability of a skip, and mean level where it is none, with intervals
    over papers."""
    frame = pd.DataFrame({"question": [c.question for c in some], "x": [c.x for c in some],
                          "skip": probabilities[:, -1],
                          "level": probabilities[:, :-1] @ np.arange(probabilities.shape[1] - 1),
                          "tried": probabilities[:, :-1].sum(1)})
    rows = []
    for (question, x), own in frame.groupby(["question", "x"], sort=False):
        rows.append({"question": question, "x": x, "papers": len(own)}
                    | with_interval("skip", [own["skip"].to_numpy()], lambda s: s, seed)
                    | with_interval("level", [own["level"].to_numpy(), own["tried"].to_numpy()],
                                    lambda level, tried: level / tried, seed))
    return pd.DataFrame(rows)


def compare(world: World, models: Sequence[str], n_papers: int, seed: int = 1,
            samples: int = 8) -> pd.DataFrame:
    """Decisions of models, each a method or NAME=FOLDER, and of the exact policy with the last
    one's abilities, method `optimal`; a row a (method, question, x)."""
    papers, tables = draw_papers(world, n_papers, seed=seed), []
    for word in models:
        name, _, folder = word.rpartition("=")
        name, checkpoint = name or word, folder if name else world.method(word).checkpoint
        env, model = load_environment(world, checkpoint), load_model(checkpoint, world.dtype)
        some = cases(env, papers, seed)
        tables.append(decision_table(some, level_probabilities(env, model, some), seed
                                     ).assign(method=name))
    outcomes = sample_outcomes(env, engine_for(model, env.tokenizer), papers, max(BUDGETS),
                               samples, STYLE, seed=seed)
    tables.append(decision_table(some, optimal_levels(env, outcomes, some), seed
                                 ).assign(method="optimal"))
    return pd.concat(tables).assign(seed=seed).round(4)
