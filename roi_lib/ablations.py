"""What each choice of RARL is worth: the same recipe with one thing changed, all in one table.

    ABLATIONS   name -> where the run starts, and what is changed
    run_one     one of them, in a process of its own: train, measure, diagnose
    ablate      all of them, two at a time, to a table and their logs
"""

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch

from roi_lib.checkpoints import load_model, load_tokenizer
from roi_lib.diagnosis import diagnose
from roi_lib.exams import draw_papers
from roi_lib.files import write_csv
from roi_lib.rarl_run import PAPERS_SEED, measure, train_model
from roi_lib.worlds import RARLRecipe, World

#: Every run is short and small, and yet shows where it is going.
STEPS, EXAMS = 120, 8


@dataclass(frozen=True)
class Ablation:
    """One run of the table.

    Attributes:
        shows: what it is there to show.
        change: the recipe -> the recipe of this run; None: the start is measured as it is.
        start: the method whose checkpoint it starts from.
    """

    shows: str
    change: Callable[[RARLRecipe], RARLRecipe] | None
    start: str = "mft"


ABLATIONS = {
    "mft": Ablation("the start of the other runs", None),
    "reference": Ablation("the recipe as it is", lambda r: r),
    "from_base": Ablation("without MFT no response has a tag, so none earns anything",
                          lambda r: r, "base"),
    "answer_only": Ablation("without the condition on the level, tags are free to drift",
                            lambda r: replace(r, reward="answer")),
    "skip_bonus": Ablation("a small reward for a right skip",
                           lambda r: replace(r, reward="skip_bonus")),
    "grpo": Ablation("GRPO's two normalisers instead of Dr. GRPO",
                     lambda r: replace(r, scale="std", normalizer="length")),
    "high_rate": Ablation("ten times the learning rate: the policy collapses",
                          lambda r: replace(r, learning_rate=10 * r.learning_rate)),
    "single_budget": Ablation("the smallest budget only: too many skips under the others",
                              lambda r: replace(r, budgets=(min(r.budgets),))),
}

COLUMNS = ("variant", "budget", "order", "score", "score_low", "score_high", "regret",
           "regret_low", "regret_high", "skip_easy", "skip_medium", "skip_hard",
           "answers_tagged_right", "skips_tagged_right", "tokens", "exams", "steps", "seed",
           "diagnosis")


def run_one(
    world: World, name: str, recipe: RARLRecipe, work: Path, n_papers: int,
    root: Path | None = None, threads: int = 1,
) -> list[dict]:
    """Train and measure one variant; its rows of the table (see `COLUMNS`).

    `work/NAME` keeps everything (see `rarl_run.run`); what is found there is not done again, and
    output.txt there is what the run prints.
    """
    torch.set_num_threads(threads)
    ablation, folder = ABLATIONS[name], work / name
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, found, steps = world.method(ablation.start).checkpoint, "", 0
    with (folder / "output.txt").open("a", buffering=1) as out, redirect_stdout(out), \
            redirect_stderr(out):
        if ablation.change is None:
            model = load_model(checkpoint, "float32")
        else:
            model = train_model(world, checkpoint, ablation.change(recipe), folder, root=root)
            found, steps = "; ".join(f.cause for f in diagnose(folder / "log.csv")), recipe.steps
        records = measure(world, load_tokenizer(checkpoint, default=world.tokenizer), model,
                          draw_papers(world, n_papers, seed=PAPERS_SEED, root=root), name,
                          folder / "exams")
    return [as_row(r, name) | {"steps": steps, "seed": recipe.seed, "diagnosis": found}
            for r in records]


def as_row(record: dict, name: str) -> dict:
    """One record of `measure` as a row; what could not be measured is empty."""
    def rounded(value):
        return "" if value is None else round(value, 4)

    low, high = record["regret_ci"] or (None, None)
    return {
        "variant": name, "budget": record["budget"], "order": record["order"],
        "score": rounded(record["score"]), "score_low": rounded(record["score_ci"][0]),
        "score_high": rounded(record["score_ci"][1]), "regret": rounded(record["regret"]),
        "regret_low": rounded(low), "regret_high": rounded(high),
        **{f"skip_{tier}": rounded(share) for tier, share in record["skip_by_tier"].items()},
        "answers_tagged_right": rounded(record["answers_tagged_right"]),
        "skips_tagged_right": rounded(record["skips_tagged_right"]),
        "tokens": rounded(record["mean_tokens"]), "exams": record["n_exams"]}


def ablate(
    world: World, recipe: RARLRecipe, work: Path, out: Path, names: Sequence[str] = (),
    n_papers: int = 400, jobs: int = 2, threads: int = 1, root: Path | None = None,
) -> list[dict]:
    """Run variants side by side; write the table to `out`, and the logs into a folder beside it.

    Args:
        recipe: of the reference; the others change it.
        work: what the runs keep; the same command goes on where it stopped.
        out: the table, TABLE.csv; the logs become TABLE/NAME.csv.
        names: which of `ABLATIONS`; all of them.
        n_papers: unseen papers, the same for all, sat in every order under every budget.
        jobs, threads: processes at a time, and threads of each.

    Returns:
        The rows of the table.

    Raises:
        ValueError: unknown name, or a variant that failed, after the others are done.
    """
    names = list(names or ABLATIONS)
    if unknown := [name for name in names if name not in ABLATIONS]:
        raise ValueError(f"unknown variant {unknown[0]!r}; choose from {', '.join(ABLATIONS)}")
    begin, rows, failed = time.monotonic(), {}, {}
    with ProcessPoolExecutor(jobs, get_context("spawn"), max_tasks_per_child=1) as executor:
        runs = {executor.submit(run_one, world, name, recipe, work, n_papers, root, threads): name
                for name in names}
        print(f"{len(names)} runs, {jobs} at a time; each prints to {work}/NAME/output.txt",
              flush=True)
        for run in as_completed(runs):
            name, seconds = runs[run], time.monotonic() - begin
            if run.exception():
                failed[name] = run.exception()
                print(f"{name}: failed: {failed[name]}", file=sys.stderr, flush=True)
                continue
            rows[name] = run.result()
            done = len(rows) + len(failed)
            print(f"{name}: {summary(rows[name])}; {done} of {len(names)} after {seconds:.0f} s",
                  flush=True)
    table = [row for name in names if name in rows for row in rows[name]]
    write_table(out, table)
    for name in rows:
        if ABLATIONS[name].change:
            shutil.copy(work / name / "log.csv", out.with_suffix("") / f"{name}.csv")
    if failed:
        name, error = next(iter(failed.items()))
        raise ValueError(f"{name} failed ({error}); run the same command again") from error
    return table


def summary(rows: Sequence[dict]) -> str:
    """Score and Regret in the hard order, and the diagnosis, in one line."""
    hard = [f"{r['budget']}/hard Score {r['score']} Regret {r['regret']} skips {r['skip_hard']}"
            for r in rows if r["order"] == "hard"]
    return ", ".join(hard) + (f" ({rows[0]['diagnosis']})" if rows[0]["diagnosis"] else "")


def write_table(out: Path, rows: Sequence[dict]) -> None:
    """Write the table in one piece, and make the folder for the logs."""
    out.with_suffix("").mkdir(parents=True, exist_ok=True)
    write_csv(out, COLUMNS, rows)
