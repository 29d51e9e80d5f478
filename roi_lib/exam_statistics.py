"""What the real datasets look like, in numbers: the file that notebook 02 reads.

    python -m roi_lib.exam_statistics --data ../shared/data --out data/exam-statistics.json

The file holds counts, lengths and ids, no text. Lengths are tokens of `data/gsm8k-bpe`, which
counts higher than Qwen2.5's tokenizer, most of all for LaTeX.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from roi_lib.checkpoints import load_tokenizer
from roi_lib.files import write_json
from roi_lib.grading import read_number, read_words, tidy
from roi_lib.problems import Problem
from roi_lib.sources import DATASETS, NEAR, find_overlaps, load_source
from roi_lib.worlds import PAPER, TIERS

PERCENTILES = (5, 25, 50, 75, 95)


def spread(values: Sequence[int]) -> list[int]:
    """The percentiles of some lengths, in whole tokens."""
    return [int(x) for x in np.percentile(values, PERCENTILES).round()]


def answer_kind(answer: str) -> str:
    """"number", "words" or "expression": which part of the grader decides."""
    if read_number(tidy(answer)) is not None:
        return "number"
    return "words" if read_words(tidy(answer)) else "expression"


def describe(tokenizer, problems: Sequence[Problem], left_out: dict[str, str]) -> dict:
    """Counts and lengths of one split of one source."""
    def lengths(texts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids]

    kinds = [answer_kind(p.answer) for p in problems]
    solved = [p.solution for p in problems if p.solution != f"\\boxed{{{p.answer}}}"]
    costs = lengths(solved) if solved else []
    levels = [PAPER.level_of(cost) for cost in costs]
    return {
        "problems": len(problems),
        "left_out": left_out,
        "statement_tokens": spread(lengths([p.text for p in problems])),
        "solution_tokens": spread(costs) if costs else None,
        "levels": [levels.count(k) for k in range(PAPER.skip_level + 1)] if costs else None,
        "answers": {kind: kinds.count(kind) for kind in ("number", "words", "expression")},
    }


def statistics(root: Path) -> dict:
    """Everything the file holds, from a local root of the datasets."""
    tokenizer = load_tokenizer(PAPER.tokenizer)
    sources = {}
    for tier in TIERS:
        for family in PAPER.families[tier]:
            loaded = {split: load_source(family, tier, split, root) for split in ("train", "test")}
            overlaps = find_overlaps(loaded["train"][0], loaded["test"][0])
            sources[family] = {
                "tier": tier,
                "overlaps": [[o.train, o.test, o.kind] for o in overlaps],
                **{split: {"id": DATASETS[family, split].id} | describe(tokenizer, *loaded[split])
                   for split in loaded},
            }
    return {"tokenizer": PAPER.tokenizer, "percentiles": list(PERCENTILES),
            "level_edges": list(PAPER.level_edges), "near": NEAR, "sources": sources}


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="local root of the datasets")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    args = parser.parse_args()
    write_json(args.out, statistics(args.data))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
