"""MFT from a checkpoint to a checkpoint (paper, section on MFT).

    fine_tune    TRL's SFTTrainer on the rows of `roi_lib.mft`, with LoRA where the recipe says so
    calibrate    how well a tagged model knows itself
    train_mft    all of the stage: sample, label, fine-tune, measure, publish
"""

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer

from roi_lib import mft
from roi_lib.engines import LoggedEngine, RunLog, engine_for, make_engine
from roi_lib.evaluation import confusion, rates
from roi_lib.exams import Environment, draw_papers, in_orders, tag
from roi_lib.generation import Engine
from roi_lib.problems import Problem
from roi_lib.sitting import sit
from roi_lib.store import checkpoints, files
from roi_lib.store.sources import load_pool
from roi_lib.training import common
from roi_lib.worlds import ORDERS, TIERS, MFTRecipe, World

IGNORED = -100  # label of a token that is not learned (torch's cross-entropy)


def as_dataset(rows: Sequence[mft.Row]) -> Dataset:
    """Token ids and labels for TRL; prompts are not learned."""
    return Dataset.from_list([
        {"input_ids": row.prompt + row.response,
         "labels": [IGNORED] * len(row.prompt) + row.response} for row in rows])


def token_weights(env: Environment, recipe: MFTRecipe) -> torch.Tensor:
    """What each token weighs in the loss, [vocabulary]: `tag_weight` for a level, else 1."""
    weights, vocabulary = torch.ones(len(env.tokenizer)), env.tokenizer.get_vocab()
    if recipe.tag_weight != 1:
        ids = [vocabulary.get(f"Level-{level}") for level in range(env.world.skip_level + 1)]
        if not all(i in env.encode(tag(level)) for level, i in enumerate(ids)):
            raise ValueError("tag_weight needs a tokenizer with one token for each level; "
                             "give tag_weight 1")
        weights[ids] = recipe.tag_weight
    return weights


class TagTrainer(SFTTrainer):
    """SFTTrainer with a loss in which some tokens weigh more: one in fifty is a level."""

    token_weights: torch.Tensor  # [vocabulary]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Weighted nats over the response tokens of the whole batch, `num_items_in_batch`."""
        labels = inputs.pop("labels")[:, 1:]
        outputs, learned = model(**inputs, use_cache=False), labels != IGNORED
        loss = cross_entropy(outputs.logits[:, :-1][learned].float(), labels[learned],
                             self.token_weights.to(labels.device), reduction="sum")
        loss = loss / (learned.sum() if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


class DevLog(ProgressCallback):
    """Has the model sit unseen exams now and then, and logs; marks whole checkpoints as whole."""

    def __init__(self, env: Environment, recipe: MFTRecipe, work: Path, last_step: int, pool=None):
        super().__init__()
        papers = draw_papers(env.world, recipe.dev_exams, split="train", seed=recipe.seed + 1_000,
                             pool=pool)
        self.env, self.exams = env, in_orders(papers, ORDERS, recipe.seed)
        self.log = common.TrainingLog(work / "log.csv", (
            "step", "loss", "rate", "tag_accuracy", *(f"tag_{tier}" for tier in TIERS),
            "skip_rate", "skip_hard", "answer_accuracy", "seconds"), last_step)

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
                        2 * max(self.env.world.budgets), style="roi", seed=1))
        model.train()
        row |= {"step": state.global_step, "loss": float(logs["loss"]),
                "rate": float(logs["learning_rate"]) / args.learning_rate,
                "answer_accuracy": row["tried_right"], "seconds": self.log.seconds()}
        self.log.append(row)
        self.training_bar.set_postfix(loss=row["loss"], tags=row["tag_accuracy"], refresh=False)

    def on_save(self, args, state, control, **kwargs) -> None:
        """The manifest comes last: a checkpoint without it was not written to the end."""
        files.write_manifest(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def sft_config(recipe: MFTRecipe, work: Path) -> SFTConfig:
    """The recipe in TRL's terms."""
    return SFTConfig(
        output_dir=str(work), num_train_epochs=1, train_sampling_strategy="sequential",
        per_device_train_batch_size=recipe.rows_at_once,
        gradient_accumulation_steps=max(1, recipe.rows // recipe.rows_at_once),
        learning_rate=recipe.learning_rate, lr_scheduler_type="linear", warmup_steps=0.03,
        weight_decay=0.0, max_grad_norm=1.0, packing=False, max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True}, bf16=recipe.bf16,
        gradient_checkpointing=recipe.checkpointing, logging_steps=recipe.log_every,
        save_steps=recipe.save_every, save_total_limit=2, seed=recipe.seed, report_to="none",
        logging_nan_inf_filter=False, disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False)


def fine_tune(env: Environment, model, rows: Sequence[mft.Row], recipe: MFTRecipe, work: Path,
              pool: Sequence[Problem] | None = None):
    """Train on the rows in their order with TRL's SFTTrainer; returns the model, adapters merged.

    Continues from the newest whole checkpoint below `work`, and keeps `log.csv` there.
    `FloatingPointError`: NaN or infinite loss, gradient, or logits of the dev exams.
    """
    state, optimizer = files.newest_complete(work, "checkpoint-"), None
    log = DevLog(env, recipe, work, int(state.name.split("-")[1]) if state else 0, pool)
    if not rows:  # no steps
        return model
    if recipe.muon_rate:  # else the trainer's own AdamW
        muon, adamw = common.muon_and_adamw(model, recipe.muon_rate, recipe.learning_rate)
        optimizer = common.CombinedOptimizer([adamw, muon])  # the first one's rate is logged
    trainer = (SFTTrainer if recipe.tag_weight == 1 else TagTrainer)(
        model, sft_config(recipe, work), train_dataset=as_dataset(rows), callbacks=[log],
        processing_class=env.tokenizer, peft_config=common.lora(recipe.lora_rank),
        optimizers=(optimizer, None))
    trainer.token_weights = token_weights(env, recipe)
    trainer.remove_callback(PrinterCallback)  # it prints what the log holds
    return common.run_trainer(trainer, state)


def label_statistics(targets: Sequence[mft.Target]) -> pd.DataFrame:
    """A row a family: tier, family, problems, share of each level, mean solve rate."""
    families = pd.DataFrame([
        {"tier": t.problem.tier, "family": t.problem.family,
         **{f"level_{k}": float(t.level == k) for k in range(4)}, "solve_rate": t.solve_rate}
        for t in targets]).groupby(["tier", "family"])
    table = families.mean().map(lambda share: round(share, 4))
    table.insert(0, "problems", families.size())
    return table.reindex(TIERS, level="tier").reset_index()


def calibrate(env: Environment, base: Engine, tagged: Engine, papers: Sequence[Sequence[Problem]],
              k: int = 8, seed: int = 0) -> dict:
    """How well a tagged model knows itself: unseen papers, the orders in turn, an ample budget.

    What a problem should have been labelled comes from `k` samples of the base model alone, as in
    training. Returns shares, JSON-ready: `tag_accuracy` by tier and position (problems tried),
    `answer_accuracy` of both models, `skip_rate` and `refused` (Level-3 labels) by tier,
    `confusion` [predicted][real] (problems tried), `false_skips` (mean solve rate of the skipped)
    and `missed_skips` (of the tried, what no sample solved). None: nothing to count.
    """
    exams = in_orders(papers, ORDERS, seed)  # each tier comes in each position
    ample = 2 * env.world.level_edges[-1] * max(len(exam.problems) for exam in exams)
    before = sit(env, base, exams, ample, seed=seed)
    after = sit(env, tagged, exams, ample, style="roi", seed=seed)
    if (after["predicted"] < 0).all():
        warnings.warn(f"not one of {len(exams)} responses holds a closed level tag; is this a "
                      "model that MFT has trained?", stacklevel=2)
    problems = [problem for exam in exams for problem in exam.problems]
    samples = mft.rejection_sample(env, base, problems, k, seed)
    targets = [mft.align(env.world, *pair) for pair in zip(problems, samples, strict=True)]
    after = after.assign(base=before["correct"], refused=[t.skip for t in targets],
                         solve_rate=[t.solve_rate for t in targets])
    tried, skipped = after[after["reached"] & ~after["skipped"]], after[after["skipped"]]

    def share(values: pd.Series) -> float | None:
        return round(float(values.mean()), 4) if len(values) else None

    tiers = {tier: after[after["tier"] == tier] for tier in TIERS}
    hit = (tried["predicted"] == tried["real"]).groupby([tried["tier"], tried["position"]])
    hits = {cell: share(values) for cell, values in hit}
    return {
        "papers": len(exams), "samples": k, "seed": seed,
        "tag_accuracy": {tier: [hits.get((tier, n)) for n in sorted(set(own["position"]))]
                         for tier, own in tiers.items()},
        "answer_accuracy": {tier: {"base": share(own["base"]), "mft": share(own["correct"])}
                            for tier, own in tiers.items()},
        "skip_rate": {tier: share(own["skipped"]) for tier, own in tiers.items()},
        "refused": {tier: share(own["refused"]) for tier, own in tiers.items()},
        "confusion": confusion(tried, env.world.skip_level + 1).tolist(),
        "false_skips": share(skipped["solve_rate"]), "missed_skips": share(tried["refused"])}


def train_mft(
    world: World, out: Path, work: Path, recipe: MFTRecipe, checkpoint: str | None = None,
    engine: str = "torch", root: Path | None = None,
) -> None:
    """The whole stage: sample, align, train, measure, write the checkpoint to `out`.

    `work` keeps samples, log and the trainer's states; a run found there goes on where it stopped.
    Without any steps the start is measured and published.

    Args:
        checkpoint: the model to start from; the world's base.
        engine: samples the answers (see `engines.make_engine`).
        root: local folder of the datasets.

    Raises:
        ValueError: before any work where `out` is not ours to replace, or the start does not fit;
            `work` holds another run, or another process is at it.
        FloatingPointError: NaN or infinite logits, loss or gradient.
    """
    checkpoint = checkpoint or world.method("base").checkpoint
    files.check_replaceable(out)
    env = checkpoints.load_environment(world, checkpoint)
    model = checkpoints.load_model(checkpoint, "float32")
    checkpoints.check_tokenizer(model.config, env.tokenizer, checkpoint)
    checkpoints.check_saveable(model)
    mft.tag_tokens(env)
    token_weights(env, recipe)
    pool = load_pool(world, "train", root)
    papers = draw_papers(world, recipe.card_papers, seed=recipe.seed + 1,
                         pool=load_pool(world, "test", root)) if recipe.card_papers else []
    run = {"world": world.name, "model": checkpoints.model_hash(checkpoint)}
    with files.folder_lock(work):
        common.same_recipe(work, asdict(recipe) | run)
        base = make_engine(engine, checkpoint, env.tokenizer, "auto")  # as it was trained
        log = RunLog(work / "samples.jsonl",
                     run | {"method": "rejection sampling", "seed": recipe.seed})
        problems = mft.training_problems(world, recipe.problems, recipe.seed, pool)
        samples = mft.rejection_sample(env, LoggedEngine(base, log, "rejection sampling"),
                                       problems, recipe.samples, recipe.seed)
        targets = [mft.align(world, *pair, recipe.target)
                   for pair in zip(problems, samples, strict=True)]
        rows = mft.curriculum(env, targets, recipe)
        model = fine_tune(env, model, rows, recipe, work, pool)
        labels, calibration = label_statistics(targets), None
        if papers:
            tagged = engine_for(model.to(base.model.dtype) if engine == "torch" else model,
                                env.tokenizer)
            calibration = calibrate(env, base, tagged, papers, recipe.samples, recipe.seed + 1)
        card = common.model_card(
            out.name, checkpoint, work / "log.csv", recipe,
            about="It predicts the level of each problem's cost, then solves it or skips it. From "
            f"`{checkpoint}`, by Meta-Cognitive Fine-Tuning; style `roi`.",
            made=f"`roi_lib train mft --world {world.name}`: {len(rows):,} rows, "
            f"{sum(map(len, rows)) / 1e6:.1f} million tokens",
            measured=measured(labels, calibration))
        documents = {"labels": labels.to_dict("records")}
        if calibration:
            documents["calibration"] = calibration
        common.write_checkpoint(out, model.float(), work / "log.csv", card,
                                checkpoints.own_tokenizer(checkpoint), **documents)


def measured(labels: pd.DataFrame, calibration: dict | None) -> str:
    """What a card says of labels and calibration, in Markdown."""
    words = ("**Labels** of the training problems (`labels.json`), with the share of samples that "
             f"are right within the top level:\n\n{common.markdown_table(labels)}\n\n")
    if calibration is None:
        return words + "Not measured (`card_papers=0`)."
    by_tier = {name: found for name, found in calibration.items() if isinstance(found, dict)}
    table = common.markdown_table(pd.DataFrame(by_tier).rename_axis("tier").reset_index())
    return words + """\
**Measured** on {papers} unseen papers (seed {seed}), orders in turn, temperature 1, ample budget
(`calibration.json`): right tags by position (of problems tried), right answers, skips, and what
{samples} samples of the base would have refused. Solve rate of the base where this model skips:
{false_skips}; of what it tries, no sample of the base solved {missed_skips}.

""".format(**calibration) + table
