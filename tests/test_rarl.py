"""RARL: reward, advantages, loss and gradients on hand-made numbers, and what a log tells."""

import copy
from dataclasses import replace
from itertools import pairwise

import pandas as pd
import pytest
import torch
from conftest import SMALL_RARL, tiny_model, token_rewards

from roi_lib import rarl
from roi_lib.engines import engine_for
from roi_lib.exams import Exam, draw_papers, tag
from roi_lib.generation import Rollout
from roi_lib.rarl import advantages, batch_gradient, policy_loss
from roi_lib.sitting import responses, tabulate
from roi_lib.training.rarl import THIRDS, describe, logprob_gap
from roi_lib.worlds import POCKET

NAN = float("nan")
EXAM = Exam(draw_papers(POCKET, 1, split="train")[0], "easy")
SKIP = f"{tag(3)} \\boxed{{NA}}"


@pytest.fixture(scope="module")
def rollouts(env):
    """Two groups of a random model's rollouts, of many lengths, with spread in their rewards."""
    exams = rarl.training_exams(POCKET, SMALL_RARL, 0)[0]
    engine = engine_for(tiny_model(env.tokenizer).float(), env.tokenizer)
    table = rarl.roll_out(env, engine, exams, [16, 24], SMALL_RARL, 0)
    table["ids"] = [ids[: max(1, len(ids) - 3 * k)]
                    for ids, k in zip(table["ids"], table["rollout"], strict=True)]
    table["reward"] = token_rewards(table)
    return table


def rewarded(table, *rewards):
    return table.assign(reward=[r / 3 for r in rewards for _ in range(3)])


def sat(env, *answers, budget=512):
    """The exam with these responses, each a list of one text a problem."""
    words = ["\n".join(f"Q{i}.\n{text}" for i, text in enumerate(texts, 1)) for texts in answers]
    ids = [tuple(env.encode(text))[:budget] for text in words]
    return tabulate(env, [EXAM], budget, [[Rollout(row, len(row) < budget) for row in ids]])


def rewards_of(table, *choice):
    table = table.assign(reward=rarl.problem_rewards(table, *choice))
    return rarl.exam_rewards(table)[0].tolist()


@pytest.fixture(scope="module")
def right(env):
    """The right answers, each under the level of its real cost."""
    costs = sat(env, [f"{tag(0)} {p.solution}" for p in EXAM.problems])["cost"]
    return [f"{tag(POCKET.level_of(cost))} {p.solution}"
            for cost, p in zip(costs, EXAM.problems, strict=True)]


def test_reward_needs_a_right_answer_and_a_right_level(env, right):
    wrong_answer = [right[0].replace("\\boxed{", "\\boxed{1"), *right[1:]]
    wrong_level = [right[0].replace("Level-0", "Level-2"), *right[1:]]
    skips = [right[0], SKIP, SKIP]
    table = sat(env, right, wrong_answer, wrong_level, skips)
    assert rewards_of(table) == [3, 2, 2, 1]
    assert rewards_of(table, "answer") == [3, 2, 3, 1]
    # problems 2 and 3 were solved by others in the group, so these skips were not right
    assert rewards_of(table, "skip_bonus") == [3, 2, 2, 1]
    alone = sat(env, skips, [right[0], "\\boxed{NA}", SKIP])
    assert rewards_of(alone, "skip_bonus", 0.25) == [1.5, 1.25]


def test_hacks_earn_no_more_than_they_solve(env, right):
    answers = [p.answer for p in EXAM.problems]
    hacks = {
        "skip everything": [SKIP] * 3,
        "minimal answers, no tag": [f"\\boxed{{{a}}}" for a in answers],
        "tag spam": ["".join(map(tag, (3, 2, 1, 0))) + text.partition("</predicted_level>")[2]
                     for text in right],
        "several answers": [f"{tag(0)} \\boxed{{1000}} \\boxed{{{a}}}" for a in answers],
        "a right answer after a skip": [f"{SKIP} \\boxed{{{a}}}" for a in answers]}
    table = sat(env, *hacks.values())
    assert dict(zip(hacks, rewards_of(table), strict=True)) == dict.fromkeys(hacks, 0)
    lazy = sat(env, [f"{tag(0)} {p.solution}" for p in EXAM.problems])
    assert lazy["correct"].all() and rewards_of(lazy) == [(lazy["real"] == 0).sum()] != [3]


def test_the_log_leaves_out_what_it_cannot_count(env, right):
    whole, skips = sat(env, right), sat(env, [SKIP] * 3)
    cut = sat(env, right, budget=int(whole["tokens"][0]) - 8)
    row = describe(pd.concat([whole, cut.assign(rollout=1)]).assign(reward=0.0), [512])
    assert row["level_accuracy"] == 1 and row["score"] == 2.5 and row["cut"] == 0.5
    nothing = describe(skips.assign(reward=0.0), [512])
    assert pd.isna(nothing["accuracy"]) and pd.isna(nothing["level_small"])  # no answer was given


def test_skips_and_efforts_are_told_apart_by_thirds_of_the_budgets(env, right):
    """Of 40 to 99 tokens up to 59 are small and from 80 on large; each has a column of its own."""
    table = pd.concat([sat(env, answers).assign(exam=i, budget=budget, reward=0.0)
                       for i, (budget, answers) in enumerate([
                           (40, [SKIP] * 3), (59, [*right[:2], SKIP]), (60, [SKIP, *right[1:]]),
                           (79, right), (80, right), (99, right), (99, right)])])
    row = describe(table, range(40, 100))
    levels = table["predicted"].tolist()
    assert [row[f"skip_{third}"] for third in THIRDS] == [1, 0, 0]
    assert row["level_small"] == sum(levels[3:5]) / 2 and row["skip_hard"] == 2 / 7
    assert row["level_middle"] == sum(levels[7:12]) / 5 != row["level_large"]
    assert row["level_large"] == sum(levels[12:15]) / 3
    assert (row["budget"], row["score"]) == (pytest.approx(516 / 7), pytest.approx(16 / 7))
    untagged = sat(env, [f"\\boxed{{{p.answer}}}" for p in EXAM.problems]).assign(reward=0.0)
    alone = describe(untagged, [512])
    assert alone["skip_small"] == 0 and pd.isna(alone["level_small"]), "there is no tag"
    assert pd.isna(alone["skip_middle"]) and pd.isna(alone["skip_large"])


def test_advantages_are_rewards_minus_the_mean_of_the_group():
    rewards = torch.tensor([[3.0, 1.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 1.0]])
    assert advantages(rewards).tolist() == [[1, -1, -1, 1], [0] * 4, [-0.25, -0.25, -0.25, 0.75]]
    scaled = (rewards[2] - 0.25) / (rewards[2].std() + 1e-4)
    torch.testing.assert_close(advantages(rewards, "std")[1:], torch.stack([0 * scaled, scaled]))


def test_a_failed_rollout_has_no_reward_and_moves_nothing(env, right):
    table = sat(env, right, [SKIP] * 3, [SKIP] * 3)
    table.loc[table["rollout"] == 2, "failed"] = "time-out"
    rewards = torch.tensor([rewards_of(table)])
    assert rewards[0, :2].tolist() == [3, 0] and rewards[0, 2].isnan()
    assert advantages(rewards).tolist() == [[1.5, -1.5, 0]]
    nothing = torch.full((1, 3), NAN)
    assert advantages(nothing).tolist() == advantages(nothing, "std").tolist() == [[0, 0, 0]]


def test_the_loss_is_hand_written_dr_grpo():
    logprobs = torch.tensor([[-1.0, -2.0, -0.5], [-0.1, -3.0, -9.0]], requires_grad=True)
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    advantage = torch.tensor([1.5, -1.5])
    loss = policy_loss(logprobs, mask, advantage, longest=10)
    assert loss.item() == pytest.approx(-(1.5 * 3 - 1.5 * 1) / 10 / 2)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(gradient, -advantage[:, None] * mask / 10 / 2)


def by_hand(model, table, scale="none", normalizer="constant"):
    """Row by row, prompt and response in one sequence: slow, and plainly right."""
    model.zero_grad(set_to_none=True)
    weights, loss = advantages(rarl.exam_rewards(table), scale).flatten(), 0.0
    for row, advantage in zip(responses(table).itertuples(), weights, strict=True):
        ids = torch.tensor([[*row.prompt, *row.ids]])
        logits = model(ids).logits[0, len(row.prompt) - 1 : -1]
        logprobs = torch.log_softmax(logits, -1).gather(1, ids[0, len(row.prompt):, None])
        length = max(SMALL_RARL.budgets) if normalizer == "constant" else len(row.ids)
        loss = loss - advantage * logprobs.sum() / length
    (loss / len(weights)).backward()
    return gradient(model)


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 1e-5), (torch.float64, 1e-7)])
def test_gradients_equal_the_computation_row_by_row(tiny, rollouts, dtype, least):
    """On policy; and what GRPO divides by makes another gradient."""
    model, found = tiny.to(dtype), []
    for scale, normalizer in (("none", "constant"), ("std", "constant"), ("none", "length")):
        expected = by_hand(model, rollouts, scale, normalizer)
        batch_gradient(model, rollouts, replace(SMALL_RARL, scale=scale, normalizer=normalizer))
        found.append(gradient(model))
        assert (found[-1] - expected).abs().max() < least * expected.abs().max()
    for other in found[1:]:
        assert (other - found[0]).abs().max() > 0.01 * found[0].abs().max()


def test_equal_rollouts_and_single_tokens_are_computed_rightly(tiny, rollouts):
    one = rollouts[rollouts["exam"] == 0]
    first, second, *_ = responses(one)["ids"]
    for rows, rewards in (([first, first, second, second[:1]], [1, 0, 2, 3]),
                          ([second[:1]] * 4, [1, 0, 0, 0])):
        table = rewarded(one, *rewards).assign(ids=[row for row in rows for _ in range(3)])
        expected = by_hand(tiny, table)
        batch_gradient(tiny, table, SMALL_RARL)
        torch.testing.assert_close(gradient(tiny), expected, rtol=0, atol=1e-6)


def test_groups_without_spread_are_left_out_and_counted(tiny, rollouts):
    learned = batch_gradient(tiny, rewarded(rollouts, 0, 1, 2, 3, 2, 2, 2, 2), SMALL_RARL)
    assert learned["no_spread"] == 0.5
    learned = batch_gradient(tiny, rewarded(rollouts, 2, 2, 2, 2, 1, NAN, 1, 1), SMALL_RARL)
    assert learned["no_spread"] == 1 and learned["entropy"] != learned["entropy"]
    assert all(p.grad is None for p in tiny.parameters())


@torch.no_grad()
def entropies(model, row, temperature, ids):
    """Entropy in nats where each of these tokens stands in a response."""
    logits = model(torch.tensor([[*row.prompt, *row.ids]])).logits[0, len(row.prompt) - 1 : -1]
    p = torch.softmax(logits / temperature, -1)
    found = -(p * p.log()).sum(-1)
    return [float(nats) for nats, token in zip(found, row.ids, strict=True) if token in ids]


def test_entropy_of_tokens_and_of_levels_by_hand(env, tiny, right):
    """Every rollout counts, also where two are the same; the groups' means weigh the same, and one
    without spread has none. Levels are few: a tag's other tokens are no choice."""
    groups = [[right, right, [SKIP] * 3, right[:1]], [[SKIP, *right[1:]], right, [SKIP], [SKIP]],
              [right, right, right, [SKIP] * 3]]
    tables = [pd.concat([sat(env, [*answers, *["2"] * (3 - len(answers))]).assign(rollout=k)
                         for k, answers in enumerate(group)]) for group in groups]
    prompt = env.prompt(EXAM, 256, "roi")
    table = pd.concat([some.assign(exam=i, prompt=[prompt] * len(some))
                       for i, some in enumerate(tables)])
    table["reward"] = table["correct"].astype(float).where(table["exam"] < 2, 1.0)
    recipe = replace(SMALL_RARL, temperature=0.7)
    found = batch_gradient(tiny, table, recipe, level_ids=env.level_ids)
    for name, ids in (("level_entropy", env.level_ids), ("entropy", range(len(env.tokenizer)))):
        means = [sum(sum(some, [])) / len(sum(some, [])) for some in (
            [entropies(tiny, row, 0.7, ids) for row in responses(table[table["exam"] == i])
             .itertuples()] for i in (0, 1))]
        assert found[name] == pytest.approx(sum(means) / 2, rel=1e-4), name
    assert found["no_spread"] == pytest.approx(1 / 3)
    assert found["level_entropy"] != pytest.approx(found["entropy"], rel=1e-3)
    assert pd.isna(batch_gradient(tiny, table, recipe)["level_entropy"]), "no token is a level"


def test_numbers_that_are_none_stop_before_the_update(env, tiny, rollouts, monkeypatch):
    monkeypatch.setattr(rarl, "problem_rewards", token_rewards)
    engine, optimizer = engine_for(tiny, env.tokenizer), torch.optim.AdamW(tiny.parameters())
    hook = tiny.model.norm.weight.register_hook(lambda found: found * NAN)
    before = copy.deepcopy(tiny.state_dict())
    with pytest.raises(FloatingPointError, match="the gradient is nan at step 0; lower"):
        rarl.train_step(env, tiny, engine, optimizer, SMALL_RARL, 0)
    assert all(torch.equal(before[name], value) for name, value in tiny.state_dict().items())
    hook.remove()
    with torch.no_grad():
        tiny.model.layers[0].mlp.down_proj.weight[0, 0] = NAN
    with pytest.raises(FloatingPointError, match="loss is nan at step 7, exam 0"):
        batch_gradient(tiny, rollouts, SMALL_RARL, step=7)
    with pytest.raises(FloatingPointError, match="step 5, sampling 2 exams: the"):
        rarl.train_step(env, tiny, engine, optimizer, SMALL_RARL, 5)


def test_a_sampler_that_is_another_policy_is_noticed(env, tiny, rollouts):
    """Its weights are stale, or its precision is another."""
    with torch.no_grad():
        tiny.model.norm.weight.mul_(40)  # sure of itself, as a trained model is
    group = rollouts[rollouts["exam"] == 0]
    live, stale = (engine_for(some, env.tokenizer) for some in (tiny, copy.deepcopy(tiny)))
    low = engine_for(copy.deepcopy(tiny).bfloat16(), env.tokenizer)
    with pytest.warns(UserWarning, match="temperature or precision"):
        assert logprob_gap(tiny, low, group) > 0.01
    assert max(logprob_gap(tiny, live, group), logprob_gap(tiny, live, group, 0.7)) < 1e-5
    with torch.no_grad():
        for parameter in tiny.parameters():
            parameter.add_(0.02)
    assert logprob_gap(tiny, live, group) < 1e-4
    with pytest.warns(UserWarning, match="sampler and trainer disagree"):
        assert logprob_gap(tiny, stale, group) > 0.01


# ---------------------------------------------------------------- exams and rollouts
def test_exams_follow_from_seed_and_step_alone():
    steps = [rarl.training_exams(POCKET, POCKET.rarl, step) for step in (0, 1, 2)]
    assert rarl.training_exams(POCKET, POCKET.rarl, 1) == steps[1] and steps[1][0] != steps[2][0]
    other = rarl.training_exams(POCKET, replace(POCKET.rarl, seed=1), 1)
    assert other[0] != steps[1][0] and other[1] != steps[1][1]
    assert {exam.order for exam in steps[0][0]} == {"hard", "medium", "easy"}
    for exams, budgets in steps:
        assert len(exams) == len(budgets) == 20 and len({*budgets}) > 10, "each has its own"
        assert len({exam.problems for exam in exams}) == 20


def test_budgets_and_sizes_are_those_of_the_recipe_and_some_are_never_drawn():
    """What is done under 72, 144 and 208 tokens was never learned, in no stage."""
    held_out = {72, 144, 208}
    assert not held_out & {*POCKET.rarl.budgets, *POCKET.mft.budgets}
    assert {*range(40, 257)} - held_out == {*POCKET.mft.budgets} > {*POCKET.rarl.budgets}
    trained = sorted(POCKET.rarl.budgets)  # in equal ratios, so that large ones leave gaps
    assert trained[0] == 40 and trained[-1] == 256
    assert max(b / a for a, b in pairwise(trained)) < 1.05
    drawn = [rarl.training_exams(POCKET, POCKET.rarl, step) for step in range(25)]
    budgets = [budget for _, some in drawn for budget in some]
    sizes = [len(exam.problems) for exams, _ in drawn for exam in exams]
    assert not held_out & {*budgets} and min(budgets) < 50 and max(budgets) > 246
    for size, weight in POCKET.rarl.sizes:
        assert sizes.count(size) / 500 == pytest.approx(weight / 7, abs=0.07)
    assert {*sizes} == {2, 3, 4, 5}
    test = {p.id for paper in draw_papers(POCKET, 100, seed=0) for p in paper}
    assert not test & {p.id for exams, _ in drawn for exam in exams for p in exam.problems}


def test_a_step_can_have_one_budget_for_all_its_exams(refusal):
    recipe = replace(POCKET.rarl, budget_for="step", exams=4, sizes=((3, 1.0),))
    steps = [rarl.training_exams(POCKET, recipe, step) for step in range(12)]
    assert all(len({*budgets}) == 1 and len(budgets) == 4 for _, budgets in steps)
    assert len({budgets[0] for _, budgets in steps}) > 8
    each = [rarl.training_exams(POCKET, replace(recipe, budget_for="exam"), step)
            for step in range(12)]
    assert [exams for exams, _ in each] == [exams for exams, _ in steps], "nothing else changes"
    assert "exam, step, not 'paper'" in refusal(replace, recipe, budget_for="paper")


@pytest.mark.parametrize(("cut", "budgets", "longest"), [
    (True, (16, 24), (16, 24)), (False, (16, 24), (48, 48)), (False, (16, 250), (320, 320))])
def test_rollouts_end_at_their_budget_or_uncut_at_twice_the_largest(env, engine, cut, budgets,
                                                                   longest):
    """Or where the world's budgets end; the prompt states the exam's own all the same."""
    exams, _ = rarl.training_exams(POCKET, SMALL_RARL, 0)
    recipe = replace(SMALL_RARL, cut=cut, budgets=budgets)
    whole = responses(rarl.roll_out(env, engine, exams, budgets, recipe, 0))
    for (_, own), exam, budget, most in zip(whole.groupby("exam"), exams, budgets, longest,
                                            strict=True):
        assert set(own["prompt"]) == {env.prompt(exam, budget, "roi")}
        assert set(own["budget"]) == {budget} and (own["tokens"] <= most).all()
        assert (own["tokens"][~own["finished"]] == most).all()
    if not cut:
        assert (whole["tokens"] > whole["budget"]).any()
    one = rarl.roll_out(env, engine, exams[1:], budgets[1:], recipe, 0, [1])
    assert responses(one)["ids"].tolist() == whole["ids"][whole["exam"] == 1].tolist()
