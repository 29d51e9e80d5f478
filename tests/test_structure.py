"""The library stays small, imports go one way, and what is said twice is said the same."""

import ast
import json
import re
import tomllib

from conftest import ROOT

#: Each imports from those before it only. First the core, in reading order; then room by room.
ORDER = [
    "worlds problems exams grading generation sitting osmckp rational mft rarl evaluation",
    "store.deadline store.files store.sources store.checkpoints store.tokenizers store.papers",
    "engines.logs engines.replay engines.llama engines.vllm engines.protocol engines.pool "
    "engines.openai engines.__init__",
    "training.recipes training.costs training.common training.pretrain training.mft training.rarl "
    "training.trl",
    "experiments.knapsack experiments.methods experiments.table "
    "experiments.counterfactuals experiments.diagnosis experiments.ablations "
    "experiments.statistics experiments.benches experiments.estimate",
    "bridges.papers bridges.trl bridges.inspect",
    "teaching.plots teaching.exercises teaching.doctor", "__main__"]
MODULES = [name for line in ORDER for name in line.split()]
TEXTS = {".".join(path.relative_to(ROOT / "roi_lib").with_suffix("").parts): path.read_text()
         for path in (ROOT / "roi_lib").rglob("*.py")}


def imported(nodes):
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "roi_lib":
            place = node.module.removeprefix("roi_lib").removeprefix(".")
            for alias in node.names:
                names = f"{place}.{alias.name}".strip("."), place, f"{place}.__init__"
                yield next(name for name in names if name in MODULES)


def test_modules_import_one_way_and_the_core_no_room():
    assert {name for name, text in TEXTS.items() if text} == set(MODULES)
    for room in ORDER:
        for name in room.split():
            tree, before = ast.parse(TEXTS[name]), set(MODULES[: MODULES.index(name)])
            wrong = {*imported(tree.body)} - before  # at the top of the module
            wrong |= {*imported(ast.walk(tree))} - before - {*room.split()}  # anywhere in it
            assert not wrong, f"{name} imports {', '.join(wrong)}"


def test_the_core_is_read_in_an_evening_and_everything_is_short():
    lines = {name: len(text.splitlines()) for name, text in TEXTS.items()}
    assert sum(lines[name] for name in ORDER[0].split()) <= 2_300
    assert sum(lines.values()) <= 8_060 and max(lines.values()) <= 520
    assert [f"{name}: {node.name}" for name in MODULES for node in ast.walk(ast.parse(TEXTS[name]))
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60] == []


def test_pins_are_equal_everywhere_and_the_readme_names_the_core_and_every_room():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {*project["dependencies"], *project["optional-dependencies"]["dev"]}
    conda = re.findall(r"^ +- (\S+==\S+)$", (ROOT / "environment.yml").read_text(), re.M)
    assert sorted(conda) == sorted(pins) and all("==" in pin for pin in pins)
    names = [*ORDER[0].split(), *(room.partition(".")[0] for room in ORDER[1:-1])]
    readme = (ROOT / "README.md").read_text()
    assert [name for name in names if not re.search(f"`{name}/?`", readme)] == []


def test_notebooks_were_run_from_top_to_bottom():
    for path in ROOT.glob("notebooks/*.ipynb"):
        counts = [cell["execution_count"] for cell in json.loads(path.read_text())["cells"]
                  if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]
        assert counts and counts == [*range(1, len(counts) + 1)], path.name
