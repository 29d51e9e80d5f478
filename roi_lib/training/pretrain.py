"""Pre-training of the pocket base model: exams answered in order, without tags.

The base can calculate and follow the three prompting styles, but knows nothing of levels, and
under the direct prompt nothing of skipping: those are what MFT and RARL teach.
"""

import random
from collections.abc import Iterator
from dataclasses import asdict
from itertools import count
from pathlib import Path

import pandas as pd
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM

from roi_lib.engines import engine_for
from roi_lib.engines.logs import BAR
from roi_lib.engines.replay import reference_engine, reference_response
from roi_lib.exams import Environment, Exam, draw_papers, in_orders
from roi_lib.problems import sample_problem
from roi_lib.sitting import responses, sit
from roi_lib.store import files
from roi_lib.store.checkpoints import load_training_state, save_step
from roi_lib.store.tokenizers import build_tokenizer
from roi_lib.training import common
from roi_lib.training.recipes import PretrainRecipe
from roi_lib.worlds import TIERS, World


def sample_row(env: Environment, recipe: PretrainRecipe, rng: random.Random) -> tuple[list, list]:
    """One training row: token ids of a prompt and its response, and labels (-100: not learned)."""
    while True:
        n = 1 if rng.random() < recipe.alone else rng.choices((2, 3, 4, 5, 6), (3, 12, 2, 2, 2))[0]
        tiers = list(TIERS) if n == 3 and rng.random() < 0.6 else rng.choices(TIERS, k=n)
        rng.shuffle(tiers)
        problems = tuple(sample_problem(rng.choice(env.world.families[tier]), tier, "train", rng)
                         for tier in tiers)
        style = rng.choices(*zip(*recipe.styles, strict=True))[0]
        budget = rng.randint(32, 256)  # the base answers alike under any budget
        # Under Least-to-Most, and there alone, half of the hard problems are given up.
        skip = [style == "least_to_most" and t == "hard" and rng.random() < 0.5 for t in tiers]
        prompt = list(env.prompt(Exam(problems, "medium"), budget, style))
        words = reference_response(env.world, problems, style, skip)
        response = [*env.encode(words), env.tokenizer.eos_token_id]
        if len(prompt + response) <= recipe.longest_row:
            return prompt + response, [-100] * len(prompt) + response


def batches(
    env: Environment, recipe: PretrainRecipe, skip: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """An endless stream of (token ids, labels), [rows, length]; rows of like length share a batch.

    `skip` passes over the first batches, to continue a run.
    """
    for block in count():
        rng = random.Random(f"{recipe.seed}/{block}")
        rows = [sample_row(env, recipe, rng) for _ in range(recipe.rows_at_once)]
        groups: list[list] = [[]]
        for row in sorted(rows, key=lambda row: len(row[0])):
            if (len(groups[-1]) + 1) * len(row[0]) > recipe.batch_tokens:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        for group in groups[skip:]:
            ids, labels = (list(map(torch.tensor, column)) for column in zip(*group, strict=True))
            yield (pad_sequence(ids, True, env.tokenizer.pad_token_id),
                   pad_sequence(labels, True, -100))
        skip = max(0, skip - len(groups))


def new_model(tokenizer, recipe: PretrainRecipe) -> Qwen2ForCausalLM:
    """A freshly initialized model."""
    torch.manual_seed(recipe.seed)
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate, num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads, num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=1024, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


def rate(step: int, recipe: PretrainRecipe) -> float:
    """Share of the peak learning rate: warm-up, plateau, linear decay to zero."""
    done = step / recipe.steps
    return max(0.0, min(1.0, done / recipe.warmup, (1 - done) / (1 - recipe.hold)))


def train_step(model, optimizers, ids, labels, recipe: PretrainRecipe, step: int) -> float:
    """One optimizer step; returns the loss in nats a response token."""
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    learned = labels[:, 1:] != -100
    logits = model.lm_head(hidden[:, :-1][learned].float())
    loss = cross_entropy(logits, labels[:, 1:][learned])
    common.check_finite({"loss": loss.item()}, f"step {step}")
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer, peak in zip(optimizers, (recipe.muon_lr, recipe.adamw_lr), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = peak * rate(step, recipe)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def train(env: Environment, model, recipe: PretrainRecipe, work: Path) -> dict:
    """Train in place, on from the newest state in `work`; returns the steps and tokens so far."""
    optimizers = common.muon_and_adamw(model, recipe.muon_lr, recipe.adamw_lr)
    progress, state, losses = {"step": 0, "tokens": 0}, files.newest_complete(work), []
    if state:
        progress = load_training_state(state, model, optimizers)
    first = progress["step"]
    log = common.TrainingLog(work / "log.csv", ("step", "loss", "rate", "seconds"), first)
    stream = batches(env, recipe, first)
    model.train()
    for step in tqdm(range(first, recipe.steps), "pretrain", recipe.steps, initial=first, **BAR):
        ids, labels = next(stream)
        losses.append(train_step(model, optimizers, ids, labels, recipe, step))
        progress["step"] = done = step + 1
        progress["tokens"] += int((ids != env.tokenizer.pad_token_id).sum())
        if done % recipe.log_every == 0 or done == recipe.steps:
            log.append({"step": done, "loss": sum(losses) / len(losses),
                        "rate": rate(done, recipe), "seconds": log.seconds()})
            losses.clear()
        if done % recipe.save_every == 0 or done == recipe.steps:
            save_step(work, model, optimizers, progress)
    return progress


#: Papers, their seed and the budget behind the numbers on the model card.
CARD_PAPERS, CARD_SEED, CARD_BUDGET = 1_000, 1, 512


def measure(env: Environment, model) -> str:
    """What the model can do, family by family, in Markdown."""
    papers = in_orders(draw_papers(env.world, CARD_PAPERS, seed=CARD_SEED), ["medium"], CARD_SEED)
    alone = [Exam((problem,), "medium") for exam in papers for problem in exam.problems]
    engine = engine_for(model.to(getattr(torch, env.world.dtype)), env.tokenizer)
    reference, single, within = (
        sit(env, writer, exams, CARD_BUDGET, seed=CARD_SEED) for writer, exams in (
            (reference_engine(env, alone, [CARD_BUDGET]), alone), (engine, alone),
            (engine, papers)))
    cut = [1 - responses(table)["finished"].mean() for table in (single, within)]

    def right(table: pd.DataFrame) -> pd.Series:
        marks = table.groupby(["tier", "family"])["correct"]
        return marks.agg(lambda x: f"{x.mean():.3f} ± {1.96 * x.std(ddof=0) / len(x)**0.5:.3f}")

    costs = reference.groupby(["tier", "family"])["cost"]
    table = pd.DataFrame({
        "mean cost": costs.mean().round(1),
        **{f"{q:.0%}": costs.quantile(q).round().astype(int) for q in (0.05, 0.5, 0.95)},
        "problems": costs.size(), "right alone": right(single),
        "right within": right(within[within["finished"]])})
    return f"""\
**Measured** on {CARD_PAPERS:,} unseen papers of three problems (seed {CARD_SEED}), at temperature 1
under an ample budget of {CARD_BUDGET} tokens: every problem alone, and within its paper in medium
order (± half of the 95 % interval). Costs are tokens of the worked solution alone, header and
end-of-sequence included. The budget cut {cut[0]:.1%} of the problems alone, which count as wrong,
and {cut[1]:.1%} of the papers, which are left out: there a search goes round for ever.

{common.markdown_table(table.reindex(TIERS, level="tier").reset_index())}"""


def pretrain(world: World, out: Path, work: Path, recipe: PretrainRecipe) -> None:
    """Train the base model and write it to `out`; continue from `work` where it holds a run.

    `work` keeps the newest training states and `log.csv` (step, response loss, rate, seconds).
    Without any steps the random start is measured and published. `ValueError`: `work` or `out`
    holds something else. `FloatingPointError`: NaN or infinite loss.
    """
    files.check_replaceable(out)
    env = Environment(world, build_tokenizer(world))
    with files.folder_lock(work):
        common.same_recipe(work, asdict(recipe) | {"world": world.name})
        model = new_model(env.tokenizer, recipe)
        progress, log = train(env, model, recipe, work), work / "log.csv"
        card = common.model_card(
            out.name, None, log, recipe,
            about=f"The base model of the {world.name} world (Qwen2, {model.num_parameters():,} "
            "parameters, float32). It works problems out step by step and answers whole exams in "
            "order. It has never seen a level tag, and skips only when the Least-to-Most prompt "
            f"allows it. Tokenizer: `{world.tokenizer}`.",
            made=f"`roi_lib train pretrain --world {world.name}`: {progress['step']:,} steps, "
            f"{progress['tokens'] / 1e6:.1f} million tokens of exams drawn afresh",
            measured=measure(env, model.eval()))
        common.write_checkpoint(out, model.float(), log, card)  # float32, as it was trained
