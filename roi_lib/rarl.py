"""Rationality-Aware RL (RARL) with Dr. GRPO: learn to allocate one budget over an exam.

Stage two of the method (paper, section on RARL), to be read downwards. What is left out of GRPO:

- the KL term to a reference model: the reward is exact, so there is nothing to be hacked towards;
- the clipped ratio: every batch of rollouts is used for one update, so the ratio is 1;
- group deviation and row length as divisors (Dr. GRPO, arXiv 2503.20783): one blows up groups in
  which hardly anything differs, the other lets long failures off lightly. Recipes can ask for both.

    training_exams, roll_out             the step's papers, each sat several times by the model
    problem_rewards, exam_rewards        what each problem of each rollout earned, and their sum
    advantages, policy_loss              reward minus the group's mean; policy gradient
    completion_logprobs, batch_gradient  how probable the model finds its responses; the gradient
    train_step                           all of it, once (`training.rarl` repeats it)

No random state has to be saved: papers and sampling streams follow from (seed, step). Notebook 05.
"""

import math
import random
from collections.abc import Sequence

import pandas as pd
import torch

from roi_lib.exams import Environment, Exam, draw_papers, in_orders
from roi_lib.generation import Engine
from roi_lib.problems import Problem
from roi_lib.sitting import responses, sit
from roi_lib.worlds import RARLRecipe, World

STYLE = "roi"  # the prompting style whose responses carry level tags


def step_seed(recipe: RARLRecipe, step: int) -> int:
    """A seed of its own for each step: of its papers, orders and rollouts."""
    return recipe.seed * 1_000_000 + step


def training_exams(world: World, recipe: RARLRecipe, step: int,
                   pool: Sequence[Problem] | None = None) -> tuple[list[Exam], list[int]]:
    """The exams of one step, from the training split, and the budget that each is sat under."""
    seed = step_seed(recipe, step)
    rng, exams = random.Random(f"{seed}/orders"), []
    orders = rng.choices(*zip(*recipe.orders, strict=True), k=recipe.exams)
    sizes = rng.choices(*zip(*recipe.sizes, strict=True), k=recipe.exams)
    for size in dict.fromkeys(sizes):
        papers = draw_papers(world, sizes.count(size), size, "train", 10 * seed + size, pool)
        exams += in_orders(papers, orders[len(exams) :], seed)
    budgets = rng.choices(recipe.budgets, k=recipe.exams)
    return exams, budgets if recipe.budget_for == "exam" else budgets[:1] * recipe.exams


def roll_out(env: Environment, engine: Engine, exams: Sequence[Exam], budgets: Sequence[int],
             recipe: RARLRecipe, step: int, numbers: Sequence[int] | None = None) -> pd.DataFrame:
    """Sit every exam `recipe.rollouts` times under its budget: `sitting`'s table and `reward`.

    `numbers`: which of the step's exams these are, if not all; random numbers follow from them.
    `FloatingPointError`: the model gave NaN or infinite logits; names the step."""
    try:
        table = sit(env, engine, exams, budgets, recipe.rollouts, STYLE, recipe.temperature,
                    step_seed(recipe, step), numbers and [(i,) for i in numbers],
                    None if recipe.cut else int(min(2 * max(recipe.budgets),
                                                    env.world.largest_budget)))
    except FloatingPointError as error:
        raise FloatingPointError(f"step {step}, sampling {len(exams)} exams: {error}; "
                                 "lower the learning rate") from error
    table["reward"] = problem_rewards(table, recipe.reward, recipe.skip_bonus)
    return table


def problem_rewards(table: pd.DataFrame, variant="level", skip_bonus: float = 0.1) -> pd.Series:
    """The reward r of each problem sat (paper, section on RARL); NaN where there is no response.

    `level`: 1 if the answer is right and the predicted level is that of the real cost (in tokens,
    header and tag included), else 0; so a skip earns nothing. `answer`: without the condition on
    the level. `skip_bonus`: as `level`, and `skip_bonus` for a right skip, which is Level-3 and NA
    where no rollout of the exam solved the problem: one rollout alone cannot know."""
    right_level = table["predicted"] == table["real"]
    reward = (table["correct"] & (right_level | (variant == "answer"))).astype(float)
    if variant == "skip_bonus":
        solved = table.groupby(["exam", "position"])["correct"].transform("any")
        reward += skip_bonus * (table["skipped"] & right_level & ~solved)
    return reward.where(table["failed"] == "")


def exam_rewards(table: pd.DataFrame) -> torch.Tensor:
    """The reward R = r_1 + ... + r_N of each rollout, [exams, rollouts]; failed ones are NaN."""
    sums = table.groupby(["exam", "rollout"])["reward"].sum(min_count=1).unstack()
    return torch.tensor(sums.to_numpy().tolist())


def advantages(rewards: torch.Tensor, scale: str = "none") -> torch.Tensor:
    """How much better than its group each rollout did; both [exams, rollouts].

    Dr. GRPO: A = R - mean. With `scale` "std" as in GRPO: also divided by the group's standard
    deviation. A reward of NaN counts in no mean, and its advantage is 0."""
    count = (~rewards.isnan()).sum(1, keepdim=True)
    centred = (rewards - rewards.nanmean(1, keepdim=True)).nan_to_num(0.0)
    if scale == "none":
        return centred
    variance = centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
    return centred / (variance.sqrt() + 1e-4)


def policy_loss(logprobs: torch.Tensor, mask: torch.Tensor, advantages: torch.Tensor, longest: int,
                normalizer: str = "constant") -> torch.Tensor:
    """The loss to be lowered, a mean over rows. On policy its *gradient* is what tells.

    `logprobs` are of the response tokens, and `mask` is 1 for each (padding: 0), [rows, length];
    `longest` is the largest budget in tokens, the constant of Dr. GRPO. With `normalizer` "length",
    GRPO's own, each row's sum is divided by its length instead."""
    ratio = torch.exp(logprobs - logprobs.detach())  # 1, with the gradient of the logarithm
    sums = (ratio * mask).sum(1)
    lengths = longest if normalizer == "constant" else mask.sum(1).clamp(min=1)
    return -(advantages * sums / lengths).mean()


def completion_logprobs(model, prompt: torch.Tensor, ids: torch.Tensor,
                        temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each response token, and entropy there in nats; both [rows, length].

    The prompt is computed once: its keys and values are repeated for the rows, with gradient.
    `ids`, [rows, length], are padded on the right, where causal attention does not look."""
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
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True)
    return ids.to(device), mask.to(device)


def group_gradient(model, group: pd.DataFrame, advantage: torch.Tensor, share: float,
                   recipe: RARLRecipe, level_ids: Sequence[int] = ()) -> tuple[float, float, float]:
    """Add one group's part to the gradient of the whole batch's loss.

    Rollouts that came out the same are computed once, with their advantages added up. `share`: the
    part of all rows that one rollout is. Returns the part of the loss, and the mean entropy of a
    token, and of those that are a level."""
    prompt = torch.tensor(group["prompt"].iloc[0], device=model.device)
    place = {row: i for i, row in enumerate(dict.fromkeys(row for row in group["ids"] if row))}
    weight, count = torch.zeros(2, len(place), device=model.device)
    for row, a in zip(group["ids"], advantage.tolist(), strict=True):
        if row:  # a failed rollout has no tokens
            weight[place[row]] += a
            count[place[row]] += 1
    ids, mask = pad_right(list(place), model.device)
    logprobs, entropy = completion_logprobs(model, prompt, ids, recipe.temperature)
    loss = policy_loss(logprobs, mask, weight, max(recipe.budgets), recipe.normalizer)
    loss = loss * len(place) * share
    loss.backward()
    tokens = mask * count[:, None]
    levels = tokens * torch.isin(ids, ids.new_tensor(level_ids))
    return loss.item(), *(float((entropy * some).sum() / some.sum()) for some in (tokens, levels))


def batch_gradient(model, table: pd.DataFrame, recipe: RARLRecipe, step: int = 0,
                   level_ids: Sequence[int] = ()) -> dict:
    """Put the gradient of the loss of a table of rollouts into `.grad`.

    Returns `loss`; `no_spread`, the share of groups without spread, which have no advantage and
    are left out; `entropy` of the others, in nats a token, and `level_entropy`, of the tokens that
    are one of `level_ids` (NaN: there are none)."""
    model.zero_grad(set_to_none=True)
    rewards, loss, entropies = exam_rewards(table), 0.0, []
    weights = advantages(rewards, recipe.scale)
    for i, (_, group) in enumerate(responses(table).groupby("exam")):
        if len(rewards[i][~rewards[i].isnan()].unique()) < 2:
            continue
        part, *entropy = group_gradient(model, group, weights[i], 1 / rewards.numel(), recipe,
                                        level_ids)
        if not math.isfinite(part):
            raise FloatingPointError(f"the loss is {part} at step {step}, exam {i} of the batch; "
                                     "lower the learning rate")
        loss += part
        entropies.append(entropy)
    means = pd.DataFrame(entropies, columns=["entropy", "level_entropy"]).mean()
    return {"loss": loss, "no_spread": 1 - len(entropies) / len(rewards), **means}


def train_step(env: Environment, model, engine: Engine, optimizer, recipe: RARLRecipe, step: int,
               pool: Sequence[Problem] | None = None) -> tuple[pd.DataFrame, dict[str, float]]:
    """One step, from 0: rollouts, rewards, advantages, one update (none without any spread).

    `engine` samples from `model` as it is now. Returns the rollouts; and what `batch_gradient`
    returns, with `grad_norm` before clipping. `FloatingPointError`: NaN or infinite gradients."""
    exams, budgets = training_exams(env.world, recipe, step, pool)
    table = roll_out(env, engine, exams, budgets, recipe, step)
    learned = batch_gradient(model, table, recipe, step, env.level_ids)
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm))
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient is {norm} at step {step}; lower the learning rate")
    if learned["no_spread"] < 1:
        optimizer.step()
    return table, learned | {"grad_norm": norm}
