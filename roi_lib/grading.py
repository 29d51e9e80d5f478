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
import builtins
import functools
import gc
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import chain
from pathlib import Path
from types import BuiltinFunctionType

from roi_lib.exams import Segment
from roi_lib.problems import Problem
from roi_lib.worlds import World

#: Longer answers are wrong: no gold answer comes near, and parsing them may never end.
MAX_ANSWER_CHARACTERS = 1_000
SECONDS_PER_ANSWER = 5
BYTES_PER_WORKER = 2 * 2**30  # of address space
WORKERS = min(4, os.cpu_count() or 1)
PAIRS_PER_RUN = 16  # that one worker grades in a row


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
    given = dict.fromkeys(  # each pair once
        (problem.answer, segment.answer) for problem, segment in pairs
        if segment.answer and not segment.skipped and len(segment.answer) <= MAX_ANSWER_CHARACTERS)
    same = GRADERS[world.grader]
    todo = sorted(given)  # a run of equal gold answers stays with one worker, which parses it once
    runs = [todo[i : i + PAIRS_PER_RUN] for i in range(0, len(todo), PAIRS_PER_RUN)]
    with ThreadPoolExecutor(WORKERS) as threads:
        marked = threads.map(lambda run: [(pair, same(*pair)) for pair in run], runs)
        marks = dict(chain.from_iterable(marked))
    return [marks.get((problem.answer, segment.answer), False) for problem, segment in pairs]


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
        start = time.monotonic()
        timer = threading.Timer(SECONDS_PER_ANSWER, self.process.kill)
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
        late = time.monotonic() - start >= SECONDS_PER_ANSWER
        return line.strip() or ("too slow" if late else "crashed")

    def close(self) -> None:
        """Kill the process, take its exit status, so that no zombie stays, and close its pipes."""
        self.process.kill()
        self.process.communicate()


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


_pools: dict[int, Pool] = {}


def pool() -> Pool:
    """The pool of this process, which ends with it; a forked child has one of its own."""
    process = os.getpid()
    return _pools.get(process) or _pools.setdefault(process, Pool())  # two threads may start it


@atexit.register
def close_pool() -> None:
    """End this process's workers; the next answer starts new ones."""
    _pools.pop(os.getpid(), Pool()).close()


def differ(gold, answer) -> bool:
    """Whether two sympy expressions are far apart at one point of no significance.

    math-verify tries to simplify their difference first, which takes 30 times as long. What is
    no expression or has no value there is left to it, but for an expression and an infinite set:
    these are never equal.
    """
    from sympy import Expr, Rational, Set

    for one, other in ((gold, answer), (answer, gold)):
        if isinstance(one, Set) and one.is_finite_set is False and isinstance(other, Expr):
            return not other.is_Matrix
    if any(not isinstance(e, Expr) or e.is_Matrix or e.is_Symbol for e in (gold, answer)):
        return False
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    point = {symbol: Rational(613 + 100 * i, 997) for i, symbol in enumerate(symbols)}
    try:
        a, b = (complex(e.evalf(15, subs=point)) for e in (gold, answer))
    except (TypeError, ValueError, OverflowError):  # an unknown function, infinity
        return False
    return abs(a - b) > 1e-5 * max(1, abs(a), abs(b))


def parse_fast() -> None:
    """Let math-verify's parser look at a rule's context (LL) only where it fails without (SLL).

    What SLL can parse, LL parses into the same tree, in twice the time (ANTLR's documentation).
    """
    from antlr4 import CommonTokenStream
    from antlr4.atn.PredictionMode import PredictionMode
    from latex2sympy2_extended.latex2sympy2 import PSParser

    full = PSParser.math

    def math(parser):
        parser._interp.predictionMode = PredictionMode.SLL
        try:
            return full(parser)
        except Exception:  # what the grammar's error listener raises
            lexer = parser.getTokenStream().tokenSource
            lexer.reset()  # it, too, must meet its errors again
            parser.setTokenStream(CommonTokenStream(lexer))
            parser._interp.predictionMode = PredictionMode.LL
            return full(parser)

    PSParser.math = math


def name_fast() -> None:
    """Let sympy's parser of plain text import all of sympy's names once, not for every text."""
    from sympy import Max, Min
    from sympy.parsing import sympy_parser

    full, names = sympy_parser.parse_expr, {}
    exec("from sympy import *", names)  # from here on as in `full`
    names |= {k: f for k, f in vars(builtins).items() if isinstance(f, BuiltinFunctionType)}
    names |= {"max": Max, "min": Min}

    def parse_expr(*args, global_dict=None, **options):
        return full(*args, global_dict=global_dict or dict(names), **options)

    sympy_parser.parse_expr = parse_expr


def serve() -> None:
    """What a worker does: read pairs, write verdicts, until its input ends."""
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (BYTES_PER_WORKER, BYTES_PER_WORKER))
    from math_verify import parse, verify

    parse_fast()
    name_fast()
    gc.freeze()  # parsing makes many short-lived objects: look for cycles among them less often
    gc.set_threshold(100_000, 20, 20)

    @functools.lru_cache(1_000)  # every gold answer is met again and again
    def read(text: str) -> list:
        return parse(f"\\boxed{{{text}}}", parsing_timeout=None, raise_on_error=True)

    def compare(gold: str, answer: str) -> str:
        golds, answers = read(gold), read(answer)
        if not answers or not golds:
            return "unreadable"
        same = not differ(golds[0], answers[0]) and verify(
            golds, answers, timeout_seconds=None, raise_on_error=True)
        return "equal" if same else "different"

    alarm = getattr(signal, "alarm", lambda seconds: None)  # not on Windows
    print("ready", flush=True)
    for line in sys.stdin:
        alarm(SECONDS_PER_ANSWER + 2)  # should the parent die first, the system ends a hanging one
        try:
            result = compare(*json.loads(line))
        except MemoryError:
            result = "too big"
        except Exception:  # math-verify and sympy raise all kinds on what they cannot read
            result = "unreadable"
        print(result, flush=True)
        alarm(0)
