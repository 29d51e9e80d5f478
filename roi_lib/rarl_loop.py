"""RARL's own trainer: `rarl.train_step` again and again, with a log and checkpoints.

    COLUMNS      what the log of a run holds, and what each column tells
    describe     the columns that rollouts alone decide
    logprob_gap  whether sampler and trainer are the same policy
    train        the loop; a run that was killed goes on as if it had not been
"""

import hashlib
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from roi_lib.checkpoints import load_training_state, newest_complete, save_step, write_folder
from roi_lib.generation import TorchGenerator
from roi_lib.problems import Problem
from roi_lib.rarl import Group, completion_logprobs, pad_right, train_step
from roi_lib.sitting import Sitting, segment_table
from roi_lib.training import TrainingLog, folder_lock, same_recipe, writing
from roi_lib.worlds import TIERS, RARLRecipe, World

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
    "level_accuracy": "share of the tags, of problems that the budget did not cut, that name the "
    "level of the real cost",
    "accuracy": "share of the answers given that are right",
    "tokens": "mean tokens spent on an exam",
    "cut": "share of responses that the budget ended",
    "no_spread": "share of groups whose rewards are all equal: they teach nothing",
    "grad_norm": "norm of the gradient before clipping",
    "entropy": "mean entropy of a response token, in nats, over the groups with spread",
    "logprob_gap": "mean difference of sampler's and trainer's log-probabilities, in nats",
    "seconds": "time of training so far",
}



def mean(values) -> float:
    """The mean, or NaN where there is nothing."""
    values = [float(v) for v in values]
    return sum(values) / len(values) if values else math.nan


def level_hits(world: World, sittings: Sequence[Sitting]) -> dict[str, list[bool]]:
    """Whether each tag names the level of the real cost: those of "answers" and of "skips".

    The level of a skip is Level-3 by definition. A problem that the budget cut has no real cost,
    and is left out.
    """
    hits: dict[str, list[bool]] = {"answers": [], "skips": []}
    for s in sittings:
        for segment in s.response.segments:
            if segment.level is not None and segment.answer is not None:
                real = world.skip_level if segment.skipped else world.level_of(segment.cost)
                hits["skips" if segment.skipped else "answers"].append(segment.level == real)
    return hits


def describe(world: World, groups: Sequence[Group]) -> dict[str, float]:
    """The columns of the log that rollouts alone decide; NaN where there is nothing to count.

    `COLUMNS` says what they are.
    """
    sittings = [s for group in groups for s in group.sittings]
    table = segment_table(world, sittings)
    answered = [correct for s in sittings
                for segment, correct in zip(s.response.segments, s.correct, strict=True)
                if segment.answer is not None and not segment.skipped]
    return {
        "reward": mean(r for group in groups for r in group.rewards if not math.isnan(r)),
        "score": mean(sum(s.correct) for s in sittings),
        **{f"skip_{tier}": mean(table["skipped"][table["tier"] == tier]) for tier in TIERS},
        "level_accuracy": mean(sum(level_hits(world, sittings).values(), [])),
        "accuracy": mean(answered),
        "tokens": mean(s.response.total for s in sittings),
        "cut": mean(not s.finished for s in sittings),
    }


def warn_of_gap(gap: float) -> None:
    """Warn where sampler and trainer differ by more than `LARGEST_GAP` nats, or by NaN (F27)."""
    if not gap <= LARGEST_GAP:
        warnings.warn(f"sampler and trainer disagree by {gap:.3g} nats a token (alarm above "
                      f"{LARGEST_GAP}): the sampler's weights, temperature or precision are not "
                      "the trainer's, and the gradient is that of another policy", stacklevel=3)


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
    logits, decoding = generator.start(group.prompt, *ids.shape)
    theirs = []
    for token in ids.T:
        table = torch.log_softmax(logits.float() / temperature, -1)
        theirs.append(table.gather(1, token[:, None])[:, 0])
        logits = decoding.step(token)
    gap = float(((torch.stack(theirs, 1) - ours).abs() * mask).sum() / mask.sum())
    warn_of_gap(gap)
    return gap


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


def keep(work: Path, model, step: int) -> None:
    """Keep a copy of the model below `work`, as a checkpoint of its own."""
    write_folder(work / "kept" / f"step-{step:06d}", model.save_pretrained)


def train(
    world: World, tokenizer, model, recipe: RARLRecipe, work: Path,
    pool: list[Problem] | None = None, on_step: Callable[[dict], None] | None = None,
):
    """Train `model` in place, and return it; continue from `work` where it holds this run.

    `work` keeps the newest training states, `log.csv` (see `COLUMNS`), and below `kept/` the model
    after each of the steps `recipe.keep`. The model stays in eval mode: dropout would put sampler
    and trainer out of step.

    Args:
        pool: problems instead of the world's generated ones (see `rarl_run.problem_pool`).
        on_step: called with the log's row after each step, for a live plot.

    Raises:
        ValueError: `work` holds another run, or another process is at it; a budget smaller than a
            header with a tag.
        FloatingPointError: NaN or infinite logits, loss or gradient; names the step.
        OSError: the disk is full; names the step.
    """
    with folder_lock(work):
        same_recipe(work, asdict(recipe) | {"world": world.name, "start": fingerprint(model)})
        return _train(world, tokenizer, model.eval(), recipe, work, pool, on_step)


def _train(world, tokenizer, model, recipe, work, pool, on_step):
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.0)
    first, before = 0, 0.0
    if state := newest_complete(work):
        progress = load_training_state(state, model, [optimizer])
        first, before = progress["step"], progress["seconds"]
        print(f"continuing {work} from step {first}")
    elif 0 in recipe.keep:
        keep(work, model, 0)
    generator = TorchGenerator.of(model, tokenizer)  # over the live weights: never stale (F26)
    log, rows, begin = StepLog(work / "log.csv", tuple(COLUMNS), first), [], time.monotonic()
    for step in range(first, recipe.steps):
        done, last = step + 1, step + 1 == recipe.steps
        groups, learned = train_step(
            world, tokenizer, model, generator, optimizer, recipe, step, pool)
        gap = math.nan
        if step % recipe.log_every == 0 and any(s.ids for s in groups[0].sittings):
            gap = logprob_gap(model, generator, groups[0], recipe.temperature)
        seconds = time.monotonic() - begin
        row = {"step": done, "budget": groups[0].sittings[0].budget, **describe(world, groups),
               **learned, "logprob_gap": gap, "seconds": before + seconds}
        rows.append({column: row[column] for column in COLUMNS})
        with writing(work, done):
            log.append(rows[-1])
            if done in recipe.keep:
                keep(work, model, done)
            if done % recipe.save_every == 0 or last:
                save_step(work, model, [optimizer], {"step": done, "seconds": before + seconds})
        if on_step:
            on_step(rows[-1])
        if done % recipe.log_every == 0 or last:
            log.show(rows, recipe.steps, seconds / (done - first))
            rows.clear()
    return model
