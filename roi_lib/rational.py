"""The rational test-taker: what perfect allocation would make of a model's own abilities.

    Outcomes, sample_outcomes    what each action at each problem costs and earns, by attempts
    exact_policies               OS-MCKP, solved for every paper, by what the test-taker knows
    rule_policies                rules of thumb, as policies
    follow, luck                 exact expectations under a policy; the best with luck known
    bounds                       all of it, for every paper, order and budget

At each problem it may *skip* or make an effort: a model with level tags is made to begin with each
tag in turn, and pays for it; a model without has one way, to *solve*. It goes through the paper in
order and knows what is left of the budget: OS-MCKP. What else it knows makes three bounds:

    statement    what the words give away: a problem's family, and the length that they state
    problem      this very problem's attempts, too; a model may know more than the words say
    luck         how every attempt will end, beforehand; no policy does

With finitely many attempts, a policy that was made from the attempts which pay it is too good to be
true. So `problem` is made from some of them and paid by the others, all folds in turn: never above
the true optimum on average. `statement` pools hundreds of attempts. Notebook 06."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd

from roi_lib.exams import SKIP_WORDS, Environment, Exam
from roi_lib.generation import Engine
from roi_lib.osmckp import TIE, Action, cheapest_best, expected_charge, expected_reward
from roi_lib.problems import Problem
from roi_lib.sitting import sit
from roi_lib.worlds import RULES, TIERS

SAMPLES = 4  # attempts a problem and level
FOLDS = 4
PRIOR = 4  # attempts that the statement's average weighs beside a problem's own
SEED_SHIFT = 1_000_003  # attempts and exams draw from different random streams
BOUNDS = ("statement", "problem", "luck")


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What efforts at single problems cost and earned. Action 0 is a skip, action k the effort k-1.

    `cost` and `correct` are [papers, problems, efforts, attempts], `statement` and `tier` [papers,
    problems]. Costs are tokens without end-of-sequence, which an exam has only once, when nothing
    more can be earned."""

    cost: np.ndarray
    correct: np.ndarray  # whether it was right
    statement: np.ndarray  # what the words give away: problems of one statement are alike
    tier: np.ndarray
    skip: int  # tokens of a skip, header included, and tag where there is one

    def pooled(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean cost and share right of the problems of a statement, [papers, problems, efforts]."""
        key = np.unique(self.statement, return_inverse=True)[1].reshape(self.statement.shape)
        means = [np.stack([x[key == k].mean((0, 2)) for k in range(key.max() + 1)])[key]
                 for x in (self.cost, self.correct)]
        return means[0], means[1]

    def by_statement(self) -> dict[str, tuple[Action, ...]]:
        """Statement -> its actions: skip, and each effort as the attempts at all problems alike."""
        found = {}
        for name in np.unique(self.statement).tolist():
            cost, correct = (np.moveaxis(x[self.statement == name], 1, 0).reshape(x.shape[2], -1)
                             for x in (self.cost, self.correct))
            p = np.full(cost.shape[1], 1 / cost.shape[1])
            found[name] = Action("skip", [(1, self.skip, 0)]), *(
                Action(f"effort {k}", np.stack([p, c, r], axis=1))
                for k, (c, r) in enumerate(zip(cost, correct, strict=True)))
        return found


def statement_of(problem: Problem) -> str:
    """What the words of a problem give away of its cost."""
    return f"{problem.family} {problem.length}"


def check_samples(samples: int, folds: int = FOLDS) -> None:
    """Refuse attempts that the folds do not divide, with a `ValueError`: before any sampling."""
    if folds < 2 or samples < 1 or samples % folds:
        raise ValueError(f"{samples} attempts cannot be divided into {folds} folds of equal size, "
                         f"two at least; give a multiple of {folds}")


def sample_outcomes(env: Environment, engine: Engine, papers: Sequence[Sequence[Problem]],
                    budget: int, samples: int = SAMPLES, style: str = "direct",
                    temperature: float = 1.0, seed: int = 0) -> Outcomes:
    """`samples` attempts at every problem, alone, with each effort; one that the budget cuts costs
    all of it. Efforts are the levels if the `style` has tags. All papers are of one size."""
    world, tagged = env.world, style == "roi"
    header = f"{world.header.format(i=1)}\n"
    openings = [env.opening(level) for level in range(world.skip_level)] if tagged else [""]
    alone = [Exam((p,), "easy") for paper in papers for p in paper for _ in range(samples)]
    tables = [sit(env, engine, alone, budget, style=style, temperature=temperature,
                  seed=seed + SEED_SHIFT, opening=opening) for opening in openings]
    failed = pd.concat([table["failed"] for table in tables])
    if (lost := failed != "").any():
        raise ValueError(f"{lost.sum()} of {len(lost)} attempts failed, and the bounds need all of "
                         f"them: {failed[lost].mode()[0]}")
    shape = len(papers), len(papers[0]), samples
    cost, correct = (np.stack([column(table).to_numpy().reshape(shape) for table in tables], axis=2)
                     for column in (lambda t: t["tokens"] - t["finished"], lambda t: t["correct"]))
    skip = f"{env.opening(world.skip_level) if tagged else header} {SKIP_WORDS}"
    words = np.array([[statement_of(p) for p in paper] for paper in papers])
    tiers = np.array([[p.tier for p in paper] for paper in papers])
    return Outcomes(cost, correct.astype(bool), words, tiers, len(env.encode(skip)))


def in_place(x: np.ndarray, place: np.ndarray) -> np.ndarray:
    """An array [papers, problems, ...] with the problems where `place` puts them."""
    return x[np.arange(len(x))[:, None], place]


def exact_policies(outcomes: Outcomes, place: np.ndarray, budget: int,
                   known: np.ndarray | None = None) -> np.ndarray:
    """The optimal action of every paper, [papers, problems, budget + 1] by tokens left, in the
    order `place`: by statement; or by each problem's own `known` attempts, a mask, together with
    what is known of its statement, which weighs as much as `PRIOR` attempts.

    What `osmckp.solve` does, for all papers at a time (a test holds the two together)."""
    b, pool = np.arange(budget + 1), outcomes.by_statement()
    tables = {}  # statement -> E[reward], E[charge] and where it leads, [actions, budget + 1, ...]
    for name, actions in pool.items():
        moves = np.zeros((len(actions), budget + 1, budget + 1))
        for move, action in zip(moves, actions, strict=True):
            for cost, p in zip(action.costs, action.costs_p, strict=True):
                move[b, np.maximum(b - cost, 0)] += p
        tables[name] = expected_reward(actions, budget), expected_charge(actions, budget), moves
    statement, cost, correct = (in_place(x, place) for x in (
        outcomes.statement, outcomes.cost, outcomes.correct))
    weight = 0.0 if known is None else known.sum() / (known.sum() + PRIOR)  # of its own attempts
    value = np.zeros((len(place), budget + 1))
    policy = np.empty((*place.shape, budget + 1), dtype=np.int32)
    for i in reversed(range(place.shape[1])):
        q, charge = np.zeros((2, cost.shape[2] + 1, *value.shape))
        for name, (reward, price, moves) in tables.items():
            rows = statement[:, i] == name
            q[:, rows] = reward[:, None] + value[rows] @ moves.transpose(0, 2, 1)
            charge[:, rows] = price[:, None]
        if known is not None:
            c, r = cost[:, i][..., known], correct[:, i][..., known]  # [papers, efforts, attempts]
            for k in range(c.shape[1]):
                left = b - c[:, k, :, None]  # [papers, attempts, budget + 1]
                future = np.take_along_axis(value[:, None], np.maximum(left, 0), 2)
                own = future + r[:, k, :, None] * (left >= 0)
                q[k + 1] += weight * (own.mean(1) - q[k + 1])
                charge[k + 1] += weight * (np.minimum(c[:, k, :, None], b).mean(1) - charge[k + 1])
        policy[:, i] = cheapest_best(q, charge, TIE * place.shape[1])
        value = q.max(axis=0)
    return policy


def rule_policies(outcomes: Outcomes, place: np.ndarray, budget: int) -> dict[str, np.ndarray]:
    """Six rules of thumb, each [papers, problems, budget + 1] by tokens left, in the order `place`.

    They know what a statement's efforts cost and earn on average: *full* is the effort most often
    right, *brief* the cheapest. `equal_share` makes the best effort that costs no more than an
    equal share of what is left; `cheapest_first` plans full efforts, the cheapest first, while
    they fit. `ValueError`: the problems have no tiers."""
    cost, right = (in_place(x, place) for x in outcomes.pooled())
    if not np.isin(outcomes.tier, TIERS).all():
        raise ValueError(f"rules of thumb need problems of the tiers {', '.join(TIERS)}")
    hard = in_place(outcomes.tier, place) == TIERS[-1]
    full, brief = 1 + right.argmax(2), 1 + cost.argmin(2)
    last = np.arange(place.shape[1]) == place.shape[1] - 1
    left = np.arange(budget + 1) / np.arange(place.shape[1], 0, -1)[:, None]  # an equal share of it
    fits = cost[:, :, None] <= left[..., None]  # [papers, problems, budget + 1, efforts]
    share = np.where(fits.any(3), 1 + np.where(fits, right[:, :, None], -1).argmax(3), 0)
    price = np.take_along_axis(cost, full[..., None] - 1, 2)[..., 0]
    order = price.argsort(1, kind="stable")
    room = np.take_along_axis(price, order, 1).cumsum(1) <= budget
    first = np.take_along_axis(room, order.argsort(1), 1)
    plans = full, brief, full * ~hard, full * ~(hard & ~last), None, full * first
    return {name: share if plan is None else np.repeat(plan[..., None], budget + 1, axis=2)
            for name, plan in zip(RULES, plans, strict=True)}


def follow(policy: np.ndarray, cost: np.ndarray, correct: np.ndarray, skip: int,
           budget: int) -> np.ndarray:
    """Exact expectations under a policy [papers, problems, tokens left], over all combinations of
    attempts: right, skipped and tokens by position, [3, papers, problems]. `cost` and `correct` as
    in `Outcomes`, in the policy's order."""
    row = np.arange(len(cost))[:, None]
    left = np.full((len(cost), 1), budget)  # one column a combination of outcomes so far
    found = np.empty((3, *cost.shape[:2]))
    for i in range(cost.shape[1]):
        action = policy[row, i, left]
        tries, effort = action[..., None] > 0, np.maximum(action - 1, 0)
        price = np.where(tries, cost[:, i][row, effort], skip)
        right = tries & correct[:, i][row, effort] & (price <= left[..., None])
        paid = np.minimum(price, left[..., None])
        found[:, :, i] = right.mean((1, 2)), 1 - tries.mean((1, 2)), paid.mean((1, 2))
        left = (left[..., None] - paid).reshape(len(cost), -1)
    return found


def luck(cost: np.ndarray, correct: np.ndarray, skip: int, budget: int) -> np.ndarray:
    """The best Score with attempt k of every effort known beforehand, mean over k; [papers]. A
    problem is given up by a skip, or by a wrong attempt that costs less."""
    best, passed = np.zeros((len(cost), cost.shape[3])), np.minimum(cost.min(2), skip)
    for plan in product(range(cost.shape[2] + 1), repeat=cost.shape[1]):
        tried = [i for i, action in enumerate(plan) if action]
        price = np.cumsum([cost[:, i, action - 1] if action else passed[:, i]
                           for i, action in enumerate(plan)], axis=0)
        earned = [correct[:, i, plan[i] - 1] & (price[i] <= budget) for i in tried]
        best = np.maximum(best, sum(earned, np.zeros_like(best)))
    return best.mean(axis=1)


def bounds(outcomes: Outcomes, places: Mapping[str, np.ndarray], budgets: Sequence[int],
           folds: int = FOLDS) -> pd.DataFrame:
    """What the exact policies (`BOUNDS`) and the rules (`RULES`) earn, in points: a row a (policy,
    budget, order, exam), which are the index. Columns: points; by position, accuracy_1 ...,
    skipped_1 ... and tokens_1 ..., which `luck` does not have.

    `places`: order -> which of the paper's problems stands at each position, [papers, problems].
    One backward induction under the largest budget holds the policies of all smaller ones."""
    attempts, top = outcomes.cost.shape[3], max(budgets)
    check_samples(attempts, folds)
    papers, n = outcomes.statement.shape
    for order, place in places.items():
        if place.shape != (papers, n):
            raise ValueError(f"the outcomes are of {papers} papers of {n} problems, and the order "
                             f"{order} of {place.shape[0]} of {place.shape[1]}")
    fold, frames = np.arange(attempts) % folds, {}
    for order, place in places.items():
        cost, correct = in_place(outcomes.cost, place), in_place(outcomes.correct, place)
        exact = {"statement": [exact_policies(outcomes, place, top)] * folds,
                 "problem": [exact_policies(outcomes, place, top, fold != f) for f in range(folds)]}
        for budget in budgets:
            rules = {name: [policy] * folds
                     for name, policy in rule_policies(outcomes, place, budget).items()}
            for name, own in (exact | rules).items():
                found = np.mean([follow(own[f], cost[..., fold == f], correct[..., fold == f],
                                        outcomes.skip, budget) for f in range(folds)], axis=0)
                frames[name, budget, order] = pd.DataFrame({"points": found[0].sum(1)} | {
                    f"{what}_{i + 1}": column for what, values in zip(
                        ("accuracy", "skipped", "tokens"), found, strict=True)
                    for i, column in enumerate(values.T)})
            frames["luck", budget, order] = pd.DataFrame(
                {"points": luck(cost, correct, outcomes.skip, budget)})
    return pd.concat(frames, names=["policy", "budget", "order", "exam"])
