"""Sources and manifests: loaders, flawed rows, overlaps, user files."""

import json
import re
from collections import Counter
from dataclasses import asdict, replace
from itertools import product
from time import perf_counter

import pytest

from roi_lib.__main__ import main
from roi_lib.exams import draw_papers
from roi_lib.manifests import make_manifest, read_manifest, restore_papers
from roi_lib.problems import Problem
from roi_lib.sources import (
    DATASETS,
    boxes,
    find_overlaps,
    flaw,
    load_jsonl,
    load_problems,
    load_source,
    problem_stream,
    read_math,
)
from roi_lib.worlds import PAPER, POCKET

COINS = "Ben has 3 coins and finds 2 more on his long way home,"

def problem(name, text):
    return Problem(name, text, "1", "\\boxed{1}", "easy", "own")


@pytest.mark.parametrize(("family", "split", "kept", "left_out"), [
    ("gsm8k", "train", 7473, []), ("gsm8k", "test", 1318, ["openai/gsm8k/main/test/454"]),
    ("math", "train", 279, ["EleutherAI/hendrycks_math/intermediate_algebra/train/12"]),
    ("math", "test", 500, []), ("aime", "train", 90, []), ("aime", "test", 30, []),
])  # fmt: skip
def test_F21_real_sources_leave_flawed_rows_out(real_data, family, split, kept, left_out):
    problems, reasons = load_source(family, "easy", split, real_data)
    assert len(problems) == kept == len({p.id for p in problems})
    assert list(reasons) == left_out and all(reasons.values())
    assert not any(flaw(p.text, p.answer) for p in problems)


def test_F28_train_and_test_never_meet(real_data, caplog):
    everything, _ = load_source("math", "medium", "train", real_data)
    test = load_problems("math", "medium", "test", real_data)
    meeting = find_overlaps(everything, test)
    assert len(meeting) == 3 and {o.kind for o in meeting} == {"near-duplicate"}
    train = load_problems("math", "medium", "train", real_data)
    assert len(train) == len(everything) - 3 and not find_overlaps(train, test)
    assert "math, train split: 4 rows are left out" in caplog.text


def test_F28_no_source_holds_a_test_problem_of_another(real_data):
    loaded = {key: load_source(key[0], "easy", key[1], real_data)[0] for key in DATASETS}
    for (train, own), (test, other) in product(DATASETS, DATASETS):
        if (own, other) == ("train", "test") and train != test:
            assert not find_overlaps(loaded[train, own], loaded[test, other])


@pytest.mark.parametrize("key", DATASETS)
def test_the_hub_is_read_at_a_pinned_commit(monkeypatch, key):
    asked = []

    def load_dataset(name, config, split, revision):
        asked.append((name, config, split, revision))
        return [row] * (source.rows if len(asked) == 1 else 0)

    row = {"question": "?", "problem": "?", "answer": "#### 7", "solution": "\\boxed{7}"}
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    source = DATASETS[key]
    problems, left_out = load_source(key[0], "easy", key[1], None)
    assert len(problems) + len(left_out) == source.rows
    assert asked == [(source.id, config, source.split, source.revision)
                     for config in source.configs]
    assert re.fullmatch("[0-9a-f]{40}", source.revision), "a branch moves, a commit does not"
    monkeypatch.setitem(DATASETS, key, replace(source, rows=source.rows + 1))
    asked.clear()
    with pytest.raises(ValueError, match=f"{source.id}, .* are published at {source.revision}"):
        load_source(key[0], "easy", key[1], None)


def aime_folder(root, rows):
    folder = root / "math-ai" / "aime25"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def test_a_local_copy_of_another_size_is_read_and_reported(tmp_path, caplog):
    rows = [{"problem": f"{i} + 0?", "answer": i} for i in range(3)]
    problems, left_out = load_source("aime", "hard", "test", aime_folder(tmp_path, rows))
    assert [p.answer for p in problems] == ["0", "1", "2"] and not left_out
    assert "3 rows, but 30 are published" in caplog.text and str(tmp_path) in caplog.text


def test_F21_a_missing_gold_is_left_out_and_a_missing_column_named(tmp_path):
    rows = [{"problem": "1 + 1?", "answer": "2"}, {"problem": "2 + 1?", "answer": None}]
    problems, left_out = load_source("aime", "hard", "test", aime_folder(tmp_path / "a", rows))
    assert len(problems) == 1
    assert left_out == {"math-ai/aime25/test/1": "there is no single gold answer"}
    rows = [{"problem": "1 + 1?", "result": "2"}]
    with pytest.raises(ValueError, match="aime25/test/0 has no column 'answer', but .*result"):
        load_source("aime", "hard", "test", aime_folder(tmp_path / "b", rows))


def test_F29_an_unreachable_hub_names_the_option(monkeypatch):
    def load_dataset(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError, match="openai/gsm8k from the hub; .* --data"):
        load_source("gsm8k", "easy", "test", None)


def test_a_source_is_read_once(real_data, monkeypatch):
    first = load_problems("aime", "hard", "train", real_data)
    monkeypatch.setattr("roi_lib.sources.read_rows", lambda *args: pytest.fail("read again"))
    again = load_problems("aime", "hard", "train", real_data)
    assert again == first and again is not first


def test_F28_overlaps():
    train = [problem("a", "Ana has  3 APPLES.\nHow many are left?"),
             problem("b", f"{COINS} then he sells 7 red cards."),
             problem("c", "What is the area of a circle of radius 2?"), problem("d", "2")]
    test = [problem("x", "ana has 3 apples. How many are left?"),
            problem("y", f"{COINS} then he sells 9 red cards."),
            problem("z", "What is 3 + 4?")]
    found = {(o.train, o.test): o.kind for o in find_overlaps(train, test)}
    assert found == {("a", "x"): "duplicate", ("b", "y"): "near-duplicate"}


def test_math_answer_is_the_box():
    row = {"problem": "?", "solution": r"so \boxed{\frac{1}{2}}, that is \boxed {\frac{1}{2}}"}
    assert read_math(row)[1] == r"\frac{1}{2}"
    assert read_math(row | {"solution": r"\boxed{1} or \boxed{2}"})[1] == "", "two golds are none"
    assert boxes(r"\boxed{1") == []


@pytest.mark.parametrize("answer", ["", "  ", "NA", "\\frac{1}{2", "}{", "?", "9" * 201])
def test_F21_unusable_gold_is_refused_with_file_and_line(tmp_path, answer):
    path = tmp_path / "own.jsonl"
    good = {"problem": "1 + 1?", "answer": "2", "tier": "easy"}
    path.write_text("\n".join(map(json.dumps, [good, good | {"problem": "?", "answer": answer}])))
    with pytest.raises(ValueError, match=r"own\.jsonl, line 2: "):
        load_jsonl(path)


def test_F28_bom_and_crlf_are_read(tmp_path):
    path = tmp_path / "own.jsonl"
    row = '{"problem": "1 + 1?", "answer": "2", "tier": "easy"}'
    path.write_bytes(b"\xef\xbb\xbf" + row.encode() + b"\r\n\r\n")
    assert load_jsonl(path)[0].answer == "2"


@pytest.mark.parametrize(("content", "message"), [
    (b"{oops}", "line 1: not JSON"), (b"[1]", "line 1: not a JSON object"),
    ('{"problem": "é"}'.encode("latin-1"), "not UTF-8"),
    (b'{"problem": "?", "answer": 2, "tier": "easy"}', "line 1: field 'answer'"),
])  # fmt: skip
def test_F28_bad_lines_name_file_and_line(tmp_path, content, message):
    path = tmp_path / "own.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"own.jsonl.*{message}"):
        load_jsonl(path)


def test_F29_missing_folder_names_the_option(tmp_path):
    with pytest.raises(FileNotFoundError, match="--data"):
        load_problems("gsm8k", "easy", "test", tmp_path)
    with pytest.raises(ValueError, match="no test split of 'poetry'"):
        load_problems("poetry", "easy", "test", tmp_path)


def test_training_streams_run_on_real_sources(real_data):
    stream = problem_stream(PAPER, "medium", "train", 0, real_data)
    ids = [next(stream).id for _ in range(276 * 2)]
    assert set(Counter(ids).values()) == {2}, "gone through again and again"


# ---------------------------------------------------------------- manifests
@pytest.mark.parametrize("tiers", [["easy"], ["hard", "easy", "hard"], ["medium"] * 5])
def test_papers_of_any_mix(tiers):
    papers = draw_papers(POCKET, 4, tiers=tiers)
    assert all(Counter(p.tier for p in paper) == Counter(tiers) for paper in papers)
    assert restore_papers(make_manifest(POCKET, papers, "test", 0)) == papers
    with pytest.raises(ValueError, match="unknown tier 'odd'"):
        draw_papers(POCKET, 1, tiers=["odd"])


def test_manifest_round_trip_without_text(tmp_path):
    papers = draw_papers(POCKET, 20, seed=5)
    path = tmp_path / "papers.json"
    path.write_text(json.dumps(asdict(make_manifest(POCKET, papers, "test", 5))))
    assert restore_papers(read_manifest(path)) == papers
    assert not any(p.text in path.read_text() for paper in papers for p in paper)


def test_manifest_of_real_papers(real_data):
    papers = draw_papers(PAPER, 10, seed=5, root=real_data)
    manifest = make_manifest(PAPER, papers, "test", 5)
    assert restore_papers(manifest, real_data) == papers
    lost = replace(manifest, papers=[["openai/gsm8k/main/test/454", *manifest.papers[0][1:]]])
    with pytest.raises(ValueError, match="1 problems of the manifest .*test/454"):
        restore_papers(lost, real_data)


def test_ids_that_name_other_statements_are_refused(tmp_path):
    """As when two local copies of a dataset are numbered otherwise."""
    rows = [{"problem": f"{i} + 1?", "answer": str(i + 1), "tier": "easy"} for i in range(4)]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    own = load_jsonl(path)
    papers = draw_papers(POCKET, 2, tiers=["easy", "easy"], problems=own)
    manifest = make_manifest(POCKET, papers, "test", 0)
    assert restore_papers(manifest, problems=own) == papers
    path.write_text("\n".join(map(json.dumps, rows[::-1])))
    with pytest.raises(ValueError, match="other statements here"):
        restore_papers(manifest, problems=load_jsonl(path))


def test_manifest_of_another_seed_is_refused():
    manifest = make_manifest(POCKET, draw_papers(POCKET, 3), "test", 0)
    with pytest.raises(ValueError, match="not to be found, first pocket/"):
        restore_papers(replace(manifest, seed=1))


@pytest.mark.parametrize(("change", "message"), [
    ({"world": "moon"}, "unknown world"), ({"split": "dev"}, "split must be"),
    ({"seed": "0"}, "split must be"), ({"orders": ["odd"]}, "orders must be"),
    ({"tiers": []}, "tiers must be"), ({"papers": []}, "papers must be"),
    ({"papers": [["a", "a", "b"]]}, "paper 0 must hold 3"), ({"papers": [3]}, "paper 0"),
    ({"text": "x"}, "has the fields"), ({"fingerprint": 3}, "fingerprint must be"),
])  # fmt: skip
def test_bad_manifests_are_refused(tmp_path, change, message):
    path = tmp_path / "papers.json"
    path.write_text(json.dumps(asdict(make_manifest(POCKET, draw_papers(POCKET, 2), "test", 0))
                               | change))
    with pytest.raises(ValueError, match=message):
        read_manifest(path)


def test_command_line_sits_the_very_same_papers(tmp_path, capsys):
    papers, first, second = (tmp_path / name for name in ("papers.json", "1.json", "2.json"))
    common = ["exam", "--methods", "replay", "--budgets", "64"]
    main([*common, "--exams", "5", "--seed", "9", "--write-papers", str(papers),
          "--out", str(first)])
    main([*common, "--papers", str(papers), "--out", str(second)])
    assert first.read_text() == second.read_text()
    with pytest.raises(SystemExit):
        main([*common, "--world", "paper", "--papers", str(papers)])
    assert "give --world pocket" in capsys.readouterr().err


def test_command_line_takes_any_mix_of_tiers(tmp_path, capsys):
    papers = tmp_path / "papers.json"
    common = ["exam", "--methods", "replay", "--budgets", "64", "--exams", "3"]
    main([*common, "--tiers", "hard,easy,easy", "--write-papers", str(papers)])
    manifest = read_manifest(papers)
    assert sorted(manifest.tiers) == ["easy", "easy", "hard"] and len(manifest.papers) == 3
    with pytest.raises(SystemExit):
        main([*common, "--tiers", "easy,odd"])
    assert "unknown tier 'odd'" in capsys.readouterr().err


def test_many_papers_are_drawn_quickly(real_data):
    """5,000 papers take 0.2 s on 2 cores; the limit here is generous."""
    start = perf_counter()
    assert len(draw_papers(PAPER, 5_000, root=real_data)) == 5_000
    assert perf_counter() - start < 20


def test_statistics_file_is_what_its_command_makes(real_data):
    from roi_lib.exam_statistics import statistics
    from roi_lib.worlds import DATA
    assert statistics(real_data) == json.loads((DATA / "exam-statistics.json").read_text())
