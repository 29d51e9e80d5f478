"""Sources: the paper's datasets, and problems of your own.

Datasets are read by hub id at a pinned commit, or from a local root with folders of the same ids.
None of their text is kept here. Left out and counted, never mended, are rows that cannot be graded
and training problems that a test problem of the same source (nearly) repeats, see `find_overlaps`.
"""

import functools
import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from roi_lib.problems import Problem, closing_brace, is_generated
from roi_lib.worlds import SKIP_ANSWER, TIERS, World, check_choice

#: Rows whose published gold answer is wrong, by problem id.
KNOWN_FLAWS = {"openai/gsm8k/main/test/454": "labelled 150, but the right answer is 240"}
#: Share of common word triples from which on two statements are near-duplicates.
NEAR = 0.7

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """One split of a dataset on the hub."""

    id: str  # hub id, and the folder's name below a local root
    revision: str  # the commit on the hub; a local root has no revisions
    configs: tuple[str | None, ...]  # configurations to join (None: the default one)
    split: str  # the hub's split
    rows: int  # how many there are at that commit, in all configurations
    read: Callable[[Mapping], tuple[str, str, str]]  # row -> (statement, gold, worked solution)


def read_gsm8k(row: Mapping) -> tuple[str, str, str]:
    """GSM8K: the gold answer follows `####`; calculator notes `<<...>>` are taken out."""
    solution, _, answer = row["answer"].partition("####")
    answer = answer.strip().replace(",", "")
    return row["question"], answer, f"{re.sub('<<.*?>>', '', solution)}\\boxed{{{answer}}}"


def read_math(row: Mapping) -> tuple[str, str, str]:
    """MATH: the gold answer is in the solution's closed boxes; boxes that differ leave none."""
    text, answers = row["solution"], set()
    for box in re.finditer(r"\\boxed\s*\{", text):
        if (end := closing_brace(text, box.end() - 1)) is not None:
            answers.add(text[box.end() : end].strip())
    return row["problem"], answers.pop() if len(answers) == 1 else "", text


def read_answer(row: Mapping) -> tuple[str, str, str]:
    """MATH-500 and AIME: a column for the answer; where there is no solution, it stands for one."""
    answer = str(row["answer"]).strip()
    return row["problem"], answer, row.get("solution") or f"\\boxed{{{answer}}}"


SUBJECTS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra",
            "number_theory", "prealgebra", "precalculus")
GSM8K = "openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866", ("main",)
MATH = "EleutherAI/hendrycks_math", "21a5633873b6a120296cce3e2df9d5550074f4a3", SUBJECTS
MATH_500 = "HuggingFaceH4/MATH-500", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be", (None,)
AIME = "AI-MO/aimo-validation-aime", "13f9e12f613e720c2a2b2f345dd04b998a29494d", (None,)
AIME_25 = "math-ai/aime25", "563bb8404243c5f09de6ec262f2db674fe5bce9b", (None,)
DATASETS: dict[tuple[str, str], Dataset] = {
    ("gsm8k", "train"): Dataset(*GSM8K, "train", 7_473, read_gsm8k),
    ("gsm8k", "test"): Dataset(*GSM8K, "test", 1_319, read_gsm8k),
    ("math", "train"): Dataset(*MATH, "train", 7_500, read_math),
    ("math", "test"): Dataset(*MATH_500, "test", 500, read_answer),
    ("aime", "train"): Dataset(*AIME, "train", 90, read_answer),
    ("aime", "test"): Dataset(*AIME_25, "test", 30, read_answer),
}


def flaw(text: str, answer: str) -> str:
    """Why a problem cannot be graded ("" where it can)."""
    gold, bare = answer.strip(), re.sub(r"\\[{}]", "", answer)
    closed = closing_brace(f"{{{bare}}}", 0) == len(bare) + 1
    if not text.strip() or not gold:
        return "there is no single gold answer" if text.strip() else "the statement is empty"
    fine = closed and len(gold) <= 200 and re.search(r"\w", gold) and gold != SKIP_ANSWER
    return "" if fine else f"the gold answer {gold[:20]!r} is none"


def read_rows(source: Dataset, root: Path | None) -> Iterator[tuple[str, Mapping]]:
    """Id and content of every row of a dataset; see `load_source`."""
    import datasets  # slow to import, and needed by the paper world only

    datasets.disable_progress_bars()
    place = source.id if root is None else str(root / source.id)
    if root is not None and not Path(place).is_dir():
        raise FileNotFoundError(f"no dataset folder {place}; --data must hold {source.id}")
    options = {"revision": source.revision} if root is None else {}
    for config in source.configs:
        try:
            rows = datasets.load_dataset(place, config, split=source.split, **options)
        except (OSError, datasets.exceptions.DatasetsError) as error:
            raise FileNotFoundError(f"cannot read {source.id} from {root or 'the hub'} ({error}); "
                                    "give a local folder with --data") from error
        for i, row in enumerate(rows):
            yield "/".join(filter(None, (source.id, config, source.split, str(i)))), row


def load_source(family: str, tier: str, split: str,
                root: Path | None) -> tuple[list[Problem], dict[str, str]]:
    """All problems of one dataset, and its rows that were left out: id -> reason. A local `root`
    holds the dataset under its hub id, more or fewer rows are logged; None reads the hub.
    `FileNotFoundError`: not to be had; `ValueError`: no such source or column, other rows."""
    check_choice(f"source of the {split} split", family,
                 [name for name, own in DATASETS if own == split])
    source, problems, left_out = DATASETS[family, split], [], {}
    for name, row in read_rows(source, root):
        row = {column: "" if value is None else value for column, value in row.items()}
        try:
            text, answer, solution = source.read(row)
        except KeyError as error:
            raise ValueError(f"{name} has no column {error}, but {', '.join(row)}") from error
        if reason := KNOWN_FLAWS.get(name) or flaw(text, answer):
            left_out[name] = reason
        else:
            problems.append(Problem(name, text, answer, solution, tier, family))
    if (found := len(problems) + len(left_out)) != source.rows:
        message = f"{source.id}, {source.split}: {found} rows, but {source.rows} are published"
        if root is None:
            raise ValueError(f"{message} at {source.revision}")
        log.warning("%s; results on this copy in %s cannot be compared", message, root)
    return problems, left_out


@functools.cache
def load_problems(family: str, tier: str, split: str, root: Path | None) -> tuple[Problem, ...]:
    """The usable problems of one dataset, read once a process; what is left out is logged. From a
    training split also goes what meets the source's test split. See `load_source`."""
    problems, left_out = load_source(family, tier, split, root)
    if split == "train":
        test, _ = load_source(family, tier, "test", root)
        left_out |= {own: f"{kind} of {other}" for own, other, kind in find_overlaps(problems, test)}
    if left_out:
        log.warning("%s, %s split: %d rows are left out, first %s: %s", family, split,
                    len(left_out), *next(iter(left_out.items())))
    return tuple(p for p in problems if p.id not in left_out)


def load_pool(world: World, split: str, root: Path | None = None) -> list[Problem] | None:
    """All problems of a world of datasets, by tier and source; None where they are generated."""
    return None if is_generated(world) else [
        problem for tier in TIERS for family in world.families[tier]
        for problem in load_problems(family, tier, split, root)]


def find_overlaps(train: Sequence[Problem],
                  test: Sequence[Problem]) -> list[tuple[str, str, str]]:
    """(id, id, kind) of each training and test problem that should never meet. "duplicate": equal
    but for white space and case. "near-duplicate": of the runs of three words (signs are words
    too) that either statement has, both have at least 70 %."""
    def read(text: str) -> tuple[list[str], set[tuple[str, ...]]]:
        words = re.findall(r"\w+|[^\w\s]", text.lower())
        return words, set(zip(words, words[1:], words[2:], strict=False)) or {tuple(words)}

    tests, holders, found = {p.id: read(p.text) for p in test}, defaultdict(list), []
    for name, (_, runs) in tests.items():
        for run in runs:
            holders[run].append(name)
    for problem in train:
        words, runs = read(problem.text)
        common = Counter(name for run in runs for name in holders.get(run, ()))
        for name, n in common.items():
            if tests[name][0] == words:
                found.append((problem.id, name, "duplicate"))
            elif n >= NEAR * (len(runs) + len(tests[name][1]) - n):
                found.append((problem.id, name, "near-duplicate"))
    return found


def read_problem(line: str, name: str, family: str) -> Problem:
    """A problem from one line of `load_jsonl`; `ValueError` says what is wrong with it."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    row = {"id": name, "solution": f"\\boxed{{{row.get('answer')}}}"} | row
    for field in ("problem", "answer", "tier", "solution"):
        if not isinstance(row.get(field), str) or not row[field].strip():
            raise ValueError(f"field {field!r} must be a non-empty text")
    if reason := flaw(row["problem"], row["answer"]):
        raise ValueError(reason)
    check_choice("tier", row["tier"], TIERS)
    return Problem(str(row["id"]), row["problem"], row["answer"], row["solution"], row["tier"],
                   family)


def load_jsonl(path: Path) -> list[Problem]:
    """Your own problems: JSON Lines of {"problem", "answer", "tier"}, "solution" and "id" optional.
    `ValueError` names file and line that are not such UTF-8 objects, or repeat an id or problem."""
    problems, seen = [], {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            if line.strip():
                text = line.decode("utf-8-sig")
                problems.append(read_problem(text, f"{path.stem}/{number}", path.stem))
                for key in (problems[-1].id, problems[-1].text):
                    if seen.setdefault(key, number) != number:
                        raise ValueError(f"repeats line {seen[key]}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {getattr(error, 'msg', error)}; each line "
                             "must be a JSON object of UTF-8 text") from error
    return problems
