"""Pre-training of the pocket base model: exams answered in order, without tags, at the effort that
the prompt asks for."""

import random
import re
from collections.abc import Iterator
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
from roi_lib.engines.replay import reference_response
from roi_lib.evaluation import rates
from roi_lib.exams import Environment, Exam, draw_papers, in_orders
from roi_lib.problems import MAX_NUMBER, sample_problem
from roi_lib.sitting import sit
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
        budget = rng.randint(32, MAX_NUMBER)
        prompt = list(env.prompt(Exam(problems, "medium"), budget, style))
        words = reference_response(env.world, problems, style, (), budget,
                                   lambda text, b=budget: max(b - len(env.encode(text)), 0))
        response = [*env.encode(words), env.tokenizer.eos_token_id]
        if len(prompt + response) <= recipe.longest_row:
            return prompt + response, [-100] * len(prompt) + response


def batches(env: Environment, recipe: PretrainRecipe,
            skip: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (token ids, labels), [rows, length], without the first `skip` batches (to continue a
    run); rows of like length share a batch."""
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
        vocab_size=len(tokenizer), hidden_size=recipe.hidden, num_hidden_layers=recipe.layers,
        intermediate_size=recipe.intermediate, num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads, max_position_embeddings=1024,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


def rate(step: int, recipe: PretrainRecipe) -> float:
    """Share of the peak learning rate: warm-up, plateau, linear decay to zero."""
    done = step / recipe.steps
    return max(0.0, min(1.0, done / recipe.warmup, (1 - done) / (1 - recipe.hold)))


def train(env: Environment, model, recipe: PretrainRecipe, work: Path) -> dict:
    """Train in place, on from the newest state in `work`; returns the steps and tokens so far."""
    peaks = recipe.muon_lr, recipe.adamw_lr
    optimizers, state = common.muon_and_adamw(model, *peaks), files.newest_complete(work)
    progress = load_training_state(state, model, optimizers) if state else {"step": 0, "tokens": 0}
    first, losses = progress["step"], []
    log = common.TrainingLog(work, ("step", "loss", "rate", "seconds"), first)
    stream = batches(env, recipe, first)
    model.train()
    for step in tqdm(range(first, recipe.steps), "pretrain", recipe.steps, initial=first, **BAR):
        ids, labels = next(stream)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        learned = labels[:, 1:] != -100
        logits = model.lm_head(hidden[:, :-1][learned].float())
        loss = cross_entropy(logits, labels[:, 1:][learned])  # in nats a response token
        losses.append(loss.item())
        common.check_finite({"loss": losses[-1]}, f"step {step}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate(step, recipe)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        progress["step"] = done = step + 1
        progress["tokens"] += int((ids != env.tokenizer.pad_token_id).sum())
        if done % recipe.log_every == 0 or done == recipe.steps:
            log.append({"step": done, "loss": sum(losses) / len(losses),
                        "rate": rate(done, recipe)})
            losses.clear()
        if done % recipe.save_every == 0 or done == recipe.steps:
            save_step(work, model, optimizers, progress)
    return progress


CARD_PAPERS, CARD_SEED, CARD_BUDGET = 1_000, 1, 320  # behind the numbers on the card
READ = (96, 128, 144, 156, 164, 176, 208, 256)  # budgets around the rated costs of a paper
COUNTED = 200  # papers a budget
EFFORTS = ("direct", "brief", "at_once")  # styles that differ in effort


def count_errors(env: Environment, table: pd.DataFrame) -> pd.Series:
    """Median error in tokens of the notes of what is left, by position; of a table of counted
    responses."""
    errors = []
    for _, rows in table.groupby("exam"):
        left = rows["budget"] - (rows["cost"].cumsum() - rows["cost"])
        segments = env.parse(rows["ids"].iloc[0], len(rows)).segments
        for position, tokens, segment in zip(rows["position"], left, segments, strict=True):
            if note := re.search(r"\((\d+)\)", segment.text):
                errors.append({"position": position, "off": abs(int(note[1]) - max(tokens, 0))})
    return pd.DataFrame(errors, columns=["position", "off"]).groupby("position")["off"].median()


def measure(env: Environment, model) -> str:
    """Share of problems solved and tokens spent, family by family and effort by effort, alone and
    within papers, in Markdown; and how well the base reads its budget and keeps count of it."""
    papers = in_orders(draw_papers(env.world, CARD_PAPERS, seed=CARD_SEED), ["medium"], CARD_SEED)
    alone = [Exam((problem,), "medium") for exam in papers for problem in exam.problems]
    engine = engine_for(model.to(getattr(torch, env.world.dtype)), env.tokenizer)
    columns = {}
    for style in EFFORTS:
        for where, exams in (("alone", alone), ("within", papers)):
            table = sit(env, engine, exams, CARD_BUDGET, style=style, seed=CARD_SEED)
            own = table.groupby(["tier", "family"])
            columns[style, f"right {where}"] = own["correct"].mean().round(3)
            columns[style, f"tokens {where}"] = own["cost"].mean().round(1)
    table = pd.DataFrame(columns).reindex(TIERS, level="tier")
    counts = {budget: count_errors(env, sit(env, engine, papers[:COUNTED], budget, style="counted",
                                            seed=CARD_SEED)) for budget in READ}
    skips = {budget: rates(sit(env, engine, papers, budget, style="least_to_most", seed=CARD_SEED)
                           )["skip_hard"] for budget in READ}
    return f"""\
**Measured** on {CARD_PAPERS:,} unseen papers (seed {CARD_SEED}) in medium order, and each problem
alone, under {CARD_BUDGET} tokens, temperature 1: share right and mean tokens, in full (`direct`),
in brief, and at once.

```
{table.to_string()}
```

**Tokens left.** Where its prompt asks it to count down, it notes before each answer how many tokens
are left: median error, by position in the paper and by budget, of {COUNTED} papers.

```
{pd.DataFrame(counts).to_string()}
```

**Hard problems skipped** under the Least-to-Most prompt, by budget. The rows that it was trained on
compare the rated costs, 160 in a paper of three tiers, with the budget, and give hard problems up
where they exceed it; a base that does not read its budget skips as often under any.

```
{pd.Series(skips, name="skipped").round(3).to_frame().T.to_string()}
```"""


def pretrain(world: World, out: Path, work: Path, recipe: PretrainRecipe) -> None:
    """Train the base model and write it to `out`; `work` keeps states and log, and a run found
    there goes on. `ValueError`: one of the two holds something else."""
    files.check_replaceable(out)
    env = Environment(world, build_tokenizer(world))
    with common.run_folder(work, recipe, world):
        model = new_model(env.tokenizer, recipe)
        progress = train(env, model, recipe, work)
        common.publish(
            out, model, work, recipe, None, {}, measure(env, model.eval()),
            about=f"The base model of the {world.name} world ({model.num_parameters():,} weights): "
            "it works problems out step by step, and answers exams in order, without level tags.",
            made=f"`roi_lib train pretrain --world {world.name}`: {progress['step']:,} steps, "
            f"{progress['tokens'] / 1e6:.1f} million tokens of exams drawn afresh")
