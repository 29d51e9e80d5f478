r"""Grading: is the answer in a problem's box the gold answer? Notebook 02.

The pocket world's answers are compared as integers, real ones by the rules of `tidy` and `decide`,
and by `math-verify` where no rule decides. Most rules refuse a credit that math-verify 0.9 gives.
"""

import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

from roi_lib.worlds import SKIP_ANSWER, World

MAX_ANSWER_CHARACTERS = 1_000  # no gold answer comes near, and parsing more may never end
SECONDS_PER_ANSWER = 5  # of computing: neither a busy nor a stopped machine decides a mark
BYTES_PER_PROCESS = 2 * 2**30  # of address space, on Linux
PROCESSES = min(4, os.cpu_count() or 1)
_LAYOUT = re.compile(r"\\(?:displaystyle|left|right)(?![a-z])|(?<!\\)\\[!,;: ]|~|\\?\$")
_THOUSANDS = re.compile(r"(?<=\d)\s*(?:,|\{,\})\s*(?=\d{3}(?!\d))")
_TEXT = r"\\(?:text|mathrm|mbox|textbf)\s*\{"
# Words at the end (`\text{ cm}^2`, or a plain ` inches`), but for those that change a number.
_UNIT = re.compile(rf"\s*(?:{_TEXT}([^{{}}\d]*)\}}|(?<=\d)\s+([A-Za-z .]+))(?:\^\{{?[23]\}}?)?\s*$")
_NO_UNIT = set("pi or and not to from half halves third thirds quarter quarters dozen hundred "
               "thousand million billion trillion squared cubed factorial base mod times plus "
               "minus over less more".split())
_SIGNS = re.compile(r"(?:\s*(?:\\?%|\^\s*\{?\s*\\circ\s*\}?|\\degree|\u00b0))+$|(?<=\d)\.$")
_NUMBER = re.compile(  # sign; decimal, or whole part, top and bottom, or top and bottom
    r"([-+]?)\s*(?:(\d+\.?\d*|\.\d+)|(?:(\d+)\s*)?\\[dt]?frac\s*(?:(\d)|\{\s*(-?\d+)\s*\})"
    r"\s*(?:(\d)|\{\s*(\d+)\s*\})|(\d+)\s*/\s*(\d+))", re.ASCII)


def tidy(text: str) -> str:
    r"""An answer without layout, leading `x =` and unit: a unit is left out, not converted. `\%` is
    one: `50\%` is 50, as both datasets write it, not 0.5."""
    text = " ".join(_LAYOUT.sub("", text.replace("\u2212", "-")).split())
    text = re.sub(r"^\\boxed\s*\{(.*)\}$", r"\1", _THOUSANDS.sub("", text)).strip()
    text = re.sub(r"^[A-Za-z]\s*=(?!=)\s*", "", text)
    unit = _UNIT.search(text)
    if unit and not _NO_UNIT & {*re.findall("[a-z]+", (unit[1] or unit[2] or "").lower())}:
        text = text[: unit.start()] or text
    return _SIGNS.sub("", text).strip()


def read_number(text: str) -> Fraction | None:
    r"""The number that a tidy text writes out (12, -0.5, 3/4, `1\frac{1}{2}`), or None."""
    match = _NUMBER.fullmatch(text)
    sign, decimal, whole, *rest = match.groups() if match else ("", "", "", "0", "0")
    parts = [int(part) for part in rest if part]
    if parts[1:] == [0]:
        return None
    value = Fraction(decimal) if decimal else Fraction(*parts) + int(whole or 0)
    return -value if sign == "-" else value


def read_words(text: str) -> str | None:
    r"""The words of `\text{(C)}` or `east`, in small letters; None where there is more to it."""
    bare = re.sub(rf"{_TEXT}([^{{}}]*)\}}", r"\1", text).strip()
    pattern = r"\([A-Z]\)|[A-Za-z]{2}[A-Za-z ,.'-]*" + ("" if bare == text else "|[A-Z]")
    return bare.strip("() .").lower() if re.fullmatch(pattern, bare) else None


def read_based(text: str) -> tuple[str, str] | None:
    """Digits and base of `52_8` or `52_{8}`, or None."""
    match = re.fullmatch(r"(-?[0-9A-Z]+)\s*_\s*\{?\s*(\d+)\s*\}?", text)
    return (match[1].lstrip("0"), match[2]) if match else None


def decide(gold: str, answer: str) -> str:
    """The verdict by rules; "" leaves it to math-verify, which takes the last of `x = y = z`."""
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return "too long"
    if answer.strip() == gold.strip():
        return "equal"
    gold, answer = tidy(gold), tidy(answer)
    number, given = read_number(gold), read_number(answer)
    if number is not None:  # for 144, neither `12^2` nor `143.9999999`
        return "not worked out" if given is None else "equal" if given == number else "different"
    if given is not None and "." in answer:  # which never meets a gold answer like `\sqrt{2}`
        return "rounded"
    for read in (read_based, read_words):  # `52_8` is not `52`; words are compared as words
        if read(gold) is not None:
            return "equal" if read(gold) == (read(answer) or answer.lower()) else "different"
    opens_with_number = "=" not in gold and re.match("[^A-Za-z]*=", answer)  # `3 = \sqrt{2}`
    pair_for_set = {gold[:1], answer[:1]} == {"(", "\\"} and r"\{" in (gold[:2], answer[:2])
    return "different" if opens_with_number or pair_for_set else ""


def verdicts(pairs: list[tuple[str, str]]) -> list[str]:
    """The `verdict` on each pair of gold answer and answer; several are computed at a time."""
    words = [decide(*pair) for pair in pairs]
    rest = [[*map(tidy, pair)] for pair, word in zip(pairs, words, strict=True) if not word]
    size = max(20, -(-len(rest) // PROCESSES))  # a process takes half a second to start
    runs = [rest[i : i + size] for i in range(0, len(rest), size)]
    with ThreadPoolExecutor(PROCESSES) as threads:
        found = (word for run in threads.map(ask, runs) for word in run)
        return [word or next(found) for word in words]


def verdict(gold: str, answer: str) -> str:
    """How an answer fares: "equal", or why not ("different", "not worked out", "too slow", ...)."""
    return verdicts([(gold, answer)])[0]


def same_integer(gold: str, answer: str) -> bool:
    """Whether two texts are the same integer; anything that is none is wrong."""
    return bool(re.fullmatch(r"\s*[0-9]{1,1000}\s*", answer)) and int(answer) == int(gold)


def same_math(gold: str, answer: str) -> bool:
    """Whether two LaTeX answers are equal by the rules of this module."""
    return verdict(gold, answer) == "equal"


GRADERS = {"integer": same_integer, "math": same_math}


def grade(world: World, pairs: list[tuple[str, str | None]]) -> list[bool]:
    """Which answers earn the point, from pairs of gold answer and answer; each is graded once.
    `RuntimeError`: math-verify does not start."""
    todo = sorted({pair for pair in pairs if pair[1] not in (None, "", SKIP_ANSWER)})
    same = GRADERS[world.grader]
    marks = verdicts(todo) if same is same_math else [same(*pair) for pair in todo]
    right = {pair for pair, mark in zip(todo, marks, strict=True) if mark in (True, "equal")}
    return [pair in right for pair in pairs]


def ask(pairs: list[list[str]]) -> list[str]:
    """What math-verify says of tidy pairs, in a process that is started anew where it dies: a short
    answer can hang it or eat all memory. The process is a bare interpreter: those of a pool would
    run a script without a main guard again, or fork torch's threads."""
    words: list[str] = []
    while len(words) < len(pairs):
        code = f"from roi_lib.grading import serve; serve({SECONDS_PER_ANSWER})"
        run = subprocess.run([sys.executable, "-c", code], input=json.dumps(pairs[len(words) :]),
                             capture_output=True, text=True, start_new_session=True)
        if not run.stdout:
            raise RuntimeError("math-verify does not start; run python -m roi_lib doctor")
        words += run.stdout.splitlines()[1:]
        if len(words) < len(pairs):  # it died on the next pair
            words.append({-signal.SIGPROF: "too slow", 3: "too big"}.get(run.returncode, "crashed"))
    return words


def serve(seconds: float) -> None:
    """What that process does: read pairs, and print a verdict on each."""
    if sys.platform == "linux":
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (BYTES_PER_PROCESS, BYTES_PER_PROCESS))
    from math_verify import parse, verify
    print("ready", flush=True)
    for pair in json.load(sys.stdin):
        signal.setitimer(signal.ITIMER_PROF, seconds)  # after these, the system ends the process
        try:
            gold, answer = (parse(f"\\boxed{{{text}}}", parsing_timeout=None, raise_on_error=True)
                            for text in pair)
            same = verify(gold, answer, timeout_seconds=None, raise_on_error=True)
            print("equal" if same else "different" if gold and answer else "unreadable", flush=True)
        except MemoryError:
            sys.exit(3)  # the next process has its memory free
        except Exception:  # math-verify and sympy raise all kinds on what they cannot read
            print("unreadable", flush=True)
