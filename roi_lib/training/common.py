"""What training runs share: a log that goes on, optimizers, checkpoints with a card."""

import json
import math
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from huggingface_hub import ModelCard, ModelCardData

from roi_lib.store.files import read_json, write_csv, write_folder, write_json


class TrainingLog:
    """A CSV file of progress; a continued run drops the rows after `last_step`, to come again."""

    def __init__(self, path: Path, columns: Sequence[str], last_step: int) -> None:
        found = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["step"])
        self.path, self.columns = path, list(columns)
        self.rows = found[found["step"] <= last_step].to_dict("records")
        self._begin = time.monotonic() - (self.rows[-1]["seconds"] if self.rows else 0)
        write_csv(path, pd.DataFrame(self.rows, columns=self.columns, dtype=object))

    def seconds(self) -> float:
        """Seconds that the run has taken, its earlier parts (column `seconds`) included."""
        return time.monotonic() - self._begin

    def append(self, row: dict[str, float]) -> None:
        """Add one row; the file is written in one piece. NaN (nothing to count) leaves a gap."""
        self.rows.append({name: round(row[name], 6) for name in self.columns})
        write_csv(self.path, self.rows)


def check_finite(logs: dict, where: str) -> None:
    """Stop at a `loss` or `grad_norm` that is NaN or infinite, with a `FloatingPointError`."""
    for name in ("loss", "grad_norm"):
        if not math.isfinite(float(logs.get(name, 0))):
            raise FloatingPointError(f"{name} is {logs[name]} at {where}; lower the learning rate")


def same_recipe(work: Path, recipe: dict) -> None:
    """Write down what a run is; `ValueError` where `work` holds another one."""
    path, recipe = work / "recipe.json", json.loads(json.dumps(recipe))
    found = read_json(path) if path.exists() else recipe
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


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimizers as the one that a trainer of transformers takes."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = list(optimizers)
        super().__init__([group for o in self.optimizers for group in o.param_groups], {})

    def step(self, closure=None) -> None:
        """One step of each."""
        for optimizer in self.optimizers:
            optimizer.step(closure)

    def state_dict(self) -> dict:
        """The states of all, in order."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict) -> None:
        """Put back what `state_dict` gave; `ValueError` where it is of other optimizers."""
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [group for o in self.optimizers for group in o.param_groups]  # new ones


def lora(rank: int):
    """Adapters of that rank on every linear layer, as peft has them; None for rank 0."""
    from peft import LoraConfig  # takes seconds, and not every training wants it

    return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear",
                      task_type="CAUSAL_LM") if rank else None


def run_trainer(trainer, state: Path | None):
    """Train with a trainer of transformers, on from the checkpoint `state` where there is one.

    Returns the model in eval mode, adapters merged. `OSError`: the disk is full.
    """
    try:
        trainer.train(resume_from_checkpoint=str(state) if state else None)
    except RuntimeError as error:  # torch.save has words of its own for a full disk
        if not re.search("PytorchStreamWriter failed|unexpected pos|iostream error", str(error)):
            raise
        raise OSError(f"{trainer.args.output_dir} could not be written ({error}); make room and "
                      "run the same command: it goes on from the last checkpoint") from error
    model = trainer.accelerator.unwrap_model(trainer.model)
    return (model.merge_and_unload() if hasattr(model, "merge_and_unload") else model).eval()


def markdown_table(table: pd.DataFrame) -> str:
    """A table in Markdown; what is missing becomes `--`."""
    rows = table.astype(object).where(table.notna(), "--").itertuples(index=False)
    return "\n".join("| " + " | ".join(map(str, row)) + " |"
                     for row in (table.columns, ["---"] * table.shape[1], *rows))


def model_card(
    name: str, base: str | None, log: Path, recipe, *, about: str, made: str, measured: str
) -> ModelCard:
    """A checkpoint's card: what it was made from (`base`), and how; with metadata for the hub. Its
    minutes are those of the training's log, earlier parts of the run included."""
    data = ModelCardData(license="mit", base_model=base, tags=["roi-reasoning"])
    minutes = pd.read_csv(log)["seconds"].iloc[-1:].sum() / 60
    return ModelCard(f"""---\n{data}\n---

# {name}

{about} Licence: MIT, as the repository.

**Made by** {made}, {minutes:.1f} minutes on {torch.get_num_threads()} threads. The log is
`log.csv`. Recipe:

```json
{json.dumps(asdict(recipe), indent=1)}
```

{measured}
""")


def write_checkpoint(out: Path, model, log: Path, card: ModelCard, tokenizer=None, **documents):
    """Write what a run made: weights, `log.csv`, card; documents as `NAME.json`, tables as `.csv`.

    A tokenizer that came with the start goes to its heir too, which would otherwise be read with
    the world's (see `store.checkpoints.own_tokenizer`).
    """
    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        shutil.copy(log, folder / "log.csv")
        card.save(folder / "README.md")
        for name, value in documents.items():
            table = isinstance(value, pd.DataFrame)
            (write_csv if table else write_json)(
                folder / f"{name}.{'csv' if table else 'json'}", value)

    write_folder(out, fill)
