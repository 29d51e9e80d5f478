"""Lists of papers as small JSON files, so that others can take the very same exams.

A list holds ids and seeds, never the text of a problem. Generated problems are drawn again from
the seed; others are looked up in a pool. Either way each id must be there, and the statements must
be the same: a copy of a dataset may number its rows otherwise.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
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
    """The list of papers that `draw_papers` drew with this seed; `ValueError`: not of one mix."""
    mixes = {tuple(p.tier for p in paper) for paper in papers}
    if len(mixes) != 1:
        raise ValueError(f"the papers of a list share one mix of tiers; here are {len(mixes)}")
    return PaperList(world.name, split, seed, list(orders), list(mixes.pop()),
                     [[p.id for p in paper] for paper in papers], fingerprint(papers))


def read_paper_list(path: Path) -> PaperList:
    """A list of papers from its file; `ValueError` says what is wrong with it."""
    content, names = read_json(path), [field.name for field in fields(PaperList)]
    if not isinstance(content, dict) or set(content) != set(names):
        raise ValueError(f"{path}: a list of papers has the fields {', '.join(names)}")
    found = PaperList(**content)

    def is_list(value, kind: type = str, known: Sequence[str] = ()) -> bool:
        return isinstance(value, list) and value != [] and all(
            isinstance(one, kind) and (one in known or not known) for one in value)

    right = {
        "world": found.world in list(WORLDS), "split": found.split in SPLITS,
        "seed": type(found.seed) is int, "orders": is_list(found.orders, known=ORDERS),
        "tiers": is_list(found.tiers, known=TIERS), "fingerprint": is_list([found.fingerprint]),
        "papers": is_list(found.papers, list) and all(map(is_list, found.papers))}
    if wrong := [name for name in names if not right[name]]:
        raise ValueError(f"{path}: {wrong[0]} is not what a list of papers has there; make it anew "
                         "with --write-papers")
    return found


def restore_papers(paper_list: PaperList,
                   pool: Sequence[Problem] | None = None) -> list[tuple[Problem, ...]]:
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
