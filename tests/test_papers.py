"""Lists of papers: the very same papers again, or refused."""

import json
from dataclasses import asdict, replace

import pytest

from roi_lib.exams import draw_papers
from roi_lib.problems import Problem
from roi_lib.store.papers import make_paper_list, read_paper_list, restore_papers
from roi_lib.store.sources import load_pool
from roi_lib.worlds import PAPER, POCKET


@pytest.mark.parametrize("tiers", [["easy"], ["hard", "easy", "hard"], ["medium"] * 5, None])
def test_a_list_of_any_mix_goes_round_without_any_text(tmp_path, tiers):
    papers = draw_papers(POCKET, 20, seed=5, tiers=tiers)
    path = tmp_path / "papers.json"
    path.write_text(json.dumps(asdict(make_paper_list(POCKET, papers, "test", 5))))
    assert restore_papers(read_paper_list(path)) == papers
    assert not any(p.text in path.read_text() for paper in papers for p in paper)


def test_real_papers_and_a_problem_that_is_not_to_be_found(real_data, refusal):
    pool = load_pool(PAPER, "test", real_data)
    papers = draw_papers(PAPER, 10, seed=5, pool=pool)
    found = make_paper_list(PAPER, papers, "test", 5)
    assert restore_papers(found, pool) == papers
    lost = replace(found, papers=[["openai/gsm8k/main/test/454", *found.papers[0][1:]]])
    assert "1 problems of the list are not to be found, first openai/gsm8k/main/test/454" in (
        refusal(restore_papers, lost, pool))
    assert "give a pool" in refusal(restore_papers, found)


def test_ids_that_name_other_statements_are_refused(refusal):
    """As when two local copies of a dataset are numbered otherwise."""
    own = [Problem(f"own/{i}", f"{i} + 1?", str(i + 1), "", "easy", "own") for i in range(4)]
    papers = draw_papers(POCKET, 2, tiers=["easy", "easy"], pool=own)
    found = make_paper_list(POCKET, papers, "test", 0)
    assert restore_papers(found, own) == papers
    renumbered = [replace(p, id=q.id) for p, q in zip(own, own[::-1], strict=True)]
    assert "other statements here" in refusal(restore_papers, found, renumbered)


def test_a_list_of_another_seed_or_with_a_repeated_problem_is_refused(refusal):
    found = make_paper_list(POCKET, draw_papers(POCKET, 3), "test", 0)
    other = replace(found, seed=1)
    assert "not to be found, first pocket/" in refusal(restore_papers, other)
    other = replace(found, papers=[[*found.papers[0][:2], found.papers[0][1]], *found.papers[1:]])
    assert "other statements here" in refusal(restore_papers, other)


@pytest.mark.parametrize(("field", "value"), [
    ("world", "moon"), ("world", ["pocket"]), ("split", "dev"), ("split", None), ("seed", "0"),
    ("seed", True), ("seed", -1), ("papers", [["a"], ["a", "b"]]), ("orders", ["odd"]),
    ("orders", {}), ("tiers", []), ("tiers", 3),
    ("papers", []), ("papers", [[]]), ("papers", [3]), ("papers", [[["a"], "b", "c"]]),
    ("papers", {"a": 1}), ("fingerprint", 3)])
def test_a_wrong_field_is_named(tmp_path, refusal, field, value):
    good = asdict(make_paper_list(POCKET, draw_papers(POCKET, 2), "test", 0))
    (tmp_path / "papers.json").write_text(json.dumps(good | {field: value}))
    assert f"papers.json: {field} is not" in refusal(read_paper_list, tmp_path / "papers.json")
    del good[field]
    (tmp_path / "papers.json").write_text(json.dumps(good))
    assert f"papers.json: {field} is not" in refusal(read_paper_list, tmp_path / "papers.json")


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, "9" * 5_000, '{"world": "poc'])
def test_a_file_of_any_content_is_one_sentence(tmp_path, refusal, text):
    (tmp_path / "papers.json").write_text(text)
    assert "papers.json" in refusal(read_paper_list, tmp_path / "papers.json")
