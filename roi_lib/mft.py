"""Meta-Cognitive Fine-Tuning (MFT): predict what a problem will cost, then solve it or skip it.

Stage one of the method, from the paper's section on MFT, step by step:

    rejection_sample   K answers of the base model to each training problem, graded
    align              one problem's answers -> what is taught: an answer with its level, or a skip
    make_row           one or several of these -> one training row whose tags are exact
    curriculum         the rows: every problem alone, then exams in mixed orders
    fine_tune          TRL's SFTTrainer on the rows, with LoRA where the recipe says so
    calibrate          how well a tagged model knows itself
    run                all of it, to a checkpoint with its card
"""

import json
import random
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from roi_lib.checkpoints import (
    check_tokenizer,
    load_config,
    load_model,
    load_tokenizer,
    newest_complete,
    own_tokenizer,
    tokenizer_name,
    write_manifest,
)
from roi_lib.engines import make_engine
from roi_lib.exams import (
    Exam,
    draw_papers,
    encode_prompt,
    exam_prompt,
    in_orders,
    parse_response,
    tag,
)
from roi_lib.files import write_json
from roi_lib.generation import BudgetedGenerator, TorchGenerator
from roi_lib.problems import Problem
from roi_lib.runlog import LoggedGenerator, RunLog, model_hash
from roi_lib.sitting import confusion, segment_table, sit
from roi_lib.sources import problem_stream
from roi_lib.training import (
    Together,
    TrainingLog,
    check_finite,
    folder_lock,
    lora,
    muon_and_adamw,
    same_recipe,
    write_checkpoint,
    writing,
)
from roi_lib.worlds import ORDERS, SKIP_ANSWER, TAG_OPEN, TIERS, MFTRecipe, World

SKIP_WORDS = f"\\boxed{{{SKIP_ANSWER}}}"
KEEP = ("shortest", "median")
IGNORED = -100  # label of a token that is not learned (torch's cross-entropy)


def tag_tokens(world: World, tokenizer) -> int:
    """Tokens of one tag.

    Raises:
        ValueError: the tokenizer does not give the tag back, or one level's tag is longer than
            another's, so that a tag would change the very cost that it names.
    """
    tags = [tag(level) for level in range(world.skip_level + 1)]
    ids = [tokenizer(words, add_special_tokens=False).input_ids for words in tags]
    texts = ["".join(tokenizer.decode(i, skip_special_tokens=True).split()) for i in ids]
    if texts != tags or len({len(i) for i in ids}) > 1:
        raise ValueError(f"the tokenizer splits the level tags badly ({tags[0]} reads {texts[0]!r} "
                         f"and takes {len(ids[0])} tokens, {tags[-1]} {len(ids[-1])}); "
                         "take another tokenizer, or other tags")
    return len(ids[0])


@dataclass(frozen=True)
class Sample:
    """One sampled answer to a problem sat alone.

    Attributes:
        words: the answer, without its header.
        cost: tokens of the answer with its header and with the tag that it will get.
        correct: right, and ended within the budget.
    """

    words: str
    cost: int
    correct: bool


def training_problems(
    world: World, count: int, seed: int = 0, root: Path | None = None, split: str = "train"
) -> list[Problem]:
    """Up to `count` different problems a tier: all there are, where a source has fewer.

    Raises:
        ValueError: unknown split, a source with bad rows, or a tier without any problem.
        FileNotFoundError: a dataset is neither below `root` nor to be had from the hub.
    """
    drawn = []
    for tier in TIERS:
        found: dict[str, Problem] = {}
        repeats = 0
        for problem in problem_stream(world, tier, split, seed, root):
            repeats += problem.id in found
            found.setdefault(problem.id, problem)
            if len(found) == count or repeats > len(found):
                break
        drawn += found.values()
    return drawn


def rejection_sample(
    world: World,
    tokenizer,
    generator: BudgetedGenerator,
    problems: Sequence[Problem],
    k: int = 8,
    seed: int = 0,
) -> list[list[Sample]]:
    """`k` graded answers to every problem, alone, under the direct prompt, at temperature 1.

    The budget is the top level's edge: an answer that needs more would be skipped anyway. Give a
    `runlog.LoggedGenerator` to keep the answers on disk.

    Raises:
        ValueError: not one answer is right, or a tokenizer that `tag_tokens` refuses.
        FloatingPointError: NaN or infinite logits.
    """
    budget, extra = world.level_edges[-1], tag_tokens(world, tokenizer)
    exams = [Exam((problem,), "easy") for problem in problems for _ in range(k)]
    sittings = sit(world, tokenizer, generator, exams, budget, seed=seed)
    if not any(s.correct[0] for s in sittings):
        raise ValueError(f"not one of {len(sittings)} sampled answers is right: there is nothing "
                         "to teach; look at some answers, and check model, prompt and grader")
    samples = []
    for s in sittings:
        segment = s.response.segments[0]
        words = re.sub(world.header_pattern, "", segment.text, count=1).strip()
        good = s.correct[0] and s.finished and TAG_OPEN not in words
        samples.append(Sample(words, segment.cost + extra, good))
    return [samples[i : i + k] for i in range(0, len(samples), k)]


@dataclass(frozen=True)
class Target:
    """What MFT teaches for one problem.

    Attributes:
        words: the kept answer, or a skip.
        level: its level when the problem stands alone.
        solve_rate: share of the samples that are right within the top level.
    """

    problem: Problem
    words: str
    level: int
    solve_rate: float

    @property
    def skip(self) -> bool:
        """Whether the problem is refused."""
        return self.words == SKIP_WORDS


def align(
    world: World, problem: Problem, samples: Sequence[Sample], keep: str = "shortest"
) -> Target:
    """Tag alignment and refusal learning: one problem's samples -> what is taught.

    Of the right answers within the top level one is kept: the "shortest" (it teaches thrift, and
    an answer that is right by luck and long is dropped) or the "median" by cost (it teaches what
    the model usually spends). Where there is none, the problem is refused.

    Raises:
        ValueError: unknown `keep`.
    """
    if keep not in KEEP:
        raise ValueError(f"keep must be one of {', '.join(KEEP)}, not {keep!r}")
    good = sorted((s for s in samples if s.correct and world.level_of(s.cost) < world.skip_level),
                  key=lambda s: s.cost)
    rate = len(good) / len(samples)
    if not good:
        return Target(problem, SKIP_WORDS, world.skip_level, rate)
    kept = good[0] if keep == "shortest" else good[(len(good) - 1) // 2]
    return Target(problem, kept.words, world.level_of(kept.cost), rate)


@dataclass(frozen=True)
class Row:
    """One training row: token ids of prompt and response, and the response's levels."""

    prompt: list[int]
    response: list[int]
    levels: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


def make_row(world: World, tokenizer, targets: Sequence[Target], budget: int) -> Row:
    """The row that answers these problems in this order under `budget` tokens.

    Levels are read off the row's own tokens, tags and end-of-sequence included, as a sitting
    would be: next to an edge a problem may cost another level in an exam than alone.

    Raises:
        ValueError: no levels agree with the costs that they bring about.
    """
    exam = Exam(tuple(t.problem for t in targets), "medium")
    prompt = encode_prompt(tokenizer, exam_prompt(world, exam, budget, "roi"))
    levels, words = [t.level for t in targets], [t.words for t in targets]
    for _ in range(len(targets) + 2):
        text = "\n".join(f"{world.header.format(i=i)}\n{tag(level)} {answer}" for i, (level, answer)
                         in enumerate(zip(levels, words, strict=True), start=1))
        response = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        segments = parse_response(world, tokenizer, response, len(targets)).segments
        real = [world.skip_level if answer == SKIP_WORDS else world.level_of(segment.cost)
                for answer, segment in zip(words, segments, strict=True)]
        if real == levels:
            return Row(prompt, response, levels)
        levels = real
        words = [SKIP_WORDS if level == world.skip_level else answer
                 for level, answer in zip(levels, words, strict=True)]
    raise ValueError(f"the tags of {targets[0].problem.id} do not settle on the costs they name")


def curriculum(
    world: World, tokenizer, targets: Sequence[Target], recipe: MFTRecipe
) -> list[Row]:
    """All rows in training order: every problem alone, then exams of several, in mixed orders.

    Budgets in the prompts are the world's own in half of the rows, else anything from half the
    smallest to twice the largest: the level of a problem does not depend on them.

    Raises:
        ValueError: the tags of a row do not settle (see `make_row`).
    """
    rng = random.Random(f"{recipe.seed}/mft")

    def budget() -> int:
        low, high = min(world.budgets) // 2, 2 * max(world.budgets)
        return rng.choice(world.budgets) if rng.random() < 0.5 else rng.randint(low, high)

    by_tier = {tier: [t for t in targets if t.problem.tier == tier] for tier in TIERS}
    tiers = [tier for tier in TIERS if by_tier[tier]]
    alone = [[t] for t in targets]
    exams = []
    for _ in range(recipe.exams):
        n = rng.choices(*zip(*recipe.sizes, strict=True))[0]
        mix = rng.choices(tiers, [recipe.mix[TIERS.index(tier)] for tier in tiers], k=n)
        exams.append([rng.choice(by_tier[tier]) for tier in mix])
    rows = []
    for stage in (alone, exams):
        made = [make_row(world, tokenizer, some, budget()) for some in stage]
        rows += in_batches_of_like_length(
            [row for row in made if len(row) <= recipe.max_length], recipe.rows, rng)
    return rows


def in_batches_of_like_length(rows: list[Row], size: int, rng: random.Random) -> list[Row]:
    """Shuffled rows in whole batches of `size` that need little padding; the odd rest is left."""
    rng.shuffle(rows)
    rows = rows[: len(rows) // size * size or len(rows)]
    batches = []
    for start in range(0, len(rows), 16 * size):
        block = sorted(rows[start : start + 16 * size], key=Row.__len__)
        batches += [block[i : i + size] for i in range(0, len(block), size)]
    rng.shuffle(batches)
    return [row for batch in batches for row in batch]


def as_dataset(rows: Sequence[Row]) -> Dataset:
    """Token ids and labels for TRL; prompts are not learned."""
    return Dataset.from_list([
        {"input_ids": row.prompt + row.response,
         "labels": [IGNORED] * len(row.prompt) + row.response} for row in rows])


class DevLog(TrainerCallback):
    """Sits the dev exams with the model as it is, and logs; marks whole checkpoints as whole."""

    COLUMNS = ("step", "loss", "rate", "tag_accuracy", *(f"tag_{tier}" for tier in TIERS),
               "skip_rate", "skip_hard", "answer_accuracy", "seconds")

    def __init__(self, world: World, tokenizer, recipe: MFTRecipe, path: Path, last_step: int,
                 root: Path | None) -> None:
        self.world, self.tokenizer, self.last_step = world, tokenizer, last_step
        papers = draw_papers(world, recipe.dev_exams, split="train", seed=recipe.seed + 1_000,
                             root=root)
        self.exams = in_orders(papers, ORDERS, recipe.seed)  # each tier in each position
        self.log = TrainingLog(path, self.COLUMNS, last_step)
        self.begin = time.monotonic() - float(self.log.last.get("seconds", 0))

    def on_log(self, args, state, control, logs=None, model=None, **kwargs) -> None:
        """One line of the log, with the remaining time.

        Raises:
            FloatingPointError: NaN or infinite loss, gradient, or logits of the dev exams.
        """
        if "loss" not in logs:
            return
        check_finite(logs, f"step {state.global_step}")
        model.eval()
        marks = segment_table(self.world, sit(
            self.world, self.tokenizer, TorchGenerator.of(model, self.tokenizer), self.exams,
            2 * max(self.world.budgets), "roi", seed=1))
        model.train()
        tried = marks["reached"] & ~marks["skipped"]
        hit, tier = marks["predicted"] == marks["real"], marks["tier"]
        seconds = time.monotonic() - self.begin
        share = state.global_step / state.max_steps
        self.log.write(
            state.global_step, round(float(logs["loss"]), 5),
            round(float(logs["learning_rate"]) / args.learning_rate, 4),
            *(round(float(x.mean()), 4) if len(x) else "" for x in (
                hit[tried], *(hit[tried & (tier == name)] for name in TIERS), marks["skipped"],
                marks["skipped"][tier == "hard"], marks["correct"][tried])), round(seconds),
            note=f"about {seconds / share - seconds:.0f} s left")

    def on_save(self, args, state, control, **kwargs) -> None:
        """The manifest comes last: a checkpoint without it was not written to the end (F1)."""
        write_manifest(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def ample_budget(world: World, exams: Sequence[Exam]) -> int:
    """A budget in tokens that cuts nobody short: twice the top level's edge a problem."""
    return 2 * world.level_edges[-1] * max(len(exam.problems) for exam in exams)


def token_weights(world: World, tokenizer, recipe: MFTRecipe) -> torch.Tensor | None:
    """The weight of each token of the vocabulary in the loss; None where all are alike.

    Raises:
        ValueError: levels shall weigh more, but a level is no token of its own.
    """
    if recipe.tag_weight == 1:
        return None
    weights = torch.ones(len(tokenizer))
    for level in range(world.skip_level + 1):
        word = tokenizer(f"Level-{level}", add_special_tokens=False).input_ids
        inside = tokenizer(tag(level), add_special_tokens=False).input_ids
        if len(word) > 1 or word[0] not in inside or weights[word[0]] != 1:
            raise ValueError("tag_weight needs a tokenizer with one token for each level; "
                             "give --set tag_weight=1")
        weights[word[0]] = recipe.tag_weight
    return weights


def check_recipe(world: World, tokenizer, recipe: MFTRecipe) -> None:
    """Refuse at once what would otherwise fail after hours of sampling.

    Raises:
        ValueError: unknown `keep`, or a tokenizer that goes with no tag or no `tag_weight`.
    """
    if recipe.keep not in KEEP:
        raise ValueError(f"keep must be one of {', '.join(KEEP)}, not {recipe.keep!r}")
    tag_tokens(world, tokenizer)
    token_weights(world, tokenizer, recipe)


class TagTrainer(SFTTrainer):
    """SFTTrainer with a loss in which some tokens weigh more: one in fifty is a level."""

    def __init__(self, *args, token_weights: torch.Tensor | None = None, **options) -> None:
        super().__init__(*args, **options)
        self.token_weights = token_weights

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean over the response tokens of the whole batch, `num_items_in_batch`."""
        if self.token_weights is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        outputs = model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False)
        learned = labels[:, 1:] != IGNORED
        wanted = labels[:, 1:][learned]
        nats = F.cross_entropy(outputs.logits[:, :-1][learned].float(), wanted, reduction="none")
        weights = self.token_weights.to(nats.device)[wanted]
        loss = (nats * weights).sum() / (len(nats) if num_items_in_batch is None
                                         else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def optimizer_of(model, recipe: MFTRecipe) -> torch.optim.Optimizer | None:
    """Muon and AdamW as one, or None for the trainer's own AdamW."""
    if not recipe.muon_rate:
        return None
    muon, adamw = muon_and_adamw(model, recipe.muon_rate, recipe.learning_rate)
    return Together([adamw, muon])  # the first one's rate is what the trainer logs


def fine_tune(
    world: World, tokenizer, model, rows: Sequence[Row], recipe: MFTRecipe, work: Path,
    root: Path | None = None,
):
    """Train on the rows in their order with TRL's SFTTrainer; returns the model, adapters merged.

    Continues from the newest whole checkpoint below `work`, and keeps `log.csv` there.

    Raises:
        ValueError: `tag_weight` is not 1, and the tokenizer has no token for each level.
        FloatingPointError: NaN or infinite loss, gradient, or logits of the dev exams.
        OSError: the disk is full; names the step.
    """
    state = newest_complete(work, "checkpoint-")
    if state:
        print(f"continuing from {state}")
    log = DevLog(world, tokenizer, recipe, work / "log.csv",
                 int(state.name.split("-")[1]) if state else 0, root)
    trainer = TagTrainer(
        model, sft_config(recipe, work), train_dataset=as_dataset(rows),
        processing_class=tokenizer, callbacks=[log],
        peft_config=lora(recipe.lora_rank),
        optimizers=(optimizer_of(model, recipe), None),
        token_weights=token_weights(world, tokenizer, recipe))
    trainer.remove_callback(PrinterCallback)  # it prints what the log prints
    with writing(work, lambda: trainer.state.global_step):
        trainer.train(resume_from_checkpoint=str(state) if state else None)
    model = trainer.model.merge_and_unload() if recipe.lora_rank else trainer.model
    return model.eval()


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


def label_statistics(targets: Sequence[Target]) -> list[dict]:
    """One dict a family: tier, family, problems, share of each level, mean solve rate."""
    rows = []
    for tier in TIERS:
        for family in sorted({t.problem.family for t in targets if t.problem.tier == tier}):
            own = [t for t in targets if t.problem.family == family and t.problem.tier == tier]
            levels = np.bincount([t.level for t in own], minlength=4) / len(own)
            rows.append({"tier": tier, "family": family, "problems": len(own),
                         **{f"level_{k}": round(float(x), 4) for k, x in enumerate(levels)},
                         "solve_rate": round(float(np.mean([t.solve_rate for t in own])), 4)})
    return rows


def calibrate(
    world: World,
    tokenizer,
    base: BudgetedGenerator,
    tagged: BudgetedGenerator,
    papers: Sequence[Sequence[Problem]],
    k: int = 8,
    seed: int = 0,
) -> dict:
    """How well a tagged model knows itself: unseen papers, the orders in turn, an ample budget.

    What a problem should have been labelled comes from `k` samples of the base model alone, as in
    training. Returns, JSON-ready: `tag_accuracy` by tier and position (problems tried),
    `answer_accuracy` of both models, `skip_rate` and `refused` (share of Level-3 labels) by tier,
    `confusion` [predicted][real] (problems tried), `false_skips` (mean solve rate of the skipped)
    and `missed_skips` (share of the tried that no sample solved).

    Raises:
        ValueError: no papers; not one response holds a closed level tag, or not one sample of the
            base model is right.
        FloatingPointError: NaN or infinite logits.
    """
    exams = in_orders(papers, ORDERS, seed)  # each tier comes in each position
    before, after = (segment_table(world, sit(world, tokenizer, generator, exams,
                                              ample_budget(world, exams), style, seed=seed))
                     for generator, style in ((base, "direct"), (tagged, "roi")))
    if (after["predicted"] < 0).all():
        raise ValueError(f"not one of {len(exams)} responses holds a closed level tag; "
                         "is this a model that MFT has trained?")
    problems = [problem for exam in exams for problem in exam.problems]
    samples = rejection_sample(world, tokenizer, base, problems, k, seed)
    targets = [align(world, p, s) for p, s in zip(problems, samples, strict=True)]
    refused = np.array([t.skip for t in targets])
    solve_rate = np.array([t.solve_rate for t in targets])
    tier = {name: after["tier"] == name for name in TIERS}
    tried, skipped = after["reached"] & ~after["skipped"], after["skipped"]
    hit = after["predicted"] == after["real"]

    def share(values, mask) -> float | None:
        return round(float(values[mask].mean()), 4) if mask.any() else None

    positions = range(1, after["position"].max() + 1)
    return {
        "papers": len(exams), "samples": k, "seed": seed,
        "tag_accuracy": {t: [share(hit, tried & m & (after["position"] == n)) for n in positions]
                         for t, m in tier.items()},
        "answer_accuracy": {t: {"base": share(before["correct"], before["tier"] == t),
                                "mft": share(after["correct"], m)} for t, m in tier.items()},
        "skip_rate": {t: share(skipped, m) for t, m in tier.items()},
        "refused": {t: share(refused, m) for t, m in tier.items()},
        "confusion": confusion(world, after["predicted"][tried], after["real"][tried]).tolist(),
        "false_skips": share(solve_rate, skipped),
        "missed_skips": share(refused, tried),
    }


def run(
    world: World,
    out: Path,
    work: Path,
    recipe: MFTRecipe,
    checkpoint: str | None = None,
    engine: str = "torch",
    root: Path | None = None,
) -> None:
    """The whole stage: sample, align, train, measure, write the checkpoint to `out`.

    `work` keeps samples.jsonl, labels.json, log.csv and the trainer's states; a run found there
    goes on where it stopped.

    Args:
        checkpoint: the model to start from; the world's base.
        engine: samples the answers (see `engines.ENGINES`).
        root: local folder of the datasets.

    Raises:
        CheckpointError: there is no such checkpoint, or its tokenizer does not fit its model.
        ValueError: `work` holds a run of another recipe or model, or another process is at it; an
            unknown engine; a recipe that `check_recipe` refuses; not one sampled answer is right.
        FloatingPointError: NaN or infinite logits, loss or gradient.
        OSError: the disk is full, or a dataset is not to be had.
    """
    checkpoint = checkpoint or world.method("base").checkpoint
    source = tokenizer_name(checkpoint, world.tokenizer)
    tokenizer = load_tokenizer(source)
    check_tokenizer(load_config(checkpoint), tokenizer, checkpoint)
    check_recipe(world, tokenizer, recipe)
    with folder_lock(work):
        same_recipe(work, asdict(recipe) | {"world": world.name, "model": model_hash(checkpoint)})
        begin = time.monotonic()
        problems = training_problems(world, recipe.problems, recipe.seed, root)
        base = make_engine(engine, checkpoint, tokenizer, "auto")  # as it was trained
        log = RunLog(work / "samples.jsonl", {
            "world": world.name, "method": "rejection sampling", "model": model_hash(checkpoint),
            "seed": recipe.seed})
        samples = rejection_sample(world, tokenizer,
                                   LoggedGenerator(base, log, 10.0, "rejection sampling"),
                                   problems, recipe.samples, recipe.seed)
        targets = [align(world, p, s, recipe.keep)
                   for p, s in zip(problems, samples, strict=True)]
        labels = label_statistics(targets)
        write_json(work / "labels.json", labels)
        rows = curriculum(world, tokenizer, targets, recipe)
        model = load_model(checkpoint, "float32")
        model = fine_tune(world, tokenizer, model, rows, recipe, work, root)
        minutes = (time.monotonic() - begin) / 60
        tokens = sum(map(len, rows))
        documents = {"labels": labels}
        if recipe.card_papers:
            papers = draw_papers(world, recipe.card_papers, seed=recipe.seed + 1, root=root)
            tagged = TorchGenerator.of(model.to(base.model.dtype) if engine == "torch" else model,
                                       tokenizer)
            documents["calibration"] = calibrate(world, tokenizer, base, tagged, papers,
                                                 recipe.samples, recipe.seed + 1)
        card = model_card(out.name, world, checkpoint, source, recipe, documents,
                          f"{len(rows):,} rows, {tokens / 1e6:.1f} million tokens, "
                          f"{minutes:.1f} minutes on {torch.get_num_threads()} threads")
        write_checkpoint(out, model.float(), work / "log.csv", card,
                         own_tokenizer(checkpoint), **documents)  # as no trainer has set it


def as_table(rows: Sequence[dict]) -> str:
    """Dicts with the same keys as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join("| " + " | ".join("--" if x is None else str(x) for x in line) + " |"
                     for line in lines)


def model_card(name, world, checkpoint, tokenizer, recipe, documents, made) -> str:
    """The README of the checkpoint."""
    card = CARD.format(name=name, checkpoint=checkpoint, tokenizer=tokenizer, made=made,
                       world=world.name, recipe=json.dumps(asdict(recipe), indent=1),
                       labels=as_table(documents["labels"]))
    if "calibration" not in documents:
        return card + "\nNot measured (`card_papers=0`).\n"
    result = documents["calibration"]
    knows = [{"tier": tier,
              **{f"tag right at {n}": x for n, x in enumerate(result["tag_accuracy"][tier], 1)},
              "right, base": result["answer_accuracy"][tier]["base"],
              "right, MFT": result["answer_accuracy"][tier]["mft"],
              "skipped": result["skip_rate"][tier], "Level-3 labels": result["refused"][tier]}
             for tier in TIERS]
    return card + MEASURED.format(knows=as_table(knows), **result)


CARD = """\
# {name}

`{checkpoint}` after Meta-Cognitive Fine-Tuning: it predicts the level of each problem's cost, then
solves it or skips it. Tokenizer: `{tokenizer}`. Licence: MIT, as the repository.

**Made by** `python -m roi_lib train mft --world {world}`: {made}. The log is `log.csv`. Recipe:

```json
{recipe}
```

**Labels** of the training problems (`labels.json`), by rejection sampling; the solve rate is the
share of samples that are right within the top level:

{labels}
"""

MEASURED = """
**Measured** on {papers} unseen papers (seed {seed}), the three orders in turn, temperature 1,
ample budget (`calibration.json`): share of right tags among problems tried, by position; share of
right answers; share skipped beside the share that {samples} samples of the base would have refused.

{knows}

Of what it skips, the base would have solved {false_skips:.1%} (mean solve rate of the samples);
of what it tries, {missed_skips:.1%} was solved by no sample.
"""
