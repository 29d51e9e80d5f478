"""RARL from a checkpoint to a checkpoint: train, measure before and after, publish with a card.

`train_rarl` is all of it. `train` repeats `rarl.train_step`; a run that was killed goes on.
"""

import copy
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from roi_lib.engines import LoggedEngine, RunLog, engine_for
from roi_lib.evaluation import rates, summarize
from roi_lib.exams import Environment, draw_papers, in_orders
from roi_lib.generation import TorchEngine
from roi_lib.problems import Problem
from roi_lib.rarl import STYLE, completion_logprobs, exam_rewards, pad_right, train_step
from roi_lib.sitting import points, responses, sit
from roi_lib.store import checkpoints, files
from roi_lib.store.sources import load_pool
from roi_lib.training import common
from roi_lib.worlds import ORDERS, TIERS, RARLRecipe, World

PAPERS_SEED = 1  # of the unseen papers behind a card, whatever the training's: runs compare
LARGEST_GAP = 0.01  # in nats: the largest mean difference of sampler and trainer
RATES = [*(f"skip_{tier}" for tier in TIERS), "answers_tagged_right", "skips_tagged_right"]
CARD = ["method", "budget", "order", "score", "score_low", "score_high", "regret", "regret_low",
        "regret_high", *RATES[2:]]
SHOWN = ["reward", "score", "skip_hard", "accuracy", "grad_norm"]  # beside the progress bar
#: Columns of the log, and what each tells. What could not be measured is an empty field.
COLUMNS = {
    "step": "updates done",
    "budget": "tokens that each exam of the step might use",
    "reward": "mean reward of an exam",
    "score": "mean number of problems solved, whatever their tags",
    **{f"skip_{tier}": f"share of the {tier} problems skipped" for tier in TIERS},
    "level_accuracy": "share of tags that name the real level, where the budget did not cut",
    "accuracy": "share of the answers given that are right",
    "tokens": "mean tokens spent on an exam",
    "cut": "share of responses that the budget ended",
    "no_spread": "share of groups whose rewards are all equal: they teach nothing",
    "grad_norm": "norm of the gradient before clipping",
    "entropy": "mean entropy of a response token, in nats, over the groups with spread",
    "logprob_gap": "mean difference of sampler's and trainer's log-probabilities, in nats",
    "seconds": "time of training so far",
}


def describe(table: pd.DataFrame) -> dict[str, float]:
    """What a table of rollouts alone decides of `COLUMNS`, and the rest of `evaluation.rates`."""
    tokens, finished = responses(table)[["tokens", "finished"]].mean()
    return rates(table) | {"reward": float(exam_rewards(table).double().nanmean()),
                           "score": points(table).mean(), "tokens": tokens, "cut": 1 - finished}


def check_gap(gap: float) -> float:
    """Warn where sampler and trainer differ by more than `LARGEST_GAP` nats, or by NaN."""
    if not gap <= LARGEST_GAP:
        warnings.warn(f"sampler and trainer disagree by {gap:.3g} nats a token (alarm above "
                      f"{LARGEST_GAP}): the sampler's weights, temperature or precision are not "
                      "the trainer's, and the gradient is that of another policy", stacklevel=3)
    return gap


@torch.inference_mode()
def logprob_gap(model, engine: TorchEngine, group: pd.DataFrame, temperature: float = 1) -> float:
    """Mean difference of sampler's and trainer's log-probabilities, in nats; see `check_gap`.

    The responses of `group`, one exam's, go through the sampler's own forward pass, token by
    token, with the weights that it holds now.
    """
    prompt = group["prompt"].iloc[0]
    ids, mask = pad_right(list(dict.fromkeys(group["ids"])), model.device)
    ours, _ = completion_logprobs(model, ids.new_tensor(prompt), ids, temperature)
    decoder = engine.Decoder(engine.model, [prompt] * len(ids), ids.shape[1], engine.pad_id)
    logits, theirs = decoder.logits, []
    for token in ids.T[:, :, None]:
        theirs.append(torch.log_softmax(logits.float() / temperature, -1).gather(1, token))
        logits = decoder.step(token[:, 0])
    return check_gap(float(((torch.cat(theirs, 1) - ours).abs() * mask).sum() / mask.sum()))


def save_snapshot(work: Path, model, step: int) -> None:
    """Keep a copy of the model below `work`, as a checkpoint of its own."""
    files.write_folder(work / "snapshots" / f"step-{step:06d}", model.save_pretrained)


def train(
    env: Environment, model, recipe: RARLRecipe, work: Path, pool: Sequence[Problem] | None = None,
    on_step: Callable[[dict], None] | None = None,
):
    """Train `model` in place, and return it; continue from `work` where it holds this run.

    `work` keeps the newest training states, `log.csv`, and `snapshots/` of the model after the
    steps that the recipe names. Dropout would put sampler and trainer out of step: it stays off.
    `pool`: see `rarl.train_step`. `on_step` gets the log's row after each step, for a live plot.

    Raises:
        ValueError: `work` holds another run, or another process is at it.
        FloatingPointError: NaN or infinite logits, loss or gradient; names the step.
    """
    start = {"world": env.world.name, "start": checkpoints.weights_hash(model.eval())}
    with files.folder_lock(work):
        common.same_recipe(work, asdict(recipe) | start)
        optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=0.0)
        first, state = 0, files.newest_complete(work)
        if state:
            first = checkpoints.load_training_state(state, model, [optimizer])["step"]
        elif 0 in recipe.snapshots:
            save_snapshot(work, model, 0)
        engine = engine_for(model, env.tokenizer)  # over the live weights: never stale
        log = common.TrainingLog(work / "log.csv", list(COLUMNS), first)
        bar = tqdm(range(first, recipe.steps), "RARL", recipe.steps, initial=first, unit="step")
        for step in bar:
            table, learned = train_step(env, model, engine, optimizer, recipe, step, pool)
            gap, done = math.nan, step + 1
            if step % recipe.log_every == 0:
                gap = logprob_gap(model, engine, table[table["exam"] == 0], recipe.temperature)
            log.append({"step": done, "budget": int(table["budget"].iloc[0]), **describe(table),
                        **learned, "logprob_gap": gap, "seconds": log.seconds()})
            bar.set_postfix({name: log.rows[-1][name] for name in SHOWN})
            if done in recipe.snapshots:
                save_snapshot(work, model, done)
            if done % recipe.save_every == 0 or done == recipe.steps:
                checkpoints.save_step(work, model, [optimizer], {"step": done})
            if on_step:
                on_step(log.rows[-1])
    return model


def measure(
    env: Environment, model, papers: Sequence[Sequence[Problem]], name: str, logs: Path,
    seed: int = PAPERS_SEED,
) -> pd.DataFrame:
    """Score, Regret, skips and right tags of a model: a row an order and budget of its world.

    The numbers are those of `exam` with as many papers and this seed. `logs/NAME.jsonl` keeps the
    responses, so that a measurement can go on; `ValueError` where it is of another run.
    """
    world, records = env.world, []
    if world.dtype != "auto":  # the same tokens on every processor
        model = copy.deepcopy(model).to(getattr(torch, world.dtype))
    logs.mkdir(parents=True, exist_ok=True)
    run = {"world": world.name, "model": checkpoints.weights_hash(model), "seed": seed}
    engine = LoggedEngine(engine_for(model, env.tokenizer), RunLog(logs / f"{name}.jsonl", run),
                          f"exams of {name}")
    for budget in world.budgets:
        tables = {order: sit(env, engine, in_orders(papers, [order], seed), budget, style=STYLE,
                             seed=seed) for order in ORDERS}
        for order, table in tables.items():
            records.append({"method": name, "order": order, "budget": budget,
                            "n_exams": len(papers), "seed": seed}
                           | summarize(table, tables["easy"], seed)
                           | pd.Series(rates(table))[RATES].to_dict())
    return pd.DataFrame(records)


def train_rarl(
    world: World, out: Path, work: Path, recipe: RARLRecipe, checkpoint: str | None = None,
    n_papers: int = 2_000, engine: str = "torch", vllm_url: str | None = None,
    root: Path | None = None,
) -> None:
    """The whole stage: train, measure before and after, write the checkpoint to `out`.

    `work` keeps states, log and responses; a run found there goes on. Of the processes of
    `accelerate launch` all train, and the first does the rest. Without steps the start is measured.

    Args:
        checkpoint: the model to start from; the world's MFT model.
        n_papers: unseen papers behind the card, sat in every order under every budget.
        engine, vllm_url: who samples the rollouts (see `training.trl.train`).
        root: local folder of the datasets.

    Raises:
        ValueError: see `train`; an engine that this recipe's trainer does not have.
        CheckpointError: no such start, or one that cannot be saved; `out` is not ours to replace.
        FloatingPointError: NaN or infinite logits, loss or gradient; names the step.
    """
    checkpoint = checkpoint or world.method("mft").checkpoint
    if recipe.trl is None and engine != "torch":
        raise ValueError(f"engine {engine!r} needs TRL's trainer, and the recipe does not use it")
    files.check_replaceable(out)
    env = checkpoints.load_environment(world, checkpoint)
    model = checkpoints.load_model(checkpoint, "float32")
    checkpoints.check_saveable(model)
    env.check_budget(min(recipe.budgets))
    pool = load_pool(world, "train", root)
    if recipe.trl and recipe.steps:
        from roi_lib.training import trl  # takes seconds, and only large models need it

        model = trl.train(env, model, recipe, work, pool, engine, vllm_url)
    else:
        model = train(env, model, recipe, work, pool)
    if int(os.environ.get("RANK", "0")) > 0:
        return
    papers = draw_papers(world, n_papers, seed=PAPERS_SEED, pool=load_pool(world, "test", root))
    start = checkpoints.load_model(checkpoint, "float32").to(model.device)
    records = pd.concat([measure(env, some, papers, name, work / "exams")
                         for name, some in (("start", start), ("rarl", model))])
    card = common.model_card(
        out.name, checkpoint, work / "log.csv", recipe,
        about="It predicts the level of each problem, and solves or skips it, so that one token "
        f"budget lasts for an exam: `{checkpoint}` after RARL with Dr. GRPO. Style `roi`.",
        made=f"{recipe.steps} steps of `python -m roi_lib train rarl --world {world.name}`",
        measured=f"**Measured** on {n_papers:,} unseen papers (seed {PAPERS_SEED}), with 95 % "
        "bootstrap intervals from low to high; more is in `exam.csv`.\n\n"
        + common.markdown_table(records[CARD].round(3)))
    common.write_checkpoint(out, model.float(), work / "log.csv", card,
                            checkpoints.own_tokenizer(checkpoint), exam=records)
