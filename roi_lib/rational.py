"""The rational test-taker: what perfect allocation would make of a model's own abilities.

A problem's outcomes are what K attempts of the base model, alone, cost and earned. A test-taker
with these abilities may *solve* a problem (one of the K outcomes) or *skip* it (the tokens of a
skip), in the order of the paper, knowing what is left of the budget: OS-MCKP with two actions a
class, solved exactly by `osmckp` for every paper and order.

With finitely many attempts, the optimum over the *same* attempts is too good to be true: the
policy has seen the luck it is paid for. So a bound has two sides:

    achievable  policy from some attempts, paid by the others, all folds in turn: what one real
                policy earns without bias, so never above the true optimum on average
    plug_in     policy and pay from the same attempts: never below the true optimum on average

Both know each problem as well as K attempts can tell, which may be more than its statement gives
away. `by_family` is the same test-taker who knows only the family of a problem: its policy takes
every problem for an average one of its family (all papers pooled), and is paid by the problem's
own attempts. `prophet` is the hindsight bound: the mean of the best choices when each attempt's
outcome is known beforehand. No policy can have it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from roi_lib.exams import Exam
from roi_lib.generation import BudgetedGenerator
from roi_lib.osmckp import (
    Action,
    Instance,
    Solution,
    expected_future,
    expected_reward,
    solve_batch,
)
from roi_lib.problems import Problem
from roi_lib.sitting import reference_drafts, sit, smallest_budget
from roi_lib.worlds import SKIP_ANSWER, World

SAMPLES = 4  # attempts a problem
FOLDS = 4
SEED_SHIFT = 1_000_003  # attempts and exams draw from different random streams


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What attempts at single problems cost and earned.

    Attributes:
        cost: tokens of each attempt without end-of-sequence, which an exam has only once, when
            nothing more can be earned; [papers, problems, attempts].
        correct: whether it was right; same shape.
        family: of each problem; [papers, problems].
        skip: tokens of a skip, header included.
        tag: tokens of a level tag.
    """

    cost: np.ndarray
    correct: np.ndarray
    family: np.ndarray
    skip: int
    tag: int

    def tagged(self) -> "Outcomes":
        """The same for a test-taker who must tag every problem, skipped ones too."""
        return replace(self, cost=self.cost + self.tag, skip=self.skip + self.tag)


def sample_outcomes(
    world: World,
    tokenizer,
    generator: BudgetedGenerator,
    papers: Sequence[Sequence[Problem]],
    budget: int,
    samples: int = SAMPLES,
    temperature: float = 1.0,
    seed: int = 0,
) -> Outcomes:
    """`samples` attempts at every problem of every paper, alone, under the direct prompt.

    An attempt that the budget cuts costs the whole budget. All papers have the same number of
    problems.
    """
    alone = [Exam((problem,), "easy") for paper in papers for problem in paper]
    drafts = reference_drafts(world, tokenizer, alone, "direct")
    exams, drafts = ([x for x in each for _ in range(samples)] for each in (alone, drafts))
    sittings = sit(world, tokenizer, generator, exams, budget, temperature=temperature,
                   seed=seed + SEED_SHIFT, drafts=drafts)
    shape = (len(papers), len(papers[0]), samples)
    header = world.header.format(i=1)
    length, skip = (len(tokenizer(words, add_special_tokens=False).input_ids)
                    for words in (header, f"{header}\n\\boxed{{{SKIP_ANSWER}}}"))
    return Outcomes(
        np.array([s.response.total - s.finished for s in sittings]).reshape(shape),
        np.array([s.correct[0] for s in sittings]).reshape(shape),
        np.array([[problem.family for problem in paper] for paper in papers]),
        skip, smallest_budget(world, tokenizer) - length)


@dataclass(frozen=True, eq=False)
class Bound:
    """The rational test-taker in one order under one budget; points, one entry a paper.

    Attributes:
        achievable, plug_in, by_family, prophet: see the module; [papers].
        accuracy, skipped, tokens: of the achievable side, by position; [papers, problems].
    """

    achievable: np.ndarray
    plug_in: np.ndarray
    by_family: np.ndarray
    prophet: np.ndarray
    accuracy: np.ndarray
    skipped: np.ndarray
    tokens: np.ndarray


def rational_bounds(
    outcomes: Outcomes, places: Mapping[str, np.ndarray], budgets: Sequence[int],
    folds: int = FOLDS,
) -> dict[tuple[int, str], Bound]:
    """(budget, order) -> the bound of the same papers.

    One backward induction under the largest budget holds the policies of all smaller ones.

    Args:
        places: order -> which of the paper's problems stands at each position, [papers, problems].

    Raises:
        ValueError: fewer than two folds, or attempts that they do not divide.
    """
    attempts, skip = outcomes.cost.shape[2], outcomes.skip
    if folds < 2 or attempts % folds:
        raise ValueError(f"{attempts} attempts cannot be divided into {folds} folds of equal size, "
                         "two at least")
    top, fold = max(budgets), np.arange(attempts) % folds
    best = rational_policies(outcomes, fold >= 0, places, top)
    family = family_policies(outcomes, places, top)
    ordered = {order: [np.take_along_axis(x, place[:, :, None], 1)
                       for x in (outcomes.cost, outcomes.correct)]
               for order, place in places.items()}
    own, pooled = ({key: [] for key in product(budgets, places)} for _ in range(2))
    for f in range(folds):
        policies = rational_policies(outcomes, fold != f, places, top)
        for budget, order in own:
            paid = *(x[:, :, fold == f] for x in ordered[order]), skip, budget
            own[budget, order].append(follow(policies[order][0], *paid))
            pooled[budget, order].append(follow(family[order], *paid)[0].sum(1))
    bounds = {}
    for (budget, order), results in own.items():
        accuracy, skipped, tokens = (np.mean(x, axis=0) for x in zip(*results, strict=True))
        bounds[budget, order] = Bound(
            accuracy.sum(1), best[order][1][:, budget], np.mean(pooled[budget, order], axis=0),
            prophet(*ordered[order], skip, budget), accuracy, skipped, tokens)
    return bounds


def solve_action(cost: np.ndarray, correct: np.ndarray) -> Action:
    """"Solve", by equally likely attempts."""
    return Action("solve", np.stack([np.full(len(cost), 1 / len(cost)), cost, correct], axis=1))


def classes_of(outcomes: Outcomes, known: np.ndarray) -> list[list[tuple[Action, Action]]]:
    """(skip, solve) of every problem of every paper, as the attempts `known` have it."""
    give_up = Action("skip", [(1, outcomes.skip, 0)])
    return [[(give_up, solve_action(c, r)) for c, r in zip(costs, rights, strict=True)]
            for costs, rights in zip(outcomes.cost[..., known], outcomes.correct[..., known],
                                     strict=True)]


def solve_in_order(classes: Sequence, place: np.ndarray, budget: int) -> list[Solution]:
    """The exact solution of every paper, its problems where `place` puts them."""
    return solve_batch([Instance(budget, [paper[i] for i in row])
                        for paper, row in zip(classes, place, strict=True)])


def rational_policies(
    outcomes: Outcomes, known: np.ndarray, places: Mapping[str, np.ndarray], budget: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Order -> the optimal policies, for a test-taker who goes by the attempts `known`.

    Each order has whether to solve, [papers, problems, budget + 1] by tokens left, and the value
    of the whole paper, [papers, budget + 1] by budget. `known` is a mask of attempts.
    """
    classes = classes_of(outcomes, known)
    policies = {}
    for order, place in places.items():
        solutions = solve_in_order(classes, place, budget)
        policies[order] = (np.stack([s.policy == 1 for s in solutions]),
                           np.stack([s.value_function[0] for s in solutions]))
    return policies


def decision_losses(outcomes: Outcomes, place: np.ndarray, budget: int) -> np.ndarray:
    """What it costs in points to skip and to try, [papers, problems, budget + 1, 2].

    The last but one axis is the tokens left. A loss is V_i(b) - Q_i(action, b), for a test-taker
    who goes by all attempts: 0 for the better action, and for both where they are equally good.
    The losses of the decisions of an exam add up, in expectation, to what it falls short of V*
    (the performance-difference lemma; Kakade and Langford, 2002).

    Args:
        place: which of the paper's problems stands at each position, [papers, problems].
    """
    every = np.ones(outcomes.cost.shape[2], bool)
    losses = []
    for solution in solve_in_order(classes_of(outcomes, every), place, budget):
        value = solution.value_function
        losses.append([value[i] - expected_reward(actions, budget)
                       - expected_future(actions, value[i + 1])
                       for i, actions in enumerate(solution.instance.classes)])
    return np.moveaxis(np.array(losses), 2, 3)


def family_policies(
    outcomes: Outcomes, places: Mapping[str, np.ndarray], budget: int
) -> dict[str, np.ndarray]:
    """Order -> whether to solve, as above, for a test-taker who knows no more than families."""
    give_up = Action("skip", [(1, outcomes.skip, 0)])
    classes = {}
    for family in np.unique(outcomes.family):
        here = outcomes.family == family
        solve = solve_action(outcomes.cost[here].ravel(), outcomes.correct[here].ravel())
        classes[family] = (give_up, solve)
    policies = {}
    for order, place in places.items():
        kinds, paper = np.unique(np.take_along_axis(outcomes.family, place, 1), axis=0,
                                 return_inverse=True)
        solutions = solve_batch([Instance(budget, [classes[f] for f in row]) for row in kinds])
        policies[order] = np.stack([s.policy == 1 for s in solutions])[paper.ravel()]
    return policies


def follow(
    solve: np.ndarray, cost: np.ndarray, correct: np.ndarray, skip: int, budget: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Exact expectations under policies, over all combinations of the attempts.

    Returns accuracy, share skipped and tokens by position, each [papers, problems].
    """
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


def prophet(cost: np.ndarray, correct: np.ndarray, skip: int, budget: int) -> np.ndarray:
    """The best Score with attempt k of every problem known beforehand, mean over k; [papers]."""
    best = np.zeros(cost.shape[::2])
    n = cost.shape[1]
    for chosen in product((False, True), repeat=n):
        last = max((i for i in range(n) if chosen[i]), default=-1)
        total = sum(cost[:, i] if chosen[i] else skip for i in range(last + 1))
        right = correct[:, np.array(chosen, bool)].all(axis=1)
        best = np.maximum(best, sum(chosen) * (right & (total <= budget)))
    return best.mean(axis=1)
