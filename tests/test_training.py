"""What training runs share: the log that goes on, and the folder kept to one process."""

import copy
import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from roi_lib.checkpoints import load_tokenizer, verify_folder
from roi_lib.tokenizer import train_bpe
from roi_lib.training import (
    Together,
    TrainingLog,
    check_finite,
    disk_is_full,
    folder_lock,
    muon_and_adamw,
    write_checkpoint,
    writing,
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


FULL = [  # as Python, safetensors and torch.save say it
    OSError(errno.ENOSPC, "No space left on device", "log.csv"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
    RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing "
                 "file data/0: file write failed"),
    RuntimeError("basic_ios::clear: iostream error")]
OTHER = [ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
         RuntimeError("CUDA out of memory"), SafetensorError("header too large"),
         RuntimeError("PytorchStreamReader failed reading zip archive")]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_F4_a_full_disk_is_told_with_step_folder_and_remedy(tmp_path, error):
    for step in (7, lambda: 7):
        with pytest.raises(OSError, match=f"step 7 could not be written to {tmp_path} .*make room "
                                          "and run the same command"):
            with writing(tmp_path, step):
                raise error


@pytest.mark.parametrize("error", OTHER, ids=lambda error: type(error).__name__)
def test_other_errors_are_not_blamed_on_the_disk(tmp_path, error):
    with pytest.raises(type(error)) as told, writing(tmp_path, 7):
        raise error
    assert told.value is error


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no device that is always full")
@pytest.mark.parametrize("size", [10, 10**6])
def test_F4_the_words_of_torch_are_known(tmp_path, size):
    (tmp_path / "full").symlink_to("/dev/full")  # which itself nothing here can replace
    with pytest.raises(RuntimeError) as told:
        torch.save({"weights": torch.zeros(size)}, tmp_path / "full")
    assert disk_is_full(told.value)


@pytest.mark.parametrize(("logs", "words"), [
    ({"loss": "nan", "grad_norm": 1.0}, "the loss is nan at step 3, budget 64; lower the"),
    ({"loss": 0.5, "grad_norm": float("inf")}, "the gradient is inf at step 3, budget 64;")])
def test_F24_what_is_no_number_stops_the_run(logs, words):
    check_finite({"loss": "0.5", "learning_rate": 1e-3}, "step 2")
    with pytest.raises(FloatingPointError, match=words):
        check_finite(logs, "step 3, budget 64")


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


def fill_disk(patch, name, error):
    """`torch.save` finds the disk full at the file whose path ends in `name`: half of it stays."""
    save = torch.save

    def full(content, path, *arguments, **options):
        if str(path).endswith(name):
            Path(path).write_bytes(b"half")
            raise error
        save(content, path, *arguments, **options)

    patch.setattr(torch, "save", full)


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
