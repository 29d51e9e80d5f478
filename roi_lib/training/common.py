"""What training runs share: start, folder, log, optimizers, and the checkpoint with its card."""

import json
import math
import re
import shutil
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pandas as pd
import psutil
import torch
from accelerate.utils import broadcast_object_list
from huggingface_hub import ModelCard, ModelCardData
from tqdm import tqdm
from transformers import ProgressCallback

from roi_lib.exams import Environment
from roi_lib.store import checkpoints, files
from roi_lib.store.deadline import NEVER, Deadline, OutOfTime
from roi_lib.training import costs
from roi_lib.worlds import World


def load_start(world: World, checkpoint: str, out: Path, budgets: Sequence[int],
               adapters: bool = False) -> tuple[Environment, torch.nn.Module]:
    """The environment and the model that a stage starts from, in float32, or, if only `adapters`
    are trained, in bfloat16; `ValueError`: they do not belong together or could not be saved, `out`
    is not ours to replace, or a prompt cannot state one of the `budgets`."""
    files.check_replaceable(out)
    env = checkpoints.load_environment(world, checkpoint)
    env.check_budget(*budgets)
    load = checkpoints.load_model
    if adapters and checkpoints.base_of(checkpoint) != checkpoint:
        load = checkpoints.load_adapters
    model = load(checkpoint, "bfloat16" if adapters else "float32")
    checkpoints.check_tokenizer(model.config, env.tokenizer, checkpoint)
    checkpoints.check_saveable(model)
    return env, model


def check_fits(stage: str, checkpoint: str, length: int, recipe, tiled: bool = True) -> None:
    """Refuse, before any weights are loaded, rows of `length` tokens by a recipe of MFT or TRL that
    this device's memory cannot hold: a `ValueError` with what would fit."""
    config = checkpoints.load_config(checkpoint)
    if config.model_type not in ("llama", "qwen2"):
        return  # of others the costs are not known
    memory = (torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available()
              else psutil.virtual_memory().total)
    need = partial(costs.training_memory, costs.read_shape(config), length, bf16=recipe.bf16,
                   tiled=tiled)
    costs.check_memory(stage, need, memory, rows_at_once=recipe.rows_at_once,
                       lora_rank=recipe.lora_rank, checkpointing=recipe.checkpointing)


@contextmanager
def run_folder(work: Path, recipe, world: World, **start) -> Iterator[None]:
    """Keep `work` to this process, and write down there what the run is, its recipe and `start`;
    `ValueError`: it holds another run, or another process is at it."""
    work.mkdir(parents=True, exist_ok=True)
    with files.lock(work):
        run = json.loads(json.dumps(asdict(recipe) | {"world": world.name} | start))
        path = work / "recipe.json"
        found = files.read_json(path) if path.exists() else run
        if not path.exists() and [*work.glob("log.csv"), *work.glob("checkpoint-*")]:
            raise ValueError(f"{work} holds the log or states of no run of ours; choose another "
                             "--work")
        other = sorted(key for key in found | run if found.get(key) != run.get(key))
        if other:
            raise ValueError(f"{work} holds a run with another {', '.join(other)}, which makes it "
                             "another recipe; choose another --work")
        files.write_json(path, run)
        yield


class TrainingLog:
    """`log.csv`, a run's progress; when it goes on, rows after `last_step` are dropped."""

    def __init__(self, work: Path, columns: Sequence[str], last_step: int = 0) -> None:
        self.path, self.columns = work / "log.csv", list(columns)
        found = (files.read_csv(self.path, columns) if self.path.exists()
                 else pd.DataFrame(columns=["step"]))
        self.rows = found[pd.to_numeric(found["step"]) <= last_step].to_dict("records")
        self._begin = time.monotonic() - (self.rows[-1]["seconds"] if self.rows else 0)
        files.write_csv(self.path, pd.DataFrame(self.rows, columns=self.columns, dtype=object))

    def append(self, row: dict[str, float]) -> None:
        """Add one row, and the `seconds` of the run with its earlier parts; NaN leaves a gap."""
        row = row | {"seconds": time.monotonic() - self._begin}
        self.rows.append({name: round(row[name], 6) for name in self.columns})
        files.write_csv(self.path, self.rows)


def check_finite(logs: dict, where: str) -> None:
    """Stop at a `loss` or `grad_norm` that is NaN or infinite, with a `FloatingPointError`."""
    for name in ("loss", "grad_norm"):
        if not math.isfinite(float(logs.get(name, 0))):
            raise FloatingPointError(f"{name} is {logs[name]} at {where}; lower the learning rate")


class Report(ProgressCallback):
    """Bar, and log of `columns`, of a trainer's first process; marks whole checkpoints as whole,
    and ends the training with one after the `deadline`."""

    def __init__(self, deadline: Deadline = NEVER) -> None:
        super().__init__()
        self.deadline = deadline

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Open the log, without the rows that come again."""
        self.current_step = 0
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps)  # on stderr, in a notebook too
            self.log = TrainingLog(Path(args.output_dir), self.columns, state.global_step)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """After the deadline, this step is the last one for now."""
        super().on_step_end(args, state, control, **kwargs)
        (over,) = broadcast_object_list([self.deadline.over])  # all processes stop at one step
        if over:
            control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs) -> None:
        """The manifest comes last: a checkpoint without it was not written to the end."""
        args.distributed_state.wait_for_everyone()  # each process has its own file there
        if state.is_world_process_zero:
            files.write_manifest(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def run_trainer(trainer):
    """Train with a trainer of transformers, on from its newest whole checkpoint; returns the model
    in eval mode. `OSError`: the disk is full. `OutOfTime`: see `Report`."""
    state = files.newest_complete(Path(trainer.args.output_dir), "checkpoint-")
    try:
        trainer.train(resume_from_checkpoint=str(state) if state else None)
    except RuntimeError as error:  # torch.save has words of its own for a full disk
        if not re.search("PytorchStreamWriter failed|unexpected pos|iostream error", str(error)):
            raise
        raise OSError(f"{trainer.args.output_dir} could not be written ({error}); make room and "
                      "run the same command: it goes on from the last checkpoint") from error
    done, steps = trainer.state.global_step, trainer.state.max_steps
    if done < steps:
        raise OutOfTime(f"{done:,} of {steps:,} steps are in {trainer.args.output_dir}")
    return trainer.accelerator.unwrap_model(trainer.model).eval()


def lora(model, rank: int):
    """Adapters of that rank on every linear layer, as peft has them; None for rank 0, and for a
    model that has adapters already, which go on."""
    from peft import LoraConfig  # takes seconds, and not every training wants it
    rank = 0 if hasattr(model, "get_base_model") else rank
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear",
                      task_type="CAUSAL_LM") if rank else None


def muon_and_adamw(model, muon_lr: float, adamw_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices; AdamW for embeddings, biases and norms. No weight decay."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    return [torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.0),
            torch.optim.AdamW(others, lr=adamw_lr, betas=(0.9, 0.98), weight_decay=0.0)]


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimizers as one, as a trainer of transformers wants it, with one state of all."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = list(optimizers)
        super().__init__([group for o in self.optimizers for group in o.param_groups], {})

    def step(self, closure=None) -> None:
        for optimizer in self.optimizers:
            optimizer.step(closure)

    def state_dict(self) -> dict:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [group for o in self.optimizers for group in o.param_groups]  # new ones


def publish(out: Path, model, work: Path, recipe, base: str | None, documents: dict,
            measured: str, about: str, made: str) -> None:
    """Write what a run in `work` made of `base`: float32 weights, log, card with metadata for the
    hub, JSON and CSV documents by file name; and the base's own tokenizer, if it has one. Of a
    model with adapters these alone, in bfloat16, and which base they belong to."""
    minutes = pd.read_csv(work / "log.csv")["seconds"].iloc[-1:].sum() / 60
    bare = checkpoints.base_of(base) if base else None
    data = ModelCardData(license="mit", base_model=bare, tags=["roi-reasoning"])
    card = ModelCard(f"""---\n{data}\n---

# {out.name}

{about} Licence: MIT, as the repository.

**Made by** {made}, {minutes:.1f} minutes on {torch.get_num_threads()} threads (`log.csv`). Recipe:
```json
{textwrap.fill(json.dumps(asdict(recipe)), 99, break_long_words=False, break_on_hyphens=False)}
```

{measured}
""")

    def fill(folder: Path) -> None:
        if hasattr(model, "get_base_model"):
            model.peft_config["default"].base_model_name_or_path = bare
            model.bfloat16().save_pretrained(folder)
            files.write_json(folder / checkpoints.BASE, {"name": bare, "sha256": (
                checkpoints.weights_hash(model.unload(), torch.bfloat16))})
        else:
            model.float().save_pretrained(folder)
            if base and (tokenizer := checkpoints.own_tokenizer(base)):
                tokenizer.save_pretrained(folder)  # else the heir would be read with the world's
        shutil.copy(work / "log.csv", folder)
        card.save(folder / "README.md")
        for name, content in documents.items():
            write = files.write_csv if name.endswith(".csv") else files.write_json
            write(folder / name, content)

    files.write_folder(out, fill)
