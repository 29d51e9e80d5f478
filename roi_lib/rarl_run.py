"""RARL from a checkpoint to a checkpoint: train, measure before and after, publish with a card."""

import copy
import csv
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from roi_lib.checkpoints import (
    check_tokenizer,
    load_model,
    load_tokenizer,
    own_tokenizer,
    tokenizer_name,
)
from roi_lib.evaluation import exam_table, segment_table, sit, summarize
from roi_lib.exams import draw_papers, in_orders
from roi_lib.generation import TorchGenerator
from roi_lib.problems import FAMILIES, Problem
from roi_lib.rarl import STYLE
from roi_lib.rarl_loop import fingerprint, level_hits, train
from roi_lib.runlog import LoggedGenerator, RunLog
from roi_lib.sources import load_problems
from roi_lib.training import write_checkpoint
from roi_lib.worlds import ORDERS, TIERS, RARLRecipe, World

#: Seed of the unseen papers behind a card, whatever the seed of the training: runs compare.
PAPERS_SEED = 1


def problem_pool(world: World, root: Path | None = None) -> list[Problem] | None:
    """All training problems of real sources, read once; None where problems are generated.

    Raises:
        ValueError: a source with bad rows.
        FileNotFoundError: a dataset is neither below `root` nor to be had from the hub.
    """
    sources = [(name, tier) for tier in TIERS for name in world.families[tier]]
    if all(name in FAMILIES for name, _ in sources):
        return None
    return [p for name, tier in sources for p in load_problems(name, tier, "train", root)]


def run(
    world: World,
    out: Path,
    work: Path,
    recipe: RARLRecipe,
    checkpoint: str | None = None,
    n_papers: int = 2_000,
    engine: str = "torch",
    vllm_url: str | None = None,
    root: Path | None = None,
) -> None:
    """The whole stage: train, measure before and after, write the checkpoint to `out`.

    `work` keeps the training states, log.csv, and the responses of the measurement; a run found
    there goes on where it stopped. Under `accelerate launch` every process trains, and the first
    one does the rest.

    Args:
        checkpoint: the model to start from; the world's MFT model.
        n_papers: unseen papers behind the card, sat in every order under every budget.
        engine, vllm_url, root: see `train_model`.

    Raises:
        ValueError, CheckpointError, FloatingPointError, OSError: see `train_model`.
    """
    checkpoint = checkpoint or world.method("mft").checkpoint
    model = train_model(world, checkpoint, recipe, work, engine, vllm_url, root)
    if int(os.environ.get("RANK", "0")) > 0:
        return
    tokenizer = load_tokenizer(checkpoint, default=world.tokenizer)
    papers = draw_papers(world, n_papers, seed=PAPERS_SEED, root=root)
    start = load_model(checkpoint, "float32").to(model.device)
    records = [record for name, policy in (("start", start), ("rarl", model))
               for record in measure(world, tokenizer, policy, papers, name, work / "exams")]
    publish(world, model, out, recipe, work / "log.csv", checkpoint, records)


def train_model(
    world: World,
    checkpoint: str,
    recipe: RARLRecipe,
    work: Path,
    engine: str = "torch",
    vllm_url: str | None = None,
    root: Path | None = None,
):
    """Train a checkpoint with the trainer that the recipe names; returns the model.

    Args:
        work: see `rarl_loop.train`; a run found there goes on.
        engine, vllm_url: who samples the rollouts (see `rarl_trl.train`).
        root: local folder of the datasets.

    Raises:
        ValueError: `work` holds another run, or another process is at it; an engine that this
            recipe's trainer does not have; a budget smaller than a header with a tag.
        CheckpointError: there is no such checkpoint, or its tokenizer does not fit its model.
        FloatingPointError: NaN or infinite logits, loss or gradient; names the step.
        OSError: the disk is full (names the step), or a dataset is not to be had.
    """
    if recipe.trl is None and engine != "torch":
        raise ValueError(f"engine {engine!r} needs TRL's trainer, which the recipe of world "
                         f"{world.name} does not use; leave --engine out")
    tokenizer = load_tokenizer(checkpoint, default=world.tokenizer)
    model, pool = load_model(checkpoint, "float32"), problem_pool(world, root)
    check_tokenizer(model.config, tokenizer, checkpoint)
    if recipe.trl is None:
        return train(world, tokenizer, model, recipe, work, pool)
    from roi_lib import rarl_trl  # takes seconds, and only large models need it

    return rarl_trl.train(world, tokenizer, model, recipe, work, pool, engine, vllm_url)


def measure(
    world: World,
    tokenizer,
    model,
    papers: Sequence[Sequence[Problem]],
    name: str,
    logs: Path,
    seed: int = PAPERS_SEED,
) -> list[dict]:
    """Score and Regret of a tagged model, one record an order and budget.

    The records are those of `exam` with as many papers and this seed, and hold three more numbers:
    `skip_by_tier`; the shares of right tags among answers, `answers_tagged_right`, and among
    skips, `skips_tagged_right` (None: there are none; see `rarl_loop.level_hits`). The responses
    are logged as `logs/NAME.jsonl`, so that a measurement can go on.

    Raises:
        ValueError: no papers, or the log of another run.
        FloatingPointError: NaN or infinite logits.
    """
    if world.dtype != "auto":  # the same tokens on every processor
        model = copy.deepcopy(model).to(getattr(torch, world.dtype))
    exams = {order: in_orders(papers, [order], seed) for order in ORDERS}
    logs.mkdir(parents=True, exist_ok=True)
    log = RunLog(logs / f"{name}.jsonl", {
        "world": world.name, "model": fingerprint(model), "seed": seed})
    generator = LoggedGenerator(TorchGenerator.of(model, tokenizer), log, 10.0, f"exams of {name}")
    records = []
    for budget in world.budgets:
        sat = {order: sit(world, tokenizer, generator, exams[order], budget, STYLE, seed=seed)
               for order in ORDERS}
        for order in ORDERS:
            table = segment_table(world, sat[order])
            skips = {tier: float(table["skipped"][table["tier"] == tier].mean()) for tier in TIERS}
            tagged = {f"{what}_tagged_right": float(np.mean(hits)) if hits else None
                      for what, hits in level_hits(world, sat[order]).items()}
            records.append({"method": name, "order": order, "budget": budget,
                            "n_exams": len(papers), "seed": seed}
                           | summarize(world, sat[order], sat["easy"], seed)
                           | {"skip_by_tier": skips} | tagged)
    return records


def publish(
    world: World, model, out: Path, recipe: RARLRecipe, log: Path, start: str,
    records: Sequence[dict],
) -> None:
    """Write the checkpoint folder: weights, `log.csv`, `exam.json`, and the card.

    The tokenizer goes with them where the run's start brought its own.

    Args:
        log: the run's `log.csv`.
        start: name of the checkpoint that the run began with.
        records: what `measure` returned, before and after.

    Raises:
        CheckpointError: the start's tokenizer is not to be had any more.
        OSError, SafetensorError: the disk is full; an earlier folder stays as it was.
    """
    with log.open(newline="") as stream:
        seconds = float(list(csv.DictReader(stream))[-1]["seconds"])
    card = CARD.format(
        name=out.name, start=start, world=world.name,
        tokenizer=tokenizer_name(start, world.tokenizer),
        parameters=f"{model.num_parameters():,}", steps=recipe.steps, seed=recipe.seed,
        minutes=f"{seconds / 60:.0f}", threads=torch.get_num_threads(),
        recipe=json.dumps(asdict(recipe), indent=1), table=exam_table(list(records)),
        papers=f"{records[0]['n_exams']:,}", papers_seed=records[0]["seed"],
        tags=tag_table(records))
    write_checkpoint(out, model.float(), log, card, own_tokenizer(start), exam=list(records))


def tag_table(records: Sequence[dict]) -> str:
    """What was skipped, and which tags were right, as a Markdown table."""
    lines = ["| method | budget | order | hard skipped | tags right: answers | skips |",
             "|---|---|---|---|---|---|"]
    for r in records:
        shares = [r["skip_by_tier"]["hard"], r["answers_tagged_right"], r["skips_tagged_right"]]
        cells = ["--" if share is None else f"{share:.3f}" for share in shares]
        lines.append(f"| {r['method']} | {r['budget']} | {r['order']} | {' | '.join(cells)} |")
    return "\n".join(lines)


CARD = """\
# {name}

`{start}` after Rationality-Aware RL with Dr. GRPO ({parameters} parameters). It predicts the
level of each problem, and solves or skips it, so that one token budget lasts for the whole exam.
Prompting style `roi`; tokenizer `{tokenizer}`. Licence: MIT, as the repository.

**Made by** `python -m roi_lib train rarl --world {world} --seed {seed}`: {steps} steps, {minutes}
minutes on {threads} threads. Every step is in `log.csv`. Recipe:

```json
{recipe}
```

**Measured** on {papers} unseen papers (seed {papers_seed}) at temperature 1, `{start}` (start) and
{name} (rarl) on the same ones; brackets are 95 % bootstrap intervals (`exam.json`). The same
figures come from `python -m roi_lib exam --world {world} --methods mft,rarl --exams N --seed
{papers_seed}`.

```
{table}
```

Of the same exams, the share of hard problems skipped, and of tags that are right: those of answers
by their cost (problems that the budget cut have none and are left out), those of skips if they say
Level-3. The reward asks for the level of an answer; the tag of a skip it leaves free.

{tags}
"""
