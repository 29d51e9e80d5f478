"""The installation check names what is wrong, and how to mend it."""

import shutil

import pytest

from roi_lib.teaching import doctor

NEEDED = ("pocket-base", "pocket-mft", "pocket-rarl", "pocket-tokenizer")


@pytest.fixture
def data(monkeypatch, tmp_path):
    for name in NEEDED:
        shutil.copytree(doctor.DATA / name, tmp_path / "data" / name)
    monkeypatch.setattr(doctor, "DATA", tmp_path / "data")
    return tmp_path / "data"


def faults(capsys):
    """Whether the check finds all well, and its lines that say otherwise."""
    good = doctor.check_installation()
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("[OK]   ", "[FAIL] ")) for line in lines)
    return good, [line for line in lines if "mend it with: " in line]


def test_all_is_well_here(capsys, data):
    assert faults(capsys) == (True, [])


def test_changed_and_missing_folders_are_named(capsys, data):
    (data / "pocket-base/config.json").write_text("{}")
    shutil.rmtree(data / "pocket-mft")
    assert faults(capsys) == (False, [
        "[FAIL] data/pocket-base differs from its hashes; mend it with: "
        "git checkout -- data/pocket-base",
        "[FAIL] data/pocket-mft is missing; mend it with: git checkout -- data/pocket-mft"])


def test_an_installation_without_any_data_is_not_well(capsys, data):
    """As after `pip install .`, which leaves the checkpoints behind."""
    shutil.rmtree(data)
    assert faults(capsys) == (False, [
        f"[FAIL] data/{name} is missing; mend it with: pip install -e . in a clone of the "
        "repository" for name in NEEDED])


def test_packages_that_are_not_the_pinned_ones_are_named(capsys, data, monkeypatch):
    def version(name):
        if name == "trl":
            raise doctor.metadata.PackageNotFoundError
        return "2.13.0+cpu" if name == "torch" else "0.0"

    monkeypatch.setattr(doctor.metadata, "version", version)
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: [
        "torch==2.13.0", "trl==1.16.0", "peft==0.21.2", "ruff==0.17.6; extra == 'dev'"])
    assert faults(capsys) == (False, [
        "[FAIL] trl missing; mend it with: pip install trl==1.16.0",
        "[FAIL] peft 0.0; mend it with: pip install peft==0.21.2"])
