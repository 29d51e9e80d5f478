"""What each choice of RARL is worth: the same recipe with one thing changed, all in one table."""

import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from roi_lib.exams import draw_papers
from roi_lib.experiments.diagnosis import diagnose
from roi_lib.store.checkpoints import load_environment, load_model
from roi_lib.store.files import check_file, write_csv
from roi_lib.training.rarl import PAPERS_SEED, measure, train
from roi_lib.worlds import RARLRecipe, World, check_choice

#: name -> (what it shows; recipe -> what is changed, None: the start is measured; start).
ABLATIONS = {
    "mft": ("the start of the other runs", None, "mft"),
    "reference": ("the recipe as it is", lambda r: {}, "mft"),
    "from_base": ("without MFT no response has a tag, so none earns anything",
                  lambda r: {}, "base"),
    "answer_only": ("without the condition on the level, tags are free to drift",
                    lambda r: {"reward": "answer"}, "mft"),
    "uncut": ("right answers alone are rewarded, and no budget cuts them: nothing is scarce",
              lambda r: {"reward": "answer", "cut": False}, "mft"),
    "budget_for_step": ("one budget for all exams of a step: within it, nothing tells them apart",
                        lambda r: {"budget_for": "step"}, "mft"),
    "skip_bonus": ("a small reward for a right skip", lambda r: {"reward": "skip_bonus"}, "mft"),
    "grpo": ("GRPO's two normalisers instead of Dr. GRPO",
             lambda r: {"scale": "std", "normalizer": "length"}, "mft"),
    "high_rate": ("ten times the learning rate: the policy collapses",
                  lambda r: {"learning_rate": 10 * r.learning_rate}, "mft"),
    "single_budget": ("one small budget only: too many skips under the others",
                      lambda r: {"budgets": (64,)}, "mft"),
}
COLUMNS = ["variant", "budget", "order", "score", "score_low", "score_high", "regret", "regret_low",
           "regret_high", "skip_easy", "skip_medium", "skip_hard", "answers_tagged_right",
           "skips_tagged_right", "tokens", "n_exams", "steps", "seed", "diagnosis"]


def run_variant(world: World, name: str, recipe: RARLRecipe, work: Path, n_papers: int,
                threads: int, pools: tuple) -> pd.DataFrame:
    """Train and measure one variant in a process of its own; its rows of the table. `work/NAME`
    keeps everything, what the run prints too; what is found there is not done again."""
    torch.set_num_threads(threads)
    (_, change, start), folder = ABLATIONS[name], work / name
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, found, steps = world.method(start).checkpoint, "", 0
    with open(folder / "output.txt", "a", 1) as out, redirect_stdout(out), redirect_stderr(out):
        env, model = load_environment(world, checkpoint), load_model(checkpoint, "float32")
        if change is not None:
            model = train(env, model, replace(recipe, **change(recipe)), folder, pools[0])
            found, steps = "; ".join(f.cause for f in diagnose(folder / "log.csv")), recipe.steps
        papers = draw_papers(world, n_papers, seed=PAPERS_SEED, pool=pools[1])
        records = measure(env, model, papers, name, folder / "exams")
    return records.assign(variant=name, steps=steps, seed=recipe.seed, diagnosis=found)


def ablate(world: World, recipe: RARLRecipe, work: Path, out: Path, names: Sequence[str] = (),
           n_papers: int = 400, jobs: int = 2, threads: int = 1,
           pools: tuple = (None, None)) -> None:
    """Run variants (all, unless named), `jobs` at a time with `threads` each, or go on in `work`.
    The table goes to `out`, TABLE.csv, logs to TABLE/NAME.csv. `pools`: to train and measure on.
    `ValueError`: unknown name, or a variant that failed, once the others are done."""
    names = list(names or ABLATIONS)
    for name in names:
        check_choice("variant", name, ABLATIONS)
    check_file(out)
    if (logs := out.with_suffix("")) == out:
        raise ValueError(f"the logs go to a folder {out}; give the table another --out, as x.csv")
    for name in names if logs.exists() else ():
        check_file(logs / f"{name}.csv")
    with ProcessPoolExecutor(jobs, get_context("spawn"), max_tasks_per_child=1) as executor:
        runs = {name: executor.submit(run_variant, world, name, recipe, work, n_papers, threads,
                                      pools) for name in names}
        list(tqdm(as_completed(runs.values()), "variants", len(runs)))  # waits, with a bar
    failed = {name: run.exception() for name, run in runs.items() if run.exception()}
    if done := [name for name in runs if name not in failed]:
        tables = [runs[name].result() for name in done]
        write_csv(out, pd.concat(tables).reindex(columns=COLUMNS).round(4))
        logs.mkdir(exist_ok=True)
        for name in done:
            if (log := work / name / "log.csv").exists():  # all but the start have one
                shutil.copy(log, logs / f"{name}.csv")
    for name, error in failed.items():
        raise ValueError(f"{name} failed ({error}); run the same command again") from error
