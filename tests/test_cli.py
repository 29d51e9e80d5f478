"""The command line: records with the agreed keys, and one clear sentence for bad input."""

import json
import shutil

import pytest

from roi_lib import doctor
from roi_lib.__main__ import arithmetic, build_parser, main
from roi_lib.worlds import get_world

KEYS = {"world", "method", "order", "budget", "n_exams", "seed", "score", "score_ci", "score_easy",
        "regret", "regret_ci", "position_accuracy", "position_accuracy_ci", "mean_tokens",
        "skip_rate", "level_accuracy", "over_budget"}


def run(capsys, *arguments):
    """Exit status, standard output, standard error."""
    try:
        main([str(a) for a in arguments])
        status = 0
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def refused(capsys, tmp_path, *arguments):
    """The one sentence with which a command refuses; its output file stays as it was."""
    out = tmp_path / "out.json"
    out.write_text("earlier")
    status, _, error = run(capsys, *arguments, "--out", out)
    assert status == 2 and out.read_text() == "earlier"
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_exam_writes_the_agreed_records(capsys, tmp_path):
    out = tmp_path / "results.json"
    status, table, _ = run(capsys, "exam", "--world", "pocket", "--methods", "base", "--budgets",
                           "64,128", "--exams", 20, "--seed", 0, "--out", out)
    records = json.loads(out.read_text())
    assert status == 0 and len(records) == 6
    assert table.count("base") == 12, "six rows of Scores, six of accuracies by position"
    assert all(KEYS <= set(r) and r["over_budget"] == 0 and r["n_exams"] == 20 for r in records)
    assert [(r["budget"], r["order"]) for r in records] == [
        (b, o) for b in (64, 128) for o in ("easy", "medium", "hard")]
    assert all(r["regret"] == 0 for r in records if r["order"] == "easy")
    again = tmp_path / "again.json"
    run(capsys, "exam", "--exams", 20, "--out", again)
    assert again.read_text() == out.read_text(), "the defaults are the pocket world's, seeded"


def test_arithmetic_of_tables():
    def chosen(*options):
        args = build_parser().parse_args(["exam", *options])
        return arithmetic(args, get_world(args.world))
    assert chosen() == "float32" and chosen("--dtype", "float64") == "float64"
    assert chosen("--world", "paper") == "auto"
    assert chosen("--engine", "vllm") is None, "the other engines have their own"


def test_real_papers_by_replay(capsys, tmp_path, real_data):
    out = tmp_path / "results.json"
    status, _, _ = run(capsys, "exam", "--world", "paper", "--data", real_data, "--methods",
                       "replay", "--exams", 40, "--budgets", "512,1024,100000", "--out", out)
    records = json.loads(out.read_text())
    assert status == 0 and all(r["over_budget"] == 0 for r in records)
    scores = {(r["budget"], r["order"]): r["score"] for r in records}
    assert all(scores[100_000, order] == 3 for order in ("easy", "medium", "hard"))
    assert scores[512, "medium"] < scores[1024, "medium"] < 3


@pytest.mark.parametrize(("arguments", "words"), [
    (["--world", "moon"], "unknown world 'moon'; choose from pocket, paper"),
    (["--methods", "base,genius"], "unknown method 'genius'"),
    (["--budgets", "0"], "budget 0 is smaller than one level tag"),
    (["--budgets", "64,4"], "give at least 5 tokens"),
    (["--exams", "0"], "must be at least 1"),
    (["--problems-per-exam", "0"], "must be at least 1"),
    (["--model", "no/such/folder/here"], "name a local folder"),
    (["--world", "paper", "--methods", "replay", "--data", "nowhere"], "no dataset folder nowhere"),
    (["--problems", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--temperature", "-1"], "temperature must be 0"),
])  # fmt: skip
def test_F6_F29_bad_arguments(capsys, tmp_path, arguments, words):
    assert words in refused(capsys, tmp_path, "exam", "--exams", 2, *arguments)


GOOD = '{"problem": "1+1", "answer": "2", "tier": "easy"}\n'


@pytest.mark.parametrize(("rows", "words"), [
    (GOOD + '{"problem": "2+2", "ans', "line 2: not JSON"),
    (GOOD + "[]", "line 2: not a JSON object"),
    (GOOD + '{"problem": "2+2", "answer": "4", "tier": "tiny"}', "line 2: tier must be one of"),
    (GOOD + '{"problem": "2+2", "answer": " ", "tier": "easy"}', "line 2: field 'answer'"),
    ('{"problem": "2+2", "tier": "easy"}', "line 1: field 'answer'"),
    (GOOD + "\n" + GOOD, "line 3: repeats line 1"),
    (GOOD, "there are no medium problems"),
    ("", "there are no easy problems"),
])  # fmt: skip
def test_F21_F28_bad_rows_name_file_and_line(capsys, tmp_path, rows, words):
    path = tmp_path / "mine.jsonl"
    path.write_text(rows)
    error = refused(capsys, tmp_path, "exam", "--exams", 2, "--problems", path)
    assert words in error and ("mine.jsonl" in error or "there are no" in error)


def test_F28_byte_order_mark_and_windows_lines(capsys, tmp_path):
    rows = [json.dumps({"problem": f"{tier} {i}", "answer": "2", "tier": tier})
            for tier in ("easy", "medium", "hard") for i in range(2)]
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode())
    status, table, _ = run(capsys, "exam", "--methods", "replay", "--budgets", 64, "--exams", 3,
                           "--problems", path)
    assert status == 0 and table.count("3.000") >= 3


def test_F28_wrong_encoding(capsys, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(GOOD.encode("utf-16"))
    assert "mine.jsonl" in refused(capsys, tmp_path, "exam", "--problems", path)


@pytest.mark.parametrize("option", ["--out", "--plot", "--write-papers"])
def test_output_files_must_have_a_folder(capsys, tmp_path, option):
    status, _, error = run(capsys, "exam", "--exams", 2, option, tmp_path / "no" / "x.json")
    assert status == 2 and f"the folder of {option} does not exist" in error
    status, _, error = run(capsys, "exam", "--exams", 2, option, tmp_path)
    assert status == 2 and f"{option} names a folder" in error


def test_osmckp_prints_json(capsys, tmp_path):
    path = tmp_path / "instance.json"
    skip = {"name": "skip", "outcomes": [{"p": 1, "cost": 0, "reward": 0}]}
    solve = {"name": "solve", "outcomes": [{"p": 0.5, "cost": 3, "reward": 1},
                                           {"p": 0.5, "cost": 9, "reward": 1}]}
    path.write_text(json.dumps({"budget": 6, "classes": [[skip, solve]]}))
    status, output, _ = run(capsys, "osmckp", path)
    assert status == 0 and json.loads(output)["value"] == 0.5
    path.write_text("{")
    status, _, error = run(capsys, "osmckp", path)
    assert status == 2 and "is not JSON" in error


def test_doctor(capsys):
    status, output, _ = run(capsys, "doctor")
    assert status == 0 and "[OK]   torch 2.13.0" in output and "[FAIL]" not in output


def test_F2_the_doctor_names_a_broken_checkpoint(capsys, monkeypatch, tmp_path):
    for name in ("pocket-base", "pocket-tokenizer"):
        shutil.copytree(doctor.DATA / name, tmp_path / name)
    (tmp_path / "pocket-base/config.json").write_text("{}")
    monkeypatch.setattr(doctor, "DATA", tmp_path)
    assert not doctor.check_environment()
    assert capsys.readouterr().out.splitlines()[-1] == (
        "[FAIL] data/pocket-base differs from its hashes; mend it with: "
        "git checkout -- data/pocket-base")


def test_all_methods_of_a_world_without_checkpoints(capsys, tmp_path):
    assert "name methods whose checkpoints the hub has" in refused(
        capsys, tmp_path, "exam", "--world", "paper", "--methods", "all")
