"""Rationality-Aware RL (RARL) with Dr. GRPO: learn to allocate one budget over an exam.

Stage two of the method, after the paper's section on RARL, with nothing hidden in a framework.
One step of training, piece by piece:

    training_exams       the step's papers, each in one of the orders, and the step's budget
    roll_out             every exam sat several times by the model as it is: one `Group` an exam
    group_rewards        what each rollout of a group earned
    advantages           reward minus the mean of its group (Dr. GRPO: no standard deviation)
    completion_logprobs  how probable the model finds its own responses, with gradient
    policy_loss          policy gradient with a constant length normaliser
    train_step, train    all of it, once; and again and again, with log and checkpoints

Nothing depends on a random state that would have to be saved: papers and sampling streams follow
from (seed, step), so a run that was killed continues as if it had not been.
"""

import hashlib
import json
import math
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError

from roi_lib.checkpoints import (
    load_training_state,
    newest_complete,
    save_training_state,
)
from roi_lib.evaluation import Sitting, check_budget, exam_table, segment_table, sit, summarize
from roi_lib.exams import (
    Exam,
    Segment,
    draw_papers,
    encode_prompt,
    exam_prompt,
    order_problems,
    parse_response,
)
from roi_lib.generation import BudgetedGenerator, Request, Rollout, TorchGenerator
from roi_lib.grading import grade
from roi_lib.problems import FAMILIES, Problem
from roi_lib.sources import load_problems
from roi_lib.training import TrainingLog, folder_lock, write_checkpoint
from roi_lib.worlds import ORDERS, TIERS, World

STYLE = "roi"  # the prompting style whose responses carry level tags
REWARDS = ("level", "answer", "skip_bonus")
SCALES = ("none", "std")
NORMALIZERS = ("constant", "length")
#: Largest mean difference of sampler's and trainer's log-probabilities, in nats (FAULTS F27).
LARGEST_GAP = 0.01
#: Columns of the log, and what each tells. What could not be measured is an empty field.
COLUMNS = {
    "step": "updates done",
    "budget": "tokens that each exam of the step might use",
    "reward": "mean reward of an exam",
    "score": "mean number of problems solved, whatever their tags",
    "skip_easy": "share of the easy problems skipped",
    "skip_medium": "share of the medium problems skipped",
    "skip_hard": "share of the hard problems skipped",
    "level_accuracy": "share of the tags that name the level of the real cost",
    "accuracy": "share of the answers given that are right",
    "tokens": "mean tokens spent on an exam",
    "cut": "share of responses that the budget ended",
    "no_spread": "share of groups whose rewards are all equal: they teach nothing",
    "grad_norm": "norm of the gradient before clipping",
    "entropy": "mean entropy of a response token, in nats, over the groups with spread",
    "logprob_gap": "mean difference of sampler's and trainer's log-probabilities, in nats",
    "seconds": "time of training so far",
}


@dataclass(frozen=True)
class RARLConfig:
    """The recipe. The paper fixes reward and loss; the numbers are ours.

    Attributes:
        steps: updates; each has fresh rollouts (on policy, one update a batch).
        exams, rollouts: exams a step, and rollouts of each (the group of Dr. GRPO).
        n_problems: problems an exam.
        budgets: taken in turn, one a step; None: the world's own. The prompt states it.
        orders: (order, weight) of the exams.
        learning_rate: of AdamW, constant, without weight decay. Too high a rate destroys the
            policy: accuracy falls and skipping dies out (see `diagnosis`).
        temperature: of sampling, and of the log-probabilities.
        reward: see `group_rewards`; `skip_bonus` counts for the variant of that name only.
        scale, normalizer: see `advantages`, `policy_loss`. ("none", "constant") is Dr. GRPO,
            ("std", "length") is GRPO.
        max_grad_norm: gradients are clipped to this norm.
        log_every, save_every: steps between printed lines, and between checkpoints.

    Raises:
        ValueError: a choice that does not exist, or a number that cannot be.
    """

    steps: int = 300
    exams: int = 16
    rollouts: int = 16
    n_problems: int = 3
    budgets: tuple[int, ...] | None = None
    orders: tuple[tuple[str, float], ...] = (("hard", 0.5), ("medium", 0.3), ("easy", 0.2))
    learning_rate: float = 1e-4
    temperature: float = 1.0
    reward: str = "level"
    skip_bonus: float = 0.1
    scale: str = "none"
    normalizer: str = "constant"
    max_grad_norm: float = 1.0
    log_every: int = 10
    save_every: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (("reward", REWARDS), ("scale", SCALES), ("normalizer", NORMALIZERS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, "
                                 f"not {getattr(self, name)!r}")
        if unknown := {order for order, _ in self.orders} - set(ORDERS):
            raise ValueError(f"unknown order {min(unknown)!r}; choose from {', '.join(ORDERS)}")
        if self.rollouts < 2 or min(self.exams, self.steps, self.log_every, self.save_every) < 1:
            raise ValueError("a group needs at least 2 rollouts; steps, exams, log_every and "
                             "save_every must be at least 1")
        if self.temperature <= 0 or self.learning_rate <= 0 or self.max_grad_norm <= 0:
            raise ValueError("temperature, learning_rate and max_grad_norm must be above 0")
        if self.budgets is not None and not self.budgets:
            raise ValueError("name at least one budget, or None for the world's own")


def budgets_of(world: World, config: RARLConfig) -> tuple[int, ...]:
    """The budgets of the training, in tokens."""
    return config.budgets or world.budgets


# --- exams and rollouts ----------------------------------------------------------------------


def step_seed(config: RARLConfig, step: int) -> int:
    """A seed of its own for each step: of its papers, orders and rollouts."""
    return config.seed * 1_000_000 + step


def problem_pool(world: World, root: Path | None = None) -> list[Problem] | None:
    """All training problems of real sources, read once; None where problems are generated."""
    sources = [(name, tier) for tier in TIERS for name in world.families[tier]]
    if all(name in FAMILIES for name, _ in sources):
        return None
    return [p for name, tier in sources for p in load_problems(name, tier, "train", root)]


def training_exams(
    world: World, config: RARLConfig, step: int, pool: list[Problem] | None = None
) -> tuple[list[Exam], int]:
    """The exams of one step, from the training split, and the budget they are all sat under."""
    seed = step_seed(config, step)
    rng = random.Random(f"{seed}/orders")
    orders = rng.choices(*zip(*config.orders, strict=True), k=config.exams)
    papers = draw_papers(world, config.exams, config.n_problems, "train", seed, problems=pool)
    exams = [Exam(order_problems(paper, order, f"{seed}/{i}"), order)
             for i, (paper, order) in enumerate(zip(papers, orders, strict=True))]
    budgets = budgets_of(world, config)
    return exams, budgets[step % len(budgets)]


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
    config: RARLConfig, step: int,
) -> list[Group]:
    """Sit every exam `config.rollouts` times under `budget` tokens; one group an exam.

    Raises:
        ValueError: a budget smaller than a header with a tag.
        FloatingPointError: the model gave NaN or infinite logits; names the step (FAULTS F24).
    """
    check_budget(world, tokenizer, budget)
    messages = [exam_prompt(world, exam, budget, STYLE) for exam in exams]
    requests = [Request(tuple(encode_prompt(tokenizer, message)), budget,
                        (step_seed(config, step), i), config.rollouts, message)
                for i, message in enumerate(messages)]
    try:
        responses = generator.generate(requests, config.temperature)
    except FloatingPointError as error:
        raise FloatingPointError(f"step {step}, sampling {len(exams)} exams under budget {budget}: "
                                 f"{error}; lower the learning rate") from error
    groups = []
    for exam, request, rollouts in zip(exams, requests, responses, strict=True):
        sittings = mark(world, tokenizer, exam, budget, rollouts)
        rewards = group_rewards(world, sittings, config.reward, config.skip_bonus)
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
    model, group: Group, advantage: torch.Tensor, share: float, longest: int, config: RARLConfig
) -> tuple[float, float]:
    """Add one group's part to the gradient of the whole batch's loss.

    Rollouts that came out the same are computed once, with their advantages added up.

    Args:
        advantage: of the group's rollouts.
        share: part of the batch's rows that one rollout is.
        longest: see `policy_loss`.

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
        model, torch.tensor(group.prompt, device=device), ids, config.temperature)
    loss = policy_loss(logprobs, mask, weight, longest, config.normalizer) * len(distinct) * share
    loss.backward()
    tokens = mask * count[:, None]
    return loss.item(), float((entropy * tokens).sum() / tokens.sum())


def batch_gradient(
    model, groups: Sequence[Group], longest: int, config: RARLConfig, step: int = 0
) -> dict[str, float]:
    """Put the gradient of the loss of all groups into `.grad`, group by group.

    Groups without spread have no advantage anywhere and are left out. `longest`: see
    `policy_loss`.

    Returns:
        `loss`; `no_spread`, the share of groups left out; `entropy` of the others, in nats a
        token (NaN: there are none).

    Raises:
        FloatingPointError: the loss is NaN or infinite; names step and exam (FAULTS F24).
    """
    model.zero_grad(set_to_none=True)
    table = advantages(torch.tensor([g.rewards for g in groups]), config.scale)
    loss, entropies = 0.0, []
    for i, (group, advantage) in enumerate(zip(groups, table, strict=True)):
        if not has_spread(group.rewards):
            continue
        part, entropy = accumulate_gradient(
            model, group, advantage, 1 / table.numel(), longest, config)
        if not math.isfinite(part):
            raise FloatingPointError(f"the loss is {part} at step {step}, exam {i} of the batch; "
                                     "lower the learning rate")
        loss += part
        entropies.append(entropy)
    return {"loss": loss, "no_spread": 1 - len(entropies) / len(groups),
            "entropy": sum(entropies) / len(entropies) if entropies else math.nan}


@torch.inference_mode()
def logprob_gap(
    model, generator: TorchGenerator, group: Group, temperature: float = 1.0
) -> float:
    """Mean difference, in nats, of sampler's and trainer's log-probabilities of one group.

    The group's responses go through the sampler's own forward pass, token by token, with the
    weights that it holds now (FAULTS F26, F27). Above `LARGEST_GAP` a warning is given.
    """
    ids, mask = pad_right([row for row in dict.fromkeys(s.ids for s in group.sittings) if row],
                          model.device)
    ours, _ = completion_logprobs(
        model, torch.tensor(group.prompt, device=model.device), ids, temperature)
    logits, prefilled, seen = generator._prefill([group.prompt])
    logits = logits.expand(len(ids), -1)
    source = torch.zeros(len(ids), dtype=torch.long, device=model.device)
    decoding = generator.rows(generator.model, prefilled, seen, source, ids.shape[1])
    theirs = []
    for token in ids.T:
        table = torch.log_softmax(logits.float() / temperature, -1)
        theirs.append(table.gather(1, token[:, None])[:, 0])
        logits = decoding.step(token)
    gap = float(((torch.stack(theirs, 1) - ours).abs() * mask).sum() / mask.sum())
    if not gap <= LARGEST_GAP:
        warnings.warn(f"sampler and trainer disagree by {gap:.3g} nats a token (alarm above "
                      f"{LARGEST_GAP}): the sampler's weights, temperature or precision are not "
                      "the trainer's, and the gradient is that of another policy", stacklevel=2)
    return gap


# --- training --------------------------------------------------------------------------------


def mean(values) -> float:
    """The mean, or NaN where there is nothing."""
    values = [float(v) for v in values]
    return sum(values) / len(values) if values else math.nan


def describe(world: World, groups: Sequence[Group]) -> dict[str, float]:
    """The columns of the log that rollouts alone decide; NaN where there is nothing to count.

    `COLUMNS` says what they are.
    """
    sittings = [s for group in groups for s in group.sittings]
    table = segment_table(world, sittings)
    answered = [correct for s in sittings
                for segment, correct in zip(s.response.segments, s.correct, strict=True)
                if segment.answer is not None and not segment.skipped]
    tagged = table["predicted"] >= 0
    return {
        "reward": mean(r for group in groups for r in group.rewards if not math.isnan(r)),
        "score": mean(sum(s.correct) for s in sittings),
        **{f"skip_{tier}": mean(table["skipped"][table["tier"] == tier]) for tier in TIERS},
        "level_accuracy": mean((table["predicted"] == table["real"])[tagged]),
        "accuracy": mean(answered),
        "tokens": mean(s.response.total for s in sittings),
        "cut": mean(not s.finished for s in sittings),
    }


def train_step(
    world: World, tokenizer, model, generator: TorchGenerator, optimizer, config: RARLConfig,
    step: int, pool: list[Problem] | None = None, check: bool = False,
) -> dict[str, float]:
    """One step: rollouts, rewards, advantages, one update. Returns the log's columns.

    Without any spread there is nothing to learn, and no update. `check` measures `logprob_gap`.

    Raises:
        FloatingPointError: NaN or infinite logits, loss or gradient (FAULTS F24).
    """
    exams, budget = training_exams(world, config, step, pool)
    groups = roll_out(world, tokenizer, generator, exams, budget, config, step)
    gap = math.nan
    if check and any(s.ids for s in groups[0].sittings):
        gap = logprob_gap(model, generator, groups[0], config.temperature)
    learned = batch_gradient(model, groups, max(budgets_of(world, config)), config, step)
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm))
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient is {norm} at step {step}, budget {budget}; "
                                 "lower the learning rate")
    if learned["no_spread"] < 1:
        optimizer.step()
    return {"step": step + 1, "budget": budget, **describe(world, groups), "grad_norm": norm,
            "no_spread": learned["no_spread"], "entropy": learned["entropy"], "logprob_gap": gap}


class StepLog(TrainingLog):
    """A row a step on disk, and now and then a printed line with the remaining time."""

    def append(self, row: dict) -> None:
        """Append one row; NaN, where there was nothing to count, becomes an empty field."""
        values = [row[c] if isinstance(row[c], int) else round(row[c], 6) for c in self.columns]
        with self.path.open("a") as stream:
            stream.write(",".join("" if math.isnan(v) else str(v) for v in values) + "\n")

    @staticmethod
    def show(rows: Sequence[dict], steps: int, seconds_a_step: float) -> None:
        """Print the means of the last rows."""
        names = ("reward", "score", "skip_hard", "level_accuracy", "accuracy", "no_spread",
                 "grad_norm", "entropy")
        known = {n: [row[n] for row in rows if not math.isnan(row[n])] for n in names}
        means = "  ".join(f"{n} {mean(values):.3f}" for n, values in known.items())
        left = seconds_a_step * (steps - rows[-1]["step"])
        print(f"step {rows[-1]['step']}/{steps}  {means}  {seconds_a_step:.2f} s a step, "
              f"about {left:.0f} s left", flush=True)


def fingerprint(model) -> str:
    """SHA-256 of all weights, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def writing(work: Path, step: int) -> Iterator[None]:
    """Say what to do when the disk is full (FAULTS F4); what was saved before is still there.

    Raises:
        OSError: names step and folder.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"step {step} could not be written to {work} ({error}); make room and run "
                      "the same command: it continues from the last checkpoint") from error


def save(work: Path, model, optimizer, progress: dict) -> None:
    """Save the training state of a step, and keep the newest two."""
    save_training_state(work / f"step-{progress['step']:06d}", model, [optimizer], progress)
    for old in sorted(work.glob("step-*"))[:-2]:
        shutil.rmtree(old)


def train(
    world: World, tokenizer, model, config: RARLConfig, work: Path,
    pool: list[Problem] | None = None, on_step: Callable[[dict], None] | None = None,
) -> dict:
    """Train `model` in place; continue from `work` where it holds a run of this recipe.

    `work` keeps the newest training states and `log.csv` (see `COLUMNS`). The model stays in eval
    mode: dropout would put sampler and trainer out of step.

    Args:
        pool: problems instead of the world's generated ones (see `problem_pool`).
        on_step: called with the log's row after each step, for a live plot.

    Returns:
        The progress: `step`, `seconds`, `recipe`, `start` (fingerprint of the first weights).

    Raises:
        ValueError: `work` holds another run, or another process is at it.
        FloatingPointError: NaN or infinite logits, loss or gradient; names the step.
        OSError: the disk is full.
    """
    with folder_lock(work):
        return _train(world, tokenizer, model.eval(), config, work, pool, on_step)


def _train(world, tokenizer, model, config, work, pool, on_step) -> dict:
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0)
    recipe = json.loads(json.dumps(asdict(config)))
    progress = {"step": 0, "seconds": 0.0, "recipe": recipe, "start": fingerprint(model)}
    if state := newest_complete(work):
        begun = progress
        progress = load_training_state(state, model, [optimizer])
        if any(progress[key] != begun[key] for key in ("recipe", "start")):
            raise ValueError(f"{work} holds a run with another recipe or from another model; "
                             "choose another --work")
        print(f"continuing {work} from step {progress['step']}")
    generator = TorchGenerator.of(model, tokenizer)  # over the live weights: never stale (F26)
    first, before, start = progress["step"], progress["seconds"], time.monotonic()
    log, rows = StepLog(work / "log.csv", tuple(COLUMNS), first), []
    for step in range(first, config.steps):
        done, last = step + 1, step + 1 == config.steps
        row = train_step(world, tokenizer, model, generator, optimizer, config, step, pool,
                         check=step % config.log_every == 0)
        elapsed = time.monotonic() - start
        progress |= {"step": done, "seconds": before + elapsed}
        rows.append(row | {"seconds": progress["seconds"]})
        with writing(work, done):
            log.append(rows[-1])
            if done % config.save_every == 0 or last:
                save(work, model, optimizer, progress)
        if on_step:
            on_step(rows[-1])
        if done % config.log_every == 0 or last:
            log.show(rows, config.steps, elapsed / (done - first))
            rows.clear()
    return progress


# --- the checkpoint --------------------------------------------------------------------------


def measure(
    world: World, tokenizer, model, n_papers: int = 2_000, seed: int = 1, name: str = "rarl"
) -> list[dict]:
    """Score and Regret on unseen papers, one record an order and budget (as `exam` prints)."""
    papers = draw_papers(world, n_papers, seed=seed)
    generator = TorchGenerator.of(model, tokenizer)
    records = []
    for budget in world.budgets:
        sat = {order: sit(world, tokenizer, generator, [
            Exam(order_problems(paper, order, f"{seed}/{i}"), order)
            for i, paper in enumerate(papers)], budget, STYLE, seed=seed) for order in ORDERS}
        records += [{"method": name, "order": order, "budget": budget}
                    | summarize(world, sat[order], sat["easy"], seed) for order in ORDERS]
    return records


def publish(
    world: World, model, out: Path, progress: dict, log: Path, start: str, records: list[dict]
) -> None:
    """Write the checkpoint folder: weights, `log.csv`, and a card with what was measured.

    Args:
        progress: what `train` returned.
        log: the run's `log.csv`.
        start: name of the checkpoint that the run began with.
        records: what `measure` returned.
    """
    card = CARD.format(
        name=out.name, start=start, world=world.name, tokenizer=world.tokenizer,
        parameters=f"{model.num_parameters():,}", steps=progress["step"],
        minutes=f"{progress['seconds'] / 60:.0f}", threads=torch.get_num_threads(),
        recipe=json.dumps(progress["recipe"], indent=1), table=exam_table(records))
    write_checkpoint(out, model, log, card)


CARD = """\
# {name}

`{start}` after Rationality-Aware RL with Dr. GRPO ({parameters} parameters). It predicts the
level of each problem, and solves or skips it, so that one token budget lasts for the whole exam.
Prompting style `roi`; tokenizer `{tokenizer}`. Licence: MIT, as the repository.

**Training.** {steps} steps, {minutes} minutes on {threads} threads; every step is in `log.csv`.
Command: `python -m roi_lib train rarl --world {world}`. Recipe:

```json
{recipe}
```

**Measured** on unseen papers at temperature 1; brackets are 95 % bootstrap intervals.

```
{table}
```
"""
