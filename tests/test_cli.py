"""The command line: what each command writes, and one clear sentence for bad input."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import Student

from roi_lib import worlds
from roi_lib.__main__ import main
from roi_lib.engines import EngineConfig
from roi_lib.exams import draw_papers
from roi_lib.experiments import counterfactuals
from roi_lib.rational import BOUNDS
from roi_lib.training.rarl import COLUMNS
from roi_lib.worlds import POCKET


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Exit status, standard output and standard error of a command, run in a folder of its own."""
    def command(words):
        status = 0
        try:
            main(words.split())
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    return command


@pytest.fixture
def students(env, small_world, monkeypatch):
    """The checkpoints of the pocket world are students with luck; see `conftest.Student`."""
    student = Student(env, [problem for paper in draw_papers(POCKET, 3) for problem in paper])
    monkeypatch.setattr(EngineConfig, "make", lambda *_: student)
    monkeypatch.setitem(worlds.WORLDS, "pocket", small_world)


def test_all_methods_on_one_screen_and_in_one_table(run, students, tmp_path):
    command = "exam --methods all --budgets 64,32,64 --exams 3 --out o.csv --plot o.png --save o"
    status, text, _ = run(command)
    assert status == 0 and len(text.splitlines()) <= 26 and (tmp_path / "o.png").stat().st_size
    records, names = pd.read_csv("o.csv"), [*POCKET.methods][1:-1]
    names += [f"optimal_{name}" for name in BOUNDS]
    assert records["method"].unique().tolist() == names and all(name in text for name in names)
    assert len(records) == len(names) * 2 * 3, "a budget that is named twice is sat once"
    assert (records["over_budget"] == 0).all() and "wrote o.csv, o, o.png" in text
    assert run(command)[0] == 0, "what we wrote we may replace"


def test_rules_and_bounds_need_no_exam_to_be_sat(run, students):
    status, text, _ = run("exam --methods rules,best_rule,optimal --exams 2 --out o.csv --save o "
                          "--samples 8 --details --plot o.png")
    assert status == 0 and "best_rule" in text and "optimal_luck" in text
    records = pd.read_csv("o/records.csv")
    assert records["method"].nunique() == 10 and set(records["budget"]) == {64, 128, 256}
    assert len(pd.read_parquet("o/rarl-outcomes.parquet")) == 2 * 3 * 3 * 8


def test_papers_are_handed_on_and_orders_chosen(run):
    common = "exam --methods replay --budgets 64 --orders hard "
    run(common + "--exams 5 --seed 7 --write-papers p.json --out 1.csv")
    status, text, _ = run(common + "--papers p.json --details --save 2")
    one, two = pd.read_csv("1.csv"), pd.read_csv("2/records.csv")
    pd.testing.assert_frame_equal(one, two)
    assert status == 0 and "accuracy_1" in text and one["order"].tolist() == ["easy", "hard"]


def test_the_other_commands(run, tmp_path, monkeypatch):
    (tmp_path / "own.jsonl").write_text("\n".join(json.dumps(
        {"problem": f"{tier} 1+1?", "answer": "2", "tier": tier}) for tier in worlds.TIERS))
    text, note = run("exam --methods replay --exams 1 --problems own.jsonl")[1:]
    assert "3.000 --" in text and "one exam has no interval" in note
    monkeypatch.setitem(worlds.WORLDS, "pocket", replace(POCKET, budgets=(24,)))
    run("sweep mix --methods replay --exams 2 --out sweep.csv")
    assert len(pd.read_csv("sweep.csv")) == 18
    solve = {"name": "solve", "outcomes": [{"p": 0.5, "cost": c, "reward": 1} for c in (3, 9)]}
    (tmp_path / "i.json").write_text(json.dumps({"budget": 6, "classes": [[solve]]}))
    assert json.loads(run("osmckp i.json")[1])["value"] == 0.5
    pd.DataFrame([dict.fromkeys(COLUMNS, 1.0)]).to_csv("log.csv", index=False)
    assert run("diagnose log.csv")[1].startswith("sampler out of step: logprob_gap reached 1.000")


def test_counterfactuals_are_asked_of_methods_and_folders(run, monkeypatch):
    got = []
    table = counterfactuals.decision_table([counterfactuals.Case("budget", 64, None, 64)],
                                           np.full((1, 4), 0.25))
    monkeypatch.setattr(counterfactuals, "compare",
                        lambda *arguments: got.append(arguments) or table)
    for papers in (400, 3):  # and what was written is replaced
        more = "" if papers == 400 else " --models mft new=runs/new --papers 3 --seed 2 --samples 4"
        assert run(f"counterfactuals --out c.csv{more}")[:2] == (0, "wrote c.csv\n")
    assert got == [(POCKET, ("mft", "rarl"), 400, 1, 8),
                   (POCKET, ("mft", "new=runs/new"), 3, 2, 4)]


def test_options_reach_the_stages_of_training(run, monkeypatch):
    got = []
    for name in ("training.mft.train_mft", "training.rarl.train_rarl",
                 "training.pretrain.pretrain", "experiments.ablations.ablate"):
        monkeypatch.setattr(f"roi_lib.{name}", lambda *arguments, **_: got.append(arguments))
    for stage in ("mft", "rarl", "pretrain"):
        run(f"train {stage} --seed 3 --work w --out o")
        assert (got[-1][0], *map(str, got[-1][1:3]), got[-1][3].seed) == (POCKET, "o", "w", 3)
    run("train rarl --budgets 16,24 --steps 7 --world paper")
    assert got[-1][3] == replace(worlds.PAPER.rarl, budgets=(16, 24), steps=7)
    run("train rarl --world small --rows-at-once 4 --report-to wandb")  # those of TRL as well
    assert got[-1][3].trl == replace(worlds.SMALL.rarl.trl, rows_at_once=4, report_to="wandb")
    run("train ablations --variants mft,grpo --steps 7 --out a.csv")
    assert got[-1][1].steps == 7 and got[-1][4] == ("mft", "grpo")


@pytest.mark.parametrize("command", [
    *"exam sweep osmckp bench diagnose counterfactuals merge estimate doctor".split(), "",
    *(f"train {stage}" for stage in "tokenizer pretrain mft rarl ablations".split())])
def test_every_command_has_help_with_an_example(run, command):
    status, text, _ = run(f"{command} --help")
    assert status == 0 and f"Example: python -m roi_lib {command or 'exam'}" in text
    assert run(f"{command} --juggle")[0] == run("")[0] == 2


REFUSED = """exam --world moon: pocket, paper; exam --methods base,genius: genius
exam --methods base,optimal --samples 3: give a multiple of 4; exam --orders easy,odd: 'odd'
exam --budgets 64,4 --exams 2: give at least 5 tokens; exam --budgets 400: give at most 320 tokens
exam --methods rules,genius: genius; exam --problems-per-exam 0: at least 1
exam --dtype float9: float9; exam --model no-such-folder: name a local folder
exam --temperature -1 --exams 2: temperature must be 0; exam --problems none.jsonl: none.jsonl
exam --engine replay --exams 2: lacks 6 of 6 responses; exam --papers own.json: own.json
exam --world paper --methods all: whose checkpoints the hub has; exam --save .: is not replaced
exam --out .: --out names something that is no file; exam --plot no/x.png: the folder of --plot
sweep weather --out x.csv: problems, mix; sweep mix --out no/x.csv: the folder of --out
osmckp own.json: own.json; bench osmckp --out no/x.json: the folder of --out
diagnose none.csv: none.csv; counterfactuals --models genius --out x.csv: 'genius'
counterfactuals --models a=none --out x.csv: name a local folder
counterfactuals --out no/x.csv: the folder of --out; counterfactuals --out own.json: own.json
exam --methods --exams 2: there is no method; sweep mix --methods --out x.csv: there is no method
exam --temperature nan --methods base,rarl --workers 2 --exams 2: temperature must be 0
exam --budgets 64,4 --methods base,rarl --workers 2 --exams 2: give at least 5 tokens
exam --out own.json: own.json; exam --save /dev/null: is not replaced
sweep mix --out own.json: own.json; bench osmckp --out own.json: own.json
train ablations --out own.json: own.json; train rarl --out /dev/null: is not replaced
train rarl --engine server --out x: needs TRL's trainer
train rarl --budgets 64,4 --out x: give at least 5 tokens; train rarl --out .: is not replaced
train rarl --model no-such-folder --out x: name a local folder; train mft --out .: is not replaced
train pretrain --out .: is not replaced; train tokenizer --out .: is not replaced
train ablations --variants luck --out x.csv: mft, reference
merge pocket-base x: there is nothing to merge; train mft --minutes -1 --out x: 0 or more
estimate --device abacus: cpu2, t4
estimate --model no-such-folder: name a local folder; estimate --out own.json: own.json
estimate --work none: none/recipe.json"""


@pytest.mark.parametrize("case", [one for line in REFUSED.splitlines() for one in line.split("; ")])
def test_bad_input_is_one_sentence_and_costs_nobody_a_file(run, tmp_path, case):
    (tmp_path / "own.json").write_text("{")
    command, words = case.rsplit(": ", 1)
    status, _, error = run(command)
    assert status == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert words in error and [path.name for path in tmp_path.iterdir()] == ["own.json"]
    assert (tmp_path / "own.json").read_text() == "{"
