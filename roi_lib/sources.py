"""Sources: where a world's problems come from, generated families and real datasets alike.

The paper's datasets are read with `datasets.load_dataset`, by hub id at a pinned commit or from a
local root that holds folders of the same ids. None of their text is kept in this repository.

Rows that cannot be graded are left out and counted, never mended. Training problems that a test
problem of the same source repeats, or nearly repeats, are left out of training (`find_overlaps`).
"""

import functools
import json
import logging
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from roi_lib.problems import FAMILIES, Problem, closing_brace, sample_problem
from roi_lib.worlds import SKIP_ANSWER, TIERS, World

SPLITS = ("train", "test")
#: Rows whose published gold answer is wrong, by problem id.
KNOWN_FLAWS = {"openai/gsm8k/main/test/454": "labelled 150, but the right answer is 240"}
#: Share of common word triples from which on two statements are near-duplicates.
NEAR = 0.7

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """One split of a dataset on the hub.

    Attributes:
        id: hub id, and the folder's name below a local root.
        revision: the commit on the hub. A local root has no revisions.
        configs: configurations to join (None: the default one).
        split: the hub's split.
        rows: how many there are at that commit, in all configurations.
        read: row -> (statement, gold answer, worked solution).
    """

    id: str
    revision: str
    configs: tuple[str | None, ...]
    split: str
    rows: int
    read: Callable[[Mapping], tuple[str, str, str]]


def read_gsm8k(row: Mapping) -> tuple[str, str, str]:
    """GSM8K: the gold answer follows `####`; calculator notes `<<...>>` are taken out."""
    solution, _, answer = row["answer"].partition("####")
    answer = answer.strip().replace(",", "")
    return row["question"], answer, f"{re.sub('<<.*?>>', '', solution)}\\boxed{{{answer}}}"


def boxes(text: str) -> list[str]:
    """Contents of all closed `\\boxed{}` of a solution, in order."""
    found = []
    for opening in re.finditer(r"\\boxed\s*\{", text):
        end = closing_brace(text, opening.end() - 1)
        if end is not None:
            found.append(text[opening.end() : end].strip())
    return found


def read_math(row: Mapping) -> tuple[str, str, str]:
    """MATH: the gold answer is in the solution's box; boxes that differ leave none."""
    answers = set(boxes(row["solution"]))
    return row["problem"], answers.pop() if len(answers) == 1 else "", row["solution"]


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
    if not text.strip():
        return "the statement is empty"
    if not answer.strip():
        return "there is no single gold answer"
    if len(answer) > 200 or not re.search(r"\w", answer) or answer.strip() == SKIP_ANSWER:
        return f"the gold answer {answer.strip()[:20]!r} is none"
    bare = re.sub(r"\\[{}]", "", answer)
    matched = closing_brace(f"{{{bare}}}", 0) == len(bare) + 1
    return "" if matched else "the gold answer's braces do not match"


def read_rows(source: Dataset, root: Path | None) -> Iterator[tuple[str, Mapping]]:
    """Id and content of every row of a dataset, from a local root or from the hub.

    Raises:
        FileNotFoundError: the local folder is not there, or the hub cannot be reached.
    """
    import datasets  # slow to import, and needed by the paper world only

    datasets.disable_progress_bars()
    place = source.id if root is None else str(Path(root) / source.id)
    if root is not None and not Path(place).is_dir():
        raise FileNotFoundError(f"no dataset folder {place}; --data must hold {source.id}")
    options = {"revision": source.revision} if root is None else {}
    for config in source.configs:
        try:
            rows = datasets.load_dataset(place, config, split=source.split, **options)
        except (OSError, ConnectionError) as error:
            raise FileNotFoundError(
                f"cannot read {source.id} from the hub; give a local folder with --data"
            ) from error
        for i, row in enumerate(rows):
            yield "/".join(filter(None, (source.id, config, source.split, str(i)))), row


def load_source(
    family: str, tier: str, split: str, root: Path | None
) -> tuple[list[Problem], dict[str, str]]:
    """All problems of one real source, and its rows that were left out: id -> reason.

    A local copy with more or fewer rows than the hub's is read, but this is logged.

    Args:
        root: a local folder that holds the dataset under its hub id; None reads the hub.

    Raises:
        FileNotFoundError: the local folder is not there, or the hub cannot be reached.
        ValueError: no such source, a column that is missing, or a number of rows that is not the
            hub's.
    """
    if (family, split) not in DATASETS:
        raise ValueError(f"there is no {split} split of {family!r}")
    source, problems, left_out = DATASETS[family, split], [], {}
    for name, row in read_rows(source, root):
        row = {column: "" if value is None else value for column, value in row.items()}
        try:
            text, answer, solution = source.read(row)
        except KeyError as error:
            raise ValueError(f"{name} has no column {error}, but {', '.join(row)}") from error
        reason = KNOWN_FLAWS.get(name) or flaw(text, answer)
        if reason:
            left_out[name] = reason
        else:
            problems.append(Problem(name, text, answer, solution, tier, family))
    found = len(problems) + len(left_out)
    if found != source.rows:
        message = f"{source.id}, {source.split}: {found} rows, but {source.rows} are published"
        if root is None:
            raise ValueError(f"{message} at {source.revision}")
        log.warning("%s; results on this copy in %s cannot be compared", message, root)
    return problems, left_out


@functools.cache
def _usable(family, tier, split, root) -> tuple[tuple[Problem, ...], dict[str, str]]:
    """`load_source`, but without what training and test split share."""
    problems, left_out = load_source(family, tier, split, root)
    if split == "train":
        test, _ = load_source(family, tier, "test", root)
        left_out |= {o.train: f"{o.kind} of {o.test}" for o in find_overlaps(problems, test)}
    return tuple(p for p in problems if p.id not in left_out), left_out


def load_problems(family: str, tier: str, split: str, root: Path | None) -> list[Problem]:
    """The usable problems of one real source; how many are left out is logged.

    From a training split also goes what meets the source's test split. A process reads each
    source once.
    """
    problems, left_out = _usable(family, tier, split, root)
    if left_out:
        name, reason = next(iter(left_out.items()))
        log.warning("%s, %s split: %d rows are left out, first %s: %s", family, split,
                    len(left_out), name, reason)
    return list(problems)


@dataclass(frozen=True)
class Overlap:
    """A training and a test problem, by id, with (nearly) the same statement."""

    train: str
    test: str
    kind: str


def find_overlaps(train: Sequence[Problem], test: Sequence[Problem]) -> list[Overlap]:
    """Pairs of a training and a test problem that should never meet.

    "duplicate": equal but for white space and case. "near-duplicate": of the runs of three words
    (signs are words too) that either statement has, both have at least 70 %.
    """
    def words_of(text: str) -> list[str]:
        return re.findall(r"\w+|[^\w\s]", text.lower())

    def triples(words: list[str]) -> set[tuple[str, ...]]:
        return set(zip(words, words[1:], words[2:], strict=False)) or {tuple(words)}

    read = {p.id: words_of(p.text) for p in test}
    runs = {name: triples(words) for name, words in read.items()}
    holders = defaultdict(list)
    for name, own in runs.items():
        for run in own:
            holders[run].append(name)
    found = []
    for problem in train:
        words = words_of(problem.text)
        own = triples(words)
        common = Counter(name for run in own for name in holders.get(run, ()))
        for name, n in common.items():
            if read[name] == words:
                found.append(Overlap(problem.id, name, "duplicate"))
            elif n >= NEAR * (len(own) + len(runs[name]) - n):
                found.append(Overlap(problem.id, name, "near-duplicate"))
    return found


def load_jsonl(path: Path) -> list[Problem]:
    """Your own problems: JSON Lines of {"problem", "answer", "tier"}, "solution" and "id" optional.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is no such object, or a repeated id or statement; the message
            names file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    problems, seen = [], {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error.msg})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: not a JSON object")
        for field in ("problem", "answer", "tier"):
            if not isinstance(row.get(field), str) or not row[field].strip():
                raise ValueError(f"{where}: field {field!r} must be a non-empty text")
        reason = flaw(row["problem"], row["answer"])
        if reason:
            raise ValueError(f"{where}: {reason}")
        if row["tier"] not in TIERS:
            raise ValueError(f"{where}: tier must be one of {', '.join(TIERS)}")
        name = str(row.get("id", f"{path.stem}/{number}"))
        for key in (name, row["problem"]):
            if key in seen:
                raise ValueError(f"{where}: repeats line {seen[key]}")
            seen[key] = number
        solution = row.get("solution") or f"\\boxed{{{row['answer']}}}"
        problems.append(Problem(name, row["problem"], row["answer"], solution, row["tier"],
                                path.stem))
    return problems


def problem_stream(
    world: World,
    tier: str,
    split: str,
    seed: int,
    root: Path | None = None,
    problems: list[Problem] | None = None,
) -> Iterator[Problem]:
    """An endless seeded stream of one tier's problems.

    Generated families alternate at random and are drawn afresh. Real sources are shuffled and
    gone through again and again. `problems` replaces the world's own sources.

    Raises:
        ValueError: unknown split, or no problem of this tier.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    rng = random.Random(f"{seed}/{split}/{tier}")
    names = world.families[tier]
    if problems is None and names[0] in FAMILIES:
        while True:
            yield sample_problem(rng.choice(names), tier, split, rng)
    if problems is None:
        problems = [p for name in names for p in load_problems(name, tier, split, root)]
    pool = [p for p in problems if p.tier == tier]
    if not pool:
        raise ValueError(f"there are no {tier} problems to draw from")
    while True:
        yield from rng.sample(pool, len(pool))
