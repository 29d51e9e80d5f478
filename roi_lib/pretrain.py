"""Pre-training of the pocket base model: exams answered in order, without tags.

The base can calculate and follow the three prompting styles, but knows nothing of levels, and
under the direct prompt nothing of skipping: those are what MFT and RARL teach.
"""

import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from roi_lib.checkpoints import (
    load_training_state,
    newest_complete,
    save_step,
)
from roi_lib.evaluation import family_costs, family_marks
from roi_lib.exams import Exam, draw_papers, encode_prompt, exam_prompt, reference_response
from roi_lib.generation import TorchGenerator
from roi_lib.problems import sample_problem
from roi_lib.tokenizer import build_tokenizer
from roi_lib.training import TrainingLog, folder_lock, muon_and_adamw, write_checkpoint
from roi_lib.worlds import TIERS, World


@dataclass(frozen=True)
class PretrainConfig:
    """The recipe. The model is Qwen2's architecture, tied embeddings, float32 weights.

    Attributes:
        steps, batch_tokens: optimizer steps, and padded tokens in each.
        muon_lr, adamw_lr: peak rates of the matrices (Muon) and of everything else (AdamW).
        warmup, hold: shares of the steps for linear warm-up, and before linear decay sets in.
        alone: share of rows with a single problem.
        styles: share of rows by prompting style.
        bf16: multiply in bfloat16 (the weights stay float32).
    """

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 4
    intermediate: int = 384
    steps: int = 4_000
    batch_tokens: int = 8_192
    muon_lr: float = 0.02
    adamw_lr: float = 5e-3
    warmup: float = 0.02
    hold: float = 0.4
    alone: float = 0.5
    styles: tuple[tuple[str, float], ...] = (
        ("direct", 0.8), ("plan_and_solve", 0.1), ("least_to_most", 0.1))
    longest_row: int = 512
    rows_at_once: int = 2_048
    log_every: int = 25
    save_every: int = 250
    bf16: bool = True
    seed: int = 0


def sample_row(
    world: World, tokenizer, config: PretrainConfig, rng: random.Random
) -> tuple[list[int], list[int]]:
    """One training row: token ids of a prompt and of its response (end-of-sequence included)."""
    while True:
        n = 1 if rng.random() < config.alone else rng.choices((2, 3, 4, 5, 6), (3, 12, 2, 2, 2))[0]
        tiers = list(TIERS) if n == 3 and rng.random() < 0.6 else rng.choices(TIERS, k=n)
        rng.shuffle(tiers)
        problems = [sample_problem(rng.choice(world.families[t]), t, "train", rng) for t in tiers]
        style = rng.choices(*zip(*config.styles, strict=True))[0]
        budget = rng.randint(32, 256)  # the base answers alike under any budget
        prompt = exam_prompt(world, Exam(tuple(problems), "medium"), budget, style)
        # Under Least-to-Most, and there alone, half of the hard problems are given up.
        skip = [style == "least_to_most" and t == "hard" and rng.random() < 0.5 for t in tiers]
        words = reference_response(world, problems, style, skip)
        response = tokenizer(words, add_special_tokens=False).input_ids
        row = encode_prompt(tokenizer, prompt), [*response, tokenizer.eos_token_id]
        if sum(map(len, row)) <= config.longest_row:
            return row


def batches(
    world: World, tokenizer, config: PretrainConfig, skip: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """An endless stream of (token ids, labels), [rows, length]; -100 marks what is not learned.

    Rows of like length share a batch. `skip` passes over the first batches, to continue a run.
    """
    for block in range(10**9):
        rng = random.Random(f"{config.seed}/{block}")
        rows = [sample_row(world, tokenizer, config, rng) for _ in range(config.rows_at_once)]
        rows.sort(key=lambda row: sum(map(len, row)))
        groups: list[list] = [[]]
        for row in rows:
            if (len(groups[-1]) + 1) * sum(map(len, row)) > config.batch_tokens:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        for group in groups[skip:]:
            length = max(sum(map(len, row)) for row in group)
            ids = torch.full((len(group), length), tokenizer.pad_token_id)
            labels = torch.full((len(group), length), -100)
            for i, (prompt, response) in enumerate(group):
                end = len(prompt) + len(response)
                ids[i, :end] = torch.tensor(prompt + response)
                labels[i, len(prompt) : end] = torch.tensor(response)
            yield ids, labels
        skip = max(0, skip - len(groups))


def new_model(tokenizer, config: PretrainConfig) -> Qwen2ForCausalLM:
    """A freshly initialized model."""
    torch.manual_seed(config.seed)
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=config.hidden,
        intermediate_size=config.intermediate, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, num_key_value_heads=config.kv_heads,
        max_position_embeddings=1024, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


def rate(step: int, config: PretrainConfig) -> float:
    """Share of the peak learning rate: warm-up, plateau, linear decay to zero."""
    done = step / config.steps
    return max(0.0, min(1.0, done / config.warmup, (1 - done) / (1 - config.hold)))


def train_step(model, optimizers, ids, labels, config: PretrainConfig, step: int) -> float:
    """One optimizer step; returns the loss in nats a response token."""
    with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    learned = labels[:, 1:] != -100
    logits = model.lm_head(hidden[:, :-1][learned].float())
    loss = F.cross_entropy(logits, labels[:, 1:][learned])
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss.item()} at step {step}; lower the rates")
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer, peak in zip(optimizers, (config.muon_lr, config.adamw_lr), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = peak * rate(step, config)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def pretrain(world: World, out: Path, work: Path, config: PretrainConfig) -> None:
    """Train the base model and write it to `out`; continue from `work` where it holds a run.

    `work` keeps the newest training state and `log.csv` (step, response loss, rate, seconds).

    Raises:
        ValueError: `work` holds a run with another recipe, or another process is at it.
    """
    with folder_lock(work):
        _pretrain(world, out, work, config)


def _pretrain(world: World, out: Path, work: Path, config: PretrainConfig) -> None:
    tokenizer = build_tokenizer(world)
    model = new_model(tokenizer, config)
    optimizers = muon_and_adamw(model, config.muon_lr, config.adamw_lr)
    recipe = json.loads(json.dumps(asdict(config)))
    progress = {"step": 0, "seconds": 0.0, "tokens": 0, "recipe": recipe}
    if state := newest_complete(work):
        progress = load_training_state(state, model, optimizers)
        if progress["recipe"] != recipe:
            raise ValueError(f"{work} holds a run with another recipe; choose another --work")
        print(f"continuing {work} from step {progress['step']}")
    log = TrainingLog(work / "log.csv", ("step", "loss", "rate", "seconds"), progress["step"])
    begin = time.monotonic() - progress["seconds"]
    stream, losses = batches(world, tokenizer, config, skip=progress["step"]), []
    model.train()
    while progress["step"] < config.steps:
        ids, labels = next(stream)
        losses.append(train_step(model, optimizers, ids, labels, config, progress["step"]))
        progress["step"] += 1
        progress["tokens"] += int((ids != tokenizer.pad_token_id).sum())
        progress["seconds"] = time.monotonic() - begin
        step = progress["step"]
        if step % config.log_every == 0 or step == config.steps:
            log.write(step, round(sum(losses) / len(losses), 5), round(rate(step, config), 4),
                      round(progress["seconds"]))
            losses.clear()
        if step % config.save_every == 0 or step == config.steps:
            save_step(work, model, optimizers, progress)
    publish(world, tokenizer, model.eval(), out, progress, log.path)


#: Papers, their seed and the budget behind the accuracies on the model card.
CARD_PAPERS, CARD_SEED, CARD_BUDGET = 1_000, 1, 512


def mean_and_margin(marks: np.ndarray) -> str:
    """A share with the half-width of its 95 % normal interval."""
    return f"{marks.mean():.3f} ± {1.96 * marks.std() / len(marks) ** 0.5:.3f}"


def publish(world: World, tokenizer, model, out: Path, progress: dict, log: Path) -> None:
    """Write the checkpoint folder: safetensors, training log, and a measured card."""
    papers = draw_papers(world, CARD_PAPERS, seed=CARD_SEED)
    generator = TorchGenerator.of(model.to(getattr(torch, world.dtype)), tokenizer)
    costs = family_costs(world, tokenizer, papers)
    marks, cut = zip(*(
        family_marks(world, tokenizer, generator, papers, CARD_BUDGET, alone, CARD_SEED)
        for alone in (True, False)), strict=True)
    rows = []
    for tier in TIERS:
        for family in world.families[tier]:
            low, middle, high = np.percentile(costs[family], [5, 50, 95])
            alone, within = (mean_and_margin(m[family]) for m in marks)
            rows.append(f"| {tier} | {family} | {costs[family].mean():.1f} | {low:.0f} | "
                        f"{middle:.0f} | {high:.0f} | {len(costs[family])} | {alone} | {within} |")
    card = CARD.format(
        name=out.name, tokenizer=world.tokenizer, rows="\n".join(rows),
        parameters=f"{model.num_parameters():,}",
        steps=f"{progress['step']:,}", tokens=f"{progress['tokens'] / 1e6:.1f}",
        minutes=f"{progress['seconds'] / 60:.0f}", threads=torch.get_num_threads(),
        recipe=json.dumps(progress["recipe"], indent=1), papers=f"{CARD_PAPERS:,}",
        seed=CARD_SEED, budget=CARD_BUDGET, cut_alone=f"{cut[0]:.1%}", cut_within=f"{cut[1]:.1%}")

    model.float()  # as it was trained: the wider arithmetic was for measuring alone
    write_checkpoint(out, model, log, card)


CARD = """\
# {name}

The base model of the pocket world: Qwen2 architecture, {parameters} parameters, float32. It works
problems out step by step and answers whole exams in order. It has never seen a level tag, and
skips only when the Least-to-Most prompt allows it. Its tokenizer is `data/{tokenizer}`. Licence:
MIT, as the repository.

**Data.** Problems drawn afresh from the six families of `roi_lib/problems.py`, training split:
half of the rows a single problem, half an exam of two to six; prompting styles in the shares of
the recipe. Loss on responses only.

**Training.** {steps} steps, {tokens} million tokens, {minutes} minutes on {threads} threads of a
shared 2-core x86-64 CPU; the loss is in `log.csv`. Command: `python -m roi_lib train pretrain
--world pocket`. Recipe:

```json
{recipe}
```

**Measured** on {papers} unseen papers of three problems (seed {seed}), sampling at temperature 1
under an ample budget of {budget} tokens: every problem alone, and the same problems within their
papers in medium order (± is the half-width of the 95 % interval). Costs are response tokens of
the worked solution alone, header and end-of-sequence included. The budget cut {cut_alone} of the
problems alone, which count as wrong, and {cut_within} of the papers, which the last column leaves
out: there a search has missed its target and goes round for ever, and what comes after it is
never reached.

| tier | family | mean cost | 5 % | 50 % | 95 % | problems | right alone | right within a paper |
|---|---|---|---|---|---|---|---|---|
{rows}
"""
