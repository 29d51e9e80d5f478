"""The moment at which a run of RARL learns to skip: the models it kept, side by side.

    kept_models   step -> folder of the models that a run kept (`RARLRecipe.keep`)
    first_dry     the exam that is shown: a rule that looks at the first model only
    skip_routes   how probable it is, exactly, that a response opens with a skip
    hard_problems what the model does with hard problems, by budget and position
    moments       all of it, for every kept model
    write_seeds   runs of several seeds in one table, as that of `ablations`
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from roi_lib.ablations import as_row, write_table
from roi_lib.checkpoints import load_model, load_tokenizer
from roi_lib.evaluation import Sitting, sit
from roi_lib.exams import Exam, draw_papers, encode_prompt, exam_prompt, in_orders
from roi_lib.generation import BudgetedGenerator, TorchGenerator
from roi_lib.problems import Problem
from roi_lib.rarl import STYLE, completion_logprobs, pad_right, problem_reward
from roi_lib.rarl_run import PAPERS_SEED
from roi_lib.worlds import ORDERS, SKIP_ANSWER, TAG_CLOSE, TAG_OPEN, World

#: How the exam that is shown was chosen; no later model has a say in it.
RULE = ("the first unseen paper in the hard order under the smallest budget on which the model of "
        "the first kept step, decoding greedily, spends the whole budget on the first problem")


def kept_models(works: Sequence[Path]) -> dict[int, Path]:
    """Step -> folder of the models below `WORK/kept`, earliest first.

    Several work folders are of one recipe and seed, for instance a short run that kept every
    model of the beginning: what a step does hangs on neither the number of steps nor `keep`.

    Raises:
        ValueError: there are none, or two runs had different starts.
    """
    starts = {json.loads((work / "recipe.json").read_text())["start"] for work in works}
    if len(starts) > 1:
        raise ValueError(f"the runs {', '.join(map(str, works))} had different starts; name runs "
                         "of one recipe and seed")
    folders = {int(folder.name.split("-")[1]): folder
               for work in works for folder in (work / "kept").glob("step-*")}
    if not folders:
        raise ValueError(f"{works[0]} has no kept models; name the --work of a `train rarl` whose "
                         "recipe keeps some (--set keep=0,20,40)")
    return dict(sorted(folders.items()))


def first_dry(
    world: World, tokenizer, generator: BudgetedGenerator, papers: Sequence[Sequence[Problem]]
) -> int:
    """Index of the paper that `RULE` names.

    Raises:
        ValueError: there is none among these papers.
    """
    exams = in_orders(papers, ["hard"], 0)
    budget = min(world.budgets)
    for i, s in enumerate(sit(world, tokenizer, generator, exams, budget, STYLE, 0.0)):
        if s.response.segments[0].cost == budget:
            return i
    raise ValueError(f"on none of {len(papers)} papers does the first problem take the whole "
                     "budget; give more --papers")


@torch.inference_mode()
def skip_routes(world: World, tokenizer, model, exam: Exam, budget: int) -> dict[str, list[float]]:
    """Probability, at temperature 1, of how a response to this exam opens, level by level.

    Returns:
        `tag`: that it opens with the header and the tag of Level-k; `skip`: that a skip follows.
        So the sum of `skip` is how probable a skip of the first problem is, whatever its tag.
        (In a world whose layout is free: when written as MFT teaches it.)
    """
    def encode(words: str) -> list[int]:
        return tokenizer(words, add_special_tokens=False).input_ids

    tags = [f"{world.header.format(i=1)}\n{TAG_OPEN}Level-{k}{TAG_CLOSE}"
            for k in range(world.skip_level + 1)]
    ids, mask = pad_right([encode(f"{t} \\boxed{{{SKIP_ANSWER}}}") for t in tags], model.device)
    prompt = encode_prompt(tokenizer, exam_prompt(world, exam, budget, STYLE))
    logprobs, _ = completion_logprobs(model, torch.tensor(prompt, device=model.device), ids)
    opening = [float(row[: len(encode(t))].sum().exp())
               for row, t in zip(logprobs, tags, strict=True)]
    return {"tag": opening, "skip": (logprobs * mask).sum(1).exp().tolist()}


def hard_problems(world: World, sittings: Sequence[Sitting]) -> list[dict]:
    """What becomes of the hard problems at each position; shares, None of nothing.

    `skipped` of all; `tagged`, of the skips that say the skip level; of those tried: `right`, and
    `level`, of those that the budget did not cut, whose tag names the real level; `reward` of all.
    """
    def share(values: list) -> float | None:
        return round(sum(values) / len(values), 4) if values else None

    places: dict[int, list] = {}
    for s in sittings:
        rows = zip(s.exam.problems, s.response.segments, s.correct, strict=True)
        for position, (problem, segment, correct) in enumerate(rows, start=1):
            if problem.tier == "hard":
                places.setdefault(position, []).append((segment, correct))
    table = []
    for position, found in sorted(places.items()):
        tried = [(s, c) for s, c in found if s.cost > 0 and not s.skipped]
        table.append({
            "position": position, "problems": len(found),
            "skipped": share([s.skipped for s, _ in found]),
            "tagged": share([s.level == world.skip_level for s, _ in found if s.skipped]),
            "tried": share([s.cost > 0 and not s.skipped for s, _ in found]),
            "right": share([c for _, c in tried]),
            "level": share([s.level == world.level_of(s.cost) for s, _ in tried
                            if s.answer is not None]),
            "reward": share([problem_reward(world, s, c) for s, c in found])})
    return table


def moments(
    world: World, works: Sequence[Path], n_papers: int = 200, seed: int = PAPERS_SEED,
    root: Path | None = None,
) -> dict:
    """One exam, and the hard problems of many, under every model that a run kept; JSON-ready.

    The exam is decoded greedily; the papers are sat in all orders under all budgets at
    temperature 1. `index` is the exam's place among the `n_papers` unseen papers of `seed`.

    Raises:
        ValueError: no kept models, or no exam that fits `RULE`.
        CheckpointError: a kept model is not whole.
    """
    folders, tokenizer = kept_models(works), load_tokenizer(world.tokenizer)
    papers = draw_papers(world, n_papers, seed=seed, root=root)
    orders = [in_orders(papers, [order], seed) for order in ORDERS]
    smallest, steps, index = min(world.budgets), [], None
    for step, folder in folders.items():
        model = load_model(str(folder), world.dtype)
        generator = TorchGenerator.of(model, tokenizer)
        if index is None:
            index = first_dry(world, tokenizer, generator, papers)
            (exam,) = in_orders([papers[index]], ["hard"], seed)
        (shown,) = sit(world, tokenizer, generator, [exam], smallest, STYLE, 0.0)
        hard = [{"budget": budget} | row for budget in world.budgets for row in hard_problems(
            world, [s for exams in orders for s in sit(
                world, tokenizer, generator, exams, budget, STYLE, seed=seed)])]
        steps.append({
            "step": step, "ids": list(shown.ids), "finished": shown.finished,
            "problems": [
                {"level": s.level, "cost": s.cost, "skipped": s.skipped, "right": c,
                 "reward": problem_reward(world, s, c)}
                for s, c in zip(shown.response.segments, shown.correct, strict=True)],
            "opening": skip_routes(world, tokenizer, model, exam, smallest), "hard": hard})
        print(f"step {step}: a skip opens the exam with probability "
              f"{sum(steps[-1]['opening']['skip']):.3f}; hard problems skipped at position 1 under "
              f"{smallest}: {hard[0]['skipped']}", flush=True)
    return {"world": world.name, "rule": RULE, "budget": smallest, "papers": n_papers,
            "seed": seed, "index": index, "ids": [p.id for p in exam.problems], "steps": steps}


def write_seeds(checkpoints: Sequence[tuple[int, Path]], out: Path) -> None:
    """Several runs in one table: the checkpoints are (seed of the training, folder).

    The table has the columns of `ablations`; the start, the same for all, comes once. The runs'
    logs become TABLE/SEED.csv.

    Raises:
        OSError: a folder without `exam.json` or `log.csv`.
    """
    rows = []
    for i, (seed, folder) in enumerate(checkpoints):
        for record in json.loads((folder / "exam.json").read_text()):
            trained = record["method"] != "start"
            if trained or i == 0:
                rows.append(as_row(record, record["method"]) | {
                    "seed": seed if trained else "", "steps": "", "diagnosis": ""})
    write_table(out, rows)
    for seed, folder in checkpoints:
        shutil.copy(folder / "log.csv", out.with_suffix("") / f"{seed}.csv")
