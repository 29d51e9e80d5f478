"""The rational test-taker: what perfect allocation would make of a model's own abilities.

`sample_outcomes` tries single problems, `rational_bounds` solves every paper exactly in every order
and under every budget.

It may *solve* a problem (one of K attempts of the model, by chance) or *skip* it, in the order of
the paper, knowing what is left of the budget: OS-MCKP with two actions a class. With finitely many
attempts, the optimum over the *same* attempts is too good to be true: the policy has seen the luck
it is paid for. So there are two sides, and two that know less and more:

    achievable  policy from some attempts, paid by the others, all folds in turn: what one real
                policy earns without bias, so never above the true optimum on average
    plug_in     policy and pay from the same attempts: never below the true optimum on average
    by_family   the policy takes every problem for an average one of its family (the first two may
                know more than a statement gives away), and is paid by the problem's own attempts
    hindsight   the best choices when each outcome is known beforehand; no policy has it

Notebook 06."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pandas as pd

from roi_lib.exams import SKIP_WORDS, Environment, Exam
from roi_lib.generation import Engine
from roi_lib.osmckp import Action, Instance, Solution, solve
from roi_lib.problems import Problem
from roi_lib.sitting import sit

SAMPLES = 4  # attempts a problem
FOLDS = 4
SEED_SHIFT = 1_000_003  # attempts and exams draw from different random streams


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What attempts at single problems cost and earned."""

    # Tokens of each attempt without end-of-sequence, which an exam has only once, when nothing
    # more can be earned; [papers, problems, attempts].
    cost: np.ndarray
    correct: np.ndarray  # whether it was right; same shape
    family: np.ndarray  # of each problem; [papers, problems]
    skip: int  # tokens of a skip, header included
    tag: int  # tokens of a level tag

    def tagged(self) -> "Outcomes":
        """The same for a test-taker who must tag every problem, skipped ones too."""
        return replace(self, cost=self.cost + self.tag, skip=self.skip + self.tag)

    def classes(self, known: np.ndarray) -> list[list[tuple[Action, Action]]]:
        """(skip, solve) of every problem of every paper, as some attempts (a mask) have it."""
        skip = Action("skip", [(1, self.skip, 0)])
        return [[(skip, solving(c[known], r[known])) for c, r in zip(costs, rights, strict=True)]
                for costs, rights in zip(self.cost, self.correct, strict=True)]

    def family_classes(self) -> list[list[tuple[Action, Action]]]:
        """The same for a test-taker who takes every problem for an average one of its family."""
        known, skip = {}, Action("skip", [(1, self.skip, 0)])
        for family in np.unique(self.family):
            here = self.family == family
            known[family] = skip, solving(self.cost[here].ravel(), self.correct[here].ravel())
        return [[known[family] for family in paper] for paper in self.family]


def solving(cost: np.ndarray, correct: np.ndarray) -> Action:
    """The action of trying a problem, by equally likely attempts, [attempts]."""
    return Action("solve", np.stack([np.full(len(cost), 1 / len(cost)), cost, correct], axis=1))


def check_samples(samples: int, folds: int = FOLDS) -> None:
    """Refuse attempts that the folds do not divide, with a `ValueError`: before any sampling."""
    if folds < 2 or samples < 1 or samples % folds:
        raise ValueError(f"{samples} attempts cannot be divided into {folds} folds of equal size, "
                         f"two at least; give a multiple of {folds}")


def sample_outcomes(env: Environment, engine: Engine, papers: Sequence[Sequence[Problem]],
                    budget: int, samples: int = SAMPLES, temperature: float = 1.0,
                    seed: int = 0) -> Outcomes:
    """`samples` attempts at every problem of every paper, alone, under the direct prompt; one that
    the budget cuts costs all of it. All papers have the same number of problems."""
    alone = [Exam((p,), "easy") for paper in papers for p in paper for _ in range(samples)]
    table = sit(env, engine, alone, budget, temperature=temperature, seed=seed + SEED_SHIFT)
    if (lost := table["failed"] != "").any():
        raise ValueError(f"{lost.sum()} of {len(lost)} attempts failed, and the rational method "
                         f"needs all of them: {table['failed'][lost].mode()[0]}")
    shape, header = (len(papers), len(papers[0]), samples), env.world.header.format(i=1)
    return Outcomes(
        (table["tokens"] - table["finished"]).to_numpy().reshape(shape),
        table["correct"].to_numpy(bool).reshape(shape),
        np.array([[problem.family for problem in paper] for paper in papers]),
        skip=len(env.encode(f"{header}\n{SKIP_WORDS}")),
        tag=env.smallest_budget - len(env.encode(header)))


def rational_bounds(outcomes: Outcomes, places: Mapping[str, np.ndarray], budgets: Sequence[int],
                    folds: int = FOLDS) -> pd.DataFrame:
    """The rational test-taker in points, a row a (budget, order, exam), which are the index.

    Columns: achievable, plug_in, by_family, hindsight (see the module); of the achievable side, by
    position, accuracy_1 ..., skipped_1 ... and tokens_1 .... `places`: order -> which of the
    paper's problems stands at each position, [papers, problems]. One backward induction under the
    largest budget holds the policies of all smaller ones."""
    attempts, skip, top = outcomes.cost.shape[2], outcomes.skip, max(budgets)
    check_samples(attempts, folds)
    fold = np.arange(attempts) % folds
    known = [outcomes.classes(fold != f) for f in range(folds)]
    every, families, frames = outcomes.classes(fold >= 0), outcomes.family_classes(), {}
    for order, place in places.items():
        cost, correct = (np.take_along_axis(x, place[:, :, None], 1)
                         for x in (outcomes.cost, outcomes.correct))
        best = solve_in_order(every, place, top)
        own = [solves(solve_in_order(classes, place, top)) for classes in known]
        family = solves(solve_in_order(families, place, top))
        for budget in budgets:
            paid = [(cost[..., fold == f], correct[..., fold == f], skip, budget)
                    for f in range(folds)]
            parts = [follow(own[f], *paid[f]) for f in range(folds)]
            by_position = dict(zip(("accuracy", "skipped", "tokens"), np.mean(parts, axis=0),
                                   strict=True))
            frames[budget, order] = pd.DataFrame({
                "achievable": by_position["accuracy"].sum(1),
                "plug_in": [s.value_function[0, budget] for s in best],
                "by_family": np.mean([follow(family, *p)[0].sum(1) for p in paid], axis=0),
                "hindsight": hindsight(cost, correct, skip, budget),
                **{f"{name}_{i + 1}": column for name, values in by_position.items()
                   for i, column in enumerate(values.T)}})
    return pd.concat({key: frames[key] for key in product(budgets, places)},
                     names=["budget", "order", "exam"]).sort_index()


def solve_in_order(classes: Sequence, place: np.ndarray, budget: int) -> list[Solution]:
    """The exact solution of every paper, its problems where `place` puts them; equal ones once."""
    papers = [tuple(paper[i] for i in row) for paper, row in zip(classes, place, strict=True)]
    found = {paper: solve(Instance(budget, paper)) for paper in dict.fromkeys(papers)}
    return [found[paper] for paper in papers]


def solves(solutions: Sequence[Solution]) -> np.ndarray:
    """Whether each policy solves, [papers, problems, budget + 1] by tokens left."""
    return np.stack([s.policy == 1 for s in solutions])


def follow(solve: np.ndarray, cost: np.ndarray, correct: np.ndarray, skip: int,
           budget: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Exact expectations under policies (see `solves`), over all combinations of the attempts:
    accuracy, share skipped and tokens by position, each [papers, problems]."""
    row = np.arange(len(cost))[:, None]
    left = np.full((len(cost), 1), budget)  # one column a combination of outcomes so far
    accuracy, skipped, tokens = (np.empty(cost.shape[:2]) for _ in range(3))
    for i in range(cost.shape[1]):
        tries = solve[row, i, left][..., None]
        price = np.where(tries, cost[:, i, None], skip)
        right = tries & correct[:, i, None] & (price <= left[..., None])
        accuracy[:, i], skipped[:, i] = right.mean((1, 2)), 1 - tries.mean((1, 2))
        tokens[:, i] = np.minimum(price, left[..., None]).mean((1, 2))
        left = np.maximum(left[..., None] - price, 0).reshape(len(cost), -1)
    return accuracy, skipped, tokens


def hindsight(cost: np.ndarray, correct: np.ndarray, skip: int, budget: int) -> np.ndarray:
    """The best Score with attempt k of every problem known beforehand, mean over k; [papers]."""
    best, n = np.zeros(cost.shape[::2]), cost.shape[1]
    for chosen in product((False, True), repeat=n):
        last = max((i for i in range(n) if chosen[i]), default=-1)
        total = sum(cost[:, i] if chosen[i] else skip for i in range(last + 1))
        right = correct[:, np.array(chosen, bool)].all(axis=1)
        best = np.maximum(best, sum(chosen) * (right & (total <= budget)))
    return best.mean(axis=1)
