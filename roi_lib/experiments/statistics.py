"""What the real datasets look like, in counts, lengths and ids: the file that notebook 02 reads.

Lengths are tokens of `data/gsm8k-bpe`, more than of Qwen2.5's tokenizer, most of all for LaTeX. It
is made by `python -m roi_lib.experiments.statistics ROOT data/exam-statistics.json`."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from roi_lib.grading import normalize, read_number, read_words
from roi_lib.problems import SPLITS, Problem
from roi_lib.store.checkpoints import load_tokenizer
from roi_lib.store.files import write_json
from roi_lib.store.sources import DATASETS, NEAR, find_overlaps, load_source
from roi_lib.worlds import PAPER

PERCENTILES = (5, 25, 50, 75, 95)


def describe(tokenizer, problems: Sequence[Problem], left_out: dict[str, str]) -> dict:
    """Counts and lengths of one split of one source; None: it has no worked solutions."""
    def percentiles(values: list[int]) -> list[int]:
        return np.percentile(values, PERCENTILES).round().astype(int).tolist()

    golds = [normalize(p.answer) for p in problems]
    kinds = ["number" if read_number(gold, commas=False) is not None else
             "words" if read_words(gold) else "expression" for gold in golds]
    found = {"problems": len(problems), "left_out": left_out, "statement_tokens": percentiles(
        list(map(len, tokenizer([p.text for p in problems]).input_ids)))}
    worked = [p.solution for p in problems if p.solution != f"\\boxed{{{p.answer}}}"]
    costs = list(map(len, tokenizer(worked).input_ids)) if worked else []
    levels = [PAPER.level_of(cost) for cost in costs]
    return found | {
        "solution_tokens": percentiles(costs) if worked else None,
        "levels": [levels.count(k) for k in range(PAPER.skip_level + 1)] if worked else None,
        "answers": {kind: kinds.count(kind) for kind in ("number", "words", "expression")}}


def statistics(root: Path) -> dict:
    """Everything the file holds, from a local root of the datasets."""
    tokenizer, sources = load_tokenizer(PAPER.tokenizer), {}
    for tier, (family,) in PAPER.families.items():
        loaded = {split: load_source(family, tier, split, root) for split in SPLITS}
        own = {split: {"id": DATASETS[family, split].id} | describe(tokenizer, *loaded[split])
               for split in SPLITS}
        overlaps = find_overlaps(loaded["train"][0], loaded["test"][0])
        sources[family] = {"tier": tier, "overlaps": overlaps} | own
    return {"tokenizer": PAPER.tokenizer, "percentiles": list(PERCENTILES),
            "level_edges": list(PAPER.level_edges), "near": NEAR, "sources": sources}


if __name__ == "__main__":
    write_json(Path(sys.argv[2]), statistics(Path(sys.argv[1])))
