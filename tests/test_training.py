"""What training runs share: the log that goes on, and the folder kept to one process."""

import copy
import subprocess
import sys

import pytest
import torch

from roi_lib.checkpoints import load_tokenizer, verify_folder
from roi_lib.tokenizer import train_bpe
from roi_lib.training import (
    Together,
    TrainingLog,
    folder_lock,
    muon_and_adamw,
    write_checkpoint,
)
from roi_lib.worlds import PAPER


def test_a_continued_log_repeats_no_step(tmp_path):
    log = TrainingLog(tmp_path / "log.csv", ("step", "loss"), 0)
    for step in (1, 2, 3):
        log.write(step, step / 10)
    again = TrainingLog(tmp_path / "log.csv", ("step", "loss"), last_step=2)
    assert again.last == {"step": "2", "loss": "0.2"}
    again.write(3, 0.5)
    assert (tmp_path / "log.csv").read_text() == "step,loss\n1,0.1\n2,0.2\n3,0.5\n"


def test_F4_a_row_cut_short_by_a_full_disk_is_dropped(tmp_path):
    (tmp_path / "log.csv").write_text("step,loss\n1,0.1\n2")
    TrainingLog(tmp_path / "log.csv", ("step", "loss"), last_step=2)
    assert (tmp_path / "log.csv").read_text() == "step,loss\n1,0.1\n"


def test_F5_two_processes_never_share_a_folder(tmp_path):
    code = (f"from pathlib import Path; from roi_lib.training import folder_lock\n"
            f"with folder_lock(Path({str(tmp_path)!r})): print('held')")
    with folder_lock(tmp_path):
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "another process is writing" in second.stderr and not second.stdout
    with folder_lock(tmp_path), pytest.raises(ValueError, match="name another folder"):
        with folder_lock(tmp_path):
            pass
    third = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert third.stdout == "held\n"


def test_a_checkpoint_holds_a_tokenizer_only_if_it_is_given_one(model, tmp_path):
    """Without one it is read with the world's; the paper world's stand-in has 4,096 words."""
    (tmp_path / "log.csv").write_text("step\n")
    words = train_bpe(["Q1. 3 + 4 = 7", "Level-1"], size=300)
    write_checkpoint(tmp_path / "own", model, tmp_path / "log.csv", "card", words, facts=[1])
    write_checkpoint(tmp_path / "none", model, tmp_path / "log.csv", "card", facts=[1])
    for name in ("own", "none"):
        verify_folder(tmp_path / name)
        assert (tmp_path / name / "facts.json").read_text() == "[\n 1\n]\n"
    found = load_tokenizer(str(tmp_path / "own"), PAPER.tokenizer)
    assert found("Q1. 3 + 47").input_ids == words("Q1. 3 + 47").input_ids
    assert found.chat_template == words.chat_template
    assert len(load_tokenizer(str(tmp_path / "none"), PAPER.tokenizer)) == 4_096


def steps(model, optimizer, scheduler, count, seed):
    """Some updates on random batches."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(8, 4, generator=draw)).square().sum().backward()
        optimizer.step()
        scheduler.step()


def pair(model):
    """Muon and AdamW as one, and a scheduler that halves both rates at each step."""
    muon, adamw = muon_and_adamw(model, 0.02, 0.005)
    optimizer = Together([adamw, muon])
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)


def small_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 4))


def test_two_optimizers_as_one_do_what_they_do_alone():
    model, twin = small_model(), small_model()
    optimizer, scheduler = pair(model)
    steps(model, optimizer, scheduler, 1, seed=1)
    draw = torch.Generator().manual_seed(1)
    twin(torch.randn(8, 4, generator=draw)).square().sum().backward()
    for one in muon_and_adamw(twin, 0.02, 0.005):
        one.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert [g["lr"] for one in optimizer.optimizers for g in one.param_groups] == [0.0025, 0.01]


def test_F3_two_optimizers_go_on_from_their_states():
    """After loading, too, a scheduler's rates reach the optimizers that make the steps."""
    whole = small_model()
    optimizer, scheduler = pair(whole)
    steps(whole, optimizer, scheduler, 3, seed=1)
    kept = copy.deepcopy((whole.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
    steps(whole, optimizer, scheduler, 3, seed=2)

    model = small_model()
    again, rates = pair(model)
    for part, state in zip((model, again, rates), kept, strict=True):
        part.load_state_dict(state)
    steps(model, again, rates, 3, seed=2)
    assert [g["lr"] for one in again.optimizers for g in one.param_groups] == [
        0.005 / 64, 0.02 / 64]
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_states_of_other_optimizers_are_refused():
    optimizer, _ = pair(small_model())
    state = optimizer.state_dict()
    with pytest.raises(ValueError):
        optimizer.load_state_dict({"optimizers": state["optimizers"][:1]})
