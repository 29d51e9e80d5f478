"""MFT from a checkpoint to a checkpoint (paper, section on MFT), with TRL's SFTTrainer."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from roi_lib import mft
from roi_lib.engines import EngineConfig, LoggedEngine, RunLog, engine_for
from roi_lib.evaluation import rates
from roi_lib.exams import Environment, draw_papers, in_orders
from roi_lib.generation import Engine
from roi_lib.problems import Problem, problem_stream
from roi_lib.sitting import sit
from roi_lib.store.checkpoints import model_hash
from roi_lib.store.deadline import NEVER, Deadline
from roi_lib.store.sources import load_pool
from roi_lib.training import common
from roi_lib.worlds import ORDERS, TIERS, MFTRecipe, World

IGNORED = -100  # label of a token that is not learned (torch's cross-entropy)


def training_problems(world: World, count: int, seed: int = 0,
                      pool: Sequence[Problem] | None = None) -> list[Problem]:
    """Up to `count` different training problems a tier; all of a smaller pool."""
    drawn = []
    for tier in TIERS:
        found: dict[str, Problem] = {}
        repeats = 0
        for problem in problem_stream(world, tier, "train", seed, pool):
            repeats += problem.id in found
            found.setdefault(problem.id, problem)
            if len(found) == count or repeats > len(found):
                break
        drawn += found.values()
    return drawn


def as_dataset(rows: Sequence[mft.Row]) -> Dataset:
    """Token ids and labels for TRL; prompts are not learned."""
    return Dataset.from_list([
        {"input_ids": row.prompt + row.response,
         "labels": [IGNORED] * len(row.prompt) + row.response} for row in rows])


def token_weights(env: Environment, recipe: MFTRecipe) -> torch.Tensor:
    """What each token weighs in the loss, [vocabulary]: `tag_weight` for a level, else 1."""
    weights = torch.ones(len(env.tokenizer))
    if recipe.tag_weight != 1:
        if not env.level_ids:
            raise ValueError("tag_weight needs a tokenizer with one token for each level; "
                             "give tag_weight 1")
        weights[env.level_ids] = recipe.tag_weight
    return weights


def introduce_tags(env: Environment, model) -> None:
    """Let the tags' own tokens begin as words that stand in like places (`World.tag_words`): what
    the base has never met has become one and the same vector, and no level could be told from
    another. All other embeddings stay: numbers keep their place among their neighbours, so what is
    learned under some budgets holds under those between."""
    embeddings, place = model.get_input_embeddings().weight, env.tokenizer.convert_tokens_to_ids
    learned = torch.zeros(len(embeddings), 1)
    with torch.no_grad():
        for new, known in env.world.tag_words.items() if env.level_ids else ():
            embeddings[place(new)], learned[place(new)] = embeddings[place(known)], 1
    if learned.any():
        embeddings.register_hook(lambda gradient: gradient * learned)


class TagTrainer(SFTTrainer):
    """SFTTrainer with a loss in which tokens weigh their `token_weights`: levels are few."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Weighted nats over the response tokens of the whole batch, `num_items_in_batch`."""
        labels = inputs.pop("labels")[:, 1:]
        logits, learned = model(**inputs, use_cache=False).logits, labels != IGNORED
        loss = cross_entropy(logits[:, :-1][learned].float(), labels[learned],
                             self.token_weights.to(labels.device), reduction="sum")
        return loss / (learned.sum() if num_items_in_batch is None else num_items_in_batch)


class DevLog(common.Report):
    """Has the model sit unseen exams of the training split before each row of the log."""

    columns = ("step", "loss", "rate", "tag_accuracy", *(f"tag_{tier}" for tier in TIERS),
               "skip_rate", "skip_hard", "answer_accuracy", "seconds")

    def __init__(self, env: Environment, recipe: MFTRecipe, pool=None,
                 deadline: Deadline = NEVER) -> None:
        super().__init__(deadline)
        papers = draw_papers(env.world, recipe.dev_exams, 3, "train", recipe.seed + 1_000, pool)
        self.env, self.recipe = env, recipe
        self.exams = in_orders(papers, ORDERS, recipe.seed)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """The last step is logged, whatever its number."""
        super().on_step_end(args, state, control, **kwargs)
        control.should_log |= state.global_step == state.max_steps

    def on_log(self, args, state, control, logs=None, model=None, **kwargs) -> None:
        """Add a row; `FloatingPointError`: NaN or infinite loss, gradient, or logits."""
        if "loss" not in logs:
            return
        common.check_finite(logs, f"step {state.global_step}")
        model.eval()
        row = rates(sit(self.env, engine_for(model, self.env.tokenizer), self.exams,
                        max(self.recipe.budgets), style="roi", seed=1))
        model.train()
        self.log.append(row | {"step": state.global_step, "loss": float(logs["loss"]),
                               "rate": float(logs["learning_rate"]) / args.learning_rate,
                               "answer_accuracy": row["tried_right"]})
        self.training_bar.set_postfix(loss=logs["loss"], tags=row["tag_accuracy"], refresh=False)


def fine_tune(env: Environment, model, rows: Sequence[mft.Row], recipe: MFTRecipe, work: Path,
              pool=None, deadline: Deadline = NEVER):
    """Train on the rows in their order, on from the newest whole checkpoint in `work`, and keep
    `log.csv` there; returns the model. `FloatingPointError`: see `DevLog`; `OutOfTime`."""
    if not rows:  # no steps
        common.TrainingLog(work, DevLog.columns)
        return model
    introduce_tags(env, model)
    optimizer = None  # the trainer's own AdamW
    if recipe.muon_rate:
        muon, adamw = common.muon_and_adamw(model, recipe.muon_rate, recipe.learning_rate)
        optimizer = common.CombinedOptimizer([adamw, muon])  # the first one's rate is logged
    config = SFTConfig(
        output_dir=str(work), num_train_epochs=1, train_sampling_strategy="sequential",
        per_device_train_batch_size=recipe.rows_at_once, seed=recipe.seed, bf16=recipe.bf16,
        gradient_accumulation_steps=max(1, recipe.rows // recipe.rows_at_once),
        learning_rate=recipe.learning_rate, lr_scheduler_type="linear", warmup_steps=0.03,
        weight_decay=0.0, max_grad_norm=1.0, packing=False, max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True}, logging_nan_inf_filter=False,
        gradient_checkpointing=recipe.checkpointing, logging_steps=recipe.log_every,
        save_steps=recipe.save_every, save_total_limit=2, disable_tqdm=True,
        report_to=recipe.report_to,
        use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False)
    trainer = (SFTTrainer if recipe.tag_weight == 1 else TagTrainer)(
        model, config, train_dataset=as_dataset(rows), processing_class=env.tokenizer,
        peft_config=common.lora(model, recipe.lora_rank),
        callbacks=[DevLog(env, recipe, pool, deadline)], optimizers=(optimizer, None))
    trainer.token_weights = token_weights(env, recipe)
    trainer.remove_callback(PrinterCallback)  # it prints what the log holds
    return common.run_trainer(trainer)


def label_statistics(targets: Sequence[mft.Target]) -> list[dict]:
    """A row a family: tier, family, problems, share of each level, mean solve rate."""
    families = pd.DataFrame([
        {"tier": t.problem.tier, "family": t.problem.family,
         **{f"level_{k}": float(t.level == k) for k in range(4)}, "solve_rate": t.solve_rate}
        for t in targets]).groupby(["tier", "family"])
    table = families.mean().map(lambda share: round(share, 4))
    table.insert(0, "problems", families.size())
    return table.reindex(TIERS, level="tier").reset_index().to_dict("records")


def calibrate(env: Environment, base: Engine, tagged: Engine, papers: list[tuple], k: int = 8,
              seed: int = 0) -> dict:
    """How well a tagged model knows itself on unseen papers under an ample budget; JSON-ready, None
    where there is nothing to count. Of problems tried: `tag_accuracy` by tier and position,
    `confusion` [predicted][real], and `missed_skips`, which none of `k` samples of the base solved
    (`refused`, of all problems). `false_skips`: the base's mean solve rate of what is skipped."""
    exams = in_orders(papers, ORDERS, seed)  # each tier comes in each position
    ample = int(min(2 * env.world.level_edges[-1] * max(len(exam.problems) for exam in exams),
                    env.world.largest_budget))
    before = sit(env, base, exams, ample, seed=seed)
    after = sit(env, tagged, exams, ample, style="roi", seed=seed)
    problems = [problem for exam in exams for problem in exam.problems]
    samples = mft.rejection_sample(env, base, problems, k, seed)
    targets = [mft.align(env.world, *pair) for pair in zip(problems, samples, strict=True)]
    tries = after["reached"] & ~after["skipped"]
    after = after.assign(
        base=before["correct"], hit=(after["predicted"] == after["real"]).where(tries),
        refused=[t.skip for t in targets], solve_rate=[t.solve_rate for t in targets])
    tiers = {tier: after[after["tier"] == tier] for tier in TIERS}
    tags, levels = after[tries & (after["predicted"] >= 0)], range(env.world.skip_level + 1)

    def share(values: pd.Series) -> float | None:
        return round(float(values.mean()), 4) if values.count() else None

    return {
        "papers": len(exams), "samples": k, "seed": seed,
        "tag_accuracy": {tier: [share(hits) for _, hits in own.groupby("position")["hit"]]
                         for tier, own in tiers.items()},
        "answer_accuracy": {tier: {"base": share(own["base"]), "mft": share(own["correct"])}
                            for tier, own in tiers.items()},
        "skip_rate": {tier: share(own["skipped"]) for tier, own in tiers.items()},
        "refused": {tier: share(own["refused"]) for tier, own in tiers.items()},
        "confusion": pd.crosstab(tags["predicted"], tags["real"]).reindex(
            index=levels, columns=levels, fill_value=0).to_numpy().tolist(),
        "false_skips": share(after.loc[after["skipped"], "solve_rate"]),
        "missed_skips": share(after.loc[tries, "refused"])}


def measured(labels: list[dict], calibration: dict | None = None) -> str:
    """What a card says of labels and calibration, in Markdown."""
    table = pd.DataFrame(labels).to_string(index=False)
    words = f"**Labels**, and share of right samples, by family:\n\n```\n{table}\n```\n\n"
    if calibration is None:
        return words + "Not measured (`card_papers=0`)."
    by_tier = {name: found for name, found in calibration.items() if isinstance(found, dict)}
    return words + f"""\
**Measured** on {calibration["papers"]} unseen papers, ample budget: right tags by position, right
answers, skips, and what {calibration["samples"]} samples of the base refuse (`calibration.json`).

```
{pd.DataFrame(by_tier).to_string()}
```"""


def train_mft(world: World, out: Path, work: Path, recipe: MFTRecipe, checkpoint: str | None = None,
              engine: str = "torch", root: Path | None = None,
              deadline: Deadline = NEVER) -> None:
    """The whole stage, from `checkpoint` (the world's base) to one in `out`. `work` keeps samples,
    log and states, and a run found there goes on. `engine` samples the answers; `root` is the
    datasets' folder. Errors: see `common.load_start`, `common.run_folder`, and `fine_tune`;
    `OutOfTime` at the first checkpoint after the deadline."""
    checkpoint = checkpoint or world.method("base").checkpoint
    common.check_fits("MFT", checkpoint, recipe.max_length, recipe, recipe.tag_weight == 1)
    env, model = common.load_start(world, checkpoint, out, recipe.budgets,
                                   recipe.lora_rank > 0 and recipe.bf16)
    mft.tag_tokens(env)
    token_weights(env, recipe)
    pool = load_pool(world, "train", root)
    papers = draw_papers(world, recipe.card_papers, seed=recipe.seed + 1,
                         pool=load_pool(world, "test", root)) if recipe.card_papers else []
    start = model_hash(checkpoint)
    with common.run_folder(work, recipe, world, model=start):
        base = EngineConfig(engine).make(checkpoint, env.tokenizer, "auto")  # its own dtype
        log = RunLog(work / "samples.jsonl", {"world": world.name, "model": start, "method":
                                              "rejection sampling", "seed": recipe.seed})
        problems = training_problems(world, recipe.problems, recipe.seed, pool)
        sampler = LoggedEngine(base, log, "rejection sampling", deadline)
        samples = mft.rejection_sample(env, sampler, problems, recipe.samples, recipe.seed,
                                       recipe.styles, recipe.temperature)
        targets = [mft.align(world, *pair, recipe.target)
                   for pair in zip(problems, samples, strict=True)]
        rows = mft.curriculum(env, problems, samples, recipe)
        model = fine_tune(env, model, rows, recipe, work, pool, deadline)
        documents = {"labels.json": label_statistics(targets)}
        if papers:
            model = model.to(base.model.dtype) if engine == "torch" else model
            tagged = engine_for(model, env.tokenizer)
            documents["calibration.json"] = calibrate(env, base, tagged, papers, recipe.samples,
                                                      recipe.seed + 1)
        common.publish(
            out, model, work, recipe, checkpoint, documents, measured(*documents.values()),
            about="It predicts the level of each problem's cost, then solves it or skips it. From "
            f"`{checkpoint}`, by Meta-Cognitive Fine-Tuning; style `roi`.",
            made=f"`roi_lib train mft --world {world.name}`: {len(rows):,} rows, "
            f"{sum(map(len, rows)) / 1e6:.1f} million tokens")
