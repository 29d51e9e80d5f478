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
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

from roi_lib.worlds import SKIP_ANSWER, World

MAX_ANSWER_CHARACTERS = 1_000  # no gold answer comes near, and parsing more may never end
SECONDS_PER_ANSWER = 5  # of computing: neither a busy nor a stopped machine decides a mark
PROCESSES = min(4, os.cpu_count() or 1)
log = logging.getLogger(__name__)

_WRAPPER = r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf)|mbox|operatorname|underline|boxed)\s*"
_MONEY = r"(?:\\(?:textdollar|pounds)(?![a-z])|[¢£¥€₹]|Rs\.?|USD|EUR|GBP)"
_REWRITE = [(re.compile(pattern), word) for pattern, word in (
    ("[\u2212\u2013]", "-"), ("²", "^2"), ("³", "^3"), ("¼", " 1/4"), ("½", " 1/2"), ("¾", " 3/4"),
    (r"\\in(?![a-z])", "="), (r"_\s*\{(\d+)\}", r"_\1"), (r"\\(?:left|right)(?![a-z])", ""),
    (r"\{bmatrix\}", "{pmatrix}"), (r"(?<=\d)(?:\{,\}|,\\!\s*|')(?=\d{3}(?!\d))", ""),  # thousands
    (r"(\d)\s*\\(?:times|cdot)\s*10\s*\^\s*(?:(\d)|\{\s*(-?\d{1,3})\s*\})", r"\1e\2\3"),
    (rf"(\d(?:\s|\\[ ,])*){_WRAPPER}\{{\s*[ACFJKLNVWghlms]\s*\}}", r"\1 units"),  # else a variable
    (rf"{_WRAPPER}\{{((?:[^{{}}]|\{{[^{{}}]*\}})*)\}}", r" \1 "), (r"^\s*\{([^{}]*)\}\s*$", r"\1"),
    (r"(?:\\(?:[a-z]+style|bf|rm|quad)(?![a-z])|(?<!\\)\\[][()! ,:;]|\\?\$|\*\*|[~\s])+", " "),
    (r"[, ]*\b(?:and|or)\b ?", ", "), (r"(?i)^ ?(?:the )?(?:final )?answer(?: is)?[ :=]*", ""),
    (rf"^ ?([-+]?) ?{_MONEY} ?(?=[\d.])", r"\1"), (r"^[ ;,]+|[ ;,]*(?<!\.)\.?[ ;,]*$", ""))]
_UNIT = (r"(?:(?:(?:centi|kilo|milli)?(?:gram|liter|meter|metre)|inche?|foot|feet|yard|mile|ton|"
         "ounce|pound|gallon|second|minute|hour|day|week|month|year|cent|dollar|degree|radian|unit|"
         "point|percent|people|person|student|time|way)s?|(?:[ckm]?m|units) ?/ ?[hs]|[ckm]m|[km]g|"
         r"m[lL]|lbs?|oz|ft|in|yd|mi|sec|mins?|hrs?|mph)(?![A-Za-z])\.?(?: ?\^ ?\{? ?[23] ?\}?)?")
_UNITS = re.compile(  # -inch, square feet, km/h, m/s^2, dollars per hour, times a day; \%, degrees
    rf"(?<![A-Za-z\\])(?:[-/ ]*(?:(?:per|an?|square|sq\.?|cubic|cu\.?) )*(?:{_UNIT}|{_MONEY}))+ ?$"
    r"| ?(?:\\?%|(?:\^ ?\{? ?\\circ ?\}?|\\degree|°) ?[CF]?)$")
_FRACTION = re.compile(r"\\[cdt]?frac" + 2 * r"\s*(\d|\{\s*-?\d+\s*\})", re.ASCII)
_NUMBER = re.compile(  # 1,000.5 or 1 000.5, 0.1\overline{6}, 1/2, 1 1/2
    r"([-+]?) ?(?:(?=\.?\d)((?:\d{1,3}(?:[, ]\d{3})+|\d*)(?:\.\d*)?(?:e-?\d{1,3})?)"
    r"(?:\\overline (\d+))?|(?:(\d+) (?=\d))?(-?\d+) ?/ ?(-?[1-9]\d*))", re.ASCII)
_NAME = (  # x, x_1, AB, \alpha, m\angle A, f(x), Area
    r"(?:(?:m ?)?\\angle ?[A-Z]+|\\[a-z]+|[A-Za-z]|[A-Z]{2,3}|[A-Za-z]{4,}[A-Za-z ]*|)"
    r"(?: ?_ ?(?:\w|\{[^{}]*\}))?'*(?: ?\([\w ,]*\))?")
_VAGUE = re.compile(  # no value, or more than one; and digits with a base, compared as text
    r"(?m)^(?:[<>]|\\[gl][et])|\\(?:approx|sim|ne|not|[cl]?dots)|[?\u2248\u2026\u2260]|\.{3}|\d_\d")


def normalize(text: str) -> str:
    """An answer without layout, wrappers, currency and unit."""
    for pattern, word in _REWRITE:
        text = pattern.sub(word, text)
    return _UNITS.sub("", text) or text


def read_number(text: str, commas: bool = True) -> Fraction | None:
    r"""The number that a normal text writes out (12, -0.5, `1\frac{1}{2}`), or None. Without
    `commas`, 1,000 is a list, as it is in a gold answer, where `1{,}000` is a number."""
    text = re.sub("[{} ]+", " ", _FRACTION.sub(r" \1/\2 ", text)).strip()
    found = _NUMBER.fullmatch(re.sub(r"^([-+]?) ?\( ?([^()]*?) ?\)$", r"\1\2", text))
    if not found or ("," in text and not commas):
        return None
    sign, decimal, repeat, whole, top, bottom = found.groups("0")
    digits = re.sub("[, ]", "", decimal)
    period = 10 ** len(digits.partition(".")[2]) * (10 ** len(repeat) - 1)
    return int(f"{sign}1") * (Fraction(digits) + Fraction(int(repeat), period) + int(whole)
                              + Fraction(int(top), int(bottom) or 1))


def read_words(text: str) -> str | None:
    """The words of `East` or `(C)`, in small letters; None where there is more to it."""
    found = re.fullmatch(r"\(?([A-Z])\)?|[A-Za-z]{2}[A-Za-z ,.'-]*", text)
    return found and (found[1] or text).lower()


def split_names(text: str) -> tuple[list[str], list[str]]:
    """Names in front of a chain like `x = y = 12 + 6 = 18`, and the values that it says are equal;
    `x = 2, x = -3` is the list 2, -3."""
    front, chain = re.fullmatch(rf"((?:{_NAME} ?= ?)*)(.*)", text).groups()
    names = front.replace(" ", "").split("=")[:-1]
    for name in names:
        chain = re.sub(rf", ?{re.escape(name)} ?= ?", ", ", chain)
    return names, [value.strip() for value in re.split(r"(?<![<>!:])=", chain)]


def differs(gold: str, answer: str) -> bool:
    """Whether they differ in letters, words, brackets or signs; math-verify passes over some."""
    runs = [re.findall(r"(?<![\\A-Za-z])[A-Za-z]+", text) for text in (gold, answer)]
    letters, used = ({*"".join(run for run in some if len(run) < 3)} for some in runs)
    new = {run for run in runs[1] if len(run) > 2} - {*re.findall("[A-Za-z]+", gold)}
    own, seen = (re.findall(r"^\(|\\{|(?<!\\sqrt)\[|\]", text) for text in (gold, answer))
    uneven = sum(map(answer.count, "([")) != sum(map(answer.count, ")]"))
    return bool(letters and letters != used or new or uneven or own and seen and own != seen
                or _VAGUE.search(f"{gold}\n{answer}"))


def decide(gold: str, answer: str) -> tuple[str, list[str]]:
    """The verdict on an answer; where it is "", math-verify says if all these texts are equal."""
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return "too long", []
    gold, answer = normalize(gold), normalize(answer)
    if re.sub(r"(?<!\d) | (?!\d)", "", gold) == re.sub(r"(?<!\d) | (?!\d)", "", answer):
        return "equal", []
    (own, wanted), (names, values) = split_names(gold), split_names(answer)
    if own and names and not {*own} & {*names}:
        return "different", []
    if len(wanted) > 1 or own and len(values) > 1 and read_number(wanted[0]) is None:  # an equation
        wanted, values = [gold], [answer]
    (gold,), answer = wanted, values[-1]
    number, given, word = read_number(gold, commas=False), read_number(answer), ""
    if number is not None:  # for 144, neither `12^2` nor `143.9999999`
        word = "not worked out" if given is None else "equal" if given == number else "different"
    elif words := read_words(gold):
        word = "equal" if words == (read_words(answer) or answer.lower()) else "different"
    asked = values[:-1] if word else values  # a chain holds if all of it is equal
    word = "different" if any(differs(gold, value) for value in asked) else word
    return "" if asked and word == "equal" else word, [gold, *asked]


def verdicts(pairs: list[tuple[str, str]]) -> list[str]:
    """How answers fare, from pairs of gold answer and answer: "equal", or why not ("different",
    "not worked out", "too slow", ...). Several are computed at a time."""
    decided = [decide(*pair) for pair in pairs]
    rest = [texts for word, texts in decided if not word]
    size = max(20, -(-len(rest) // PROCESSES))  # a process takes half a second to start
    with ThreadPoolExecutor(PROCESSES) as threads:
        runs = threads.map(ask, [rest[i : i + size] for i in range(0, len(rest), size)])
        found = (word for run in runs for word in run)
        return [word or next(found) for word, _ in decided]


def grade(world: World, pairs: list[tuple[str, str | None]]) -> list[bool]:
    """Which answers earn the point, from pairs of gold answer and answer; each is graded once, and
    what a limit decides is logged. `RuntimeError`: math-verify does not start."""
    todo = sorted({pair for pair in pairs if pair[1] not in (None, "", SKIP_ANSWER)})
    words = verdicts(todo) if world.grader != "integer" else [
        "equal" if re.fullmatch(rf"\s*0*{int(gold)}\s*", answer) else "" for gold, answer in todo]
    for word in ("too slow", "too big", "crashed"):
        if n := words.count(word):
            log.warning("%d answers count as wrong because grading them was %s", n, word)
    right = {pair for pair, word in zip(todo, words, strict=True) if word == "equal"}
    return [pair in right for pair in pairs]


def ask(lists: list[list[str]]) -> list[str]:
    """Whether math-verify takes the texts of each list for equal, in a process that is started anew
    where it dies: a short answer can hang it or eat all memory. It is a bare interpreter: those of
    a pool would run a script without a main guard again, or fork torch's threads."""
    words: list[str] = []
    while len(words) < len(lists):
        code = f"from roi_lib.grading import serve; serve({SECONDS_PER_ANSWER})"
        run = subprocess.run([sys.executable, "-c", code], input=json.dumps(lists[len(words) :]),
                             capture_output=True, text=True, start_new_session=True)
        if not run.stdout:
            raise RuntimeError("math-verify does not start; run python -m roi_lib doctor")
        words += run.stdout.splitlines()[1:]
        if len(words) < len(lists):  # it died on the next list
            words.append({-signal.SIGPROF: "too slow", 3: "too big"}.get(run.returncode, "crashed"))
    return words


def serve(seconds: float) -> None:
    """What that process does: read lists of texts, and print a verdict on each."""
    if sys.platform == "linux":
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30, 2 * 2**30))  # bytes of address space
    from math_verify import parse, verify

    @functools.lru_cache(10_000)
    def read(text: str) -> list:
        # Decimals are compared exactly, as fractions that are worked out; and 1,000 is a list.
        text = re.sub(r"(\d*)\.(\d+)", lambda m: rf"\frac{{{m[1]}{m[2]}}}{{1{'0' * len(m[2])}}}",
                      re.sub(r"(?<=\d),(?=\d)", ", ", text))
        found = parse(rf"\boxed{{{text}}}", parsing_timeout=None, raise_on_error=True)
        return [x.doit() if getattr(x, "is_number", False) else x for x in found]

    print("ready", flush=True)
    for texts in json.load(sys.stdin):
        signal.setitimer(signal.ITIMER_PROF, seconds)  # after these, the system ends the process
        try:
            gold, *answers = map(read, texts)
            same = all(verify(gold, answer, numeric_precision=1_000, timeout_seconds=None,
                              raise_on_error=True, allow_set_relation_comp=True)
                       for answer in answers)
            print("equal" if same else "different", flush=True)
        except MemoryError:
            sys.exit(3)  # the next process has its memory free
        except Exception:  # math-verify and sympy raise all kinds on what they cannot read
            print("unreadable", flush=True)
