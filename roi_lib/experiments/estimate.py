"""What the stages of a world cost on a device, before they run: tokens, operations, memory, hours.

With P weights, one token forward takes 2 P operations. Training takes 4 P more for all weights, 2 P
more for adapters alone, whose frozen weights need no gradient of their own. A decoding step is as
long as it takes to read the weights once, or to multiply them with all rows, whichever is longer,
and the calls between: layers are many and rows are short. Notebook 08 derives all of it.

Devices are given by their makers' numbers (16-bit, dense), of which programs reach a part. So an
estimate is an order of magnitude, and each run says afterwards how far off it was."""

from dataclasses import dataclass

import pandas as pd
import torch
from transformers import AutoModelForCausalLM

from roi_lib.store.checkpoints import load_config
from roi_lib.worlds import TIERS, World, check_choice


@dataclass(frozen=True)
class Device:
    """What a device can do."""

    operations: float  # a second, in 16 bits
    bandwidth: float  # bytes read a second
    memory: float  # bytes
    call: float  # seconds between two layers of one decoding step
    reached: float = 0.4  # share of the operations that training and reading prompts reach


DEVICES = {
    "cpu": Device(1.5e11, 2e10, 16e9, 0.0),  # two cores with AVX-512 and bfloat16
    "t4": Device(65e12, 320e9, 16e9, 8e-4),
    "rtx-4090": Device(165e12, 1_008e9, 24e9, 5e-4),
    "a100": Device(312e12, 2_039e9, 80e9, 6e-4),
    "h100": Device(989e12, 3_350e9, 80e9, 5e-4),
}
BYTES = 2  # of a number in 16 bits
STATEMENT = 90  # tokens of a statement of the real datasets, on average (`data/exam-statistics`)
ROWS = 256  # that decode together, at most
TABLE = ("base", "plan_and_solve", "least_to_most", "mft", "mft_greedy_knapsack", "rarl")


@dataclass(frozen=True)
class Shape:
    """What of a model decides its cost."""

    weights: int
    layers: int
    cached: int  # bytes of keys and values a token

    @classmethod
    def of(cls, checkpoint: str) -> "Shape":
        """Read off a checkpoint's configuration; its weights are not loaded."""
        config = load_config(checkpoint).get_text_config()
        with torch.device("meta"):
            weights = AutoModelForCausalLM.from_config(config).num_parameters()
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        cached = 2 * config.num_hidden_layers * config.num_key_value_heads * size * BYTES
        return cls(weights, config.num_hidden_layers, cached)


@dataclass(frozen=True)
class Work:
    """The tokens of one stage."""

    generated: float = 0.0
    trained: float = 0.0  # passed through forward and backward
    row: float = 0.0  # tokens of a row, prompt and response
    rows: int = ROWS  # that decode together
    rows_at_once: int = 1  # in training
    lora: bool = True


def stages(world: World, papers: int = 500) -> dict[str, Work]:
    """The stages of a world's recipes, and an exam of so many papers with all methods."""
    mft, rarl = world.mft, world.rarl
    answer = sum(world.centroids) / len(world.centroids)  # tokens, as Greedy Knapsack assumes
    problem = STATEMENT + answer
    size = sum(n * w for n, w in mft.sizes) / sum(w for _, w in mft.sizes)
    samples = len(TIERS) * mft.problems * len(mft.styles) * mft.samples
    rollouts, budget = rarl.steps * rarl.exams * rarl.rollouts, sum(rarl.budgets) / len(rarl.budgets)
    n = sum(n * w for n, w in rarl.sizes) / sum(w for _, w in rarl.sizes)
    exams = papers * 3 * len(TABLE)
    return {
        "sampling": Work(samples * answer, row=problem, rows=min(ROWS, samples)),
        "mft": Work(trained=(len(TIERS) * mft.problems + mft.exams * size) * problem,
                    row=size * problem, rows_at_once=mft.rows_at_once, lora=mft.lora_rank > 0),
        "rarl": Work(rollouts * budget, rollouts * (n * STATEMENT + budget),
                     n * STATEMENT + budget, min(ROWS, rarl.exams * rarl.rollouts),
                     rarl.trl.rows_at_once if rarl.trl else rarl.rollouts,
                     bool(rarl.trl and rarl.trl.lora_rank)),
        "exam": Work(exams * sum(world.budgets), row=3 * STATEMENT + max(world.budgets))}


def estimate(world: World, device: str, checkpoint: str | None = None,
             papers: int = 500) -> pd.DataFrame:
    """A row a stage: millions of tokens generated and trained on, 10^15 operations, GB of memory,
    whether the device has that much, and hours. `ValueError`: an unknown device."""
    check_choice("device", device, DEVICES)
    own, model = DEVICES[device], Shape.of(checkpoint or world.method("base").checkpoint)
    table = {}
    for name, work in stages(world, papers).items():
        passes = (4 if work.lora else 6) * model.weights * work.trained
        step = max(BYTES * model.weights / own.bandwidth,
                   2 * model.weights * work.rows / own.operations / own.reached)
        decoding = work.generated / work.rows * (step + model.layers * own.call)
        cache = model.cached * work.row * work.rows * bool(work.generated)
        # Adapters: the weights, and what a row leaves behind in every layer; else AdamW's, too.
        states = (BYTES if work.lora else 16) * model.weights
        activations = 34 * model.cached / 4 * work.row * work.rows_at_once * bool(work.trained)
        memory = states + max(cache, activations)
        table[name] = {
            "million tokens generated": work.generated / 1e6,
            "million tokens trained": work.trained / 1e6,
            "10^15 operations": (2 * model.weights * work.generated + passes) / 1e15,
            "GB": memory / 1e9, "fits": memory < 0.9 * own.memory,
            "hours": (decoding + passes / own.operations / own.reached) / 3_600}
    return pd.DataFrame(table).T
