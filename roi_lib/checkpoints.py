"""Checkpoints that are whole or not there: safetensors and JSON with a manifest of hashes.

A folder is filled under a temporary name, given a manifest of sizes and SHA-256 hashes as its
last file, and renamed. So a killed run leaves the previous folder, never half of a new one.
"""

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from roi_lib.worlds import DATA

logging.disable_progress_bar()  # a bar for a file of 3 MB is noise in a notebook

MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete or changed, or goes with another tokenizer."""


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """Sizes and hashes of all files of a folder; written last, it says that the folder is whole.

    A manifest found there is replaced: a trainer saves once more over what it had to pass over.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    manifest = {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": file_hash(p)}
                for p in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a temporary folder, add the manifest, then put it in place.

    An earlier folder of that name is replaced only at the very end; an error of `fill` passes
    through, and leaves it as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    fill(temporary)
    write_manifest(temporary)
    if folder.exists():
        retired = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(retired, ignore_errors=True)
        folder.rename(retired)
        temporary.rename(folder)
        shutil.rmtree(retired)
    else:
        temporary.rename(folder)


def verify_folder(folder: Path) -> None:
    """Check every file of a folder against its manifest.

    Raises:
        CheckpointError: no folder, no manifest or half of one, or a file that is missing or
            differs.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint at {folder}")
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder} has no {MANIFEST}: it was not written to the end")
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except ValueError as error:  # the disk was full (FAULTS F4), or the run killed, just here
        raise CheckpointError(f"{folder / MANIFEST} is cut short: the folder was not written to "
                              "the end") from error
    for name, facts in manifest.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != facts["bytes"]:
            raise CheckpointError(f"{path} is missing or cut short; restore the folder and retry")
        if file_hash(path) != facts["sha256"]:
            raise CheckpointError(f"{path} differs from its manifest; restore the folder and retry")


def newest_complete(root: Path, prefix: str = "step-") -> Path | None:
    """The newest whole folder `PREFIX<step>` below `root`; broken ones are named, passed over."""
    folders = [path for path in root.glob(f"{prefix}*") if path.name[len(prefix):].isdigit()]
    for folder in sorted(folders, key=lambda path: int(path.name[len(prefix):]), reverse=True):
        try:
            verify_folder(folder)
        except CheckpointError as error:
            warnings.warn(f"passing over an incomplete checkpoint: {error}", stacklevel=2)
        else:
            return folder
    return None


def save_training_state(folder: Path, model, optimizers, progress: dict) -> None:
    """Save weights, optimizer state and progress, for an exact continuation."""

    def fill(temporary: Path) -> None:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()
                   if k != "lm_head.weight" or not model.config.tie_word_embeddings},
                  temporary / "weights.safetensors")
        tensors = {
            f"{i}/{parameter}/{name}": value if torch.is_tensor(value) else torch.tensor(value)
            for i, optimizer in enumerate(optimizers)
            for parameter, state in optimizer.state_dict()["state"].items()
            for name, value in state.items()
        }
        save_file(tensors, temporary / "optimizers.safetensors")
        (temporary / "progress.json").write_text(json.dumps(progress) + "\n")

    write_folder(folder, fill)


def save_step(work: Path, model, optimizers, progress: dict) -> None:
    """Save the training state of `progress["step"]` below `work`, and keep the newest two."""
    save_training_state(work / f"step-{progress['step']:06d}", model, optimizers, progress)
    for old in sorted(work.glob("step-*"))[:-2]:
        shutil.rmtree(old)


def load_training_state(folder: Path, model, optimizers) -> dict:
    """Put back what `save_training_state` saved; returns the progress.

    Raises:
        CheckpointError: the folder is not whole.
    """
    verify_folder(folder)
    model.load_state_dict(load_file(folder / "weights.safetensors"), strict=False)
    model.tie_weights()
    states: list[dict] = [{} for _ in optimizers]
    for key, value in load_file(folder / "optimizers.safetensors").items():
        i, parameter, name = key.split("/")
        states[int(i)].setdefault(int(parameter), {})[name] = value
    for optimizer, state in zip(optimizers, states, strict=True):
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    return json.loads((folder / "progress.json").read_text())


def locate(name: str) -> Path | None:
    """A checkpoint folder: a path, or a name below `data/`; None where neither exists."""
    return next((p for p in (Path(name), DATA / name) if p.is_dir()), None)


def tokenizer_name(name: str, default: str) -> str:
    """Whose tokenizer a checkpoint goes with: its own, or `default`'s.

    A hub id always has its own; a local folder has one if it holds `tokenizer_config.json`.
    """
    folder = locate(name)
    return default if folder and not (folder / "tokenizer_config.json").is_file() else name


def load_tokenizer(name: str, default: str | None = None):
    """The tokenizer of a folder, of a name below `data/`, or of a hub id.

    Args:
        default: taken instead where `name` is a local folder without a tokenizer of its own.

    Raises:
        CheckpointError: it is neither here nor to be had from the hub, or its files differ from
            its manifest.
    """
    return _load(AutoTokenizer, tokenizer_name(name, default) if default else name)


def own_tokenizer(name: str):
    """The tokenizer that a checkpoint brought itself, for its heirs; None where it is the world's.

    Raises:
        CheckpointError: see `load_tokenizer`.
    """
    return load_tokenizer(name) if tokenizer_name(name, "") else None


def load_config(name: str):
    """The configuration of a checkpoint's model, without its weights; see `load_tokenizer`.

    Raises:
        CheckpointError: not to be had, or its files differ from its manifest.
    """
    return _load(AutoConfig, name)


def check_tokenizer(config, tokenizer, name: str) -> None:
    """Refuse a tokenizer that has words for which the model has no embedding.

    Args:
        config: of the model.
        name: of the checkpoint, for the message.

    Raises:
        CheckpointError: the tokenizer has more tokens than the model.
    """
    size = config.get_text_config().vocab_size
    if len(tokenizer) > size:
        raise CheckpointError(
            f"the model of {name!r} knows {size:,} tokens, but the tokenizer {len(tokenizer):,}: "
            "they do not belong together; save the model's own tokenizer in its folder")


def load_model(name: str, dtype: str = "auto"):
    """The causal language model of a checkpoint, in eval mode; see `load_tokenizer`.

    Args:
        dtype: "float32", "float64", ..., or "auto" for what the checkpoint holds.

    Raises:
        CheckpointError: not to be had, or its files differ from its manifest.
    """
    return _load(AutoModelForCausalLM, name, dtype=dtype, use_safetensors=True).eval()


def _load(kind, name: str, **options):
    folder = locate(name)
    if folder and (folder / MANIFEST).is_file():
        verify_folder(folder)
    remedy = f"no checkpoint {name!r}: it is no folder and no name below {DATA.name}/"
    if folder is None and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise CheckpointError(f"{remedy}; name a local folder")
    try:
        return kind.from_pretrained(folder or name, trust_remote_code=False, **options)
    except OSError as error:
        raise CheckpointError(
            f"{remedy}, and the hub did not give it; name a local folder"
        ) from error
