r"""Grading: is the answer in a problem's box the gold answer?

The pocket world's answers are integers and compared as such. Real answers are compared by the
rules below, and by `math-verify` only where no rule decides. Most of them refuse a credit that
math-verify 0.9 gives (`52_7` for `52_8`, `12^2` for 144); in doubt, no point is given.

- The first closed box of the segment is the answer (`exams.boxed`): `\boxed{4} or \boxed{5}` is 4.
- A number is compared exactly, and must be worked out: for 144, neither `12^2` nor `143.9999999`.
- A gold answer that is no plain number (`\sqrt{2}`) is never met by a rounded decimal.
- Units are left out, not converted. `\%` is one: `50\%` is 50, as both datasets write it, not 0.5.
- A base is part of a number: `52_8` is neither `52_7` nor `52`.
- A chain of equations counts by its last member, but not `3 = \sqrt{2}`, which opens with a number.
- A set is no pair: for `(1,2)`, `1,2` will do, but not `\{1,2\}`.
- Words are compared as words: for `\text{east}`, `East` will do, but not `seat`.

math-verify can hang or eat all memory on a short answer, and its own time-outs work on the main
thread only. It runs in a few worker processes that live as long as this one. An answer that takes
too long, too much memory, or its worker's life is wrong, and the worker is replaced.
"""

import atexit
import functools
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

from roi_lib.exams import Segment
from roi_lib.problems import Problem
from roi_lib.worlds import World

#: Longer answers are wrong: no gold answer comes near, and parsing them may never end.
MAX_ANSWER_CHARACTERS = 1_000
SECONDS_PER_ANSWER = 5
BYTES_PER_WORKER = 2 * 2**30  # of address space
WORKERS = min(4, os.cpu_count() or 1)


def same_integer(gold: str, answer: str) -> bool:
    """Whether two texts are the same integer; anything that is none is wrong."""
    digits = answer.strip()
    return digits.isascii() and digits.isdigit() and int(digits) == int(gold)


_LAYOUT = re.compile(r"\\displaystyle(?![a-z])|(?<!\\)\\[!,;: ]"
                     r"|\\left(?![a-z])|\\right(?![a-z])|~|(?<!\\)\$|\\\$")
_THOUSANDS = re.compile(r"(?<=\d)\s*(?:,|\{,\})\s*(?=\d{3}(?!\d))")
#: Words at the end: `\text{ cm}^2`, or a plain ` inches`.
_UNIT = re.compile(r"\s*(?:\\(?:text|mathrm|mbox|textbf)\s*\{([^{}\d]*)\}|(?<=\d)\s+([A-Za-z .]+))"
                   r"(?:\^\{?[23]\}?)?\s*$")
#: Words that change a number, and so are no unit of it.
_NO_UNIT = {"pi", "or", "and", "not", "to", "from", "half", "halves", "third", "thirds", "quarter",
            "quarters", "dozen", "hundred", "thousand", "million", "billion", "trillion", "squared",
            "cubed", "factorial", "base", "mod", "times", "plus", "minus", "over", "less", "more"}
_SIGN, _DECIMAL = r"(?P<sign>[-+]?)\s*", r"(?:\d+\.?\d*|\.\d+)"
_NUMBER = re.compile(
    rf"{_SIGN}(?:(?P<decimal>{_DECIMAL})"
    r"|(?:(?P<whole>\d+)\s*)?\\[dt]?frac\s*(?:(?P<a>\d)|\{\s*(?P<top>-?\d+)\s*\})"
    r"\s*(?:(?P<b>\d)|\{\s*(?P<bottom>\d+)\s*\})"
    r"|(?P<over>\d+)\s*/\s*(?P<under>\d+))", re.ASCII)


def tidy(text: str) -> str:
    """An answer without layout, unit, percent or degree sign, and a leading `x =`."""
    text = " ".join(_LAYOUT.sub("", text.replace("\u2212", "-")).split())
    text = _THOUSANDS.sub("", text)
    text = re.sub(r"^\\boxed\s*\{(.*)\}$", r"\1", text).strip()
    text = re.sub(r"^[A-Za-z]\s*=(?!=)\s*", "", text)
    unit = _UNIT.search(text)
    if unit and not _NO_UNIT & {*re.findall("[a-z]+", (unit[1] or unit[2] or "").lower())}:
        text = text[: unit.start()] or text
    return re.sub(r"(?:\s*(?:\\?%|\^\s*\{?\s*\\circ\s*\}?|\\degree|\u00b0))+$|(?<=\d)\.$", "",
                  text).strip()


def read_number(text: str) -> Fraction | None:
    r"""The number that a tidy text writes out (12, -0.5, 3/4, `1\frac{1}{2}`), or None."""
    match = _NUMBER.fullmatch(text)
    if not match:
        return None
    part = match.groupdict()
    top = part["a"] or part["top"] or part["over"]
    if part["decimal"]:
        value = Fraction(part["decimal"])
    else:
        bottom = int(part["b"] or part["bottom"] or part["under"])
        if bottom == 0:
            return None
        value = Fraction(int(top), bottom) + int(part["whole"] or 0)
    return -value if part["sign"] == "-" else value


def read_words(text: str) -> str | None:
    r"""The words of `\text{(C)}` or `east`, in small letters; None where there is more to it."""
    bare = re.sub(r"\\(?:text|mathrm|mbox|textbf)\s*\{([^{}]*)\}", r"\1", text).strip()
    is_words = re.fullmatch(r"\([A-Z]\)|[A-Za-z]{2}[A-Za-z ,.'-]*", bare) or (
        bare != text and re.fullmatch("[A-Z]", bare))
    return bare.strip("() .").lower() if is_words else None


def read_based(text: str) -> tuple[str, str] | None:
    """Digits and base of `52_8` or `52_{8}`, or None."""
    match = re.fullmatch(r"(-?[0-9A-Z]+)\s*_\s*\{?\s*(\d+)\s*\}?", text)
    return (match[1].lstrip("0"), match[2]) if match else None


def verdict(gold: str, answer: str) -> str:
    """How an answer fares: "equal", or why it is not ("different", "not worked out", ...)."""
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return "too long"
    if answer.strip() == gold.strip():
        return "equal"
    gold, answer = tidy(gold), tidy(answer)
    number, given = read_number(gold), read_number(answer)
    if number is not None:
        return "not worked out" if given is None else "equal" if given == number else "different"
    if given is not None and "." in answer:
        return "rounded"
    for read in (read_based, read_words):
        if read(gold) is not None:
            given = read(answer) or (answer.lower() if read is read_words else None)
            return "equal" if given == read(gold) else "different"
    opens_with_number = "=" not in gold and re.match("[^A-Za-z]*=", answer)
    pair_for_set = {gold[:1], answer[:1]} == {"(", "\\"} and r"\{" in (gold[:2], answer[:2])
    if opens_with_number or pair_for_set:
        return "different"
    return pool().ask(gold, answer)


def same_math(gold: str, answer: str) -> bool:
    """Whether two LaTeX answers are equal by the rules of this module."""
    return verdict(gold, answer) == "equal"


GRADERS = {"integer": same_integer, "math": same_math}


def grade(world: World, pairs: Sequence[tuple[Problem, Segment]]) -> list[bool]:
    """Which segments earn their problem's point; no answer and a skip earn nothing.

    Raises:
        RuntimeError: math-verify does not start, so that nothing can be said about any answer.
    """
    def texts(problem: Problem, segment: Segment) -> tuple[str, str] | None:
        given = segment.answer is not None and not segment.skipped
        if given and len(segment.answer) <= MAX_ANSWER_CHARACTERS:
            return problem.answer, segment.answer
        return None

    asked = [texts(*pair) for pair in pairs]
    different = list(dict.fromkeys(a for a in asked if a))
    same = GRADERS[world.grader]
    with ThreadPoolExecutor(WORKERS) as threads:
        marks = dict(zip(different, threads.map(lambda a: same(*a), different), strict=True))
    return [marks.get(a, False) for a in asked]


def is_correct(world: World, problem: Problem, segment: Segment) -> bool:
    """Whether one segment earns its problem's point."""
    return grade(world, [(problem, segment)])[0]


class Worker:
    """One process that compares answers; it speaks JSON lines and can be killed at any time.

    It is a bare interpreter, neither forked nor spawned by `multiprocessing`: that works from
    threads, notebook kernels and scripts without a main guard, and on Windows.
    """

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from roi_lib.grading import serve; serve()"],
            cwd=Path(__file__).resolve().parent.parent, start_new_session=True, text=True,
            encoding="utf-8", stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL)
        if self.process.stdout.readline() != "ready\n":
            self.close()
            raise RuntimeError("math-verify does not start, so answers cannot be graded; "
                               "run python -m roi_lib doctor")

    def ask(self, gold: str, answer: str) -> str:
        """The verdict on one pair; "too slow" or "crashed" when the worker did not live."""
        late = threading.Event()
        timer = threading.Timer(SECONDS_PER_ANSWER, lambda: (late.set(), self.process.kill()))
        timer.daemon = True
        timer.start()
        try:
            self.process.stdin.write(json.dumps([gold, answer]) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:  # it died while it was idle
            line = ""
        finally:
            timer.cancel()
        return line.strip() or ("too slow" if late.is_set() else "crashed")

    def close(self) -> None:
        """Kill the process and take its exit status, so that no zombie stays."""
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        try:
            self.process.stdin.close()
        except BrokenPipeError:  # words it never read
            pass


class Pool:
    """A fixed number of places for workers, started when first needed; safe for threads."""

    def __init__(self, size: int = WORKERS) -> None:
        self.workers: set[Worker] = set()
        self.places: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        for _ in range(size):
            self.places.put(None)

    def ask(self, gold: str, answer: str) -> str:
        """The verdict on one pair.

        A worker may have been killed from outside: after a crash the pair is tried once more.
        """
        for _ in range(2):
            worker, result = self.places.get(), "crashed"
            try:
                if worker is None:
                    worker = Worker()
                    self.workers.add(worker)
                result = worker.ask(gold, answer)
            finally:
                lost = result in ("crashed", "too slow", "too big")
                if worker and lost:
                    self.workers.discard(worker)
                    worker.close()
                self.places.put(None if lost else worker)
            if result != "crashed":
                break
        return result

    def close(self) -> None:
        """End all workers."""
        for worker in list(self.workers):
            worker.close()
        self.workers.clear()


_pool: Pool | None = None
_lock = threading.Lock()


def pool() -> Pool:
    """The pool of this process, which ends with it."""
    global _pool
    with _lock:
        if _pool is None:
            _pool = Pool()
        return _pool


@atexit.register
def close_pool() -> None:
    """End this process's workers; the next answer starts new ones."""
    global _pool
    if _pool is not None:
        _pool.close()
        _pool = None


def forget_pool() -> None:
    """In a forked child: the workers are the parent's, and its lock may have been held."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=forget_pool)


def serve() -> None:
    """What a worker does: read pairs, write verdicts, until its input ends."""
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (BYTES_PER_WORKER, BYTES_PER_WORKER))
    from math_verify import parse, verify

    @functools.lru_cache(1_000)  # every gold answer is met again and again
    def read(text: str) -> list:
        return parse(f"\\boxed{{{text}}}", parsing_timeout=None, raise_on_error=True)

    def compare(gold: str, answer: str) -> str:
        golds, answers = read(gold), read(answer)
        if not answers or not golds:
            return "unreadable"
        same = verify(golds, answers, timeout_seconds=None, raise_on_error=True)
        return "equal" if same else "different"

    print("ready", flush=True)
    for line in sys.stdin:
        if hasattr(signal, "alarm"):  # should the parent die first, the system ends a hanging one
            signal.alarm(SECONDS_PER_ANSWER + 2)
        try:
            result = compare(*json.loads(line))
        except MemoryError:
            result = "too big"
        except Exception:  # math-verify and sympy raise all kinds on what they cannot read
            result = "unreadable"
        print(result, flush=True)
        if hasattr(signal, "alarm"):
            signal.alarm(0)
