"""RARL: reward, advantages, loss and gradients on hand-made numbers; runs that get killed."""

import copy
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY
from safetensors import SafetensorError

from roi_lib import checkpoints, rarl
from roi_lib.checkpoints import CheckpointError, verify_folder
from roi_lib.exams import Exam, draw_papers
from roi_lib.generation import Rollout, TorchGenerator
from roi_lib.pretrain import new_model
from roi_lib.rarl import (
    Group,
    advantages,
    batch_gradient,
    completion_logprobs,
    group_rewards,
    mark,
    pad_right,
    policy_loss,
    roll_out,
    train_step,
    training_exams,
)
from roi_lib.rarl_loop import COLUMNS, describe, fingerprint, level_hits, logprob_gap, train
from roi_lib.tokenizer import build_tokenizer
from roi_lib.training import folder_lock
from roi_lib.worlds import POCKET

SMALL = replace(POCKET.rarl, steps=6, exams=2, rollouts=4, budgets=(16, 24), learning_rate=1e-3,
                save_every=2, log_every=2)
SKIP = "<predicted_level>Level-3</predicted_level> \\boxed{NA}"


def tiny(tokenizer, dtype=torch.float32):
    """A random model whose responses have all lengths."""
    model = new_model(tokenizer, TINY)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(std=0.5)
        model.model.embed_tokens.weight[tokenizer.eos_token_id] *= 4
    return model.to(dtype).eval()


def spread(world, sittings, variant="level", skip_bonus=0.1):
    """A reward that a random model earns now and then: it stands in for the real one."""
    return [float(sum(s.ids) % 4) for s in sittings]


def run(work, steps=6, **changes):
    """A short training run from the same start; returns its final weights."""
    tokenizer = build_tokenizer(POCKET)
    model = tiny(tokenizer)
    rarl.group_rewards = spread
    try:
        train(POCKET, tokenizer, model, replace(SMALL, steps=steps, **changes), work)
    finally:
        rarl.group_rewards = group_rewards
    return fingerprint(model)


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory):
    """Work folder and final weights of a run that nobody disturbed."""
    work = tmp_path_factory.mktemp("unkilled")
    return work, run(work)


@pytest.fixture
def groups(tokenizer, monkeypatch):
    """Two groups of rollouts of a random model, of many lengths, with spread in their rewards."""
    monkeypatch.setattr(rarl, "group_rewards", spread)
    model = tiny(tokenizer)
    exams, budget = training_exams(POCKET, SMALL, 0)
    sampled = roll_out(POCKET, tokenizer, TorchGenerator.of(model, tokenizer), exams, budget,
                       SMALL, 0)
    return [replace(g, sittings=tuple(
        replace(s, ids=s.ids[: len(s.ids) - 3 * k]) for k, s in enumerate(g.sittings)))
        for g in sampled]


# --- reward ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exam():
    return Exam(draw_papers(POCKET, 1, split="train")[0], "easy")


def sat(tokenizer, exam, *responses, budget=512):
    """The exam with these responses: each a list of one text a problem, or one whole text."""
    rollouts = []
    for words in responses:
        if not isinstance(words, str):
            words = "\n".join(f"Q{i}.\n{text}" for i, text in enumerate(words, start=1))
        ids = tuple(tokenizer(words, add_special_tokens=False).input_ids)[:budget]
        rollouts.append(Rollout(ids, len(ids) < budget))
    return mark(POCKET, tokenizer, exam, budget, rollouts)


def honest(tokenizer, exam):
    """The right answers, each under the level of its real cost."""
    texts = []
    for problem in exam.problems:
        alone = replace(exam, problems=(problem,))
        tries = [f"<predicted_level>Level-{k}</predicted_level> {problem.solution}"
                 for k in range(4)]
        costs = [sat(tokenizer, alone, [text])[0].response.segments[0].cost for text in tries]
        texts += [text for k, text in enumerate(tries) if POCKET.level_of(costs[k] + 1) == k][:1]
    return texts


def test_reward_needs_a_right_answer_and_a_right_level(tokenizer, exam):
    right = honest(tokenizer, exam)
    assert len(right) == 3
    wrong_answer = [right[0].replace("\\boxed{", "\\boxed{1"), *right[1:]]
    wrong_level = [right[0].replace("Level-0", "Level-2"), *right[1:]]
    skips = [right[0], SKIP, SKIP]
    sittings = sat(tokenizer, exam, right, wrong_answer, wrong_level, skips)
    assert group_rewards(POCKET, sittings) == [3, 2, 2, 1]
    assert group_rewards(POCKET, sittings, "answer") == [3, 2, 3, 1]
    # problems 2 and 3 were solved by others in the group, so these skips were not right
    assert group_rewards(POCKET, sittings, "skip_bonus") == [3, 2, 2, 1]
    alone = sat(tokenizer, exam, skips, [right[0], "\\boxed{NA}", SKIP])
    assert group_rewards(POCKET, alone, "skip_bonus", 0.25) == [1.5, 1.25]


def test_F22_a_failed_rollout_has_no_reward_and_moves_nothing(tokenizer, exam):
    good, other = sat(tokenizer, exam, honest(tokenizer, exam), [SKIP] * 3)
    failed = replace(other, ids=(), failed="time-out")
    rewards = group_rewards(POCKET, [good, other, failed])
    assert rewards[:2] == [3, 0] and rewards[2] != rewards[2]
    assert advantages(torch.tensor([rewards])).tolist() == [[1.5, -1.5, 0]]
    nothing = torch.full((1, 3), float("nan"))
    assert advantages(nothing).tolist() == advantages(nothing, "std").tolist() == [[0, 0, 0]]


def test_F25_hacks_earn_no_more_than_they_solve(tokenizer, exam):
    right = honest(tokenizer, exam)
    answers = [p.answer for p in exam.problems]
    hacks = {
        "skip everything": [SKIP] * 3,
        "minimal answers, no tag": [f"\\boxed{{{a}}}" for a in answers],
        "tag spam": ["".join(f"<predicted_level>Level-{k}</predicted_level>" for k in (3, 2, 1, 0))
                     + text.split("</predicted_level>")[1] for text in right],
        "always Level-0": [f"<predicted_level>Level-0</predicted_level> {p.solution}"
                           for p in exam.problems],
        "several answers": ["<predicted_level>Level-0</predicted_level> \\boxed{1000} "
                            f"\\boxed{{{a}}}" for a in answers],
        "a right answer after a skip": [f"{SKIP} \\boxed{{{a}}}" for a in answers],
    }
    sittings = sat(tokenizer, exam, *hacks.values())
    rewards = dict(zip(hacks, group_rewards(POCKET, sittings), strict=True))
    levels = [POCKET.level_of(s.cost) for s in sittings[3].response.segments]
    assert rewards == {"skip everything": 0, "minimal answers, no tag": 0, "tag spam": 0,
                       "always Level-0": levels.count(0), "several answers": 0,
                       "a right answer after a skip": 0}
    assert levels.count(0) < 3
    row = describe(POCKET, [Group((1,), sittings[:1], (0.0,))])
    assert row["skip_easy"] == row["skip_hard"] == 1 and row["level_accuracy"] == 1
    assert row["accuracy"] != row["accuracy"]  # no answer was given: nothing to count


def test_level_accuracy_leaves_out_what_the_budget_cut(tokenizer, exam):
    whole, = sat(tokenizer, exam, honest(tokenizer, exam))
    cut, = sat(tokenizer, exam, honest(tokenizer, exam), budget=len(whole.ids) - 8)
    assert sum(level_hits(POCKET, [whole]).values(), []) == [True] * 3
    assert sum(level_hits(POCKET, [cut]).values(), []) == [True] * 2 and not cut.correct[2]
    row = describe(POCKET, [Group((1,), (whole, cut), (3.0, 2.0))])
    assert row["level_accuracy"] == 1


# --- advantages and loss on hand-made numbers --------------------------------------------------


def test_advantages_are_rewards_minus_the_mean_of_the_group():
    rewards = torch.tensor([[3.0, 1.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 1.0]])
    assert advantages(rewards).tolist() == [[1, -1, -1, 1], [0] * 4, [-0.25, -0.25, -0.25, 0.75]]
    scaled = advantages(rewards, "std")
    expected = (rewards[2] - 0.25) / (rewards[2].std() + 1e-4)
    torch.testing.assert_close(scaled[2], expected)
    assert scaled[1].tolist() == [0] * 4


def test_the_loss_is_hand_written_dr_grpo():
    logprobs = torch.tensor([[-1.0, -2.0, -0.5], [-0.1, -3.0, -9.0]], requires_grad=True)
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    advantage = torch.tensor([1.5, -1.5])
    loss = policy_loss(logprobs, mask, advantage, longest=10)
    assert loss.item() == pytest.approx(-(1.5 * 3 - 1.5 * 1) / 10 / 2)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(gradient, -advantage[:, None] * mask / 10 / 2)
    (other,) = torch.autograd.grad(
        policy_loss(logprobs, mask, advantage, 10, "length"), logprobs)
    torch.testing.assert_close(other, -advantage[:, None] * mask / torch.tensor([[3.0], [1.0]]) / 2)


# --- log-probabilities and gradients -------------------------------------------------------------


def naive_gradient(model, groups, longest, scale="none", normalizer="constant"):
    """Row by row, prompt and response in one sequence: slow, and plainly right."""
    model.zero_grad(set_to_none=True)
    table = advantages(torch.tensor([g.rewards for g in groups]), scale)
    loss = 0.0
    for group, row in zip(groups, table, strict=True):
        for sitting, advantage in zip(group.sittings, row, strict=True):
            ids = torch.tensor([[*group.prompt, *sitting.ids]])
            logits = model(ids).logits[0, len(group.prompt) - 1 : -1]
            logprobs = torch.log_softmax(logits, -1).gather(1, ids[0, len(group.prompt):, None])
            length = longest if normalizer == "constant" else len(sitting.ids)
            loss = loss - advantage * logprobs.sum() / length
    (loss / table.numel()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def difference(model, gradient):
    """Largest difference of `.grad` to another gradient, relative to its largest entry."""
    largest = max(float(g.abs().max()) for g in gradient.values())
    return max(float((p.grad - gradient[name]).abs().max())
               for name, p in model.named_parameters()) / largest


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 1e-5), (torch.float64, 1e-7)])
def test_gradients_equal_the_naive_computation_row_by_row(tokenizer, groups, dtype, least):
    model = tiny(tokenizer, dtype)
    assert len({len(g.prompt) for g in groups}) > 1
    assert len({len(s.ids) for g in groups for s in g.sittings}) > 2
    for scale, normalizer in (("none", "constant"), ("std", "length")):
        recipe = replace(SMALL, scale=scale, normalizer=normalizer)
        expected = naive_gradient(model, groups, 24, scale, normalizer)
        batch_gradient(model, groups, recipe)
        assert difference(model, expected) < least


def test_grpo_is_another_gradient(tokenizer, groups):
    model = tiny(tokenizer)
    dr_grpo = naive_gradient(model, groups, 24)
    for change in ({"scale": "std"}, {"normalizer": "length"}):
        batch_gradient(model, groups, replace(SMALL, **change))
        assert difference(model, dr_grpo) > 0.01


def test_equal_rollouts_and_single_tokens_are_computed_rightly(tokenizer, groups):
    model = tiny(tokenizer)
    first, second = groups[0].sittings[:2]
    short = replace(second, ids=second.ids[:1])
    for sittings, rewards in (((first, first, second, short), (1.0, 0.0, 2.0, 3.0)),
                              ((short, short, short, short), (1.0, 0.0, 0.0, 0.0))):
        group = Group(groups[0].prompt, sittings, rewards)
        expected = naive_gradient(model, [group], 24)
        batch_gradient(model, [group], SMALL)
        largest = max(float(g.abs().max()) for g in expected.values())
        gap = max(float((p.grad - expected[name]).abs().max())
                  for name, p in model.named_parameters())
        assert gap <= 1e-5 * max(largest, 0.1)


def test_entropy_is_the_mean_over_all_response_tokens(tokenizer, groups):
    model = tiny(tokenizer)
    group = Group(groups[0].prompt, groups[0].sittings[:1] * 3, (0.0, 1.0, 2.0))
    ids, mask = pad_right([group.sittings[0].ids])
    _, entropy = completion_logprobs(model, torch.tensor(group.prompt), ids)
    assert batch_gradient(model, [group], SMALL)["entropy"] == pytest.approx(
        float(entropy.mean()), rel=1e-5)


def test_F22_groups_without_spread_are_left_out_and_counted(tokenizer, groups):
    model = tiny(tokenizer)
    flat = [replace(g, rewards=(2.0,) * 4) for g in groups]
    learned = batch_gradient(model, [groups[0], flat[1]], SMALL)
    assert learned["no_spread"] == 0.5
    learned = batch_gradient(model, flat, SMALL)
    assert learned["no_spread"] == 1 and learned["entropy"] != learned["entropy"]
    assert all(p.grad is None for p in model.parameters())


def test_F22_a_run_without_any_spread_goes_on_and_changes_nothing(tokenizer, tmp_path):
    model = tiny(tokenizer)
    before = fingerprint(model)
    recipe = replace(SMALL, steps=2, save_every=1)
    train(POCKET, tokenizer, model, replace(recipe, steps=1), tmp_path / "other")
    train(POCKET, tokenizer, model, recipe, tmp_path)
    train(POCKET, tokenizer, model, recipe, tmp_path)  # continues an empty optimizer
    assert fingerprint(model) == before
    assert (tmp_path / "log.csv").read_text().count(",1.0,0.0,,") == 2


def test_F23_rows_that_the_budget_cuts_still_train(tokenizer, groups):
    model = tiny(tokenizer)
    cut = [replace(g, sittings=tuple(
        replace(s, finished=False) for s in g.sittings)) for g in groups]
    assert describe(POCKET, cut)["cut"] == 1
    batch_gradient(model, cut, SMALL)
    assert sum(float(p.grad.abs().sum()) for p in model.parameters()) > 0


def test_F24_a_broken_model_stops_with_step_and_batch(tokenizer, groups):
    model = tiny(tokenizer)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="loss is nan at step 7, exam 0"):
        batch_gradient(model, groups, SMALL, step=7)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(FloatingPointError, match="step 5, sampling 2 exams under budget 24: the"):
        train_step(POCKET, tokenizer, model, TorchGenerator.of(model, tokenizer), optimizer,
                   SMALL, 5)


def test_F26_a_sampler_with_stale_weights_is_noticed(tokenizer, groups):
    model, stale = tiny(tokenizer), tiny(tokenizer)
    live = TorchGenerator.of(model, tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.ones_like(parameter))
    assert logprob_gap(model, live, groups[0]) < 1e-5
    with pytest.warns(UserWarning, match="sampler and trainer disagree"):
        assert logprob_gap(model, TorchGenerator.of(stale, tokenizer), groups[0]) > 0.01


def test_F27_another_precision_shows_and_another_temperature_is_another_policy(tokenizer, groups):
    model = tiny(tokenizer)
    with torch.no_grad():
        model.model.norm.weight.mul_(40)  # sure of itself, as a trained model is
    low = TorchGenerator.of(copy.deepcopy(model).bfloat16(), tokenizer)
    with pytest.warns(UserWarning, match="precision"):
        assert logprob_gap(model, low, groups[0]) > 0.01
    assert logprob_gap(model, TorchGenerator.of(model, tokenizer), groups[0], 0.7) < 1e-5
    prompt, (ids, _) = torch.tensor(groups[0].prompt), pad_right([groups[0].sittings[0].ids])
    at_one, _ = completion_logprobs(model, prompt, ids)
    cooler, _ = completion_logprobs(model, prompt, ids, 0.7)
    assert (at_one - cooler).abs().mean() > 0.01


# --- exams and recipe --------------------------------------------------------------------------


def test_exams_follow_from_seed_and_step_alone():
    exams, budget = training_exams(POCKET, POCKET.rarl, 3)
    again, _ = training_exams(POCKET, POCKET.rarl, 3)
    assert exams == again and len(exams) == 16 and budget in POCKET.rarl.budgets
    assert exams != training_exams(POCKET, POCKET.rarl, 4)[0]
    assert exams != training_exams(POCKET, replace(POCKET.rarl, seed=1), 3)[0]
    assert {e.order for e in exams} == {"hard", "medium", "easy"}
    budgets = [training_exams(POCKET, replace(POCKET.rarl, exams=1), s)[1] for s in (0, 1, 2)]
    assert budgets == [64, 128, 128]


@pytest.mark.parametrize(("change", "words"), [
    ({"reward": "luck"}, "reward must be one of level, answer, skip_bonus"),
    ({"scale": "batch"}, "scale must be one of"), ({"rollouts": 1}, "at least 2 rollouts"),
    ({"orders": (("best", 1.0),)}, "unknown order 'best'"), ({"temperature": 0}, "above 0"),
    ({"budgets": ()}, "at least one budget"),
    ({"keep": (0, -6)}, "step -6 cannot be kept: the start is step 0")])
def test_a_bad_recipe_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        replace(POCKET.rarl, **change)


def test_a_budget_too_small_for_a_tag_is_refused(tokenizer):
    model = tiny(tokenizer)
    recipe = replace(SMALL, budgets=(2,))
    with pytest.raises(ValueError, match="budget 2 is smaller"):
        exams, budget = training_exams(POCKET, recipe, 0)
        roll_out(POCKET, tokenizer, TorchGenerator.of(model, tokenizer), exams, budget, recipe, 0)


# --- runs that are killed, and folders ---------------------------------------------------------


def stamp(path):
    """When a file was written last; None: there is none."""
    return path.stat().st_mtime_ns if path.exists() else None


def test_F1_F3_a_killed_run_ends_with_the_weights_of_the_unkilled(unkilled, tmp_path):
    """kill -9 at random moments of the training, saving included; KILLS=10 for more of them."""
    reference, weights = unkilled
    moments = random.Random()
    seed = moments.randrange(10**6)
    moments.seed(seed)
    code = "import sys; from pathlib import Path; from test_rarl import run; run(Path(sys.argv[1]))"
    # sums are rounded alike only with as many threads
    environment = os.environ | {"PYTHONPATH": str(ROOT),
                                "OMP_NUM_THREADS": str(torch.get_num_threads())}
    begin = time.monotonic()
    run(tmp_path / "timed")
    whole, log, ends = time.monotonic() - begin, tmp_path / "log.csv", []
    for _ in range(int(os.environ.get("KILLS", "2"))):
        before = stamp(log)
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)],
                                   cwd=Path(__file__).parent, env=environment,
                                   stdout=subprocess.DEVNULL)
        while process.poll() is None and stamp(log) == before:
            time.sleep(0.002)  # until it has begun, or goes on
        time.sleep(moments.random() * whole)
        process.send_signal(signal.SIGKILL)
        ends.append(process.wait())
    assert -signal.SIGKILL in ends, f"every run was over before its kill (seed {seed})"
    assert run(tmp_path) == weights, f"kill moments of seed {seed}"
    rows = [[line.split(",")[:-1] for line in (work / "log.csv").read_text().splitlines()]
            for work in (reference, tmp_path)]  # all but the seconds
    assert rows[0] == rows[1] and len(rows[0]) == 7
    assert weights != fingerprint(tiny(build_tokenizer(POCKET)))


def test_F1_F2_F3_a_damaged_checkpoint_is_passed_over(unkilled, tmp_path):
    run(tmp_path, steps=4)
    (tmp_path / "step-000004" / "optimizers.safetensors").unlink()
    with pytest.warns(UserWarning, match="passing over an incomplete checkpoint"):
        with pytest.raises(ValueError, match="another recipe"):
            run(tmp_path)  # six steps are another recipe than four
        weights = run(tmp_path, steps=4)
    clean = tmp_path / "clean"
    assert run(clean, steps=4) == weights
    for folder in clean.glob("step-*"):
        verify_folder(folder)
    (clean / "step-000004" / "weights.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="cut short"):
        verify_folder(clean / "step-000004")


def test_another_recipe_or_start_is_refused(unkilled, tmp_path, tokenizer):
    work, weights = unkilled
    with pytest.raises(ValueError, match="another learning_rate, which makes it another recipe"):
        run(work, learning_rate=2e-3)
    other = tiny(tokenizer)
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    with pytest.raises(ValueError, match="another start"):
        train(POCKET, tokenizer, other, SMALL, work)
    assert run(work) == weights  # a finished run does nothing more


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"),
                                   SafetensorError("StorageFull: No space left on device")])
def test_F4_a_full_disk_leaves_the_last_checkpoint(unkilled, tmp_path, monkeypatch, error):
    real, calls = checkpoints.save_file, []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) > 3:  # two files a checkpoint: the second one's optimizer does not fit
            raise error
        real(*arguments)

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match="step 4 could not be written .* make room"):
        run(tmp_path)
    monkeypatch.undo()
    verify_folder(tmp_path / "step-000002")
    assert run(tmp_path) == unkilled[1]


def test_F5_two_runs_cannot_share_a_folder(tmp_path):
    with folder_lock(tmp_path), pytest.raises(ValueError, match="another process"):
        run(tmp_path)


def test_log_lines_and_live_rows(tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rarl, "group_rewards", spread)
    rows = []
    train(POCKET, tokenizer, tiny(tokenizer), replace(SMALL, steps=3), tmp_path,
          on_step=rows.append)
    out = capsys.readouterr().out
    assert "step 2/3" in out and "step 3/3" in out and "about 0 s left" in out
    assert [row["budget"] for row in rows] == [16, 24, 16]
    header, *lines = (tmp_path / "log.csv").read_text().splitlines()
    assert header.split(",") == list(COLUMNS) and len(lines) == 3
    gaps = [row["logprob_gap"] for row in rows]
    assert gaps[0] < 1e-5 and gaps[1] != gaps[1]
