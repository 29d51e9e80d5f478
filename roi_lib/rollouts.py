"""Rollout logs that are small enough to keep: what lies behind a table, in one folder.

    papers.json      ids and seed of the papers (see `manifests`)
    records.json     the table's records
    METHOD.npz       one entry a problem sat (`COLUMNS`), and the token ids of the first papers
    rational.npz     the attempts at each problem, and the bounds that follow from them
    manifest.json    sizes and hashes of these (see `checkpoints`)

`python -m roi_lib exam ... --save FOLDER` writes it; the same command remakes it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np

from roi_lib.checkpoints import verify_folder, write_folder
from roi_lib.exams import parse_response
from roi_lib.files import write_json
from roi_lib.grading import grade
from roi_lib.manifests import make_manifest, read_manifest, restore_papers
from roi_lib.methods import Rational, Sat, Setting
from roi_lib.rational import Bound, Outcomes
from roi_lib.sitting import Sitting, segment_table
from roi_lib.worlds import ORDERS, World

TRACED = 300  # papers whose responses are kept token by token
#: Of a method: `budget`, `order`, `paper` (from 0), and what `sitting.segment_table` has.
COLUMNS = ("budget", "order", "paper", "position", "tier", "family", "cost", "predicted", "real",
           "skipped", "correct", "reached", "cut")


def narrow(values) -> np.ndarray:
    """An array in the smallest type that holds its whole numbers."""
    values = np.asarray(values)
    if values.dtype.kind not in "iu" or not values.size:
        return values
    ends = np.min_scalar_type(values.min()), np.min_scalar_type(values.max())
    return values.astype(np.result_type(*ends))


def problem_columns(world: World, results: Iterable[Sat]) -> dict[str, np.ndarray]:
    """`COLUMNS` of one method: budgets as they come, then orders, papers, positions."""
    tables = []
    for result in results:
        for order in ORDERS:
            sittings = result.sittings[order]
            table = segment_table(world, sittings)
            rows = len(table["position"])
            tables.append(table | {
                "budget": np.full(rows, result.budget), "order": np.full(rows, order),
                "paper": np.repeat(np.arange(len(sittings)), rows // len(sittings))})
    return {name: narrow(np.concatenate([table[name] for table in tables])) for name in COLUMNS}


def responses(results: Iterable[Sat], traced: int) -> dict[str, np.ndarray]:
    """Token ids of the first papers' responses, one after another, and how to cut them."""
    kept = [(result.budget, ORDERS.index(order), paper, sitting)
            for result in results for order in ORDERS
            for paper, sitting in enumerate(result.sittings[order][:traced])]
    budget, order, paper, sittings = zip(*kept, strict=True)
    whole = {"budget": budget, "order": order, "paper": paper,
             "length": [len(s.ids) for s in sittings], "finished": [s.finished for s in sittings],
             "ids": np.array([i for s in sittings for i in s.ids], dtype=int)}
    return {f"response_{name}": narrow(values) for name, values in whole.items()}


def bound_arrays(results: Sequence[Rational]) -> dict[str, np.ndarray]:
    """Outcomes as they are; bounds as [results, orders, papers, ...]."""
    outcomes = {f"outcome_{name}": narrow(value)
                for name, value in vars(results[0].outcomes).items()}
    return outcomes | {
        "tagged": np.array([r.tagged for r in results]),
        "budget": np.array([r.budget for r in results]),
    } | {f.name: np.array([[getattr(r.bounds[order], f.name) for order in ORDERS]
                           for r in results]) for f in fields(Bound)}


def save_rollouts(
    folder: Path, setting: Setting, results: Sequence[Sat | Rational], records: list[dict],
    split: str = "test", traced: int = TRACED,
) -> None:
    """Write the folder in one piece; an earlier one is replaced only at the very end."""
    sat = [result for result in results if isinstance(result, Sat)]
    rational = [result for result in results if isinstance(result, Rational)]

    def fill(temporary: Path) -> None:
        manifest = make_manifest(setting.world, setting.papers, split, setting.seed)
        write_json(temporary / "papers.json", asdict(manifest))
        write_json(temporary / "records.json", records)
        for method in dict.fromkeys(result.method for result in sat):
            own = [result for result in sat if result.method == method]
            np.savez_compressed(temporary / f"{method}.npz", allow_pickle=False,
                                **problem_columns(setting.world, own), **responses(own, traced))
        if rational:
            np.savez_compressed(temporary / "rational.npz", allow_pickle=False,
                                **bound_arrays(rational))

    write_folder(folder, fill)


def _read(folder: Path, name: str) -> dict[str, np.ndarray]:
    verify_folder(folder)
    path = folder / f"{name}.npz"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.npz")))
        raise ValueError(f"{folder} holds no {name!r}; it has {known}")
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def load_columns(folder: Path, method: str) -> dict[str, np.ndarray]:
    """`COLUMNS` of one method, each one entry a problem sat.

    Raises:
        ValueError: a folder that is not whole, or does not hold the method.
    """
    arrays = _read(folder, method)
    return {name: arrays[name] for name in COLUMNS}


def load_points(folder: Path, method: str, budget: int, order: str) -> np.ndarray:
    """Problems solved, one number a paper: what `evaluation.paired_difference` compares.

    Raises:
        ValueError: see `load_columns`; or a budget or order that was not sat.
    """
    columns = load_columns(folder, method)
    here = (columns["budget"] == budget) & (columns["order"] == order)
    if not here.any():
        raise ValueError(f"{folder}: {method} did not sit order {order!r} under budget {budget}")
    return np.bincount(columns["paper"][here], columns["correct"][here])


def load_bounds(folder: Path) -> tuple[dict[tuple[bool, int, str], Bound], Outcomes]:
    """(tagged, budget, order) -> bound, and the outcomes that it follows from, without tags.

    Raises:
        ValueError: see `load_columns`.
    """
    arrays = _read(folder, "rational")
    bounds = {
        (bool(tagged), int(budget), order): Bound(*(arrays[f.name][i, j] for f in fields(Bound)))
        for i, (tagged, budget) in enumerate(zip(arrays["tagged"], arrays["budget"], strict=True))
        for j, order in enumerate(ORDERS)}
    outcomes = Outcomes(*(arrays[f"outcome_{f.name}"] for f in fields(Outcomes)))
    return bounds, replace(outcomes, cost=outcomes.cost.astype(int), skip=int(outcomes.skip),
                           tag=int(outcomes.tag))


def load_sittings(
    world: World, tokenizer, folder: Path, method: str, budget: int, order: str,
    root: Path | None = None,
) -> list[Sitting]:
    """The exams of the first papers as they were sat, for a method that sits whole papers.

    Everything is worked out again from the token ids: segments, costs, marks.

    Args:
        root: local folder of the datasets (see `sources.load_problems`).

    Raises:
        ValueError: see `load_points`; papers of another world; or a method that sits parts of
            papers.
    """
    if world.method(method).way != "whole":
        raise ValueError(f"{method} sits parts of papers, whose responses do not stand alone; "
                         "see load_columns")
    manifest, arrays = read_manifest(folder / "papers.json"), _read(folder, method)
    if manifest.world != world.name:
        raise ValueError(f"{folder} holds papers of the world {manifest.world}, not {world.name}")
    setting = Setting(world, restore_papers(manifest, root), manifest.seed)
    here = (arrays["response_budget"] == budget) & (
        arrays["response_order"] == ORDERS.index(order))
    if not here.any():
        raise ValueError(f"{folder}: {method} did not sit order {order!r} under budget {budget}")
    exams = setting.exams(order)
    ends = np.cumsum(arrays["response_length"].astype(int))
    sittings = []
    for i in np.flatnonzero(here):
        exam = exams[arrays["response_paper"][i]]
        ids = arrays["response_ids"][ends[i] - arrays["response_length"][i] : ends[i]].tolist()
        response = parse_response(world, tokenizer, ids, len(exam.problems))
        correct = grade(world, list(zip(exam.problems, response.segments, strict=True)))
        sittings.append(Sitting(exam, budget, tuple(ids), bool(arrays["response_finished"][i]),
                                response, tuple(correct)))
    return sittings
