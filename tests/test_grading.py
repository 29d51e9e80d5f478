"""Grading: what earns a point, what does not, and processes that survive what answers do."""

import json
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import nbclient
import psutil
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook

from roi_lib import grading
from roi_lib.exams import Environment
from roi_lib.grading import grade, verdicts
from roi_lib.store.sources import load_problems, readable
from roi_lib.worlds import PAPER, POCKET, TAG_CLOSE, TAG_OPEN

COLUMN = r"\begin{pmatrix} 1 \\ -2 \end{pmatrix}"
TAG = f"{TAG_OPEN}Level-2{TAG_CLOSE}"
ENDLESS = "5^{5^{5^{5^5}}}"

#: (response, gold answer, whether it earns the point, why)
RESPONSES = [
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
    (TAG, "2", False, "a level tag is no answer"),
    (TAG + r" \boxed{3}", "2", False, "nor beside one"),
    (rf"\boxed{{{TAG}}}", "2", False, "nor in a box"),
]
#: (subject, gold answer, answers that earn the point, answers that do not)
ANSWERS = [
    ("a number must be worked out", "144", ["144.000", "0144", "x = 144"],
     ["12^2", r"12 \cdot 12", r"\sqrt{20736}", "143.9999999", r"x \neq 144", "-144", "1,44",
      "144 or 145", r"144 \text{ or } 145", "\uff11\uff14\uff14"]),
    ("a factorial", "479001600", [], ["12!"]),
    ("units are left out", "144", [r"144\text{ cm}^2", "144 inches"],
     [r"144 \text{ million}", r"144 \text{ squared}", "144 pi", r"144\pi"]),
    ("a typeset minus", "-144", ["\u2212144"], []),
    ("thousands", "1440", ["1{,}440"], ["1.440"]),
    ("two numbers", "12", [], ["1 2", "11,12,13"]),
    ("dollars", r"\$18.90", [r"\$18.90"], []),
    ("degrees", r"90^\circ", ["90"], []),
    ("fractions are exact", r"\frac{1}{3}", ["2/6"], ["0.3333333"]),
    ("mixed numbers", r"1\frac{3}{4}", ["7/4", "1.75"], ["13/4"]),
    ("no numbers", "1", [], ["1/0", "inf"]),
    ("a base is part of a number", "52_8", ["52_{8}"], ["52_7", "52"]),
    ("a base is part of a number", "52", ["52.0"], ["52_8"]),
    ("per cent is a unit", "50", [r"50\%"], ["0.5"]),
    ("per cent is no factor", "0.5", [], [r"50\%"]),
    ("per cent is no factor", r"50\%", ["50"], ["0.5"]),
    ("words", r"\text{east}", ["East"], ["seat"]),
    ("a choice", r"\text{(C)}", ["C"], [r"\text{(C) or (D)}"]),
    ("a root", r"\sqrt{2}", [r"\sqrt{8}/2"],
     ["1.41421356237", r"\frac{141421356237}{100000000000}", r"\pm\sqrt{2}", r"3 = \sqrt{2}"]),
    ("near is not equal", r"\pi", [], [r"\frac{355}{113}"]),
    ("a factor or a sign", r"288\pi", [], ["288", r"-288\pi"]),
    ("letters count", "x+2h", ["x + 2h"], ["x+2", "x+2k"]),
    ("letters count", "x^2+3x", ["x(x+3)"], ["x^2+3x t", "x^2+3"]),
    ("a chain holds in all its parts", "18", ["12 + 6 = 18"], ["> 18 = 18", r"\approx 18 = 18"]),
    ("expanded", "(a+5)(b+2)", ["ab + 2a + 5b + 10"], ["ab + 2a + 5b"]),
    ("variables have names", "x^2 + 1", [], ["y^2 + 1"]),
    ("both signs", r"3 \pm \sqrt{2}", [r"3 + \sqrt{2}, 3 - \sqrt{2}"], [r"3 + \sqrt{2}"]),
    ("roots", "1, -2", ["-2, 1"], ["1", "1, -2, 3"]),
    ("a pair has an order and is no set", "(1, 2)", [], ["(2, 1)", r"\{1, 2\}"]),
    ("intervals", "(3, 4]", [], ["[3, 4]"]),
    ("columns", COLUMN, [COLUMN.replace("pmatrix", "bmatrix")], [COLUMN.replace("-2", "2")]),
    ("words behind a number are units only where they are", "3",
     ["3 feet", r"3\text{ m}", r"3\ \mathrm{km/h}", r"3\,\mathrm{m/s^2}", "3-inch", "3 cm²",
      r"3\operatorname{kg}", "3 miles per hour", "3 percent", "3°"],
     ["3 x", "3 i", "3 m", "3 tenths", "3 dozen", "3 below zero", "3 quarters", "3 mod 4", "3!",
      r"3\text{ is wrong}", r"3\text{ million}", r"3\text{ or more}", "3 k", "3...", "3?", "not 3",
      "about 3", r"\approx 3", r"\neq 3", "> 3", r"\pm 3", "3_4", r"3^{1}", "3 to 4"]),
    ("money", "18", ["€18", "18€", "USD 18", "Rs. 18", r"\pounds 18", r"\$18/\text{hour}", "18¢",
                     r"\$18 \text{ per hour}", r"\$18.00", "18 dollars"], [r"\$18x", "$18 short"]),
    ("money", "-18", [r"-\$18"], [r"\$18"]),
    ("wrappers", "13", [r"\text{13}", r"\textbf{13}", "{13}", "**13**", "(13)", r"\underline{13}",
                        r"\[13\]", r"\bf 13", "13;", "+13", r"\mathrm{13}."],
     [r"\text{13 or 14}", "(13, 13)", r"\text{not }13"]),
    ("thousands of one number", "1000000",
     ["1,000,000", r"1\,000\,000", r"1,\!000,\!000", "1'000'000", "1 000 000", r"1 \times 10^6",
      r"\$1,000,000.00"], ["1, 000, 000", "1,000,00", "1.000.000", "1 0"]),
    ("thousands of one number", "58{,}500", ["58500", "58,500", "$58,500$"], ["58, 500", "58.5"]),
    ("a comma in a list or an interval is none", "(0,500)", ["(0, 500)", "0,500"],
     ["500", "0500", "(0500)", "[0,500)", "(0,500]"]),
    ("a comma in a list or an interval is none", "(1,200,3)", ["(1, 200, 3)"], ["1200,3", "1203"]),
    ("a comma in a list or an interval is none", "12,144", ["144, 12"], ["12144"]),
    ("a comma in a list or an interval is none", r"(2,12) \cup (12,102)",
     [r"(2, 12) \cup (12, 102)"], [r"(2,12) \cup (12102)", r"(2,12] \cup (12,102)"]),
    ("fractions as people write them", r"\frac{3}{4}",
     [r"\cfrac{3}{4}", r"\tfrac34", "¾", r"(\frac{3}{4})", "{3/4}", ".75", r"\frac{-3}{-4}"],
     [r"3\div4", "3:4", "-3/4", "0.7500001"]),
    ("fractions as people write them", r"\frac{16}{9}", ["1 7/9", r"1\frac79", r"1.\overline{7}"],
     ["17/9", "1.7777778", r"1.\overline{8}"]),
    ("fractions as people write them", "3.5", ["3½", r"3\frac12", "7/2"], ["31/2"]),
    ("a name in front", "18", ["x = 18", "x_1 = 18", "AB = 18", r"\angle ABC = 18^\circ", "n=18",
                               r"\text{Answer: } 18", "f(2) = 18", r"\text{Area} = 18"],
     ["2x = 18", "x = 17", "|x| = 18", "x > 18"]),
    ("a chain holds if its members are equal", "18", ["12 + 6 = 18", r"3 \times 6 = 18", "18 = 18",
                                                      "x = 12 + 6 = 18"],
     ["12 + 5 = 18", "18 = 17", "12 + 6", "x = 18 = 17"]),
    ("names of a gold answer", "y = 2x + 3", ["2x - y + 3 = 0", "y=3+2x", "2x+3"],
     ["z=2x+3", "y = 2x", r"\ge y = 2x + 3", "-(y = 2x + 3"]),
    ("names of a gold answer", "m=6,n=9", ["m=6, n=9"], ["m=9,n=6"]),
    ("names of a gold answer", "x=5", ["5", "x = 5.0"], ["y=5", "x=6"]),
    ("names of a gold answer", r"x \in [-2,7]", ["[-2,7]", r"-2 \le x \le 7"], ["[-2,7)"]),
    ("lists", "2, -3", ["x = 2, x = -3", r"x=2 \text{ or } x=-3", r"\{-3, 2\}",
                          r"2 \text{ and } -3"],
     ["x = 2", "2, 3"]),
    ("factors are no units", "x^2+3 x", ["x^2+3x", "x(x+3)", "f(x) = x^2 + 3x"],
     ["x^2+3", r"x^2+3x \text{ is wrong}", "y^2+3y", "x^2+3x=0"]),
    ("tiny values", r"\frac{1}{10^{20}}", ["10^{-20}"], [r"\frac{7}{10^{20}}", "0"]),
    ("tiny values", r"\frac{1}{2004!}", [r"1/2004!"], [r"\frac{1}{2006!}"]),
    ("tiny values", r"(\frac{1}{2^{99}}, 1)", [], [r"(\frac{1}{2^{98}}, 1)"]),
    ("rounded inside", r"(\sqrt{2}, 1)", [r"(\sqrt{2}, 1.0)"], ["(1.41421356237, 1)"]),
    ("rounded inside", r"\sqrt{2}", [], [r"1.41421356237\ldots", r"\approx\sqrt{2}"]),
    ("dots stand for anything", r"1,2,\ldots,n", [r"1, 2, \ldots, n"], [r"1,3,5,\ldots,2n-1"]),
    ("hostile text", r"\sqrt{2}", [],
     ["\x00", "\ud800", "<|im_end|>", "(" * 3_000, "__import__('os').abort()"]),
    ("hostile text", "2", [], ["\u202e2\u202c", "2" * 200_000, "2" * 20_000]),
]
ROWS = RESPONSES + [
    (f"So it is \\boxed{{{answer}}}.", gold, answer in right, subject)
    for subject, gold, right, wrong in ANSWERS for answer in right + wrong]


@pytest.fixture(scope="module")
def points():
    """(response, gold answer) -> whether it earns the point, all graded together."""
    read = Environment(PAPER, None).read_segment
    pairs = [(gold, read(1, response).answer) for response, gold, _, _ in ROWS]
    return dict(zip([row[:2] for row in ROWS], grade(PAPER, pairs), strict=True))


@pytest.mark.parametrize(("response", "gold", "expected", "why"), ROWS, ids=[
    f"{row[3]}-{row[0][:60]}".replace(" ", "_") for row in ROWS])
def test_adversarial_responses(points, response, gold, expected, why):
    assert points[response, gold] is expected, why


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(grading, "SECONDS_PER_ANSWER", 1)


def children():
    """The processes that grade; other tests leave theirs, as vLLM's."""
    return [child for child in psutil.Process().children(recursive=True)
            if "roi_lib.grading" in str(child.as_dict(["cmdline"]))]


def computing_child(seconds):
    """The first process that grades, after so many seconds of computing."""
    while not children() or children()[0].cpu_times().user < seconds:
        time.sleep(0.02)
    return children()[0]


def test_answers_that_never_end_are_wrong_and_the_others_are_graded(impatient):
    endless = [ENDLESS, "10^9!", "9^{9^9}", "(10^9)!"]
    assert grading.verdicts([(r"\sqrt{2}", answer) for answer in endless]) == ["too slow"] * 4
    pairs = [(r"\sqrt{2}", answer) for answer in (ENDLESS, r"\sqrt{8}/2", r"\sqrt{3}")]
    assert grade(PAPER, pairs) == [False, True, False]
    assert not children()


def test_memory_is_limited_and_a_crash_costs_one_answer_alone():
    asked = ThreadPoolExecutor(1).submit(verdicts, [(r"\sqrt{2}", ENDLESS)])
    child = computing_child(1)
    if sys.platform == "linux":  # elsewhere address space has no limit
        assert str(2 * 2**30) in open(f"/proc/{child.pid}/limits").read()
    child.send_signal(signal.SIGSEGV)
    assert asked.result() == ["crashed"] and not children()
    assert verdicts([(r"\sqrt{2}", r"\sqrt{8}/2")]) == ["equal"]


def test_a_stopped_process_turns_no_right_answer_wrong(impatient):
    pairs = [(r"\sqrt{2}", rf"\frac{{\sqrt{{{2 * k * k}}}}}{{{k}}}") for k in range(2, 2_000)]
    asked = ThreadPoolExecutor(1).submit(grading.verdicts, pairs)
    child = computing_child(0.5)
    child.suspend()
    time.sleep(3)
    child.resume()
    assert asked.result() == ["equal"] * len(pairs)


def test_works_from_threads():
    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(grade, PAPER, [("x+x", "2x")]) for _ in range(4)]
    assert [a.result() for a in asked] == [[True]] * 4


def test_a_grader_that_cannot_start_says_so(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match="python -m roi_lib doctor"):
        grade(PAPER, [("x+x", "2x")])
    assert grade(POCKET, [("4", "4")]) == [True], "integers need no math-verify"
    monkeypatch.undo()
    assert grade(PAPER, [("x+x", "2x")]) == [True], "and it mends itself"


@pytest.mark.parametrize("way", ["script", "command", "notebook"])
def test_works_without_a_main_guard_beside_the_threads_of_torch(way, tmp_path):
    code = ("import torch\ntorch.set_num_threads(2)\ntorch.ones(500, 500) @ torch.ones(500, 500)\n"
            "from roi_lib.grading import verdicts\nprint(*verdicts([('x+x', '2x')]))\n")
    if way == "notebook":
        cell = new_code_cell(code)
        nbclient.execute(new_notebook(cells=[cell]))
        assert cell.outputs[0].text == "equal\n"
        return
    script = tmp_path / "script.py"
    script.write_text(code)
    arguments = ["-c", code] if way == "command" else [script]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout == "equal\n"


def test_works_in_the_workers_of_pools(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing\nfrom concurrent.futures import ProcessPoolExecutor\n"
        "from roi_lib.grading import verdicts\nif __name__ == '__main__':\n"
        "    for method in set(multiprocessing.get_all_start_methods()) & {'fork', 'spawn'}:\n"
        "        context = multiprocessing.get_context(method)\n"
        "        with context.Pool(1) as pool:  # its workers are daemons\n"
        "            assert pool.map(verdicts, [[('2x', 'x+x')]]) == [['equal']]\n"
        "        with ProcessPoolExecutor(1, context) as pool:\n"
        "            assert [*pool.map(verdicts, [[('2x', 'x+x')]])] == [['equal']]\n")
    subprocess.run([sys.executable, script], check=True, timeout=120)


def test_works_in_a_data_loader():
    loader = torch.utils.data.DataLoader(
        [("2x", "x+x"), ("2x", "x")], batch_size=None, num_workers=1, timeout=60,
        collate_fn=lambda pair: verdicts([pair]))
    assert list(loader) == [["equal"], ["different"]]


def test_no_process_outlives_a_killed_one_for_long():
    pair = r"\sqrt{2}", ENDLESS
    parent = psutil.Popen([sys.executable, "-c", "from roi_lib import grading\n"
                           f"grading.SECONDS_PER_ANSWER = 2\ngrading.verdicts([{pair!r}])"])
    while not (orphans := parent.children()):
        assert parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(orphans, timeout=30)
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


def test_equal_pairs_are_graded_once_and_integers_without_threads(monkeypatch):
    asked, answers = [], ["7", None, "7", "NA", "7", ""]
    pairs = [("7", answer) for answer in answers]
    monkeypatch.setattr(grading, "verdicts", lambda some: asked.extend(some) or ["equal"])
    assert grade(PAPER, pairs) == [True, False] * 3 and asked == [("7", "7")]
    monkeypatch.setattr(grading, "ThreadPoolExecutor", None)
    assert grade(POCKET, pairs) == [True, False] * 3 and grade(POCKET, []) == []


def test_rows_of_others(real_data):
    lines = (real_data.parent / "cases/grading.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    found = verdicts([(row["gold"], row["answer"]) for row in rows])
    assert [row for row, word in zip(rows, found, strict=True)
            if (word == "equal") is not row["credit"]] == []


BEHIND = (r"x|y|i|n|m|pi|tenths|halves|dozen|hundred|million|below zero|is wrong|or so|squared"
          r"|short|factorial|mod 7|base 2|over 2|less|more|and a half|times 2|plus 1|maybe|sin x|!"
          r"|^2|_2|\pi|x^2|\sqrt{2}|\ldots|...|\times 10|\cdot 2|+1|-1|/2|\text{ is wrong}|, 7|?|=8"
          r"|\text{ million}|\text{ dozen}|\text{ or more}|\text{ and } 7|\text{ short}|e|\%x")
BEFORE = r"\text{not }|not |\neq |\approx |> |\ge |\pm |about |2 \cdot |-(|x |1/|7, |8 = |2^"


def test_no_words_around_a_number_earn_its_point():
    golds = ["3", "144", "-7", "0.5", r"\frac{1}{2}", "58{,}500", r"90^\circ"]
    answers = [(gold, f"{gold}{space}{word}") for gold in golds for word in BEHIND.split("|")
               for space in ("", " ", r"\ ", "{}")]
    answers += [(gold, f"{word}{gold}") for gold in golds for word in BEFORE.split("|")]
    found = zip(answers, verdicts(answers), strict=True)
    assert {answer for (_, answer), word in found if word == "equal"} == set()


def test_reference_solutions_pass_their_own_grader(real_data):
    read, pairs = Environment(PAPER, None).read_segment, []
    for source, tier in (("gsm8k", "easy"), ("math", "medium"), ("aime", "hard")):
        for split in ("train", "test"):
            problems = load_problems(source, tier, split, real_data)
            found = [(p.answer, read(1, p.solution).answer) for p in problems]
            assert all(readable(PAPER, [gold for gold, answer in found]))
            pairs += [(gold, answer) for gold, answer in found if answer]
    assert len(pairs) > 9_000 and all(grade(PAPER, pairs))


@pytest.mark.parametrize(("world", "gold"), [
    (POCKET, "(2n-1)!!"), (POCKET, "-1"), (PAPER, r"\frac{1}{"), (PAPER, r"\{ x \right."),
    (PAPER, r"\sqrt{")])
def test_what_no_grader_can_read_is_no_gold_answer(world, gold):
    assert readable(world, ["12", gold]) == [True, False]


def test_a_mark_that_a_limit_decides_is_told(impatient, caplog):
    assert grade(PAPER, [(r"\sqrt{2}", ENDLESS)]) == [False]
    assert "1 answers count as wrong because grading them was too slow" in caplog.text


def test_math500_golds_equal_themselves_and_not_123(real_data):
    golds = [p.answer for p in load_problems("math", "medium", "test", real_data)]
    answers = [[f"\\displaystyle {gold}", "123", r"\displaystyle\sqrt{123}"] for gold in golds]
    pairs = [(gold, answer) for gold, some in zip(golds, answers, strict=True) for answer in some]
    assert grade(PAPER, pairs) == [True, False, False] * 500


def test_math500_golds_do_not_pass_for_each_other(real_data):
    golds = sorted({p.answer for p in load_problems("math", "medium", "test", real_data)})
    pairs = list(zip(golds, golds[1:] + golds[:1], strict=True))
    for (gold, answer), mark in zip(pairs, grade(PAPER, pairs), strict=True):
        if mark:  # all that passes is the same number without its unit
            number = grading.read_number(grading.normalize(gold))
            assert number is not None and number == grading.read_number(grading.normalize(answer))
