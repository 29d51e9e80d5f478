"""Manifests: a set of papers as a small JSON file, so that others can sit the very same papers.

A manifest holds ids and seeds, never the text of a problem. Generated problems are drawn again
from the seed; real ones are looked up in their datasets. Either way each id must be there, and
the statements must be the same: a copy of a dataset may number its rows otherwise.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from roi_lib.exams import draw_papers
from roi_lib.problems import FAMILIES, Problem
from roi_lib.sources import SPLITS, load_problems
from roi_lib.worlds import ORDERS, TIERS, World, get_world


@dataclass(frozen=True)
class Manifest:
    """A set of papers.

    Attributes:
        world: the world's name.
        split: "train" or "test".
        seed: what the papers were drawn with; paper i in medium order is
            `order_problems(paper, "medium", f"{seed}/{i}")`.
        orders: the orders in which they are sat.
        tiers: the tier of each problem, the same for every paper.
        papers: ids of the problems of each paper.
        fingerprint: of the statements, see `fingerprint`.
    """

    world: str
    split: str
    seed: int
    orders: list[str]
    tiers: list[str]
    papers: list[list[str]]
    fingerprint: str


def fingerprint(papers: Sequence[Sequence[Problem]]) -> str:
    """16 hexadecimal digits of the hash of all statements, white space folded as in prompts."""
    lines = "\n".join(" ".join(p.text.split()) for paper in papers for p in paper)
    return hashlib.sha256(lines.encode(errors="surrogatepass")).hexdigest()[:16]


def make_manifest(
    world: World,
    papers: Sequence[Sequence[Problem]],
    split: str,
    seed: int,
    orders: Sequence[str] = ORDERS,
) -> Manifest:
    """The manifest of papers that `draw_papers` drew with this seed.

    Raises:
        ValueError: no papers, or papers of different tiers.
    """
    mixes = {tuple(p.tier for p in paper) for paper in papers}
    if len(mixes) != 1:
        raise ValueError(f"the papers of a manifest share one mix of tiers; here are {len(mixes)}")
    return Manifest(world.name, split, seed, list(orders), list(mixes.pop()),
                    [[p.id for p in paper] for paper in papers], fingerprint(papers))


def read_manifest(path: Path) -> Manifest:
    """A manifest from its file.

    Raises:
        ValueError: not such a file; the message names what is wrong with it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    names = {field.name for field in fields(Manifest)}
    if not isinstance(content, dict) or set(content) != names:
        raise ValueError(f"{path}: a manifest has the fields {', '.join(sorted(names))}")
    get_world(content["world"])
    for name, known in (("orders", ORDERS), ("tiers", TIERS)):
        if not isinstance(content[name], list) or not content[name] or any(
                value not in known for value in content[name]):
            raise ValueError(f"{path}: {name} must be a list of {', '.join(known)}")
    if content["split"] not in SPLITS or type(content["seed"]) is not int:
        raise ValueError(f"{path}: split must be train or test, and seed a whole number")
    if not isinstance(content["fingerprint"], str):
        raise ValueError(f"{path}: fingerprint must be a text")
    check_papers(path, content["papers"], len(content["tiers"]))
    return Manifest(**content)


def check_papers(path: Path, papers, n: int) -> None:
    """Refuse papers that are not lists of `n` different ids."""
    if not isinstance(papers, list) or not papers:
        raise ValueError(f"{path}: papers must be a list of lists of ids")
    for i, paper in enumerate(papers):
        is_ids = isinstance(paper, list) and all(isinstance(name, str) for name in paper)
        if not is_ids or len(paper) != n or len(set(paper)) != n:
            raise ValueError(f"{path}: paper {i} must hold {n} different ids, as tiers does")


def restore_papers(
    manifest: Manifest, root: Path | None = None, problems: list[Problem] | None = None
) -> list[tuple[Problem, ...]]:
    """The papers themselves.

    Args:
        root: local folder of the datasets (see `sources.load_problems`).
        problems: the pool of your own that the papers were drawn from.

    Raises:
        ValueError: an id is not to be found (the message names the first and counts them), or
            the statements are others.
    """
    world = get_world(manifest.world)
    tiers = dict.fromkeys(manifest.tiers)
    if problems is None and world.families[manifest.tiers[0]][0] in FAMILIES:
        drawn = draw_papers(world, len(manifest.papers), split=manifest.split,
                            seed=manifest.seed, tiers=manifest.tiers)
        problems = [p for paper in drawn for p in paper]
    elif problems is None:
        problems = [p for tier in tiers for family in world.families[tier]
                    for p in load_problems(family, tier, manifest.split, root)]
    known = {p.id: p for p in problems}
    missing = sorted({name for paper in manifest.papers for name in paper} - set(known))
    if missing:
        raise ValueError(f"{len(missing)} problems of the manifest are not to be found, first "
                         f"{missing[0]}; it was made from other data or another version")
    papers = [tuple(known[name] for name in paper) for paper in manifest.papers]
    if fingerprint(papers) != manifest.fingerprint:
        raise ValueError("the manifest's ids name other statements here; "
                         "it was made from another copy of the data")
    return papers
