"""RARL from a checkpoint to a checkpoint (paper, section on RARL), by our own trainer or TRL's."""

import copy
import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from roi_lib.engines import LoggedEngine, RunLog, engine_for
from roi_lib.evaluation import rates, summarize
from roi_lib.exams import Environment, draw_papers, in_orders
from roi_lib.generation import TorchEngine
from roi_lib.rarl import STYLE, completion_logprobs, exam_rewards, pad_right, train_step
from roi_lib.sitting import points, responses, sit
from roi_lib.store import checkpoints
from roi_lib.store.deadline import NEVER, Deadline, OutOfTime
from roi_lib.store.files import newest_complete
from roi_lib.store.sources import load_pool
from roi_lib.training import common
from roi_lib.worlds import ORDERS, TIERS, RARLRecipe, World

PAPERS_SEED = 1  # of the unseen papers behind a card, whatever the training's: runs compare
THIRDS = ("small", "middle", "large")  # of the budgets of training, a third each
LARGEST_GAP = 0.01  # in nats: the largest mean difference of sampler and trainer
RATES = [*(f"skip_{tier}" for tier in TIERS), "answers_tagged_right", "skips_tagged_right"]
CARD = ["method", "budget", "order", "score", "score_low", "score_high", "regret", *RATES[2:]]
SHOWN = ["reward", "score", "skip_hard", "accuracy", "grad_norm"]  # beside the progress bar
#: Columns of the log, and what each tells. What could not be measured is an empty field.
COLUMNS = {
    "step": "updates done",
    "budget": "mean tokens that an exam of the step might use",
    "reward": "mean reward of an exam",
    "score": "mean number of problems solved, whatever their tags",
    **{f"skip_{tier}": f"share of the {tier} problems skipped" for tier in TIERS},
    **{f"skip_{third}": f"share of the hard problems skipped under {third} budgets"
       for third in THIRDS},
    **{f"level_{third}": f"mean level of what is tried under {third} budgets" for third in THIRDS},
    "level_accuracy": "share of tags that name the real level, where the budget did not cut",
    "accuracy": "share of the answers given that are right",
    "tokens": "mean tokens spent on an exam",
    "cut": "share of responses that the budget ended",
    "no_spread": "share of groups whose rewards are all equal: they teach nothing",
    "grad_norm": "norm of the gradient before clipping",
    "entropy": "mean entropy of a response token, in nats, over the groups with spread",
    "level_entropy": "the same of the tokens that are a level: 0 where nothing is left to choose",
    "logprob_gap": "mean difference of sampler's and trainer's log-probabilities, in nats",
    "seconds": "time of training so far",
}


def describe(table: pd.DataFrame, budgets: Sequence[int]) -> dict[str, float]:
    """What a table of rollouts alone decides of `COLUMNS`, and the rest of `evaluation.rates`;
    `budgets` are those of the recipe."""
    budget, tokens, finished = responses(table)[["budget", "tokens", "finished"]].mean()
    third = np.searchsorted(np.quantile(budgets, [1 / 3, 2 / 3]), table["budget"])
    hard, tagged = table["tier"] == TIERS[-1], table["predicted"] >= 0
    tried = table["predicted"].where(tagged & ~table["skipped"])
    by_budget = {f"{name}_{word}": values[third == i].mean() for i, word in enumerate(THIRDS)
                 for name, values in (("skip", table["skipped"].where(hard)), ("level", tried))}
    return rates(table) | by_budget | {
        "reward": float(exam_rewards(table).double().nanmean()), "budget": budget,
        "score": pd.Series(points(table)).mean(), "tokens": tokens, "cut": 1 - finished}


def check_gap(gap: float) -> float:
    """Warn where sampler and trainer differ by more than `LARGEST_GAP` nats, or by NaN."""
    if not gap <= LARGEST_GAP:
        warnings.warn(f"sampler and trainer disagree by {gap:.3g} nats a token: the sampler's "
                      "weights, temperature or precision are not the trainer's", stacklevel=3)
    return gap


@torch.inference_mode()
def logprob_gap(model, engine: TorchEngine, group: pd.DataFrame, temperature: float = 1) -> float:
    """Mean difference of sampler's and trainer's log-probabilities, in nats; see `check_gap`. The
    responses of `group`, one exam's, go token by token through the sampler as it is now."""
    prompt = group["prompt"].iloc[0]
    ids, mask = pad_right(list(dict.fromkeys(group["ids"])), model.device)
    ours, _ = completion_logprobs(model, ids.new_tensor(prompt), ids, temperature)
    decoder = engine.Decoder(engine.model, [prompt] * len(ids), ids.shape[1], engine.pad_id)
    logits, theirs = decoder.logits, []
    for token in ids.T[:, :, None]:
        theirs.append(torch.log_softmax(logits.float() / temperature, -1).gather(1, token))
        logits = decoder.step(token[:, 0])
    return check_gap(float(((torch.cat(theirs, 1) - ours).abs() * mask).sum() / mask.sum()))


def train(env: Environment, model, recipe: RARLRecipe, work: Path, pool=None,
          on_step: Callable[[dict], None] | None = None, deadline: Deadline = NEVER):
    """Train `model` in place, and return it; `work` keeps states and `log.csv`, and a run found
    there goes on. `on_step` gets each row of the log. `ValueError`: see `common.run_folder`.
    `FloatingPointError`: NaN or infinite logits, loss or gradient. `OutOfTime`: the deadline."""
    model.eval()  # dropout would put sampler and trainer out of step
    model.get_input_embeddings().requires_grad_(False)  # numbers keep their neighbours
    with common.run_folder(work, recipe, env.world, start=checkpoints.weights_hash(model)):
        optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=0.0)
        state = newest_complete(work)
        first = checkpoints.load_training_state(state, model, [optimizer])["step"] if state else 0
        engine = engine_for(model, env.tokenizer)  # over the live weights: never stale
        log = common.TrainingLog(work, list(COLUMNS), first)
        bar = tqdm(range(first, recipe.steps), "RARL", recipe.steps, initial=first, unit="step")
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * (1 - step / recipe.steps)
            table, learned = train_step(env, model, engine, optimizer, recipe, step, pool)
            gap, done = math.nan, step + 1
            if step % recipe.log_every == 0:
                gap = logprob_gap(model, engine, table[table["exam"] == 0], recipe.temperature)
            log.append({"step": done, **describe(table, recipe.budgets), **learned,
                        "logprob_gap": gap})
            bar.set_postfix({name: log.rows[-1][name] for name in SHOWN})
            stop = deadline.over and done < recipe.steps
            if done % recipe.save_every == 0 or done == recipe.steps or stop:
                checkpoints.save_step(work, model, [optimizer], {"step": done})
            if on_step:
                on_step(log.rows[-1])
            if stop:
                raise OutOfTime(f"{done:,} of {recipe.steps:,} steps are in {work}")
    return model


def measure(env: Environment, model, papers: list[tuple], name: str, logs: Path,
            deadline: Deadline = NEVER) -> pd.DataFrame:
    """Score, Regret, skips and right tags of a model: a row an order and budget of its world.
    `logs/NAME.jsonl` keeps the responses; `ValueError` where it is of another run."""
    world, records = env.world, []
    if world.dtype != "auto":  # the same tokens on every processor
        model = copy.deepcopy(model).to(getattr(torch, world.dtype))
    run = {"world": world.name, "model": checkpoints.weights_hash(model), "seed": PAPERS_SEED}
    engine = LoggedEngine(engine_for(model, env.tokenizer), RunLog(logs / f"{name}.jsonl", run),
                          f"exams of {name}", deadline)
    exams = [exam for order in ORDERS for exam in in_orders(papers, [order], PAPERS_SEED)]
    for budget in world.budgets:
        table = sit(env, engine, exams, budget, style=STYLE, seed=PAPERS_SEED,
                    streams=[(i,) for _ in ORDERS for i in range(len(papers))])
        table["exam"] %= len(papers)  # the paper's number, in every order
        own = {order: table[table["order"] == order] for order in ORDERS}
        for order in ORDERS:
            records.append({"method": name, "order": order, "budget": budget,
                            "n_exams": len(papers), "seed": PAPERS_SEED}
                           | summarize(own[order], own["easy"], PAPERS_SEED)
                           | pd.Series(rates(own[order]))[RATES].to_dict())
    return pd.DataFrame(records)


def train_rarl(world: World, out: Path, work: Path, recipe: RARLRecipe,
               checkpoint: str | None = None, n_papers: int = 2_000, engine: str = "torch",
               vllm_url: str | None = None, root: Path | None = None,
               deadline: Deadline = NEVER) -> None:
    """The whole stage, from `checkpoint` (the world's MFT model) to one in `out`, measured on
    `n_papers` unseen papers; a run found in `work` goes on. `engine` and `vllm_url`: see
    `trl.make_trainer`; `root`: the datasets' folder. `ValueError`: see `common.load_start`.
    `OutOfTime` at the first checkpoint after the deadline."""
    checkpoint = checkpoint or world.method("mft").checkpoint
    if recipe.trl is None and engine != "torch":
        raise ValueError(f"engine {engine!r} needs TRL's trainer, and the recipe does not use it")
    if recipe.trl:  # a prompt has as many tokens as its budget, or fewer
        common.check_fits("RARL", checkpoint, 2 * max(recipe.budgets), recipe.trl)
    env, model = common.load_start(world, checkpoint, out, recipe.budgets, bool(
        recipe.trl and recipe.trl.lora_rank and recipe.trl.bf16))
    pool = load_pool(world, "train", root)
    if recipe.trl and recipe.steps:
        from roi_lib.training import trl  # takes seconds, and only large models need it
        model = trl.train(env, model, recipe, work, pool, engine, vllm_url, deadline)
    else:
        model = train(env, model, recipe, work, pool, deadline=deadline)
    if int(os.environ.get("RANK", "0")) > 0:
        return  # of several processes, the first does the rest
    papers = draw_papers(world, n_papers, seed=PAPERS_SEED, pool=load_pool(world, "test", root))
    start = checkpoints.load_model(checkpoint, "auto").to(model.device)
    records = pd.concat([measure(env, some, papers, name, work / "exams", deadline)
                         for name, some in (("start", start), ("rarl", model))])
    common.publish(
        out, model, work, recipe, checkpoint, {"exam.csv": records},
        about="It predicts the level of each problem, and solves or skips it, so that one token "
        f"budget lasts for an exam: `{checkpoint}` after RARL with Dr. GRPO. Style `roi`.",
        made=f"{recipe.steps} steps of `roi_lib train rarl --world {world.name}`",
        measured=f"**Measured** on {n_papers:,} unseen papers, 95 % intervals (`exam.csv`)\n\n```\n"
        f"{records[CARD].round(3).to_string(index=False)}\n```")
