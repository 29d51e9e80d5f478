"""Costs: each formula beside what torch, transformers and peft really do; the table of a world."""

import json
import math
from dataclasses import asdict, replace
from functools import partial

import pandas as pd
import pytest
import torch
from conftest import ROOT
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from roi_lib.__main__ import main
from roi_lib.engines import RunLog
from roi_lib.engines.llama import LlamaDecoder
from roi_lib.experiments import estimate
from roi_lib.experiments.estimate import ASSUMED, KNOWN, compare, shape_of
from roi_lib.generation import Rollout
from roi_lib.store.checkpoints import load_model
from roi_lib.training import costs
from roi_lib.training.common import lora
from roi_lib.training.costs import DEVICES, GIB, Device, read_shape
from roi_lib.worlds import PAPER, POCKET

SMALL = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, vocab_size=90)
QWEN = dict(num_key_value_heads=2, vocab_size=151_936, tie_word_embeddings=True)
CONFIGS = {  # number of parameters -> config
    494_032_768: Qwen2Config(**QWEN, hidden_size=896, intermediate_size=4_864, num_hidden_layers=24,
                             num_attention_heads=14),  # Qwen2.5-0.5B
    1_543_714_304: Qwen2Config(**QWEN, hidden_size=1_536, intermediate_size=8_960,
                               num_hidden_layers=28, num_attention_heads=12, dtype="bfloat16"),
    71_184: LlamaConfig(**SMALL, head_dim=16, tie_word_embeddings=False),
    64_560: Qwen2Config(**SMALL, tie_word_embeddings=False)}
BASE = KNOWN["Qwen/Qwen2.5-1.5B-Instruct"]


@pytest.fixture(scope="module")
def shape():
    return shape_of("pocket-base")


def pocket(rank=0, **options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        ROOT / "data/pocket-base", attn_implementation="eager", **options).train()
    return get_peft_model(model, lora(model, rank)) if rank else model


# ---------------------------------------------------------------- a model
@pytest.mark.parametrize("number", CONFIGS)
def test_parameters_are_exact(number):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[number])
    assert costs.parameters(read_shape(CONFIGS[number])) == model.num_parameters() == number


@pytest.mark.parametrize("name", ["pocket-base", "pocket-mft", "pocket-rarl"])
def test_parameters_of_real_checkpoints_are_exact(name):
    assert costs.parameters(shape_of(name)) == load_model(name).num_parameters() == 850_688


def test_the_known_shape_is_that_of_its_config_and_nothing_is_fetched(monkeypatch):
    assert read_shape(CONFIGS[1_543_714_304]) == BASE
    monkeypatch.setattr("roi_lib.store.checkpoints.load_config", None)
    assert shape_of(PAPER.method("base").checkpoint) is BASE


def test_other_models_are_refused(refusal):
    for config in (Qwen3Config(**SMALL), LlamaConfig(**SMALL, attention_bias=True)):
        assert f"not of this {config.model_type}" in refusal(read_shape, config)
    assert "name a local folder" in refusal(shape_of, "no-such-folder")


@pytest.mark.parametrize("rank", [1, 8])
def test_adapters_are_those_of_peft(shape, rank):
    assert costs.adapters(shape, rank) == pocket(rank).get_nb_trainable_parameters()[0]


def test_flops_of_a_forward_pass(shape):
    ids = torch.randint(0, 400, (2, 150))
    for context, keep in ((150, 0), (150, 1)):  # all logits, and the last token's alone
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            pocket()(input_ids=ids, logits_to_keep=keep)
        scored = 1 if keep == 0 else 1 / 150
        assert ids.numel() * costs.forward_flops(shape, context, scored) == pytest.approx(
            counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_of_an_update(shape, rank, checkpointing):
    model, ids = pocket(rank), torch.randint(0, 400, (2, 20))
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    told = ids.numel() * costs.training_flops(shape, 20, 1, rank, checkpointing)
    # a block that is repeated stops before its last product
    assert 0.96 < told / counter.get_total_flops() < (1.09 if checkpointing else 1.03)


# ---------------------------------------------------------------- memory
def test_bytes_of_a_cache_are_those_of_its_tensors(shape):
    model = load_model("pocket-base", "float64")
    layers = model(input_ids=torch.zeros(3, 7, dtype=torch.long)).past_key_values.layers
    held = sum(t.nbytes for layer in layers for t in (layer.keys, layer.values))
    assert held == 3 * 7 * costs.kv_bytes(shape, 8)
    with torch.inference_mode():  # and our decoder keeps a prompt once for its rows
        decoder = LlamaDecoder(model, [(5,) * 11, (6,) * 9] * 4, 32, 0)
        for _ in range(32):
            decoder.step(torch.zeros(8, dtype=torch.long))
    held = sum(t.nbytes for kind in (decoder.prompts, decoder.own) for x in kind for t in x)
    assert held == 8 * (32 + 11 / 4) * costs.kv_bytes(shape, 8)
    assert costs.decoding_memory(shape, 4, 34.75, 8, 1_000) - costs.decoding_memory(
        shape, 4, 34.75, 0) == held / 2 + 8 * 485 * 20 + 1_000


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("bf16", [False, True])
def test_what_waits_for_the_backward_pass(shape, rank, bf16):
    half = {"dtype": torch.bfloat16} if rank and bf16 else {}  # as adapters' bases are loaded
    model, kept, tokens = pocket(rank, **half), {}, 4 * 250
    model.set_attn_implementation("sdpa")
    body = model.get_base_model().model if rank else model.model  # logits: 16 bytes each, below
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def measured():
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                body(input_ids=torch.randint(0, 400, (4, 250)), use_cache=False)
        return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)

    def told(checkpointing):
        return costs.training_memory(shape, 250, 4, rank, bf16, checkpointing, tiled=False) - (
            (2 if half else 4) * costs.parameters(shape) + costs.state_bytes(shape, rank)
            + tokens * 16 * 485)

    whole = measured()
    assert 0.95 < told(False) / whole < 1.25
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    # now the inputs of the blocks wait (and the last norm's, here as much as two of them), and one
    # block at a time is as before
    copies = 2 * costs.parameters(shape) if bf16 and not rank else 0
    block = (whole - copies) / 4
    assert 0.85 < (told(True) - copies * (rank == 0)) / (measured() + block) < 1.25


@pytest.mark.parametrize("rank", [0, 8])
def test_gradients_and_states_of_what_is_trained(shape, rank):
    model = pocket(rank)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4)
    ids = torch.randint(0, 400, (1, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    held = sum(p.grad.nbytes for p in trained) + sum(
        t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)
    held += sum(p.nbytes for p in trained) if rank else 0
    assert costs.state_bytes(shape, rank) == held


def test_whole_logits_are_four_tables_and_tiles_do_not_grow():
    def grows(**options):
        return costs.training_memory(BASE, 200, 1, 32, True, True, **options) - (
            costs.training_memory(BASE, 100, 1, 32, True, True, **options))

    assert grows(tiled=False) - grows() == 100 * 151_936 * 4 * 4


@pytest.mark.parametrize(("settings", "gib", "words"), [
    ({"max_rows": 200}, 0.08, "max_rows 100, or 4090, or a100, or h100"),
    ({"max_rows": 7}, 3, "max_rows 3, or a100, or h100"),
    ({"rows_at_once": 4, "lora_rank": 32, "checkpointing": True}, 3.5, "rows_at_once 2, or 4090"),
    ({"rows_at_once": 1, "lora_rank": 0, "checkpointing": True}, 8, "lora_rank 32, or 4090"),
    ({"rows_at_once": 1, "lora_rank": 32, "checkpointing": False}, 8, "checkpointing True, or 40"),
    ({"rows_at_once": 9, "lora_rank": 0, "checkpointing": False}, 8,
     "rows_at_once 1 with lora_rank 32 with checkpointing True"),
    ({"max_rows": 1}, 9_999, "nothing that is known here")])
def test_what_does_not_fit_says_what_would(refusal, settings, gib, words):
    """2 GiB, and so many for each row; training all weights or keeping everything takes twice."""
    def need(lora_rank=32, checkpointing=True, **rows):
        (rows,) = rows.values()
        return GIB * (2 + gib * rows * (1 + (lora_rank == 0)) * (2 - checkpointing))

    costs.check_memory("MFT", lambda **_: 0.9 * 15 * GIB, 15 * GIB, **settings)  # just fits
    told = refusal(costs.check_memory, "MFT", need, 15 * GIB, **settings)
    assert f"what would fit: {words}" in told and told.startswith(
        f"MFT needs {need(**settings) / GIB:.1f} GiB, and of this device's 15 only 13.5 are to be")


# ---------------------------------------------------------------- time
def test_a_step_takes_as_long_as_what_takes_longest():
    device = Device(1e12, 1e11, 1e9, GIB, arithmetic=0.5, reading=0.25, block_seconds=0.01)
    step, quick = partial(costs.step_seconds, BASE, context=100, cached=0), replace(
        device, bandwidth=1e12)
    few, many = step(device, 2, 1), step(quick, 2, 512)
    assert few == (2 * 1_543_714_304 + 64 * 151_936) / 0.25e9
    assert many == 512 * costs.forward_flops(BASE, 100) / 0.5e12
    assert step(quick, 4, 512) == pytest.approx(10 * many), "float32 has a speed of its own"
    assert step(quick, 2, 1) == 28 * 0.01
    assert step(device, 2, 1, cached=10**6) - few == 10**6 * costs.kv_bytes(BASE, 2) / 0.25e9


def hours(world=PAPER, device=DEVICES["4090"], shape=BASE, a=ASSUMED["paper"]):
    return estimate.estimate(world, shape, device, a)[0].set_index("stage")


def test_hours_scale_as_they_should():
    """Twice the work, twice the hours of the stage that does it; what is twice as fast, half."""
    def ratios(column="seconds", **changed):
        ratio = hours(**changed)[column] / hours()[column]
        return {name: round(x, 2) for name, x in ratio.items() if abs(x - 1) > 0.005}

    rarl, mft, card = PAPER.rarl, PAPER.mft, {"RARL card": 2.0}
    assert ratios(world=replace(PAPER, rarl=replace(rarl, steps=600))) == {
        "RARL sampling": 2.0, "RARL gradient": 2.0}
    assert ratios(world=replace(PAPER, mft=replace(mft, samples=16))).keys() == {
        "MFT sampling", "MFT card"}
    assert ratios(a=replace(ASSUMED["paper"], papers=1_024, card_papers=4_000)) == card | {
        "exams": 2.0}
    four = DEVICES["4090"]
    fast = replace(four, flops16=2 * four.flops16, flops32=2 * four.flops32, block_seconds=2e-4,
                   bandwidth=2 * four.bandwidth)
    assert set(ratios(device=fast).values()) == {0.5} and len(ratios(device=fast)) == 8
    assert ratios(device=replace(four, flops16=2 * four.flops16)).keys() >= {
        "MFT training", "RARL gradient"}
    full = ratios(world=replace(PAPER, mft=replace(mft, lora_rank=0, checkpointing=False)))
    assert full == {"MFT training": pytest.approx(3 / 3.07, abs=0.02),
                    "MFT log": pytest.approx(1.76, abs=0.01)}  # float32 weights sample there
    trl = replace(PAPER.rarl.trl, lora_rank=0)  # float32 weights sample, too
    single = ratios(world=replace(PAPER, rarl=replace(PAPER.rarl, trl=trl)))
    assert single.keys() == {"RARL sampling", "RARL gradient", "RARL card"}
    assert single["RARL sampling"] > 1.5


def test_tokens_are_those_of_the_recipe():
    table = hours()
    problems = 3_000 + 3_000 + 90  # AIME has no more to train on
    assert table.tokens["MFT sampling"] == problems * 8 * 400
    assert table.tokens["MFT training"] == pytest.approx(
        problems * (290 + 400) + 6_000 * (200 + 90 * 2.75 + 0.9 * 768))
    assert table.tokens["RARL sampling"] == pytest.approx(300 * 256 * 0.9 * 768)
    assert table.tokens["RARL gradient"] == pytest.approx(300 * 256 * (200 + 3 * 90 + 0.9 * 768))
    assert table.tokens["exams"] == pytest.approx(512 * 3 * 2 * 8 * 0.9 * 768)
    few = hours(replace(PAPER, mft=replace(PAPER.mft, steps=10, card_papers=0)))
    assert "MFT card" not in few.index and few.tokens["MFT training"] == pytest.approx(
        table.tokens["MFT training"] * 640 / 12_090)


def test_a_stage_of_sampling_goes_in_batches_until_their_longest_response():
    """800 responses, 256 at a time: 4 batches of 200, of which 80 are under way on average."""
    device, a = DEVICES["t4"], ASSUMED["paper"]
    stage = estimate.sampled(BASE, device, a, "x", 100, 8, 2, 400, 1_000, 2, beside=GIB)
    step = costs.step_seconds(BASE, device, 2, 80, 380 + 200, 380 / 8 + 200)
    reading = 100 * 380 * costs.forward_flops(BASE, 190, 1 / 380)
    assert stage.seconds == pytest.approx(4 * 1_000 * step + reading / device.speed(2))
    assert stage.flops == pytest.approx(reading + 800 * 400 * costs.forward_flops(BASE, 580))
    assert stage.need(**stage.settings) == costs.decoding_memory(
        BASE, 2, 800 + 2 * 380 / 8, 200, GIB), "nobody keeps 200 rows until the end"


def test_memory_of_stages(shape):
    """What else is held, the checkpoint's own numbers, the larger of two parts, whole logits."""
    table, base = hours(), 2 * 1_543_714_304
    longest = 2 * (200 + 3 * 90) + 1_024
    assert table.bytes["RARL gradient"] == costs.training_memory(BASE, longest, 4, 32, True, True)
    assert table.bytes["MFT training"] == costs.training_memory(
        BASE, longest, 4, 32, True, True, beside=base)
    assert table.bytes["MFT sampling"] == costs.decoding_memory(BASE, 2, 800 + 2 * 290 / 8, 256)
    assert table.bytes["MFT card"] == costs.decoding_memory(
        BASE, 2, 2_400 + 2 * 470, 200, base), "and not the samples of each problem alone"
    own = hours(POCKET, DEVICES["cpu2"], shape, ASSUMED["pocket"])
    assert own.bytes["RARL gradient"] == costs.training_memory(
        shape, 2 * (20 + 5 * 28) + 256, 12, 0, False, False, tiled=False)


def test_nothing_is_refused(refusal):
    assert "0 steps" in refusal(hours, replace(PAPER, rarl=replace(PAPER.rarl, steps=0)))
    assert "above 0, not -1" in refusal(estimate.Assumed, rows=-1)


def test_the_pocket_world_comes_near_its_own_logs(shape):
    """Within 15 % of the tokens that were counted (`data/`)."""
    table = hours(POCKET, DEVICES["cpu2"], shape, ASSUMED["pocket"])
    assert table.tokens["MFT training"] == pytest.approx(3.3e6, rel=0.15)
    log = pd.read_csv(ROOT / "data/pocket-rarl/log.csv")
    assert table.tokens["RARL sampling"] == pytest.approx(log["tokens"].sum() * 240, rel=0.15)


# ---------------------------------------------------------------- afterwards
def run_of(folder, recipe, columns, **start):
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe) | {"world": "paper"} | start))
    pd.DataFrame(columns).to_csv(folder / "log.csv", index=False)
    return folder


@pytest.fixture
def rarl_run(tmp_path):
    """One that has come to step 4 of 300."""
    return run_of(tmp_path / "rarl", PAPER.rarl, {
        "step": [1, 2, 3, 4], "tokens": [500, 600, 700, 800], "seconds": [50, 100, 180, 240]})


@pytest.fixture
def mft_run(tmp_path):
    work = run_of(tmp_path / "mft", PAPER.mft, {"step": [20, 40], "seconds": [100, 3_600]}, model=1)
    log = RunLog(work / "samples.jsonl", {"world": "paper"})
    with log.writing():
        for i in range(3):
            log.append(f"{i}", [Rollout((1,) * 100, True), Rollout((1,) * 50, False)])
    return work


def test_a_run_is_put_beside_the_estimate_of_what_it_has_done(rarl_run, mft_run):
    given = PAPER, BASE, DEVICES["4090"], ASSUMED["paper"]
    (row,) = compare(rarl_run, *given).to_dict("records")
    table = hours(replace(PAPER, rarl=replace(PAPER.rarl, steps=4)))
    assert row["tokens_measured"] == 2_600 * 32 * 8 and row["seconds_measured"] == 240
    assert row["tokens_estimated"] == table.tokens["RARL sampling"]
    assert row["tokens_ratio"] == pytest.approx(650 / (0.9 * 768))
    both = table.seconds["RARL sampling"] + table.seconds["RARL gradient"]
    assert row["seconds_ratio"] == 240 / row["seconds_estimated"] == 240 / both
    sampling, training = compare(mft_run, *given).to_dict("records")
    assert sampling["tokens_measured"] == 450 and math.isnan(sampling["seconds_ratio"])
    assert sampling["tokens_ratio"] == 450 / (6_090 * 8 * 400)
    table = hours(replace(PAPER, mft=replace(PAPER.mft, steps=40)))
    assert training["seconds_ratio"] == 3_600 / (
        table.seconds["MFT training"] + table.seconds["MFT log"])
    (mft_run / "samples.jsonl").unlink()
    assert len(compare(mft_run, *given)) == 1


def test_what_is_no_run_of_this_world_is_refused(rarl_run, tmp_path, refusal):
    given = BASE, DEVICES["4090"], ASSUMED["paper"]
    assert "in the world pocket" in refusal(compare, rarl_run, POCKET, *given)
    (rarl_run / "log.csv").write_text("step,tokens,seconds\n")
    assert "has no step yet" in refusal(compare, rarl_run, PAPER, *given)
    (rarl_run / "log.csv").write_text("step,seconds\n1,2\n")
    assert "no column 'tokens'" in refusal(compare, rarl_run, PAPER, *given)
    (rarl_run / "recipe.json").write_text('{"hidden": 128, "world": "paper"}')
    assert "no run of MFT or RARL" in refusal(compare, rarl_run, PAPER, *given)


def test_one_screen_and_a_file(rarl_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # and what was written is replaced
        main("estimate --world paper --device 4090 --work rarl --out e.json --share 0.8 "
             "--rarl.trl.rows-at-once 64 --mft.lora-rank 0".split())
    text = capsys.readouterr().out
    text = text[: len(text) // 2]
    assert len(text.splitlines()) <= 24 and max(map(len, text.splitlines())) <= 200
    assert "1,543,714,304 parameters) on 4090" in text and "share 0.8" in text
    assert "MFT training needs " in text and "lora_rank 32" in text
    assert "RARL gradient needs " in text and "rows_at_once " in text
    found = json.loads((tmp_path / "e.json").read_text())
    assert (found["world"], found["device"], found["share"]) == ("paper", "4090", 0.8)
    assert [row["stage"] for row in found["stages"]][:2] == ["MFT sampling", "MFT training"]
    assert found["work"][0]["seconds_measured"] == 240 and len(found["too_large"]) >= 2
