"""What training runs share: the log that goes on, optimizers as one, checkpoints with a card."""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from huggingface_hub import ModelCard

from roi_lib.store.checkpoints import load_tokenizer
from roi_lib.store.files import verify_folder
from roi_lib.store.tokenizers import train_bpe
from roi_lib.training import common
from roi_lib.worlds import PAPER, POCKET


def test_a_continued_log_repeats_no_step_and_goes_on_counting_seconds(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(common.time, "monotonic", lambda: now[0])

    def work(log, steps):
        for step in steps:
            now[0] += 7
            log.append({"step": step, "loss": math.nan if step == 2 else 0.1 * step, "extra": 1})

    work(common.TrainingLog(tmp_path, ("step", "loss", "seconds")), (1, 2, 3))
    now[0] = 5_000.0
    work(common.TrainingLog(tmp_path, ("step", "loss", "seconds"), last_step=2), (3, 4))
    assert (tmp_path / "log.csv").read_text().split() == [
        "step,loss,seconds", "1,0.1,7.0", "2,,14.0", "3,0.3,21.0", "4,0.4,28.0"]


@pytest.mark.parametrize(("logs", "words"), [
    ({"loss": "nan", "grad_norm": 1.0}, "loss is nan at step 3, budget 64; lower the learning"),
    ({"loss": 0.5, "grad_norm": float("inf")}, "grad_norm is inf at step 3, budget 64;")])
def test_what_is_no_number_stops_the_run(logs, words):
    common.check_finite({"loss": "0.5", "learning_rate": math.nan}, "step 2")
    with pytest.raises(FloatingPointError, match=words):
        common.check_finite(logs, "step 3, budget 64")


@dataclass
class Recipe:
    rate: float = 0.5
    sizes: tuple = ((2, 1),)


def test_a_work_folder_of_another_recipe_is_refused(tmp_path, refusal):
    for _ in range(2):
        with common.run_folder(tmp_path, Recipe(), POCKET):
            pass
    other = common.run_folder(tmp_path, Recipe(0.4), POCKET, start="x")
    assert "holds a run with another rate, start, which" in refusal(other.__enter__)


@pytest.mark.parametrize("text", ["[]", "null", "", "[" * 100_000, "9" * 5_000, "\x00"])
def test_a_work_folder_of_any_content_is_one_sentence(tmp_path, refusal, text):
    (tmp_path / "log.csv").write_text(text)
    enter = common.run_folder(tmp_path, Recipe(), POCKET).__enter__
    assert "holds the log or states of no run of ours" in refusal(enter)
    assert "log.csv is no log" in refusal(common.TrainingLog, tmp_path, ("step", "seconds"))
    assert (tmp_path / "log.csv").read_text() == text
    (tmp_path / "recipe.json").write_text(text)
    enter = common.run_folder(tmp_path, Recipe(), POCKET).__enter__
    assert "recipe.json is cut short or no JSON of ours" in refusal(enter)


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no device that is always full")
@pytest.mark.parametrize("size", [10, 10**6])
def test_a_full_disk_is_an_os_error_whatever_torch_calls_it(tmp_path, size):
    def train(**options):
        torch.save({"w": torch.zeros(size)}, tmp_path / "full")
        raise RuntimeError("CUDA out of memory")

    trainer = SimpleNamespace(train=train, args=SimpleNamespace(output_dir="runs/mft"))
    with pytest.raises(RuntimeError, match="^CUDA out of memory$"):  # other errors pass
        common.run_trainer(trainer)
    (tmp_path / "full").unlink()
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OSError, match="runs/mft could not be written .*make room and run the same"):
        common.run_trainer(trainer)


def parts():
    """A model, Muon and AdamW as one, and a scheduler that halves both rates at each step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 4))
    muon, adamw = common.muon_and_adamw(model, 0.02, 0.005)
    optimizer = common.CombinedOptimizer([adamw, muon])
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5**k)


def update(model, optimizers, seed):
    """One update on a random batch."""
    batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
    model(batch).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_two_optimizers_as_one_do_what_they_do_alone_and_go_on_from_their_states():
    """After loading, too, a scheduler's rates reach the optimizers that make the steps."""
    whole, twin = parts(), parts()[0]
    update(whole[0], [whole[1]], 0)
    update(twin, common.muon_and_adamw(twin, 0.02, 0.005), 0)
    assert equal(whole[0], twin) and not equal(twin, parts()[0])
    later = parts()
    for part, other in zip(whole, later, strict=True):
        other.load_state_dict(copy.deepcopy(part.state_dict()))
    for seed in range(3):
        for model, optimizer, scheduler in (whole, later):
            update(model, [optimizer], seed)
            scheduler.step()
    assert equal(whole[0], later[0])
    assert [group["lr"] for one in later[1].optimizers for group in one.param_groups] == [
        0.005 / 8, 0.02 / 8]
    with pytest.raises(ValueError):
        later[1].load_state_dict({"optimizers": whole[1].state_dict()["optimizers"][:1]})


def test_a_checkpoint_has_a_card_its_log_and_a_tokenizer_only_if_its_base_has_one(model, tmp_path):
    """Without one it is read with the world's; the paper world's stand-in has 4,096 words."""
    table = pd.DataFrame({"tier": ["easy", "hard"], "right": [1, math.nan]})
    (tmp_path / "log.csv").write_text("step,seconds\n1,60\n2,3675.6\n")
    words = train_bpe(["Q1. 3 + 4 = 7", "Level-1"], size=300)
    (tmp_path / "bare").mkdir()
    words.save_pretrained(tmp_path / "rich")
    for base in ("bare", "rich"):
        out = tmp_path / f"{base}-out"
        common.publish(out, model, tmp_path, Recipe(), str(tmp_path / base),
                       {"facts.json": [1], "table.csv": table}, "It is right.", about="It skips.",
                       made="`a command`")
        verify_folder(out)
        assert [(out / name).read_text() for name in ("facts.json", "table.csv", "log.csv")] == [
            "[\n 1\n]\n", "tier,right\neasy,1.0\nhard,\n", "step,seconds\n1,60\n2,3675.6\n"]
    found = load_tokenizer(str(out), PAPER.tokenizer)
    assert found("Q1. 3 + 47").input_ids == words("Q1. 3 + 47").input_ids
    assert len(load_tokenizer(str(tmp_path / "bare-out"), PAPER.tokenizer)) == 4_096
    read = ModelCard.load(out / "README.md")
    assert (read.data.license, read.data.base_model) == ("mit", str(tmp_path / "rich"))
    for part in ("# rich-out\n\nIt skips. Licence: MIT", '"rate": 0.5', "`a command`, 61.3 minutes",
                 "It is right."):
        assert part in read.text
