"""Modules import one way, and README's map of them is complete."""

import ast
from pathlib import Path

import roi_lib

PACKAGE = Path(roi_lib.__file__).parent
#: Each imports from those before it only (imports inside functions are not looked at).
ORDER = (
    "files", "worlds", "checkpoints", "osmckp", "problems", "sources", "exams", "manifests",
    "grading", "exam_statistics", "decoding", "generation", "engines", "runlog", "sitting",
    "training", "tokenizer", "mft", "rarl", "rarl_loop", "rarl_trl", "diagnosis", "rational",
    "methods", "evaluation", "rollouts", "sweeps", "pretrain", "rarl_run", "ablations",
    "moments", "plots", "bench_osmckp", "bench_generation", "bench_rarl", "exercises", "doctor",
    "__main__")


def imported(path):
    """Modules of the package that a module imports at its top."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module == "roi_lib":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("roi_lib."):
            yield node.module.split(".")[1]


def test_modules_import_one_way():
    modules = {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    assert set(modules) == set(ORDER)
    for name, path in modules.items():
        wrong = [other for other in imported(path) if ORDER.index(other) >= ORDER.index(name)]
        assert not wrong, f"{name} imports {', '.join(wrong)}, which come after it"


def test_readme_has_every_module():
    words = (PACKAGE.parent / "README.md").read_text()
    for name in ORDER[:-1]:
        assert f"`{name}`" in words or name.startswith("bench_"), name
