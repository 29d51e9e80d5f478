"""Rationality-Aware RL (RARL) with Dr. GRPO: learn to allocate one budget over an exam.

Stage two of the method, after the paper's section on RARL, with nothing hidden in a framework.
One step of training, piece by piece:

    training_exams       the step's papers, each in one of the orders, and the step's budget
    roll_out             every exam sat several times by the model as it is: one `Group` an exam
    group_rewards        what each rollout of a group earned
    advantages           reward minus the mean of its group (Dr. GRPO: no standard deviation)
    completion_logprobs  how probable the model finds its own responses, with gradient
    policy_loss          policy gradient with a constant length normaliser
    batch_gradient       the gradient of the loss of all groups
    train_step           all of it, once

`rarl_loop` repeats it, with a log and checkpoints; `rarl_trl` does the same through TRL; `rarl_run`
makes a checkpoint with its card. Nothing depends on a random state that would have to be saved:
papers and sampling streams follow from (seed, step), so a run that was killed continues as if it
had not been.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from roi_lib.exams import (
    Exam,
    Segment,
    draw_papers,
    encode_prompt,
    exam_prompt,
    in_orders,
    parse_response,
)
from roi_lib.generation import BudgetedGenerator, Request, Rollout
from roi_lib.grading import grade
from roi_lib.problems import Problem
from roi_lib.sitting import Sitting, check_budget
from roi_lib.worlds import RARLRecipe, World

STYLE = "roi"  # the prompting style whose responses carry level tags


# --- exams and rollouts ----------------------------------------------------------------------


def step_seed(recipe: RARLRecipe, step: int) -> int:
    """A seed of its own for each step: of its papers, orders and rollouts."""
    return recipe.seed * 1_000_000 + step


def training_exams(
    world: World, recipe: RARLRecipe, step: int, pool: list[Problem] | None = None
) -> tuple[list[Exam], int]:
    """The exams of one step, from the training split, and the budget they are all sat under."""
    seed = step_seed(recipe, step)
    rng = random.Random(f"{seed}/orders")
    orders = rng.choices(*zip(*recipe.orders, strict=True), k=recipe.exams)
    papers = draw_papers(world, recipe.exams, recipe.n_problems, "train", seed, problems=pool)
    return in_orders(papers, orders, seed), recipe.budgets[step % len(recipe.budgets)]


@dataclass(frozen=True)
class Group:
    """The rollouts of one exam.

    Attributes:
        prompt: token ids, chat template included.
        sittings: one a rollout.
        rewards: what each earned; NaN where there is no response.
    """

    prompt: tuple[int, ...]
    sittings: tuple[Sitting, ...]
    rewards: tuple[float, ...]


def mark(
    world: World, tokenizer, exam: Exam, budget: int, rollouts: Sequence[Rollout]
) -> tuple[Sitting, ...]:
    """The rollouts of one exam, cut into segments and graded; equal responses only once."""
    n = len(exam.problems)
    distinct = dict.fromkeys(r.ids for r in rollouts)
    responses = [parse_response(world, tokenizer, ids, n) for ids in distinct]
    points = iter(grade(world, [pair for response in responses for pair in zip(
        exam.problems, response.segments, strict=True)]))
    known = {ids: (response, tuple(islice(points, n)))
             for ids, response in zip(distinct, responses, strict=True)}
    return tuple(Sitting(exam, budget, r.ids, r.finished, *known[r.ids], r.overrun, r.failed)
                 for r in rollouts)


def roll_out(
    world: World, tokenizer, generator: BudgetedGenerator, exams: Sequence[Exam], budget: int,
    recipe: RARLRecipe, step: int, numbers: Sequence[int] | None = None,
) -> list[Group]:
    """Sit every exam `recipe.rollouts` times under `budget` tokens; one group an exam.

    Args:
        numbers: which of the step's exams these are, where they are not all of them: the random
            numbers of an exam follow from it.

    Raises:
        ValueError: a budget smaller than a header with a tag.
        FloatingPointError: the model gave NaN or infinite logits; names the step (FAULTS F24).
    """
    check_budget(world, tokenizer, budget)
    messages = [exam_prompt(world, exam, budget, STYLE) for exam in exams]
    requests = [Request(tuple(encode_prompt(tokenizer, message)), budget,
                        (step_seed(recipe, step), i), recipe.rollouts, message)
                for i, message in zip(numbers or range(len(exams)), messages, strict=True)]
    try:
        responses = generator.generate(requests, recipe.temperature)
    except FloatingPointError as error:
        raise FloatingPointError(f"step {step}, sampling {len(exams)} exams under budget {budget}: "
                                 f"{error}; lower the learning rate") from error
    groups = []
    for exam, request, rollouts in zip(exams, requests, responses, strict=True):
        sittings = mark(world, tokenizer, exam, budget, rollouts)
        rewards = group_rewards(world, sittings, recipe.reward, recipe.skip_bonus)
        groups.append(Group(request.prompt, sittings, tuple(rewards)))
    return groups


# --- the algorithm ---------------------------------------------------------------------------


def problem_reward(
    world: World, segment: Segment, correct: bool, variant: str = "level", solved: bool = True,
    skip_bonus: float = 0.1,
) -> float:
    """The reward r of one problem (paper, section on RARL).

    `level`: 1 if the answer is right and the predicted level is that of the real cost (in tokens,
    header and tag included), else 0; so a skip earns nothing. `answer`: without the condition on
    the level. `skip_bonus`: as `level`, and `skip_bonus` for a right skip, which is Level-3 and NA
    where nobody `solved` the problem.
    """
    if correct and (variant == "answer" or segment.level == world.level_of(segment.cost)):
        return 1.0
    right_skip = segment.skipped and segment.level == world.skip_level and not solved
    return skip_bonus if variant == "skip_bonus" and right_skip else 0.0


def group_rewards(
    world: World, sittings: Sequence[Sitting], variant: str = "level", skip_bonus: float = 0.1
) -> list[float]:
    """The reward R = r_1 + ... + r_N of each rollout of one exam; see `problem_reward`.

    One rollout cannot know whether its skip was right; the group is the best evidence there is:
    a problem counts as solved if any of its rollouts solved it. A failed rollout has no response,
    and so no reward: NaN.
    """
    solved = [any(marks) for marks in zip(*(s.correct for s in sittings), strict=True)]
    return [
        math.nan if s.failed else sum(
            problem_reward(world, segment, correct, variant, by_someone, skip_bonus)
            for segment, correct, by_someone in zip(
                s.response.segments, s.correct, solved, strict=True))
        for s in sittings
    ]


def has_spread(rewards: Sequence[float]) -> bool:
    """Whether a group teaches anything: two different rewards, NaN aside."""
    return len({r for r in rewards if not math.isnan(r)}) > 1


def advantages(rewards: torch.Tensor, scale: str = "none") -> torch.Tensor:
    """How much better than its group each rollout did; both [groups, rollouts].

    Dr. GRPO (arXiv 2503.20783): A = R - mean. With `scale` "std" as in GRPO: also divided by the
    group's standard deviation, which blows up the groups where hardly anything differs. A reward
    of NaN counts in no mean, and its advantage is 0 (FAULTS F22).
    """
    known = ~rewards.isnan()
    count = known.sum(1, keepdim=True)
    centred = (rewards - rewards.nanmean(1, keepdim=True)).nan_to_num(0.0)
    if scale == "none":
        return centred
    variance = centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
    return centred / (variance.sqrt() + 1e-4)


def policy_loss(
    logprobs: torch.Tensor, mask: torch.Tensor, advantages: torch.Tensor, longest: int,
    normalizer: str = "constant",
) -> torch.Tensor:
    """The loss to be lowered, a mean over rows.

    On policy the ratio of new to old probability is 1; its *gradient* is that of the
    log-probability. So the value says little (it is 0 where all rows are equally long).

    Args:
        logprobs: of the response tokens, [rows, length].
        mask: 1 for response tokens, 0 for padding, likewise.
        advantages: one a row.
        longest: the largest budget in tokens, the constant of Dr. GRPO.
        normalizer: "constant"; or "length", GRPO's own: each row's sum is divided by its length,
            so that a long failure is punished less, token by token, than a short one.
    """
    ratio = torch.exp(logprobs - logprobs.detach())
    sums = (ratio * mask).sum(1)
    lengths = longest if normalizer == "constant" else mask.sum(1).clamp(min=1)
    return -(advantages * sums / lengths).mean()


def completion_logprobs(
    model, prompt: torch.Tensor, ids: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each response token, and entropy there in nats; both [rows, length].

    The prompt, which all rows share, is computed once, with gradient: its keys and values are
    repeated for the rows, and the backward pass adds up what each row wants of them. Padding
    stands on the right, where causal attention does not see it. Logits are computed where the
    next token is a response token, and nowhere else.

    Args:
        prompt: token ids, [prompt length].
        ids: responses to it, [rows, length], padded on the right with any id.
    """
    out = model(input_ids=prompt[None], use_cache=True, logits_to_keep=1)
    logits = out.logits.expand(len(ids), -1, -1)
    if ids.shape[1] > 1:
        cache = out.past_key_values
        cache.batch_repeat_interleave(len(ids))
        rest = model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True).logits
        logits = torch.cat((logits, rest), 1)
    table = torch.log_softmax(logits / temperature, -1)
    entropy = -(table.exp() * table).sum(-1).detach()
    return table.gather(-1, ids[..., None])[..., 0], entropy


def pad_right(rows: Sequence[Sequence[int]], device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of token ids as one tensor [rows, longest row], and its mask of the same shape."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1.0] * len(row) + [0.0] * (width - len(row)) for row in rows],
                        device=device)
    return ids, mask


def accumulate_gradient(
    model, group: Group, advantage: torch.Tensor, share: float, recipe: RARLRecipe
) -> tuple[float, float]:
    """Add one group's part to the gradient of the whole batch's loss.

    Rollouts that came out the same are computed once, with their advantages added up.

    Args:
        advantage: of the group's rollouts.
        share: part of the batch's rows that one rollout is.

    Returns:
        The group's part of the loss, and the mean entropy of its response tokens.
    """
    device = model.device
    rows = [s.ids for s in group.sittings]
    distinct = [row for row in dict.fromkeys(rows) if row]
    place = {row: i for i, row in enumerate(distinct)}
    weight, count = torch.zeros(2, len(distinct), device=device)
    for row, a in zip(rows, advantage.tolist(), strict=True):
        if row:  # a failed rollout has no tokens
            weight[place[row]] += a
            count[place[row]] += 1
    ids, mask = pad_right(distinct, device)
    logprobs, entropy = completion_logprobs(
        model, torch.tensor(group.prompt, device=device), ids, recipe.temperature)
    loss = policy_loss(logprobs, mask, weight, max(recipe.budgets), recipe.normalizer)
    loss = loss * len(distinct) * share
    loss.backward()
    tokens = mask * count[:, None]
    return loss.item(), float((entropy * tokens).sum() / tokens.sum())


def batch_gradient(
    model, groups: Sequence[Group], recipe: RARLRecipe, step: int = 0
) -> dict[str, float]:
    """Put the gradient of the loss of all groups into `.grad`, group by group.

    Groups without spread have no advantage anywhere and are left out.

    Returns:
        `loss`; `no_spread`, the share of groups left out; `entropy` of the others, in nats a
        token (NaN: there are none).

    Raises:
        FloatingPointError: the loss is NaN or infinite; names step and exam (FAULTS F24).
    """
    model.zero_grad(set_to_none=True)
    table = advantages(torch.tensor([g.rewards for g in groups]), recipe.scale)
    loss, entropies = 0.0, []
    for i, (group, advantage) in enumerate(zip(groups, table, strict=True)):
        if not has_spread(group.rewards):
            continue
        part, entropy = accumulate_gradient(model, group, advantage, 1 / table.numel(), recipe)
        if not math.isfinite(part):
            raise FloatingPointError(f"the loss is {part} at step {step}, exam {i} of the batch; "
                                     "lower the learning rate")
        loss += part
        entropies.append(entropy)
    return {"loss": loss, "no_spread": 1 - len(entropies) / len(groups),
            "entropy": sum(entropies) / len(entropies) if entropies else math.nan}


def train_step(
    world: World, tokenizer, model, generator: BudgetedGenerator, optimizer, recipe: RARLRecipe,
    step: int, pool: list[Problem] | None = None,
) -> tuple[list[Group], dict[str, float]]:
    """One step: rollouts, rewards, advantages, one update.

    Without any spread there is nothing to learn, and no update.

    Args:
        generator: samples from `model` as it is now.
        step: number of the step, from 0; its exams and random numbers follow from it.
        pool: problems instead of the world's generated ones.

    Returns:
        The rollouts; and what `batch_gradient` returns, with `grad_norm` before clipping.

    Raises:
        FloatingPointError: NaN or infinite logits, loss or gradient (FAULTS F24).
    """
    exams, budget = training_exams(world, recipe, step, pool)
    groups = roll_out(world, tokenizer, generator, exams, budget, recipe, step)
    learned = batch_gradient(model, groups, recipe, step)
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm))
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient is {norm} at step {step}, budget {budget}; "
                                 "lower the learning rate")
    if learned["no_spread"] < 1:
        optimizer.step()
    return groups, learned | {"grad_norm": norm}
