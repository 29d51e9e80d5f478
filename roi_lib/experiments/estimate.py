"""What a world's recipes will cost on a device, and afterwards how far off that was.

    Assumed                        what is taken for granted: mean lengths, papers
    sampled, updated               one stage, by the formulas of `training.costs`
    mft_stages, rarl_stages        the stages of a world's recipes
    estimate, compare, report      a table of all; a run beside its estimate; both as text

Not counted: drawing papers, grading, saving, and what lies behind rules and bounds of `exam`."""

import math
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from roi_lib.problems import is_generated
from roi_lib.store import files
from roi_lib.store.sources import DATASETS
from roi_lib.training import costs
from roi_lib.training.costs import GIB, Device, Shape
from roi_lib.worlds import TIERS, MFTRecipe, RARLRecipe, TRLRecipe, World


@dataclass(frozen=True)
class Assumed:
    """What an estimate takes for granted. Lengths are means, in tokens."""

    rules: int = 200  # of a prompt without its problems, chat template included
    statement: int = 90  # of a problem with its header
    answer: int = 400  # of a response to a problem alone
    share: float = 0.9  # of its budget that the response to an exam uses
    longest: float = 2.0  # the longest prompt, in mean ones
    rows: int = 256  # responses decoded at a time, as `TorchEngine.max_rows`
    papers: int = 512  # that `exam` lets every method sit
    card_papers: int = 2_000  # behind the card of RARL

    def __post_init__(self) -> None:
        if min(vars(self).values()) <= 0:
            raise ValueError(f"what is assumed must be above 0, not {min(vars(self).values())}")

    def prompt(self, problems: float) -> float:
        """Mean tokens of a prompt with so many problems."""
        return self.rules + problems * self.statement


#: Those of the paper world are guesses, those of the pocket world were counted in rows and logs.
ASSUMED = {"paper": Assumed(), "small": Assumed(150, papers=60, card_papers=100),
           "pocket": Assumed(20, 28, 29, 0.68)}
#: Bases whose configs need not be fetched.
KNOWN = {
    "Qwen/Qwen2.5-1.5B-Instruct": Shape(1_536, 28, 12, 2, 128, 8_960, 151_936, True, True, 2),
    "Qwen/Qwen2.5-Coder-0.5B-Instruct": Shape(896, 24, 14, 2, 64, 4_864, 151_936, True, True, 2)}
#: Tokens written or learned from; seconds; `need(**settings)` gives bytes, see `check_memory`.
Stage = namedtuple("Stage", "name tokens flops seconds need settings")


def shape_of(name: str) -> Shape:
    """Shape of a folder, a name below data/ or a hub id, from its config alone. `ValueError`: not
    to be had, or see `costs.read_shape`."""
    if known := KNOWN.get(name.partition("@")[0]):
        return known
    from roi_lib.store.checkpoints import load_config  # takes seconds
    return costs.read_shape(load_config(name))


def sampled(shape: Shape, device: Device, a: Assumed, name: str, prompts: float, n: int,
            problems: float, response: float, longest: float, size: int, calls: float = 1,
            beside: float = 0) -> Stage:
    """Prompts with so many problems are answered `n` times each, in so many calls of the engine.
    A batch goes on until its `longest` response: a step has response/longest of its rows. A prompt
    is read once, and its cache shared by its rows. `size`: bytes a number."""
    total, prompt = prompts * n, a.prompt(problems)
    batches = calls * math.ceil(total / calls / a.rows)
    rows, context = total / batches, prompt + response / 2
    step = costs.step_seconds(shape, device, size, rows * response / longest, context,
                              prompt / n + response / 2)
    read = prompts * prompt * costs.forward_flops(shape, prompt / 2, 1 / prompt)
    # a long response goes on when most rows have left
    cached = min(longest, 2 * response) + a.longest * prompt / n
    need = partial(costs.decoding_memory, shape, size, cached, beside=beside)
    return Stage(name, total * response,
                 read + total * response * costs.forward_flops(shape, context),
                 batches * longest * step + read / device.speed(size), need,
                 {"max_rows": math.ceil(rows)})


def updated(shape: Shape, device: Device, name: str, rows: float, read: float, wrote: float,
            longest: float, recipe: MFTRecipe | TRLRecipe, **memory) -> Stage:
    """Rows with so many tokens of prompts and of responses in all are learned from; the longest has
    `longest`; `memory`: see `costs.training_memory`."""
    tokens = read + wrote
    ways = {"lora_rank": recipe.lora_rank, "checkpointing": recipe.checkpointing}
    flops = tokens * costs.training_flops(shape, tokens / rows / 2, wrote / tokens, **ways)
    need = partial(costs.training_memory, shape, longest, bf16=recipe.bf16, **memory)
    return Stage(name, tokens, flops, flops / device.speed(2 if recipe.bf16 else 4), need,
                 {"rows_at_once": recipe.rows_at_once} | ways)


def mean_size(sizes: Sequence[tuple[int, float]]) -> float:
    """Mean of numbers with weights."""
    return float(np.average([n for n, _ in sizes], weights=[weight for _, weight in sizes]))


def mft_stages(world: World, shape: Shape, device: Device, a: Assumed) -> list[Stage]:
    """Sampling, fine-tuning, the exams behind its log and its card."""
    mft, edge, ask = world.mft, world.level_edges[-1], partial(sampled, shape, device, a)
    problems = sum(mft.problems if is_generated(world) else min(
        mft.problems, sum(DATASETS[name, "train"].rows for name in world.families[tier]))
        for tier in TIERS)
    size, budget, rows = mean_size(mft.sizes), float(np.mean(mft.budgets)), problems + mft.exams
    done = min(1.0, mft.steps * mft.rows / rows) if mft.steps >= 0 else 1.0
    logs, largest = max(1, int(done * rows / mft.rows / mft.log_every)), max(mft.budgets)
    base = shape.size * costs.parameters(shape)  # which stays in memory
    found = [
        ask("MFT sampling", problems * len(mft.styles), mft.samples, 1, a.answer, edge, shape.size),
        updated(shape, device, "MFT training", done * rows,
                done * (problems * a.prompt(1) + mft.exams * a.prompt(size)),
                done * (problems * a.answer + mft.exams * a.share * budget),
                min(mft.max_length, a.longest * a.prompt(max(mft.sizes)[0]) + largest), mft,
                tiled=mft.tag_weight == 1, beside=base),
        ask("MFT log", logs * 3 * mft.dev_exams, 1, 3, a.share * largest, largest,
            2 if mft.lora_rank and mft.bf16 else 4, logs,
            base + costs.state_bytes(shape, mft.lora_rank))]
    if mft.card_papers:  # before and after under an ample budget; each problem alone
        ample = min(6 * edge, world.largest_budget)
        for prompts, n, k, response, longest in (
                (6 * mft.card_papers, 1, 3, 3 * a.answer, ample),
                (9 * mft.card_papers, mft.samples, 1, a.answer, edge)):
            found.append(ask("MFT card", prompts, n, k, response, longest, shape.size, beside=base))
    return found


def rarl_stages(world: World, shape: Shape, device: Device, a: Assumed) -> list[Stage]:
    """Sampling, gradient, the exams behind the card, which both models sit."""
    rarl, ask = world.rarl, partial(sampled, shape, device, a)
    trl = rarl.trl or TRLRecipe(rarl.rollouts, 0, False, False)  # our own takes a group at a time
    size, budget, tests = mean_size(rarl.sizes), float(np.mean(rarl.budgets)), world.budgets
    state, exams = costs.state_bytes(shape, trl.lora_rank), rarl.steps * rarl.exams
    live = 2 if trl.lora_rank and trl.bf16 else 4  # bytes a number as the trainer's model samples
    test = float(np.mean(tests))
    return [
        ask("RARL sampling", exams, rarl.rollouts, size, a.share * budget, budget,
            live, rarl.steps, state),
        updated(shape, device, "RARL gradient", exams * rarl.rollouts,
                exams * a.prompt(size) * (rarl.rollouts if rarl.trl else 1),
                exams * rarl.rollouts * a.share * budget,
                a.longest * a.prompt(max(rarl.sizes)[0]) + max(rarl.budgets), trl,
                tiled=rarl.trl is not None),
        ask("RARL card", 6 * len(tests) * a.card_papers, 1, 3, a.share * test, test, live,
            6 * len(tests), live * costs.parameters(shape))]


def estimate(world: World, shape: Shape, device: Device, a: Assumed) -> tuple[pd.DataFrame, list]:
    """A row a stage: tokens, FLOPs, bytes, seconds; and a sentence on each that does not fit.
    `ValueError`: a recipe of no steps."""
    if 0 in (world.mft.steps, world.rarl.steps):
        raise ValueError("a recipe of 0 steps costs nothing; give others to --mft.steps and "
                         "--rarl.steps")
    methods = sum(bool(m.checkpoint) and m.strategy in ("whole", "knapsack")
                  for m in world.methods.values())
    cells, budget = 3 * methods * len(world.budgets), float(np.mean(world.budgets))
    size = {"auto": shape.size, "float32": 4}[world.table_dtype]
    stages = [*mft_stages(world, shape, device, a), *rarl_stages(world, shape, device, a),
              sampled(shape, device, a, "exams", cells * a.papers, 1, 3, a.share * budget, budget,
                      size, cells)]
    too_large = []
    for stage in stages:
        try:
            costs.check_memory(stage.name, stage.need, device.memory, **stage.settings)
        except ValueError as error:
            too_large.append(str(error))
    table = pd.DataFrame([{"stage": s.name, "tokens": s.tokens, "flops": s.flops,
                           "bytes": s.need(**s.settings), "seconds": s.seconds} for s in stages])
    how = {"tokens": "sum", "flops": "sum", "bytes": "max", "seconds": "sum"}
    return table.groupby("stage", sort=False).agg(how).reset_index(), too_large


def compare(work: Path, world: World, shape: Shape, device: Device, a: Assumed) -> pd.DataFrame:
    """A run of MFT or RARL in `work`, as far as it has come, beside the estimate of its own recipe:
    tokens and seconds, `estimated`, `measured` and their ratio; NaN: what nothing on disk says.
    `ValueError`: no such run, of another world, or without a step."""
    found = files.read_json(work / "recipe.json")
    kinds = [k for k in (MFTRecipe, RARLRecipe) if {f.name for f in fields(k)} <= set(found)]
    if not kinds or found.get("world") != world.name:
        raise ValueError(f"{work} holds no run of MFT or RARL in the world {world.name}, but one "
                         f"with {', '.join(list(found)[:4])} ... (world {found.get('world')})")
    needed = ["step", "seconds"] + ["tokens"] * (kinds == [RARLRecipe])
    log = files.read_csv(work / "log.csv", needed)
    if log.empty:
        raise ValueError(f"{work / 'log.csv'} has no step yet; let the run do a few")
    recipe = kinds[0](**{f.name: found[f.name] for f in fields(kinds[0])})
    recipe, seconds = replace(recipe, steps=int(log["step"].iloc[-1])), log["seconds"].iloc[-1]
    rows = []
    if kinds == [RARLRecipe]:
        recipe = replace(recipe, trl=recipe.trl and TRLRecipe(**recipe.trl))
        sampling, gradient, _ = rarl_stages(replace(world, rarl=recipe), shape, device, a)
        rows.append(("RARL", sampling.tokens, log["tokens"].sum() * recipe.exams * recipe.rollouts,
                     sampling.seconds + gradient.seconds, seconds))
    else:
        ask, learn, dev, *_ = mft_stages(replace(world, mft=recipe), shape, device, a)
        rows.append(("MFT training and log", learn.tokens, math.nan, learn.seconds + dev.seconds,
                     seconds))
        if (work / "samples.jsonl").exists():
            from roi_lib.engines.logs import RunLog  # takes seconds
            wrote = sum(len(r.ids) for some in RunLog(work / "samples.jsonl", {}).rows.values()
                        for r in some)
            rows.insert(0, ("MFT sampling", ask.tokens, wrote, ask.seconds, math.nan))
    table = pd.DataFrame(rows, columns=["stage", "tokens_estimated", "tokens_measured",
                                        "seconds_estimated", "seconds_measured"])
    for name in ("tokens", "seconds"):
        table[f"{name}_ratio"] = table[f"{name}_measured"] / table[f"{name}_estimated"]
    return table


def number(x: float) -> str:
    """Three digits, or whole; "--" for NaN."""
    return "--" if math.isnan(x) else f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def report(table: pd.DataFrame, too_large: Sequence[str], compared: pd.DataFrame | None) -> str:
    """All of it as text."""
    shown = pd.DataFrame({
        "million tokens": table["tokens"] / 1e6, "PFLOP": table["flops"] / 1e15,
        "GiB": table["bytes"] / GIB, "hours": table["seconds"] / 3_600}).set_index(table["stage"])
    shown.loc["total"] = shown.sum().where(shown.columns != "GiB", shown["GiB"].max())
    parts = [shown.map(number).rename_axis(None).to_string(), "\n".join(too_large)]
    if compared is not None:
        parts.append(compared.set_index("stage").map(number).rename_axis(None).to_string())
    return "\n\n".join(filter(None, parts))
