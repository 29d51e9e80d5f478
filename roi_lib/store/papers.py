"""Lists of papers as small JSON files, so that others can take the very same exams.

A list holds ids and seeds, never a text. Generated problems are drawn again, others looked up in a
pool; either way the statements must be the same: a copy of a dataset may be numbered otherwise."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from roi_lib.exams import draw_papers
from roi_lib.problems import SPLITS, Problem
from roi_lib.store.files import read_json
from roi_lib.worlds import ORDERS, TIERS, WORLDS, World, get_world


@dataclass(frozen=True)
class PaperList:
    """A set of papers."""
    world: str  # its name
    split: str  # "train" or "test"
    seed: int  # of the drawing; medium order: `order_problems(paper, "medium", f"{seed}/{i}")`
    orders: list[str]  # the orders in which they are taken
    tiers: list[str]  # the tier of each problem, the same for every paper
    papers: list[list[str]]  # ids of the problems of each paper
    fingerprint: str  # of the statements, see `fingerprint`


def fingerprint(papers: Sequence[Sequence[Problem]]) -> str:
    """16 hexadecimal digits of the hash of all statements, white space folded as in prompts."""
    lines = "\n".join(" ".join(p.text.split()) for paper in papers for p in paper)
    return hashlib.sha256(lines.encode(errors="surrogatepass")).hexdigest()[:16]


def make_paper_list(world: World, papers: Sequence[Sequence[Problem]], split: str, seed: int,
                    orders: Sequence[str] = ORDERS) -> PaperList:
    """The list of papers that `draw_papers` drew with this seed, all of one mix of tiers."""
    return PaperList(world.name, split, seed, list(orders), [p.tier for p in papers[0]],
                     [[p.id for p in paper] for paper in papers], fingerprint(papers))


def read_paper_list(path: Path) -> PaperList:
    """A list of papers from its file; `ValueError` names a field that is missing or not right."""
    def is_list(value, kind: type = str, known: Sequence[str] = ()) -> bool:
        return isinstance(value, list) and value != [] and all(
            isinstance(one, kind) and (one in known or not known) for one in value)

    content = read_json(path)
    get = content.get
    right = {
        "world": get("world") in list(WORLDS), "split": get("split") in SPLITS,
        "seed": type(get("seed")) is int and get("seed") >= 0,
        "orders": is_list(get("orders"), known=ORDERS), "tiers": is_list(get("tiers"), known=TIERS),
        "papers": is_list(get("papers"), list) and all(map(is_list, get("papers")))
        and len(set(map(len, get("papers")))) == 1, "fingerprint": type(get("fingerprint")) is str}
    if wrong := [name for name, fine in right.items() if not fine]:
        raise ValueError(f"{path}: {wrong[0]} is not what a list of papers has there; make it anew "
                         "with --write-papers")
    return PaperList(**{name: content[name] for name in right})


def restore_papers(paper_list: PaperList, pool: Sequence[Problem] | None = None) -> list[tuple]:
    """The papers themselves, from the pool they were drawn from (None: generated problems);
    `ValueError`: an id is not to be found, or the statements are others."""
    if pool is None:
        drawn = draw_papers(get_world(paper_list.world), len(paper_list.papers),
                            split=paper_list.split, seed=paper_list.seed, tiers=paper_list.tiers)
        pool = [problem for paper in drawn for problem in paper]
    known = {problem.id: problem for problem in pool}
    if missing := sorted(set().union(*paper_list.papers) - set(known)):
        raise ValueError(f"{len(missing)} problems of the list are not to be found, first "
                         f"{missing[0]}; it was made from other data or another version")
    papers = [tuple(known[name] for name in paper) for paper in paper_list.papers]
    if fingerprint(papers) != paper_list.fingerprint:
        raise ValueError("the ids of the list name other statements here; it was made from "
                         "another copy of the data")
    return papers
