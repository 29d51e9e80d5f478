r"""Grading: is the answer in a problem's box the gold answer? Notebook 02.

The pocket world compares integers. Of real answers math-verify is the judge; around it stand

    normalize         takes away what changes no value: layout, wrappers, currency, units
    read_number       the number that a text writes out; numbers are compared exactly
    decide, differs   refuse what math-verify would credit; decide says what it must be asked
    ask, serve        math-verify in processes that may hang or die, and are started anew

A unit is left out, not converted; `\%` is one: `50\%` is 50, as the datasets write it, not 0.5."""

import functools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

from roi_lib.problems import closing_brace
from roi_lib.worlds import SKIP_ANSWER, World

MAX_ANSWER_CHARACTERS = 1_000  # no gold answer comes near, and parsing more may never end
SECONDS_PER_ANSWER = 5  # of computing: neither a busy nor a stopped machine decides a mark
BYTES_PER_PROCESS = 2 * 2**30  # of address space, on Linux
PROCESSES = min(4, os.cpu_count() or 1)
log = logging.getLogger(__name__)

_WRAPPER = r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf)|mbox|operatorname|underline|boxed)\s*"
_LETTERS = "[ACFJKLNVWghlms]"  # units of one letter: only in a wrapper, or as in m/s
_REWRITE = [(re.compile(pattern), word) for pattern, word in (
    ("[\u2212\u2013]", "-"), ("\u00b2", "^2"), ("\u00b3", "^3"), (r"\{bmatrix\}", "{pmatrix}"),
    ("[\u00bc-\u00be\u2150-\u215e]",  # fractions of one character
     lambda half: " " + unicodedata.normalize("NFKC", half[0]).replace("\u2044", "/")),
    (r"\\[cdt]frac(?![a-z])", r"\\frac"), (r"\\in(?![a-z])", "="), (r"_\s*\{\s*(\d+)\s*\}", r"_\1"),
    (r"(?<=\d)(?:\{,\}|,\\!\s*|')(?=\d{3}(?!\d))", ""),  # thousands beyond doubt
    (r"\\(?:displaystyle|textstyle|left|right|bf|rm)(?![A-Za-z])", ""),
    (r"(?<!\\)(?:\\[][()!]|\$)|\*\*", ""),
    (r"(?<!\\)\\[ ,:;]|\\q?quad(?![a-z])|[~\s]+", " "),
    (r"(\d)\s*\\(?:times|cdot)\s*10\s*\^\s*(?:(\d)|\{\s*(-?\d{1,3})\s*\})", r"\1e\2\3"),
    (rf"(\d\s*){_WRAPPER}\{{\s*{_LETTERS}\s*\}}", r"\1 units"),
    (rf"{_WRAPPER}\{{((?:[^{{}}]|\{{[^{{}}]*\}})*)\}}", r" \1 "),
    (r"(?:,\s*)?\b(?:and|or)\b", ", "),
    (r"(?i)^\s*(?:the )?(?:final )?answer(?: is)?\s*[:=]?", ""))]
_MONEY = (r"\\?\$|\\(?:textdollar|pounds)(?![a-z])|[\u00a2\u00a3\u00a5\u20ac\u20b9]|Rs\.?|USD|EUR|"
          "GBP")
_CURRENCY = re.compile(rf"^([-+]?)\s*(?:{_MONEY})\s*(?=[\d.])")
_POWER = r"(?:\s*\^\s*\{?\s*[2-4]\s*\}?|\s+squared|\s+cubed)?"
_UNIT = (r"(?:(?:square|sq\.?|cubic|cu\.?)\s+)?(?:(?:(?:(?:milli|centi|kilo)?(?:met(?:er|re)|gram|"
         r"lit(?:er|re))|inch(?:es)?|foot|feet|yard|mile|pound|ounce|ton|gallon|second|minute|hour|"
         r"day|week|month|year|dollar|cent|degree|radian|unit|point|percent|people|person|student|"
         r"time|way)s?|[ckm]m|[km]g|m[lL]|k[mJWg]|lbs?|oz|ft|in|yd|mi|sec|mins?|hrs?|mph)"
         rf"(?![A-Za-z])\.?|{_MONEY}){_POWER}")
_UNITS = re.compile(rf"(?<![A-Za-z\\])\s*-?(?:/|\bper\b|\ban?\b)?\s*(?:{_UNIT}|{_LETTERS}(?=\s*/))"
                    rf"(?:\s*(?:/|per\b|\\cdot|\s)\s*(?:{_UNIT}|{_LETTERS}{_POWER}(?![A-Za-z])))*\s*$"
                    r"|\s*(?:\\?%|(?:\^\s*\{?\s*\\circ\s*\}?|\\degree|\u00b0)\s*[CF]?)\s*$")
_FRACTION = re.compile(r"\\frac\s*(?:(\d)|\{\s*([-+]?\d+)\s*\})\s*(?:(\d)|\{\s*([-+]?\d+)\s*\})",
                       re.ASCII)
_NUMBER = re.compile(  # 1,000.5 and 0.1\overline{6}, or 1/2 and 1 1/2
    r"(?P<sign>[-+]?)\s*(?:(?=\.?\d)(?P<decimal>(?:\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)|\d*)"
    r"(?:\.\d*)?(?:e-?\d{1,3})?)(?:\\overline\s*\{(?P<repeat>\d+)\})?|(?:(?P<whole>\d+)\s+(?=\d))?"
    r"(?P<top>[-+]?\d+)\s*/\s*(?P<bottom>[-+]?\d+))", re.ASCII)
_NAME = re.compile(  # x, x_1, AB, \alpha, m\angle A, f(x), Area
    r"(?:(?:m\s*)?\\angle\s*[A-Z]+|\\[a-z]+|[A-Za-z]|[A-Z]{2,3}|[A-Za-z]{4,}[A-Za-z ]*|)"
    r"(?:\s*_\s*(?:\w|\{[^{}]*\}))?'*(?:\s*\([\w\s,]*\))?")
_VAGUE = re.compile(  # no value, or more than one; and digits with a base, compared as text
    r"^(?:[<>]|\\[gl](?:e|t|eq|eqslant)(?![a-z]))|\\(?:approx|sim|neq?|not|[cl]?dots)(?![a-z])|"
    r"[?\u2248\u2026\u2260]|\.\.\.|\d_\d", re.ASCII)
_FUNCTIONS = set("sin cos tan cot sec csc log exp sqrt".split())


def normalize(text: str) -> str:
    """An answer without layout, wrappers, currency and unit."""
    for pattern, word in _REWRITE:
        text = pattern.sub(word, text)
    while (bare := re.sub(r"(?<!\.)\.$", "", text.strip(" ;,"))) != text or (
            text.startswith("{") and closing_brace(text, 0) == len(text) - 1):
        text = bare if bare != text else text[1:-1]
    return _UNITS.sub("", _CURRENCY.sub(r"\1", text)) or text


def read_number(text: str, commas: bool = True) -> Fraction | None:
    r"""The number that a normal text writes out (12, -0.5, `1\frac{1}{2}`), or None. Without
    `commas`, 1,000 is a list, as it is in a gold answer, where `1{,}000` is a number."""
    text = _FRACTION.sub(r" \1\2/\3\4 ", text).strip()
    found = _NUMBER.fullmatch(re.sub(r"^([-+]?)\s*\(([^()]*)\)$", r"\1\2", text).strip())
    if not found or (found["bottom"] and not int(found["bottom"])) or ("," in text and not commas):
        return None
    if found["bottom"]:
        value = int(found["whole"] or 0) + Fraction(int(found["top"]), int(found["bottom"]))
    else:
        digits, repeat = re.sub("[, ]", "", found["decimal"]), found["repeat"] or "0"
        period = 10 ** len(digits.partition(".")[2]) * (10 ** len(repeat) - 1)
        value = Fraction(digits) + Fraction(int(repeat), period)
    return -value if found["sign"] == "-" else value


def read_words(text: str) -> str | None:
    """The words of `East` or `(C)`, in small letters; None where there is more to it."""
    found = re.fullmatch(r"\(?([A-Z])\)?|[A-Za-z]{2}[A-Za-z ,.'-]*", text)
    return found and (found[1] or text).lower()


def split_names(text: str) -> tuple[list[str], list[str]]:
    """Names in front of a chain like `x = y = 12 + 6 = 18`, and the values that it says are equal;
    `x = 2, x = -3` is the list 2, -3."""
    name = text.partition("=")[0].strip()
    if name and _NAME.fullmatch(name):
        text = re.sub(rf"(,\s*){re.escape(name)}\s*=", r"\1", text)
    parts = [part.strip() for part in re.split(r"(?<![<>!:])=", text)]
    n = next((i for i, part in enumerate(parts[:-1]) if not _NAME.fullmatch(part)), len(parts) - 1)
    return [part.replace(" ", "") for part in parts[:n]], parts[n:]


def differs(gold: str, answer: str) -> bool:
    """Whether two expressions differ in what math-verify passes over: words, brackets, a tuple and
    a set, rounding, and signs that make an answer vague."""
    found, own = ({*re.findall(r"(?<![\\A-Za-z])[A-Za-z]{3,}", text)} for text in (answer, gold))
    square = [re.findall(r"(?<!\\sqrt)\[|\]", t) for t in (gold, answer) if t[:1] in ("(", "[")]
    pair_for_set = {gold[:1], answer[:1]} == {"(", "\\"} and r"\{" in (gold[:2], answer[:2])
    rounded = "." in answer and read_number(answer) is not None  # gold is no written-out number
    unclosed = sum(map(answer.count, "([")) != sum(map(answer.count, ")]"))
    return (bool(found - own - _FUNCTIONS or _VAGUE.search(gold) or _VAGUE.search(answer))
            or pair_for_set or rounded or unclosed or len(square) == 2 and square[0] != square[1])


def decide(gold: str, answer: str) -> tuple[str, list[tuple[str, str]]]:
    """The verdict on an answer; where it is "", it is that of math-verify on these pairs."""
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return "too long", []
    gold, answer = normalize(gold), normalize(answer)
    if re.sub(r"(?<!\d) | (?!\d)", "", gold) == re.sub(r"(?<!\d) | (?!\d)", "", answer):
        return "equal", []
    (own, wanted), (names, values) = split_names(gold), split_names(answer)
    if own and names and not {*own} & {*names}:
        return "different", []
    if len(wanted) > 1 or (own and len(values) > 1):  # an equation
        wanted, values = [gold], [answer]
    (gold,), answer = wanted, values[-1]
    number, given = read_number(gold, commas=False), read_number(answer)
    if number is not None:  # for 144, neither `12^2` nor `143.9999999`
        word = "not worked out" if given is None else "equal" if given == number else "different"
    elif words := read_words(gold):
        word = "equal" if words == (read_words(answer) or answer.lower()) else "different"
    else:
        word = "" if answer and not differs(gold, answer) else "different"
    asked = [(gold, value) for value in values[:-1]] + [(gold, answer)] * (not word)
    return "" if asked and word == "equal" else word, asked


def verdicts(pairs: list[tuple[str, str]]) -> list[str]:
    """How answers fare, from pairs of gold answer and answer: "equal", or why not ("different",
    "not worked out", "too slow", ...). Several are computed at a time."""
    decided = [decide(*pair) for pair in pairs]
    rest = [[*map(exact, pair)] for word, asked in decided if not word for pair in asked]
    size = max(20, -(-len(rest) // PROCESSES))  # a process takes half a second to start
    with ThreadPoolExecutor(PROCESSES) as threads:
        runs = threads.map(ask, [rest[i : i + size] for i in range(0, len(rest), size)])
        found = (word for run in runs for word in run)
        return [word or next((w for w in [next(found) for _ in asked] if w != "equal"), "equal")
                for word, asked in decided]


def exact(text: str) -> str:
    """The same with fractions for decimals, and with lists that cannot be read as thousands."""
    text = re.sub(r"(\d*)\.(\d+)", lambda m: rf"\frac{{{m[1]}{m[2]}}}{{1{'0' * len(m[2])}}}", text)
    return re.sub(r"(?<=\d),(?=\d)", ", ", text)


def grade(world: World, pairs: list[tuple[str, str | None]]) -> list[bool]:
    """Which answers earn the point, from pairs of gold answer and answer; each is graded once, and
    what a limit decides is logged. `RuntimeError`: math-verify does not start."""
    todo = sorted({pair for pair in pairs if pair[1] not in (None, "", SKIP_ANSWER)})
    if world.grader == "integer":
        right = {(gold, answer) for gold, answer in todo
                 if re.fullmatch(r"\s*[0-9]{1,1000}\s*", answer) and int(answer) == int(gold)}
        return [pair in right for pair in pairs]
    marks = dict(zip(todo, verdicts(todo), strict=True))
    for word in ("too slow", "too big", "crashed"):
        if n := list(marks.values()).count(word):
            log.warning("%d answers count as wrong because grading them was %s", n, word)
    return [marks.get(pair) == "equal" for pair in pairs]


def ask(pairs: list[list[str]]) -> list[str]:
    """What math-verify says of pairs, in a process that is started anew where it dies: a short
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

    @functools.lru_cache(10_000)
    def read(text: str) -> list:
        found = parse(f"\\boxed{{{text}}}", parsing_timeout=None, raise_on_error=True)
        # Worked out, rational numbers are compared exactly, others to 1,000 digits.
        return [x.doit() if getattr(x, "is_number", False) else x for x in found]

    print("ready", flush=True)
    for pair in json.load(sys.stdin):
        signal.setitimer(signal.ITIMER_PROF, seconds)  # after these, the system ends the process
        try:
            gold, answer = map(read, pair)
            same = verify(gold, answer, numeric_precision=1_000, timeout_seconds=None,
                          raise_on_error=True, allow_set_relation_comp=True)
            print("equal" if same else "different" if gold and answer else "unreadable", flush=True)
        except MemoryError:
            sys.exit(3)  # the next process has its memory free
        except Exception:  # math-verify and sympy raise all kinds on what they cannot read
            print("unreadable", flush=True)
