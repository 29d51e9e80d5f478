"""Files and folders are whole or not there, and what is not ours is never lost."""

import os
import signal
import subprocess
import sys

import pandas as pd
import pytest

from roi_lib.store import files
from roi_lib.store.checkpoints import locate

SHIPPED = sorted(path.parent for path in files.DATA.glob("*/manifest.json"))


def write(folder, **texts):
    files.write_folder(folder, lambda path: [(path / name).write_text(text)
                                       for name, text in texts.items()])


def content(place):
    """All that lies at and below a place, but for folders that are being filled."""
    return {str(path): os.readlink(path) if path.is_symlink() else
            path.read_bytes() if path.is_file() else "folder"
            for path in [place, *place.rglob("*")] if "/.out." not in str(path)}


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def foreign(place, name="thesis.tex", text="years of work"):
    (place / name).parent.mkdir(parents=True, exist_ok=True)
    (place / name).write_text(text)


def ours(place):
    write(place, weights="w", card="written by the run")


FOREIGN = {
    "a folder": foreign, "a file": lambda place: place.write_text("years of work"),
    "a hidden file": lambda place: foreign(place, ".notes", ""),
    "a folder with another manifest": lambda place: foreign(
        place, "manifest.json", '{"name": "a web page", "icons": []}'),
    "a link to a folder of ours": lambda place: (
        ours(place.with_name("elsewhere")), place.symlink_to("elsewhere")),
    "a dangling link": lambda place: place.symlink_to("nowhere"), "a device": os.mkfifo,
    "ours with a file": lambda place: (ours(place), foreign(place)),
    "ours with a folder": lambda place: (ours(place), foreign(place / "notes")),
    "ours with a link": lambda place: (ours(place), (place / "p").symlink_to(place.parent)),
    "ours but edited": lambda place: (ours(place), foreign(place, "card", "written by the us,")),
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_what_is_not_ours_is_refused_before_the_work_and_stays(tmp_path, make, refusal):
    make(tmp_path / "out")
    before = content(tmp_path)
    assert "name another --out" in refusal(files.check_replaceable, tmp_path / "out")
    said = refusal(files.write_folder, tmp_path / "out", lambda folder: pytest.fail("worked"))
    assert f"{tmp_path / 'out'} is not replaced" in said and content(tmp_path) == before


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_what_comes_while_a_folder_is_filled_stays_as_well(tmp_path, make, refusal):
    after = {}

    def fill(folder):
        (folder / "weights").write_text("new")
        make(tmp_path / "out")
        after.update(content(tmp_path))

    assert "name another --out" in refusal(files.write_folder, tmp_path / "out", fill)
    assert content(tmp_path) == after and not list(tmp_path.glob(".out.*"))


def test_neighbours_of_any_name_stay(tmp_path, refusal):
    for name in (".out.partial", ".out.old", ".out", "out.partial"):
        foreign(tmp_path / name)
    before = content(tmp_path)
    for text in ("one", "two"):
        write(tmp_path / "out", weights=text)
    assert before.items() < content(tmp_path).items()
    assert (tmp_path / "out" / "weights").read_text() == "two"
    below_a_file = tmp_path / ".out" / "thesis.tex" / "sub" / "out"
    assert "name another --out" in refusal(files.check_replaceable, below_a_file)


def test_a_new_name_an_empty_folder_and_a_whole_one_of_ours_are_free(tmp_path):
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "new" / "er", tmp_path / "empty"):
        write(place, weights="one", log="1")
        write(place, weights="two")
        assert {path.name for path in place.iterdir()} == {"weights", "manifest.json"}
        assert place.stat().st_mode == tmp_path.joinpath("new").stat().st_mode, "readable by others"


def test_a_text_never_replaces_a_folder_a_device_or_a_link(tmp_path, refusal):
    foreign(tmp_path / "folder")
    (tmp_path / "link").symlink_to("folder/thesis.tex")
    os.mkfifo(tmp_path / "device")
    for name in ("folder", "link", "device"):
        assert "name another --out" in refusal(files.write_text, tmp_path / name, "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "link").read_text() == "years of work"


@pytest.mark.parametrize("text", [
    "years of work", '{\n "cells": [', "\x89PNG of a user", "name,score\n", '["world"]'])
def test_a_file_that_is_not_ours_or_read_only_is_no_output(tmp_path, text, refusal):
    place, folder = tmp_path / "out", tmp_path / "folder"
    for allowed in ("", "world,method,model\n", "step,budget\n", '{\n "world": "pocket"'):
        place.write_text(allowed)
        files.check_file(place)
    place.chmod(0o444)
    assert "read-only or not ours" in refusal(files.check_file, place)
    place.chmod(0o644)
    place.write_text(text)
    folder.mkdir()
    (tmp_path / "link").symlink_to("folder/new")
    for path, words in ((place, "read-only or not ours"), (folder, "names something that is no"),
                        (tmp_path / "link", "names something that is no")):
        assert words in refusal(files.check_file, path, "--plot")
    assert place.read_text() == text and not list(folder.iterdir())


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no folder that nobody can write")
def test_a_place_that_cannot_be_written_is_refused_before_the_work():
    for check in (files.check_file, files.check_replaceable):
        with pytest.raises(OSError, match="/proc/"):
            check(files.Path("/proc/out"))


# ---------------------------------------------------------------- whole or not there
def test_a_kill_between_the_renames_is_made_good(tmp_path, monkeypatch):
    write(tmp_path / "out", weights="one")
    foreign(tmp_path / ".out.notes.earlier")
    killed = run("import os, signal; from pathlib import Path; from roi_lib.store import files\n"
                 "rename = Path.rename\n"
                 "Path.rename = lambda *names: (rename(*names), os.kill(os.getpid(), 9))\n"
                 f"files.write_folder(Path({str(tmp_path / 'out')!r}),\n"
                 "    lambda path: (path / 'weights').write_text('two'))")
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    assert not files.is_there(tmp_path / "out"), "the writer may be alive"
    now = files.time.time()
    monkeypatch.setattr(files.time, "time", lambda: now + 100)
    assert locate(str(tmp_path / "out")) and (tmp_path / "out" / "weights").read_text() == "one"
    assert (tmp_path / ".out.notes.earlier" / "thesis.tex").exists()


def test_a_killed_save_leaves_the_earlier_folder(tmp_path):
    write(tmp_path / "step-1", weights="one")
    killed = run("import os, signal; from pathlib import Path\n"
                 "from roi_lib.store.files import write_folder\n"
                 "def fill(folder):\n"
                 "    (folder / 'weights').write_text('half')\n"
                 "    os.kill(os.getpid(), signal.SIGKILL)\n"
                 f"write_folder(Path({str(tmp_path / 'step-1')!r}), fill)")
    assert killed.returncode == -signal.SIGKILL and files.newest_complete(tmp_path).name == "step-1"
    write(tmp_path / "step-1", weights="two")
    assert (tmp_path / "step-1" / "weights").read_text() == "two"


def test_two_writers_of_one_folder_never_mix(tmp_path):
    """The second one finishes while the first one is still filling."""
    def slow(path):
        (path / "weights").write_text("first")
        write(tmp_path / "out", weights="second", log="second")

    files.write_folder(tmp_path / "out", slow)
    files.verify_folder(tmp_path / "out", exactly=True)
    assert (tmp_path / "out" / "weights").read_text() == "first"


def test_a_text_is_whole_or_the_earlier_one(tmp_path, monkeypatch):
    files.write_json(tmp_path / "below" / "a.json", {"a": [1, "é"]})

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_text(tmp_path / "below" / "a.json", "two\n")
    assert [path.name for path in (tmp_path / "below").iterdir()] == ["a.json"]
    assert (tmp_path / "below" / "a.json").read_text() == (
        '{\n "a": [\n  1,\n  "\\u00e9"\n ]\n}\n')


def test_tables_keep_their_numbers(tmp_path):
    files.write_csv(tmp_path / "rows.csv", [{"step": 1, "loss": 0.1}, {"step": 20, "loss": None}])
    assert (tmp_path / "rows.csv").read_text() == "step,loss\n1,0.1\n20,\n"
    table = pd.DataFrame({"share": [1 / 3, 2e-7], "cut": [True, False]})
    files.write_csv(tmp_path / "table.csv", table)
    assert pd.read_csv(tmp_path / "table.csv").equals(table)


def test_the_newest_complete_folder_is_taken_and_the_broken_named(tmp_path):
    for step in (1, 2, 3, 10):
        write(tmp_path / f"step-{step}", weights=f"weights {step}", rng="state")
    (tmp_path / "step-10" / "manifest.json").write_text('{\n "weights": {')
    (tmp_path / "step-3" / "rng").unlink()
    (tmp_path / "step-2" / "weights").write_text("weights X")
    (tmp_path / "step-X").mkdir()
    with pytest.warns(UserWarning) as told:
        assert files.newest_complete(tmp_path) == tmp_path / "step-1"
    names = ("step-10/manifest.json is cut", "step-3/rng is missing", "step-2/weights is missing")
    assert all(name in str(w.message) for name, w in zip(names, told, strict=True))
    assert files.newest_complete(tmp_path / "nowhere") is None


def test_a_change_after_a_verification_is_seen(tmp_path, refusal):
    """Though a file's hash is taken only once for the same size and time."""
    write(tmp_path / "model", weights="0123456789")
    os.utime(tmp_path / "model" / "weights", ns=(0, 0))
    files.verify_folder(tmp_path / "model")
    (tmp_path / "model" / "weights").write_text("012345678X")
    assert "weights is missing, cut" in refusal(files.verify_folder, tmp_path / "model")
    files.write_manifest(tmp_path / "model")  # as a trainer does that saves once more over it
    files.verify_folder(tmp_path / "model")


@pytest.mark.parametrize("text", [
    "[]", "null", "3", "{}", '{"weights": null}', '{"weights": {"bytes": 1}}', '{"weights": {',
    '{"../out/weights": {"bytes": 1, "sha256": ""}}', "[" * 100_000, "9" * 5_000, "", "\x00",
    '{"weights": {"bytes": {"bytes": []}, "sha256": 3}}', "\ud800"])
def test_a_manifest_of_any_content_is_one_sentence(tmp_path, text, refusal):
    ours(tmp_path / "out")
    (tmp_path / "out" / "manifest.json").write_bytes(text.encode(errors="surrogatepass"))
    assert str(tmp_path / "out") in refusal(files.verify_folder, tmp_path / "out")
    assert "name another --out" in refusal(files.check_replaceable, tmp_path / "out")


def test_two_processes_never_share_a_folder(tmp_path):
    code = ("from pathlib import Path; from roi_lib.store.files import lock\n"
            f"with lock(Path({str(tmp_path)!r})): print('held')")
    (tmp_path / ".lock").write_text("of the user")
    with files.lock(tmp_path):
        second = run(code)
    assert "another process is writing" in second.stderr and not second.stdout
    assert run(code).stdout == "held\n" and (tmp_path / ".lock").read_text() == "of the user"


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_shipped_folders_match_their_hashes(folder):
    files.verify_folder(folder, exactly=True)
