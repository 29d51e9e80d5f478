"""What training runs share: a log that goes on, a folder of their own, optimizers, checkpoints."""

import errno
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError

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


def disk_is_full(error: Exception) -> bool:
    """Whether an error says that a disk or a quota is full: each library has its own words."""
    words = str(error)
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None))  # no EDQUOT: Windows
    if isinstance(error, SafetensorError):
        return "No space left" in words or "StorageFull" in words or "os error 112" in words
    return isinstance(error, RuntimeError) and any(  # torch.save tells no reason
        sign in words for sign in ("PytorchStreamWriter failed", "unexpected pos", "iostream error")
    )


@contextmanager
def writing(work: Path, step: int | Callable[[], int]) -> Iterator[None]:
    """Say what to do when the disk is full (FAULTS F4); what was saved before is still there.

    Other errors pass as they are: of a file they name it, and a server that cannot be reached is
    one of them.

    Args:
        step: of training; or what gives it at the time of the error.

    Raises:
        OSError: the disk is full; names step and folder.
    """
    try:
        yield
    except Exception as error:
        if not disk_is_full(error):
            raise
        step = step() if callable(step) else step
        raise OSError(f"step {step} could not be written to {work} ({error}); make room and run "
                      "the same command: it continues from the last checkpoint") from error


def check_finite(logs: dict, where: str) -> None:
    """Stop at a loss or a gradient that is no number (FAULTS F24), before it is saved.

    Args:
        logs: what a trainer of transformers logs; `loss` and `grad_norm` are looked at.
        where: the step, and what else tells the batch.

    Raises:
        FloatingPointError: names it, and the place.
    """
    for name, words in (("loss", "loss"), ("grad_norm", "gradient")):
        if not math.isfinite(float(logs.get(name, 0))):
            raise FloatingPointError(f"the {words} is {logs[name]} at {where}; lower the learning "
                                     "rate")


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


def muon_and_adamw(model, muon_lr: float, adamw_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices; AdamW for embeddings, biases and norms. No weight decay."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    return [torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.0),
            torch.optim.AdamW(others, lr=adamw_lr, betas=(0.9, 0.98), weight_decay=0.0)]


def lora(rank: int):
    """Adapters of that rank on every linear layer, as peft has them; None for rank 0."""
    from peft import LoraConfig  # takes seconds, and not every training wants it

    return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear",
                      task_type="CAUSAL_LM") if rank else None


class Together(torch.optim.Optimizer):
    """Several optimizers as the one that a trainer of transformers takes."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = list(optimizers)
        super().__init__(self._groups(), {})

    def _groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, closure=None) -> None:
        """One step of each."""
        for optimizer in self.optimizers:
            optimizer.step(closure)

    def state_dict(self) -> dict:
        """The states of all, in order."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict) -> None:
        """Put back what `state_dict` gave; loading gives each optimizer new parameter groups.

        Raises:
            ValueError: the states of another number of optimizers, or of other parameters.
        """
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = self._groups()


def write_checkpoint(
    out: Path, model, log: Path, card: str, tokenizer=None, **documents
) -> None:
    """Write what a run made: weights (safetensors), its `log.csv`, its card, and JSON documents.

    Args:
        card: becomes README.md.
        tokenizer: that of the checkpoint which the run started from, where it brought its own
            (see `checkpoints.tokenizer_name`): otherwise its heir would be read with the world's.
        documents: `name=value` becomes `name.json`.

    Raises:
        OSError, SafetensorError: the disk is full; an earlier folder stays as it was.
    """
    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        shutil.copy(log, folder / "log.csv")
        (folder / "README.md").write_text(card)
        for name, value in documents.items():
            write_json(folder / f"{name}.json", value)

    write_folder(out, fill)
