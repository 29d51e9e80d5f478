"""The safety net: results in float64 are those of commit 41d8423, which wrote `reference.json`."""

import json
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from roi_lib import mft, rarl
from roi_lib.engines import EngineConfig, engine_for
from roi_lib.exams import draw_papers
from roi_lib.experiments.methods import Comparison, run_methods
from roi_lib.experiments.table import CELL, make_records
from roi_lib.sitting import responses
from roi_lib.store.checkpoints import load_model
from roi_lib.worlds import POCKET

REFERENCE = json.loads((ROOT / "tests/reference.json").read_text())


def digest(content):
    return sha256(json.dumps(content).encode()).hexdigest()


def test_tokens_and_records_of_24_papers():
    comparison = Comparison(POCKET, draw_papers(POCKET, 24), engine=EngineConfig(dtype="float64"))
    results = run_methods(comparison, [
        "base", "mft_greedy_knapsack_charged", "rarl", "rational"], POCKET.budgets, workers=1)
    found = {" ".join(map(str, cell)): digest([list(ids) for ids in responses(table)["ids"]])
             for cell, table in results.table.groupby(CELL, sort=False)}
    assert found == REFERENCE["tokens"]
    wanted = pd.DataFrame(REFERENCE["records"], columns=REFERENCE["columns"])
    records = make_records(comparison, results)[wanted.columns]
    pd.testing.assert_frame_equal(records, wanted, check_dtype=False, rtol=0, atol=1e-12)


def test_labels_of_mft(env):
    engine = engine_for(load_model("pocket-base", "float64"), env.tokenizer)
    problems = mft.training_problems(POCKET, 12)
    samples = mft.rejection_sample(env, engine, problems, 4)
    targets = [mft.align(POCKET, *pair) for pair in zip(problems, samples, strict=True)]
    rows = mft.curriculum(env, targets, replace(POCKET.mft, problems=12, exams=64, rows=8))
    assert REFERENCE["mft"] == {
        "labels": [[t.problem.id, t.level, t.words] for t in targets],
        "costs": [[s.cost for s in some] for some in samples],
        "correct": [[s.correct for s in some] for some in samples],
        "rows": digest([[row.prompt, row.response, row.levels] for row in rows])}


@pytest.mark.parametrize("step", [0, 1])
def test_rewards_and_gradients_of_rarl(env, step):
    wanted, model = REFERENCE["rarl"][step], load_model("pocket-mft", "float64")
    recipe = replace(POCKET.rarl, exams=4, rollouts=8, budgets=(64, 128))
    exams, budget = rarl.training_exams(POCKET, recipe, step)
    table = rarl.roll_out(env, engine_for(model, env.tokenizer), exams, budget, recipe, step)
    ids = [list(map(list, group)) for _, group in responses(table).groupby("exam")["ids"]]
    assert (budget, digest(ids)) == (wanted["budget"], wanted["ids"])
    assert rarl.exam_rewards(table).tolist() == wanted["rewards"]
    learned = rarl.batch_gradient(model, table, recipe, step)
    assert learned == pytest.approx(wanted["learned"], rel=0, abs=1e-12)
    for name, weight in model.named_parameters():
        found = [float(weight.grad.norm()), float(weight.grad.flatten()[:64].sum())]
        np.testing.assert_allclose(found, wanted["gradient"][name], rtol=0, atol=1e-12)
