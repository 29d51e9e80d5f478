"""Sources: loaders, flawed rows, overlaps, pools, and files of your own."""

import json
import re
from collections import Counter
from itertools import islice, product

import pytest

from roi_lib.exams import draw_papers
from roi_lib.problems import Problem, problem_stream
from roi_lib.store import sources
from roi_lib.worlds import PAPER, POCKET

FLAWS = list(sources.KNOWN_FLAWS)
COINS = "Ben has 3 coins and finds 2 more on his long way home,"


@pytest.mark.parametrize(("family", "split", "kept", "left_out"), [
    ("gsm8k", "train", 7458, FLAWS[:-1]), ("gsm8k", "test", 1318, FLAWS[-1:]),
    ("math", "train", 279, ["EleutherAI/hendrycks_math/intermediate_algebra/train/12"]),
    ("math", "test", 500, []), ("aime", "train", 90, []), ("aime", "test", 30, []),
])  # fmt: skip
def test_real_sources_leave_flawed_rows_out(real_data, family, split, kept, left_out):
    problems, reasons = sources.load_source(family, "easy", split, real_data)
    assert len(problems) == kept == len({p.id for p in problems})
    assert list(reasons) == left_out and all(reasons.values())
    assert not any(sources.flaw(p.text, p.answer) for p in problems)


def test_train_and_test_never_meet(real_data, caplog):
    everything, _ = sources.load_source("math", "medium", "train", real_data)
    test = sources.load_problems("math", "medium", "test", real_data)
    meeting = sources.find_overlaps(everything, test)
    assert len(meeting) == 3 and {kind for *_, kind in meeting} == {"near-duplicate"}
    sources.load_problems.cache_clear()
    train = sources.load_problems("math", "medium", "train", real_data)
    assert len(train) == len(everything) - 3 and not sources.find_overlaps(train, test)
    assert "math, train split: 4 rows are left out" in caplog.text


def test_no_source_holds_a_test_problem_of_another(real_data):
    loaded = {(family, split): sources.load_source(family, "easy", split, real_data)[0]
              for family, split in sources.DATASETS}
    for (train, own), (test, other) in product(loaded, loaded):
        if (own, other) == ("train", "test") and train != test:
            assert not sources.find_overlaps(loaded[train, own], loaded[test, other])


@pytest.mark.parametrize("key", sources.DATASETS)
def test_the_hub_is_read_at_a_pinned_commit(monkeypatch, refusal, key):
    asked = []

    def load_dataset(name, config, split, revision):
        asked.append((name, config, split, revision))
        return [row] * (source.rows if len(asked) == 1 else 0)

    row = {"question": "?", "problem": "?", "answer": "#### 7", "solution": "\\boxed{7}"}
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    source = sources.DATASETS[key]
    problems, left_out = sources.load_source(key[0], "easy", key[1], None)
    assert len(problems) + len(left_out) == source.rows
    assert asked == [(source.id, config, key[1], source.revision) for config in source.configs]
    assert re.fullmatch("[0-9a-f]{40}", source.revision), "a branch moves, a commit does not"
    monkeypatch.setitem(sources.DATASETS, key, source._replace(rows=source.rows + 1))
    asked.clear()
    said = refusal(sources.load_source, key[0], "easy", key[1], None)
    assert source.id in said and f"are published at {source.revision}" in said


def aime_folder(root, rows):
    folder = root / "math-ai" / "aime25"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def test_a_local_copy_is_read_and_what_is_wrong_with_it_is_said(tmp_path, caplog, refusal):
    rows = [{"problem": f"{i} + 0?", "answer": i} for i in (0, 1, None)]
    root = aime_folder(tmp_path / "a", rows)
    problems, left_out = sources.load_source("aime", "hard", "test", root)
    assert [p.answer for p in problems] == ["0", "1"]
    assert left_out == {"math-ai/aime25/test/2": "there is no single gold answer"}
    assert "3 rows, but 30 are published" in caplog.text and str(root) in caplog.text
    root = aime_folder(tmp_path / "b", [{"problem": "1 + 1?", "result": "2"}])
    assert "aime25/test/0 has no column 'solution', but problem, result" in refusal(
        sources.load_source, "aime", "hard", "test", root)


def test_what_cannot_be_reached_names_the_option(monkeypatch, tmp_path, refusal):
    def load_dataset(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError, match="openai/gsm8k from the hub .* --data"):
        sources.load_source("gsm8k", "easy", "test", None)
    with pytest.raises(FileNotFoundError, match="--data"):
        sources.load_problems("gsm8k", "easy", "test", tmp_path)
    said = refusal(sources.load_source, "poetry", "easy", "test", None)
    assert "gsm8k, math, aime, not 'poetry'" in said


def test_a_pool_holds_all_tiers_and_is_read_once(real_data, monkeypatch):
    pool = sources.load_pool(PAPER, "train", real_data)
    assert Counter(p.tier for p in pool) == {"easy": 7458, "medium": 276, "hard": 90}
    monkeypatch.setattr("datasets.load_dataset", lambda *args: pytest.fail("read again"))
    assert sources.load_pool(PAPER, "train", real_data) == pool
    ids = [p.id for p in islice(problem_stream(PAPER, "medium", "train", 0, pool), 276 * 2)]
    assert set(Counter(ids).values()) == {2}, "gone through again and again"
    assert sources.load_pool(POCKET, "train") is None


def test_the_same_seed_draws_the_same_real_problems_for_ever(real_data):
    """Recorded runs hold only these numbers."""
    papers = draw_papers(PAPER, 2, seed=4, pool=sources.load_pool(PAPER, "test", real_data))
    assert [int(p.id.split("/")[-1]) for paper in papers for p in paper] == [
        62, 81, 20, 538, 42, 6]


def problem(name, text):
    return Problem(name, text, "1", "\\boxed{1}", "easy", "own")


def test_overlaps():
    train = [problem("a", "Ana has  3 APPLES.\nHow many are left?"),
             problem("b", f"{COINS} then he sells 7 red cards."),
             problem("c", "What is the area of a circle of radius 2?"), problem("d", "2")]
    test = [problem("x", "ana has 3 apples. How many are left?"),
            problem("y", f"{COINS} then he sells 9 red cards."),
            problem("z", "What is 3 + 4?")]
    assert sources.find_overlaps(train, test) == [
        ("a", "x", "duplicate"), ("b", "y", "near-duplicate")]


def test_math_answer_is_the_box():
    for solution, gold in ((r"so \boxed{\frac12}, that is \boxed {\frac12}", r"\frac12"),
                           (r"\boxed{1} or \boxed{2}", ""), (r"\boxed{1", ""), ("1", "")):
        assert sources.read_row({"problem": "?", "solution": solution}) == ("?", gold, solution)


# ---------------------------------------------------------------- problems of your own
GOOD = {"problem": "1 + 1?", "answer": "2", "tier": "easy"}


def test_a_file_with_bom_and_crlf_is_read(tmp_path):
    path = tmp_path / "own.jsonl"
    named = json.dumps(GOOD | {"problem": "é?", "id": 7, "solution": "So \\boxed{2}."})
    path.write_bytes(b"\xef\xbb\xbf" + f"{json.dumps(GOOD)}\r\n\r\n{named}\r\n".encode())
    assert sources.load_jsonl(path, PAPER) == [
        Problem("own/1", "1 + 1?", "2", "\\boxed{2}", "easy", "own"),
        Problem("7", "é?", "2", "So \\boxed{2}.", "easy", "own")]


@pytest.mark.parametrize("change", [
    {"answer": answer} for answer in ("", "  ", "NA", "\\frac{1}{2", "}{", "?", "9" * 201, 2, None)
] + [{"problem": " "}, {"tier": "odd"}, {"tier": ["easy"]}, {"solution": 3}, GOOD])
def test_a_row_that_cannot_be_used_is_refused_with_file_and_line(tmp_path, refusal, change):
    path = tmp_path / "own.jsonl"
    rows = [GOOD, GOOD | {"problem": "2 + 0?"} | change]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert "own.jsonl, line 2: " in refusal(sources.load_jsonl, path, PAPER)


@pytest.mark.parametrize(("content", "words"), [
    (b"{oops}", "line 1: Expecting"), (b"[1]", "line 1: not a JSON object"),
    ('{"problem": "é"}'.encode("latin-1"), "UTF-8"), (b"[" * 100_000, "line 1: "),
    (b'{"problem": ' + b"9" * 5_000 + b"}", "line 1: "),
    (b'{"solution": "\\ud800"}', "line 1: 'utf-8' codec can't encode")])  # fmt: skip
def test_a_line_of_any_content_is_one_sentence(tmp_path, refusal, content, words):
    path = tmp_path / "own.jsonl"
    path.write_bytes(content)
    said = refusal(sources.load_jsonl, path, PAPER)
    assert "own.jsonl" in said and words in said
