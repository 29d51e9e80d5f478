"""Sources: the paper's datasets, and problems of your own.

Datasets are read by hub id at a pinned commit, or from a local root with folders of the same ids.
None of their text is kept here. Left out and counted, never mended, are rows that cannot be graded
and training problems that a test problem of the same source (nearly) repeats, see `find_overlaps`.
"""

import functools
import json
import logging
import re
from collections import Counter, defaultdict, namedtuple
from collections.abc import Mapping, Sequence
from pathlib import Path

from roi_lib.grading import ask, normalize, read_number, read_words
from roi_lib.problems import Problem, closing_brace, is_generated
from roi_lib.worlds import SKIP_ANSWER, TIERS, World, check_choice

#: Rows whose published gold answer is wrong, by problem id. Each was solved twice. Of GSM8K the 470
#: rows were read whose last calculator note is not the gold answer, and 665 that use a number from
#: nowhere or pass over one; rows that can be read in two ways are not here.
KNOWN_FLAWS = {
    f"openai/gsm8k/main/{row}": f"labelled {gold}, but the right answer is {right}"
    for row, gold, right in (
        ("train/356", 66, 64), ("train/803", 17, 16), ("train/1081", 2460, 1060),
        ("train/1776", 94, 104), ("train/2770", 106, 108), ("train/3110", 64, 67),
        ("train/3263", 16, 4), ("train/3529", 3, 13), ("train/4428", 560, 840),
        ("train/4796", 140, 120), ("train/5181", 10, 15), ("train/5782", 380, 330),
        ("train/5936", 500, 1400), ("train/7182", 4, 10), ("train/7444", 280, 140),
        ("test/454", 150, 240))}
NEAR = 0.7  # share of common word triples from which on two statements are near-duplicates
log = logging.getLogger(__name__)


def read_row(row: Mapping) -> tuple[str, str, str]:
    """Statement, gold answer ("": no single one) and worked solution of a row of a dataset."""
    if "question" in row:  # GSM8K: the answer follows ####, and <<...>> are calculator notes
        solution, _, answer = row["answer"].partition("####")
        answer = answer.strip().replace(",", "")
        return row["question"], answer, f"{re.sub('<<.*?>>', '', solution)}\\boxed{{{answer}}}"
    if "answer" in row:  # MATH-500 and AIME
        answer = str(row["answer"]).strip()
        return row["problem"], one_number(answer), row.get("solution") or f"\\boxed{{{answer}}}"
    text, answers = row["solution"], set()  # MATH: what all closed boxes hold
    for box in re.finditer(r"\\boxed\s*\{", text):
        if (end := closing_brace(text, box.end() - 1)) is not None:
            answers.add(text[box.end() : end].strip())
    return row["problem"], one_number(answers.pop()) if len(answers) == 1 else "", text


def one_number(gold: str) -> str:
    """A gold answer of MATH like 58,500 is one number; grading takes a plain comma for a list's."""
    return gold.replace(",", "{,}") if re.fullmatch(r"\d{1,3}(,\d{3})+", gold) else gold


#: Hub id (also the folder's name below a local root), commit, configurations to join, all rows.
Dataset = namedtuple("Dataset", "id revision configs rows")
SUBJECTS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra",
            "number_theory", "prealgebra", "precalculus")
GSM8K = "openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866", ("main",)
MATH = "EleutherAI/hendrycks_math", "21a5633873b6a120296cce3e2df9d5550074f4a3", SUBJECTS
MATH_500 = "HuggingFaceH4/MATH-500", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be", (None,)
AIME = "AI-MO/aimo-validation-aime", "13f9e12f613e720c2a2b2f345dd04b998a29494d", (None,)
AIME_25 = "math-ai/aime25", "563bb8404243c5f09de6ec262f2db674fe5bce9b", (None,)
DATASETS = {
    ("gsm8k", "train"): Dataset(*GSM8K, 7_473), ("gsm8k", "test"): Dataset(*GSM8K, 1_319),
    ("math", "train"): Dataset(*MATH, 7_500), ("math", "test"): Dataset(*MATH_500, 500),
    ("aime", "train"): Dataset(*AIME, 90), ("aime", "test"): Dataset(*AIME_25, 30)}


def flaw(text: str, answer: str) -> str:
    """Why a problem cannot be graded ("" where it can)."""
    gold, bare = answer.strip(), re.sub(r"\\[{}]", "", answer)
    closed = closing_brace(f"{{{bare}}}", 0) == len(bare) + 1
    if not text.strip() or not gold:
        return "there is no single gold answer" if text.strip() else "the statement is empty"
    fine = closed and len(gold) <= 200 and re.search(r"\w", gold) and gold != SKIP_ANSWER
    return "" if fine else f"the gold answer {gold[:20]!r} is none"


def load_source(family: str, tier: str, split: str, root: Path | None) -> tuple[list, dict]:
    """All problems of one dataset, and its rows that were left out: id -> reason. A local `root`
    holds the dataset under its hub id, and a copy's other number of rows is logged; None reads the
    hub. `FileNotFoundError`: not to be had; `ValueError`: no such source or column, other rows."""
    import datasets  # slow to import, and needed by the paper world only

    check_choice(f"source of the {split} split", family, [f for f, own in DATASETS if own == split])
    source, problems, left_out = DATASETS[family, split], [], {}
    revision = source.revision if root is None else None
    place = source.id if root is None else str(Path(root, source.id).absolute())
    datasets.disable_progress_bars()
    for config in source.configs:
        try:
            rows = datasets.load_dataset(place, config, split=split, revision=revision)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise FileNotFoundError(f"cannot read {source.id} from {root or 'the hub'} ({error}); "
                                    "give a local folder with --data") from error
        for i, row in enumerate(rows):
            name = "/".join(filter(None, (source.id, config, split, str(i))))
            row = {column: "" if value is None else value for column, value in row.items()}
            try:
                text, answer, solution = read_row(row)
            except KeyError as error:
                raise ValueError(f"{name} has no column {error}, but {', '.join(row)}") from error
            if reason := KNOWN_FLAWS.get(name) or flaw(text, answer):
                left_out[name] = reason
            else:
                problems.append(Problem(name, text, answer, solution, tier, family))
    if (found := len(problems) + len(left_out)) != source.rows:
        message = f"{source.id}, {split}: {found} rows, but {source.rows} are published"
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
        left_out |= {p: f"{kind} of {other}" for p, other, kind in find_overlaps(problems, test)}
    if left_out:
        log.warning("%s, %s split: %d rows are left out, first %s: %s", family, split,
                    len(left_out), *next(iter(left_out.items())))
    return tuple(p for p in problems if p.id not in left_out)


def load_pool(world: World, split: str, root: Path | None = None) -> list[Problem] | None:
    """All problems of a world of datasets, by tier and source; None where they are generated."""
    return None if is_generated(world) else [
        problem for tier in TIERS for family in world.families[tier]
        for problem in load_problems(family, tier, split, root)]


def find_overlaps(train: Sequence[Problem], test: Sequence[Problem]) -> list[tuple]:
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
        for name, n in Counter(name for run in runs for name in holders.get(run, ())).items():
            if n >= NEAR * (len(runs) + len(tests[name][1]) - n):
                near = "" if tests[name][0] == words else "near-"
                found.append((problem.id, name, f"{near}duplicate"))
    return found


def readable(world: World, golds: list[str]) -> list[bool]:
    """Which gold answers the world's grader can read, each once in another layout: what
    math-verify cannot read, it compares as text."""
    if world.grader == "integer":
        return [re.fullmatch("[0-9]{1,1000}", gold) is not None for gold in golds]
    own = [normalize(gold) for gold in golds]
    plain = [read_number(gold) is not None or bool(read_words(gold)) for gold in own]
    rest = [gold for gold, is_plain in zip(own, plain, strict=True) if not is_plain]
    found = iter(ask([[gold, rf"\displaystyle {gold}"] for gold in rest]))
    return [is_plain or next(found) == "equal" for is_plain in plain]


def load_jsonl(path: Path, world: World) -> list[Problem]:
    """Your own problems: JSON Lines of {"problem", "answer", "tier"}, "solution" and "id" optional.
    `ValueError` names file and line that are not such UTF-8 objects, repeat an id or problem, or
    hold an answer that the world's grader cannot read."""
    problems, seen = [], {}
    lines = enumerate(path.read_bytes().split(b"\n"), start=1)
    for number, line in ((number, line) for number, line in lines if line.strip()):
        try:
            row = json.loads(line.decode("utf-8-sig"))
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
            boxed = f"\\boxed{{{row.get('answer')}}}"
            row = {"id": f"{path.stem}/{number}", "solution": boxed} | row
            json.dumps(row, ensure_ascii=False).encode()  # a lone surrogate, escaped, is no text
            texts = [row.get(field) for field in ("problem", "answer", "solution", "tier")]
            if not all(isinstance(text, str) and text.strip() for text in texts):
                raise ValueError("problem, answer, tier and solution must be texts, not empty")
            check_choice("tier", row["tier"], TIERS)
            if reason := flaw(row["problem"], row["answer"]):
                raise ValueError(reason)
            for key in (str(row["id"]), row["problem"]):
                if seen.setdefault(key, number) != number:
                    raise ValueError(f"repeats line {seen[key]}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {getattr(error, 'msg', error)}; each line "
                             "must be a JSON object of UTF-8 text") from error
        problems.append(Problem(str(row["id"]), *texts, path.stem))
    for problem, fine in zip(problems, readable(world, [p.answer for p in problems]), strict=True):
        if not fine:
            raise ValueError(f"{path}, line {seen[problem.text]}: the grader of the world "
                             f"{world.name} cannot read the answer {problem.answer!r}")
    return problems
