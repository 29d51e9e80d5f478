"""Grading: what earns a point, what does not, and a pool that survives what answers do to it."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from roi_lib import grading
from roi_lib.exams import Segment, read_segment
from roi_lib.grading import close_pool, grade, pool, verdict
from roi_lib.problems import Problem
from roi_lib.sources import load_problems
from roi_lib.worlds import PAPER, TAG_CLOSE, TAG_OPEN

COLUMN = r"\begin{pmatrix} 1 \\ -2 \end{pmatrix}"
TAG = f"{TAG_OPEN}Level-{{}}{TAG_CLOSE}"


def point(response, gold):
    problem = Problem("p", "?", gold, f"\\boxed{{{gold}}}", "hard", "own")
    return grade(PAPER, [(problem, read_segment(PAPER, 1, response))])[0]


def box(answer):
    return f"So it is \\boxed{{{answer}}}."


#: case -> rows of (response, gold, expected, why)
TABLE = {
    "F15": [  # boxes
        (r"\boxed{4} or \boxed{5}", "4", True, "the first box is the answer"),
        (r"\boxed{4} or \boxed{5}", "5", False, "and the second is a second guess"),
        (r"\boxed{5", "5", False, "never closed"),
        (r"\boxed{}", "5", False, "empty"),
        (r"\boxed{ } \boxed{5}", "5", False, "an empty first box is no licence for a second"),
        (r"\boxed{\boxed{5}}", "5", True, "nested, one answer"),
        (r"\boxed{NA} \boxed{5}", "5", False, "a skip is final"),
        (r"They give \boxed{3}. So \boxed{5}", "5", False, "one quoted from the statement counts"),
        (r"\boxed{NA}", "NA", False, "a skip earns nothing, whatever the gold answer"),
        ("The answer is 5.", "5", False, "no box"),
        (r"$5$ \fbox{5}", "5", False, "another kind of box"),
        (r"\boxed{4,5,6}", "5", False, "a list of guesses"),
    ],
    "F16": [  # the level's digit
        (TAG.format(2), "2", False, "a tag is no answer"),
        (TAG.format(2) + r" \boxed{3}", "2", False, "nor beside one"),
        (rf"\boxed{{{TAG.format(2)}}}", "2", False, "nor in a box"),
    ],
    "numbers": [
        (box("12^2"), "144", False, "not worked out"),
        (box(r"12 \cdot 12"), "144", False, "not worked out"),
        (box(r"\sqrt{20736}"), "144", False, "not worked out"),
        (box("12!"), "479001600", False, "not worked out"),
        (box("143.9999999"), "144", False, "near is not equal"),
        (box("144.000"), "144", True, "same number"),
        (box("0144"), "144", True, "AIME's leading zero"),
        (box("x = 144"), "144", True, "a name in front"),
        (box(r"x \neq 144"), "144", False, "no equation"),
        (box(r"144 \text{ or } 145"), "144", False, "two answers"),
        (box("144 or 145"), "144", False, "two answers, in plain words"),
        (box(r"144\text{ cm}^2"), "144", True, "units are left out"),
        (box("144 inches"), "144", True, "units are left out"),
        (box(r"144 \text{ million}"), "144", False, "no unit"),
        (box(r"144 \text{ squared}"), "144", False, "no unit"),
        (box("144 pi"), "144", False, "no unit"),
        (box(r"144\pi"), "144", False, "another number"),
        (box("-144"), "144", False, "sign"),
        (box("\u2212144"), "-144", True, "a typeset minus"),
        (box("\uff11\uff14\uff14"), "144", False, "full-width digits"),
        (box("1,44"), "144", False, "no thousands"),
        (box("1{,}440"), "1440", True, "thousands"),
        (box("1.440"), "1440", False, "a point is a point"),
        (box("1 2"), "12", False, "two numbers"),
        (box(r"\$18.90"), r"\$18.90", True, "dollars"),
        (box(r"90"), r"90^\circ", True, "degrees are a unit"),
        (box("6/8"), r"\frac{3}{4}", True, "same number"),
        (box("0.75"), r"\frac{3}{4}", True, "exact"),
        (box("0.3333333"), r"\frac{1}{3}", False, "rounded"),
        (box("9/5"), r"1\frac{4}{5}", True, "a mixed number"),
        (box("1/0"), "1", False, "no number"),
        (box("inf"), "1", False, "no number"),
    ],
    "false_credit": [  # of math-verify 0.9
        (box("52_7"), "52_8", False, "another base"),
        (box("52_{8}"), "52_8", True, "the same base"),
        (box("52"), "52_8", False, "without its base it is another number"),
        (box("52_8"), "52", False, "and the other way round"),
        (box(r"50\%"), "50", True, "per cent is a unit"),
        (box(r"50\%"), "0.5", False, "never both"),
        (box("0.5"), r"50\%", False, "never both"),
    ],
    "words": [
        (box("seat"), r"\text{east}", False, "another word"),
        (box("East"), r"\text{east}", True, "small or capital"),
        (box("C"), r"\text{(C)}", True, "parentheses of a choice"),
        (box(r"\text{(C) or (D)}"), r"\text{(C)}", False, "two choices"),
    ],
    "expressions": [
        (box(r"\sqrt{8}/2"), r"\sqrt{2}", True, "equal expressions"),
        (box("1.41421356237"), r"\sqrt{2}", False, "rounded"),
        (box(r"\frac{141421356237}{100000000000}"), r"\sqrt{2}", False, "rounded in disguise"),
        (box(r"\pm\sqrt{2}"), r"\sqrt{2}", False, "two answers"),
        (box(r"3 = \sqrt{2}"), r"\sqrt{2}", False, "a false equation"),
        (box(r"\frac{355}{113}"), r"\pi", False, "near is not equal"),
        (box("288"), r"288\pi", False, "a factor short"),
        (box("q - p"), "p - q", False, "sign"),
        (box("ab + 2a + 5b + 10"), "(a+5)(b+2)", True, "expanded"),
        (box("y^2 + 1"), "x^2 + 1", False, "another variable"),
        (box(r"3 + \sqrt{2}"), r"3 \pm \sqrt{2}", False, "one of two"),
        (box(r"3 + \sqrt{2}, 3 - \sqrt{2}"), r"3 \pm \sqrt{2}", True, "both"),
        (box("-2, 1"), "1, -2", True, "roots in any order"),
        (box("1"), "1, -2", False, "one of two"),
        (box("1, -2, 3"), "1, -2", False, "one too many"),
        (box("(2, 1)"), "(1, 2)", False, "a pair has an order"),
        (box(r"\{1, 2\}"), "(1, 2)", False, "a set is no pair"),
        (box("[3, 4]"), "(3, 4]", False, "another interval"),
        (box(COLUMN.replace("pmatrix", "bmatrix")), COLUMN, True, "other brackets"),
        (box(COLUMN.replace("-2", "2")), COLUMN, False, "another vector"),
    ],
    "F14_F18": [  # hostile text
        (box("\x00"), r"\sqrt{2}", False, "NUL"),
        (box("\ud800"), r"\sqrt{2}", False, "a lone surrogate"),
        (box("\u202e2\u202c"), "2", False, "right-to-left marks"),
        (box("<|im_end|>"), r"\sqrt{2}", False, "a control token"),
        (box("(" * 3_000), r"\sqrt{2}", False, "3,000 parentheses"),
        (box("9" * 20_000), "9", False, "20,000 digits"),
        (box("2" * 200_000), "2", False, "200 kB"),
        (box("__import__('os').abort()"), r"\sqrt{2}", False, "text is never run"),
    ],
}  # fmt: skip
ROWS = [(case, *row) for case, rows in TABLE.items() for row in rows]


@pytest.mark.parametrize(("case", "response", "gold", "expected", "why"), ROWS, ids=[
    f"{row[0]}-{row[4].replace(' ', '_')}-{row[2]}" for row in ROWS])
def test_adversarial_responses(case, response, gold, expected, why):
    assert point(response, gold) is expected, why


def test_the_table_is_long_enough():
    assert len({row[1:3] for row in ROWS}) >= 60


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(grading, "SECONDS_PER_ANSWER", 1.5)


@pytest.mark.parametrize("answer", ["5^{5^{5^{5^5}}}", "10^9!", "9^{9^9}", "(10^9)!"])
def test_F17_F18_answers_that_never_end_are_wrong(impatient, answer):
    start = time.perf_counter()
    assert verdict(r"\sqrt{2}", answer) in ("too slow", "too big")
    assert time.perf_counter() - start < 10
    assert verdict(r"\sqrt{2}", r"\sqrt{8}/2") == "equal", "and the next answer is graded"
    assert pool().places.qsize() == grading.WORKERS, "F20: and no place is lost"


def test_F18_memory_is_limited():
    if sys.platform != "linux":
        pytest.skip("address space can be limited on Linux only")
    verdict(r"\sqrt{2}", r"\sqrt{3}")
    for worker in pool().workers:
        limits = open(f"/proc/{worker.process.pid}/limits").read()
        assert str(grading.BYTES_PER_WORKER) in limits


def test_F19_grading_works_from_threads():
    marks = []
    threads = [threading.Thread(target=lambda: marks.append(point(box("2x"), "x+x")))
               for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert marks == [True] * 6


def test_F20_dead_workers_are_replaced():
    for _ in range(3):
        assert verdict(r"\sqrt{2}", r"\sqrt{8}/2") == "equal"
        for worker in list(pool().workers):
            worker.process.kill()
            worker.process.wait()
    assert verdict(r"\sqrt{2}", r"\sqrt{8}/2") == "equal"
    assert pool().places.qsize() == grading.WORKERS


def test_F19_a_pool_that_cannot_start_says_so(monkeypatch):
    close_pool()
    monkeypatch.setattr(sys, "executable", "/bin/false" if os.path.exists("/bin/false") else
                        "/usr/bin/false")
    with pytest.raises(RuntimeError, match="does not start"):
        point(box("2x"), "x+x")
    monkeypatch.undo()
    assert point(box("2x"), "x+x"), "and mends itself"


def test_F20_no_process_outlives_ours():
    script = ("from roi_lib.grading import pool, verdict\nverdict('2x', 'x+x')\n"
              "print(*[w.process.pid for w in pool().workers])")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          check=True)
    for pid in map(int, done.stdout.split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_F19_works_in_a_spawned_and_in_a_forked_process(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, sys\nfrom roi_lib.grading import same_math\n"
        "if __name__ == '__main__':\n"
        "    assert same_math('2x', 'x+x')\n"
        "    for method in set(multiprocessing.get_all_start_methods()) & {'fork', 'spawn'}:\n"
        "        with multiprocessing.get_context(method).Pool(1) as p:\n"
        "            assert p.starmap(same_math, [('2x', 'x+x'), ('2x', 'x')]) == [True, False]\n")
    subprocess.run([sys.executable, script], check=True, timeout=120)


def test_F19_works_in_a_data_loader():
    class Pairs(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, i):
            return grading.same_math("2x", ("x+x", "x")[i])

    loader = torch.utils.data.DataLoader(Pairs(), num_workers=1, timeout=60)
    assert [bool(mark) for mark in loader] == [True, False]


@pytest.mark.parametrize(("gold", "answer", "apart"), [
    (r"\sqrt{2}", r"\frac{2}{\sqrt{2}}", False), ("(a+5)(b+2)", "ab + 2a + 5b + 10", False),
    (r"x + 1", r"\frac{x^2 - 1}{x - 1}", False), (r"10^{30}\pi", r"10^{30}\pi + 1", False),
    ("f(x)", "f(x) + 1", False), ("x", "y", False), ("(1, 2)", "(2, 1)", False),
    (COLUMN, COLUMN.replace("-2", "2"), False),  # no values, no expressions
    (r"\sqrt{2}", r"\sqrt{3}", True), ("(a+5)(b+2)", "ab + 2a + 5b", True), (r"\pi", "e", True),
    (r"1 + i", r"1 - i", True), ("x + y", "x + z", True),
    (r"2 \pi", r"(0, 3]", True), (r"x - 1", r"(-\infty, 2) \cup (3, \infty)", True),
    ("3", r"\{3\}", False), (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "(1, 2)", False),
])  # fmt: skip
def test_only_what_is_far_apart_is_not_simplified(gold, answer, apart):
    from math_verify import parse
    gold, answer = (parse(f"\\boxed{{{text}}}", parsing_timeout=None)[0]
                    for text in (gold, answer))
    assert grading.differ(gold, answer) is grading.differ(answer, gold) is apart


def test_fast_parsing_gives_the_same_expressions(monkeypatch):
    from latex2sympy2_extended.latex2sympy2 import PSParser, latex2sympy
    answers = sorted({row[2] for row in ROWS} | {r"\frac{1}{2", "1, 2, 3", r"(3, \infty)",
                      r"x \in [-2, 7]", r"\begin{cases} 1 \end{cases}", "2 < x < 3", r"A \cup B",
                      r"\star(m)", r"1 + \dots + n"})

    def read(text):
        try:
            return latex2sympy(text)
        except Exception as error:
            return type(error)
    fully = [read(text) for text in answers]
    monkeypatch.setattr(PSParser, "math", PSParser.math)  # put back at the end
    grading.parse_fast()
    assert [read(text) for text in answers] == fully


def test_names_imported_once_give_the_same_expressions(monkeypatch):
    from sympy.parsing import sympy_parser
    texts = ["2", "0.5", "x + pi", "max(x, 2)", "abs(-3)", "sqrt(8)", "E", "f(x)", "2x"]

    def read(text):
        try:
            return sympy_parser.parse_expr(text)
        except Exception as error:
            return type(error)
    fully = [read(text) for text in texts]
    monkeypatch.setattr(sympy_parser, "parse_expr", sympy_parser.parse_expr)  # put back at the end
    grading.name_fast()
    assert [read(text) for text in texts] == fully


def test_equal_pairs_are_graded_once(monkeypatch):
    asked = []
    monkeypatch.setitem(grading.GRADERS, "math", lambda *pair: asked.append(pair) or True)
    problem = Problem("p", "?", "7", "", "easy", "own")
    pairs = [(problem, Segment(1, "", answer, None)) for answer in ("7", None, "7", "NA", "7")]
    assert grade(PAPER, pairs) == [True, False, True, False, True]
    assert asked == [("7", "7")] and grade(PAPER, []) == []


def test_math500_golds_equal_themselves_and_not_123(real_data):
    problems = load_problems("math", "medium", "test", real_data)
    segments = {answer: [read_segment(PAPER, 1, f"\\boxed{{{answer or p.answer}}}")
                         for p in problems] for answer in ("", "123", r"\displaystyle\sqrt{123}")}
    marks = {answer: grade(PAPER, list(zip(problems, own, strict=True)))
             for answer, own in segments.items()}
    assert marks[""] == [True] * 500
    assert not any(marks["123"]) and not any(marks[r"\displaystyle\sqrt{123}"])


def test_math500_golds_do_not_pass_for_each_other(real_data):
    answers = sorted({p.answer for p in load_problems("math", "medium", "test", real_data)})
    pairs = list(zip(answers, answers[1:] + answers[:1], strict=True))
    problems = [Problem(str(i), "?", gold, "", "easy", "own") for i, (gold, _) in enumerate(pairs)]
    segments = [Segment(1, "", answer, None) for _, answer in pairs]
    wrong = [pair for pair, mark in zip(
        pairs, grade(PAPER, list(zip(problems, segments, strict=True))), strict=True) if mark]
    for gold, answer in wrong:  # all that passes is the same number without its unit
        number = grading.read_number(grading.tidy(gold))
        assert number is not None and number == grading.read_number(grading.tidy(answer)), answer
