"""The library stays small, imports go one way, and what says the same twice says the same."""

import ast
import json
import re
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "roi_lib"
#: Each module imports from those before it only. The first line is the core, in reading order; the
#: others are its rooms.
ORDER = [
    "worlds problems exams grading generation sitting osmckp rational mft rarl evaluation",
    "store.files store.sources store.checkpoints store.tokenizers store.papers store.instances",
    "engines.logs engines.replay engines.llama engines.vllm engines.openai engines",
    "training.recipes training.common training.pretrain training.mft training.rarl training.trl",
    "experiments.methods experiments.table experiments.sweeps experiments.diagnosis "
    "experiments.ablations experiments.snapshots experiments.statistics experiments.bench_osmckp "
    "experiments.bench_generation experiments.bench_rarl",
    "teaching.plots teaching.exercises teaching.doctor", "__main__"]
CORE, *ROOMS = (line.split() for line in ORDER)
MODULES = [name for line in ORDER for name in line.split()]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def path_of(name: str) -> Path:
    folder = PACKAGE / name.replace(".", "/")
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")


def imported(nodes):
    """Modules of the package that are imported by these nodes of a syntax tree."""
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "roi_lib":
            stem = node.module.removeprefix("roi_lib").removeprefix(".")
            for alias in node.names:
                inner = f"{stem}.{alias.name}".strip(".")
                yield inner if inner in MODULES else stem


def lines_of(*paths: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


def test_modules_import_one_way_and_the_core_no_room():
    files = {path for path in PACKAGE.rglob("*.py") if path.stat().st_size}
    assert files == {path_of(name) for name in MODULES}
    for line in ORDER:
        for name in line.split():
            tree, i = ast.parse(path_of(name).read_text()), MODULES.index(name)
            later = {*imported(tree.body)} - {*MODULES[:i]}  # at the top of the module
            later |= {*imported(ast.walk(tree))} - {*MODULES[:i], *line.split()}  # anywhere
            assert not later, f"{name} imports {', '.join(later)}, which do not come before it"


def test_the_core_is_read_in_an_evening():
    assert lines_of(*map(path_of, CORE)) <= 2_300
    assert lines_of(*map(path_of, MODULES)) <= 6_500


@pytest.mark.parametrize("name", MODULES)
def test_files_and_functions_are_short(name):
    path = path_of(name)
    assert lines_of(path) <= 520
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} has more than 60 lines"


def test_pins_are_equal_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {*project["dependencies"], *project["optional-dependencies"]["dev"]}
    conda = re.findall(r"^ +- (\S+==\S+)$", (ROOT / "environment.yml").read_text(), re.M)
    assert len(pins) > 15 and all("==" in pin for pin in pins)
    assert sorted(conda) == sorted(pins)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_were_run_from_top_to_bottom(path):
    cells = json.loads(path.read_text())["cells"]
    counts = [cell["execution_count"] for cell in cells
              if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]
    assert counts == list(range(1, len(counts) + 1)) != []


def test_readme_names_every_room_and_the_core():
    words = (ROOT / "README.md").read_text()
    rooms = [room[0].partition(".")[0] for room in ROOMS[:-1]]
    assert [name for name in (*CORE, *rooms) if f"`{name}`" not in words
            and f"`{name}/`" not in words] == []
