"""The moment at which a run of RARL learns to skip: the models it kept, side by side."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from roi_lib.engines import engine_for
from roi_lib.exams import SKIP_WORDS, Environment, Exam, draw_papers, in_orders, tag
from roi_lib.generation import Engine
from roi_lib.problems import Problem
from roi_lib.rarl import STYLE, completion_logprobs, pad_right, problem_rewards
from roi_lib.sitting import responses, sit
from roi_lib.store.checkpoints import load_environment, load_model
from roi_lib.store.files import read_json
from roi_lib.worlds import ORDERS, World

#: How the exam that is shown was chosen; no later model has a say in it.
RULE = ("the first unseen paper in the hard order under the smallest budget on which the model of "
        "the first kept step, decoding greedily, spends the whole budget on the first problem")


def find_snapshots(works: Sequence[Path]) -> dict[int, Path]:
    """Step -> folder of the models below `WORK/snapshots` of runs of one recipe and seed, earliest
    first; `ValueError`: there are none, or two runs had different starts."""
    if len({str(read_json(work / "recipe.json").get("start")) for work in works}) > 1:
        raise ValueError(f"the runs {', '.join(map(str, works))} had different starts; name runs "
                         "of one recipe and seed")
    folders = {int(folder.name.split("-")[1]): folder
               for work in works for folder in (work / "snapshots").glob("step-*[0-9]")
               if folder.name[5:].isdigit()}
    if not folders:
        raise ValueError(f"{works[0]} has no snapshots; name the --work of a `train rarl` whose "
                         "recipe keeps some (--snapshots 0,20,40)")
    return dict(sorted(folders.items()))


def find_example(env: Environment, engine: Engine, papers: Sequence[Sequence[Problem]]) -> int:
    """Index of the paper that `RULE` names; a `ValueError` where there is none."""
    budget = min(env.world.budgets)
    table = sit(env, engine, in_orders(papers, ["hard"], 0), budget, style=STYLE, temperature=0.0)
    spent = table[(table["position"] == 1) & (table["cost"] == budget)]["exam"]
    if spent.empty:
        raise ValueError(f"on none of {len(papers)} papers does the first problem take the whole "
                         "budget; give more --papers")
    return int(spent.iloc[0])


@torch.inference_mode()
def skip_routes(env: Environment, model, exam: Exam, budget: int) -> dict[str, list[float]]:
    """Probability, at temperature 1, that a response to this exam opens with the header and the tag
    of Level-k (`tag`), and that a skip follows (`skip`), level by level, as MFT writes it."""
    tags = [f"{env.world.header.format(i=1)}\n{tag(k)}" for k in range(env.world.skip_level + 1)]
    ids, mask = pad_right([env.encode(f"{t} {SKIP_WORDS}") for t in tags], model.device)
    prompt = torch.tensor(env.prompt(exam, budget, STYLE), device=model.device)
    logprobs, _ = completion_logprobs(model, prompt, ids)
    opening = [float(row[: len(env.encode(t))].sum().exp())
               for row, t in zip(logprobs, tags, strict=True)]
    return {"tag": opening, "skip": (logprobs * mask).sum(1).exp().tolist()}


def hard_problems(table: pd.DataFrame) -> list[dict]:
    """What becomes of the hard problems at each position; shares, None of nothing: `skipped` of
    all; `tagged`, of the skips that say the skip level; of those tried: `right`, and `level`, of
    those that the budget did not cut, whose tag names the real level; `reward` of all."""
    rows = []
    for position, own in table[table["tier"] == "hard"].groupby("position"):
        tried, hit = own["reached"] & ~own["skipped"], own["predicted"] == own["real"]
        shares = {"skipped": own["skipped"], "tagged": hit[own["skipped"]], "tried": tried,
                  "right": own["correct"][tried], "level": hit[tried & own["answer"].notna()],
                  "reward": problem_rewards(own)}
        rows.append({"position": position, "problems": len(own)} | {
            name: round(float(values.mean()), 4) if len(values) else None
            for name, values in shares.items()})
    return rows


def snapshot_report(world: World, works: Sequence[Path], n_papers: int, seed: int,
                    pool: Sequence[Problem] | None = None) -> dict:
    """For every model that a run kept (`RARLRecipe.snapshots`): one exam, decoded greedily, how
    probable a skip is at its opening, and what becomes of the hard problems of `n_papers` unseen
    papers, at temperature 1 in all orders under all budgets; JSON-ready."""
    env, papers = load_environment(world), draw_papers(world, n_papers, seed=seed, pool=pool)
    smallest, steps, index = min(world.budgets), [], None
    for step, folder in tqdm(find_snapshots(works).items(), "snapshots"):
        model = load_model(str(folder), world.dtype)
        engine = engine_for(model, env.tokenizer)
        index = find_example(env, engine, papers) if index is None else index
        (exam,) = in_orders([papers[index]], ["hard"], seed)
        shown = sit(env, engine, [exam], smallest, style=STYLE, temperature=0.0)
        shown["reward"] = problem_rewards(shown)
        hard = [{"budget": budget} | row for budget in world.budgets for row in hard_problems(
            pd.concat([sit(env, engine, in_orders(papers, [order], seed), budget, style=STYLE,
                           seed=seed) for order in ORDERS]))]
        (whole,) = responses(shown).itertuples()
        problems = shown[["predicted", "cost", "skipped", "correct", "reward"]]
        steps.append({"step": step, "ids": list(whole.ids), "finished": bool(whole.finished),
                      "problems": problems.to_dict("records"),
                      "opening": skip_routes(env, model, exam, smallest), "hard": hard})
    return {"world": world.name, "rule": RULE, "budget": smallest, "papers": n_papers,
            "seed": seed, "index": index, "ids": [p.id for p in exam.problems], "steps": steps}
