"""The command line: what each command writes, and one clear sentence for bad input."""

import json
from dataclasses import replace

import pandas as pd
import pytest

from roi_lib.__main__ import main
from roi_lib.worlds import ORDERS, POCKET


@pytest.fixture
def run(capsys):
    """Exit status, standard output and standard error of one command."""
    def command(*arguments):
        status = 0
        try:
            main([str(a) for a in arguments])
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return command


# ---------------------------------------------------------------- exams
def test_all_methods_on_one_screen_and_in_one_table(run, tmp_path):
    out, plot = tmp_path / "out.csv", tmp_path / "out.png"
    status, text, _ = run("exam", "--methods", "all", "--budgets", "64,32,64", "--exams", 3,
                          "--out", out, "--plot", plot, "--progress", "False")
    records = pd.read_csv(out)
    assert status == 0 and len(text.splitlines()) <= 24 and plot.stat().st_size > 9_000
    assert text.startswith("hard order, 3 papers, seed 0") and f"wrote {out}, {plot}" in text
    names = [name for name in POCKET.methods if name != "replay"] + ["rational_tagged"]
    assert records["method"].unique().tolist() == names and all(name in text for name in names)
    assert len(records) == len(names) * 2 * 3, "a budget that is named twice is sat once"
    assert set(records["order"]) == set(ORDERS) and (records["over_budget"] == 0).all()
    assert (records[records["order"] == "easy"]["regret"].dropna() == 0).all()


def test_papers_are_handed_on_and_orders_chosen(run, tmp_path):
    """What somebody else sits from the list is what was sat here; easy is always there."""
    papers, tables = tmp_path / "papers.json", [tmp_path / "one.csv", tmp_path / "two.csv"]
    common = ["exam", "--methods", "replay", "--budgets", "64"]
    assert run(*common, "--exams", 5, "--seed", 7, "--write-papers", papers, "--orders", "hard",
               "--out", tables[0])[0] == 0
    status, text, _ = run(*common, "--papers", papers, "--orders", "hard", "--details", "True",
                          "--out", tables[1], "--save", tmp_path / "saved")
    assert status == 0 and "--details" not in text and "accuracy_1" in text
    one, two = map(pd.read_csv, tables)
    pd.testing.assert_frame_equal(one, two)
    assert one["order"].tolist() == ["easy", "hard"] and set(one["seed"]) == {7}
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "saved/records.csv"), one)


def test_problems_of_ones_own_and_a_single_exam(run, tmp_path):
    rows = [json.dumps({"problem": f"{tier} 1+1?", "answer": "2", "tier": tier}) for tier in ORDERS]
    (tmp_path / "mine.jsonl").write_text("\n".join(rows))
    status, text, note = run("exam", "--methods", "replay", "--budgets", 64, "--exams", 1,
                             "--problems", tmp_path / "mine.jsonl")
    assert status == 0 and "3.000 --" in text and "one exam has no interval" in note


def test_real_papers_by_replay(run, tmp_path, real_data):
    out = tmp_path / "out.csv"
    status, _, _ = run("exam", "--world", "paper", "--data", real_data, "--methods", "replay",
                       "--exams", 40, "--budgets", "512,1024,100000", "--out", out)
    score = pd.read_csv(out).set_index(["budget", "order"])["score"]
    assert status == 0 and (score[100_000] == 3).all()
    assert score[512, "medium"] < score[1024, "medium"] < 3


# ---------------------------------------------------------------- the other commands
COMMANDS = ["exam", "sweep", "osmckp", "bench", "diagnose", "snapshots", "seeds", "doctor",
            *(f"train {stage}" for stage in ("tokenizer", "pretrain", "mft", "rarl", "ablations"))]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_has_help_with_an_example(run, command):
    status, text, _ = run(*command.split(), "--help")
    assert status == 0 and f"Example: python -m roi_lib {command or 'exam'}" in text


def test_sweep_osmckp_diagnose_and_seeds(run, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("roi_lib.worlds").worlds.WORLDS, "pocket",
                        replace(POCKET, budgets=(24,)))
    out = tmp_path / "sweep.csv"
    status, text, _ = run("sweep", "mix", "--methods", "replay", "--exams", 2, "--out", out)
    assert status == 0 and f"wrote {out}: 18 rows" in text and len(pd.read_csv(out)) == 18
    skip, solve = ({"name": name, "outcomes": [{"p": 0.5, "cost": c, "reward": r} for c in costs]}
                   for name, costs, r in (("skip", (0, 0), 0), ("solve", (3, 9), 1)))
    (tmp_path / "one.json").write_text(json.dumps({"budget": 6, "classes": [[skip, solve]]}))
    status, text, _ = run("osmckp", tmp_path / "one.json")
    assert status == 0 and json.loads(text)["value"] == 0.5
    assert run("diagnose", "data/pocket-rarl/log.csv")[1].startswith("no known cause fits")
    status, _, _ = run("seeds", "0=data/pocket-rarl", "--out", tmp_path / "seeds.csv")
    assert status == 0 and len(pd.read_csv(tmp_path / "seeds.csv")) == 12


def test_options_reach_the_stages_of_training(run, tmp_path, monkeypatch):
    called = {}
    for name in ("training.mft.train_mft", "training.rarl.train_rarl", "training.pretrain.pretrain",
                 "experiments.ablations.ablate", "experiments.snapshots.snapshot_report"):
        monkeypatch.setattr(f"roi_lib.{name}", lambda *a, name=name, **k: called.update({name: a}))
    for stage in ("mft", "rarl", "pretrain"):
        run("train", stage, "--seed", 3, "--work", tmp_path / "w", "--out", tmp_path / stage)
        function = f"training.{stage}.{'' if stage == 'pretrain' else 'train_'}{stage}"
        world, out, work, recipe, *_ = called[function]
        assert (world, out, work, recipe.seed) == (POCKET, tmp_path / stage, tmp_path / "w", 3)
    run("train", "rarl", "--budgets", "16,24", "--snapshots", "0", "2", "--world", "paper")
    world, _, _, recipe, *_ = called["training.rarl.train_rarl"]
    assert recipe == replace(world.rarl, budgets=(16, 24), snapshots=(0, 2)) and recipe.trl
    run("train", "ablations", "--variants", "mft,grpo", "--out", tmp_path / "a.csv", "--steps", 7)
    arguments = called["experiments.ablations.ablate"]
    assert arguments[1].steps == 7 and tuple(arguments[4]) == ("mft", "grpo")
    run("snapshots", "--work", "a", "b", "--papers", 5, "--out", tmp_path / "s.json")
    _, works, papers, *_ = called["experiments.snapshots.snapshot_report"]
    assert list(map(str, works)) == ["a", "b"] and papers == 5


# ---------------------------------------------------------------- bad input
REFUSED = [
    ("exam --world moon", "world must be one of pocket, paper"),
    ("exam --methods base,genius", "genius"),
    ("exam --methods base,rational --samples 3", "give a multiple of 4"),
    ("exam --orders easy,odd", "order must be one of easy, medium, hard, not 'odd'"),
    ("exam --budgets 0", "budget 0 is smaller than one level tag"),
    ("exam --budgets 64,4", "give at least 5 tokens"),
    ("exam --exams 0", "must be at least 1"), ("exam --problems-per-exam 0", "must be at least 1"),
    ("exam --tiers easy,tiny", "tier must be one of"), ("exam --dtype float9", "float9"),
    ("exam --model no/such/folder/here", "name a local folder"),
    ("exam --temperature -1", "temperature must be 0"),
    ("exam --engine replay --exams 2", "lacks 2 of 2 responses"),
    ("exam --world paper --methods all", "name methods whose checkpoints the hub has"),
    ("exam --world paper --methods replay --data nowhere", "nowhere"),
    ("exam --problems nowhere.jsonl", "nowhere.jsonl"), ("exam --papers TMP/own.json", "own.json"),
    ("exam --save TMP", "is not replaced"), ("exam --out TMP", "--out names"),
    ("exam --out TMP/no/x.csv", "the folder of --out does not exist"),
    ("exam --plot TMP/no/x.png", "the folder of --plot does not exist"),
    ("exam --write-papers TMP/no/x.json", "the folder of --write-papers does not exist"),
    ("sweep weather --out TMP/x.csv", "sweep must be one of budget, problems"),
    ("sweep mix --out TMP/no/x.csv", "the folder of --out does not exist"),
    ("osmckp TMP/own.json", "own.json"), ("osmckp TMP/none.json", "none.json"),
    ("bench osmckp --out TMP/no/x.json", "the folder of --out does not exist"),
    ("diagnose TMP/none.csv", "none.csv"), ("diagnose TMP/own.json", "is no log of RARL"),
    ("snapshots --work TMP/none --out TMP/x.json", "none"),
    ("seeds 0=TMP/none --out TMP/x.csv", "none"),
    ("train rarl --reward luck", "reward must be one of"),
    ("train rarl --budgets 64,4 --work TMP/w --out TMP/o", "give at least 5 tokens"),
    ("train rarl --model no/such --work TMP/w --out TMP/o", "no/such"),
    ("train rarl --engine server --work TMP/w --out TMP/o", "needs TRL's trainer"),
    ("train rarl --out TMP", "is not replaced"), ("train mft --out TMP", "is not replaced"),
    ("train pretrain --out TMP", "is not replaced"),
    ("train tokenizer --out TMP", "is not replaced"),
    ("train mft --target longest", "target must be one of shortest, median"),
    ("train ablations --variants luck --out TMP/x.csv", "variant must be one of mft, reference"),
    ("train ablations --out TMP/no/x.csv", "the folder of --out does not exist")]


@pytest.mark.parametrize(("command", "words"), REFUSED, ids=[command for command, _ in REFUSED])
def test_bad_input_is_one_sentence_and_costs_nobody_a_file(run, tmp_path, command, words,
                                                          monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "own.json").write_text("{")
    status, _, error = run(*command.replace("TMP", str(tmp_path)).split())
    assert status == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert words in error
    assert (tmp_path / "own.json").read_text() == "{"
    assert not [*tmp_path.glob("x.*")] and not (tmp_path / "o").exists()


@pytest.mark.parametrize("command", ["exam --engine abacus", "exam --exams many", "juggle", ""])
def test_what_is_no_command_or_option_ends_with_status_2(run, command):
    status, _, error = run(*command.split())
    assert status == 2 and (not command or command.split()[-1] in error)
