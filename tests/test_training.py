"""What training runs share: the log that goes on, and the folder kept to one process."""

import subprocess
import sys

import pytest

from roi_lib.training import TrainingLog, folder_lock


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
