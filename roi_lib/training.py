"""What every training run shares: a log that goes on, a folder of its own, a checkpoint."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from roi_lib.checkpoints import write_folder
from roi_lib.files import write_json


class TrainingLog:
    """A CSV of progress that a continued run goes on writing, without lines it will repeat.

    Args:
        path: the file; its folder is made if need be.
        columns: names; the first is the step, a whole number.
        last_step: rows of a found file that come after this step are dropped.
    """

    def __init__(self, path: Path, columns: Sequence[str], last_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [",".join(columns)]
        if path.exists():
            lines = path.read_text().splitlines()[1:]
            whole = [line for line in lines if line.count(",") == len(columns) - 1]
            kept += [line for line in whole if int(line.split(",")[0]) <= last_step]
        partial = path.with_suffix(".partial")
        partial.write_text("\n".join(kept) + "\n")
        partial.replace(path)  # so that a full disk does not cost the old log (FAULTS F4)
        self.path, self.columns = path, columns
        #: column -> text of the last row found
        self.last = dict(zip(columns, kept[-1].split(","), strict=True)) if len(kept) > 1 else {}

    def write(self, *values, note: str = "") -> None:
        """Append one row, and print it with the note."""
        with self.path.open("a") as stream:
            stream.write(",".join(map(str, values)) + "\n")
        print(" ".join(f"{c} {v}" for c, v in zip(self.columns, values, strict=True)), note,
              flush=True)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Keep a folder to this process (FAULTS F5); the lock goes with the process, however it ends.

    Raises:
        ValueError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise ValueError(f"another process is writing {folder}; wait for it, or name another "
                         "folder") from error


def same_recipe(work: Path, recipe: dict) -> None:
    """Write down what a run is, or refuse to go on with another one.

    Raises:
        ValueError: `work` holds a run of another recipe.
    """
    path, recipe = work / "recipe.json", json.loads(json.dumps(recipe))
    if path.exists():
        found = json.loads(path.read_text())
        other = sorted(key for key in found | recipe if found.get(key) != recipe.get(key))
        if other:
            raise ValueError(f"{work} holds a run with another {', '.join(other)}, which makes it "
                             "another recipe; choose another --work")
    write_json(path, recipe)


def write_checkpoint(out: Path, model, log: Path, card: str, **documents) -> None:
    """Write what a run made: weights (safetensors), its `log.csv`, its card, and JSON documents.

    Args:
        card: becomes README.md.
        documents: `name=value` becomes `name.json`.
    """
    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        shutil.copy(log, folder / "log.csv")
        (folder / "README.md").write_text(card)
        for name, value in documents.items():
            write_json(folder / f"{name}.json", value)

    write_folder(out, fill)
