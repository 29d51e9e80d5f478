"""Checkpoints: models and tokenizers by name, and the state of a training run.

A name is a folder, a name below `data/`, or a hub id, which `@` pins to a commit or a tag. A folder
may hold adapters (LoRA, as peft has them) in place of weights: these are their base's, of which
`base.json` has the name and the hash. Weights are safetensors, never a pickle, and no code of a
model is run. `CheckpointError`: not to be had."""

import hashlib
import re
import shutil
import warnings
from contextlib import suppress
from pathlib import Path

import safetensors.torch as safetensors
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from roi_lib.exams import Environment
from roi_lib.store import files
from roi_lib.store.files import DATA, MANIFEST, CheckpointError
from roi_lib.worlds import World

BASE = "base.json"
logging.disable_progress_bar()  # a bar for a file of 3 MB is noise in a notebook


def locate(name: str) -> Path | None:
    """A checkpoint folder: a path, or a name below `data/`; None where neither exists."""
    return next((p for p in (Path(name), DATA / name) if name and files.is_there(p)), None)


def hub_id(name: str) -> tuple[str, str]:
    """Hub id and revision ("main" where none is pinned) of a name that is no folder."""
    if not (found := re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)):
        raise CheckpointError(f"no folder or hub id {name!r}; name a local folder, or one in data/")
    return found[1], found[2] or "main"


def model_hash(name: str) -> str:
    """What identifies a model: the hash of a folder's manifest or weights, or the whole hub id."""
    if not (folder := locate(name)):
        return name
    found = sorted(folder.glob(MANIFEST)) or sorted(folder.glob("*.safetensors"))
    return hashlib.sha256("".join(map(files.file_hash, found)).encode()).hexdigest()


def model_label(name: str) -> str:
    """The same for a table: 12 digits of a folder's hash; a hub id, with its revision, whole."""
    return model_hash(name)[:12] if locate(name) else name


def weights_hash(model, dtype: torch.dtype | None = None) -> str:
    """SHA-256 of all weights of a model, rounded to `dtype` (None: as they are), in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.to(dtype) if dtype else tensor
        digest.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _load(kind, name: str, **options):
    """What `kind` makes of a checkpoint; its failures, which are of many kinds, in one sentence."""
    folder = locate(name)
    place, revision = (folder, "main") if folder else hub_id(name)
    if folder and (folder / MANIFEST).is_file():
        files.verify_folder(folder)
    try:
        return kind.from_pretrained(place, revision=revision, trust_remote_code=False, **options)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise CheckpointError(f"{name!r} cannot be loaded ({reason}); fetch it again (a pointer of "
                              "git-lfs: `git lfs pull`; gated: `hf auth login`), or name a local "
                              "folder with config.json and whole *.safetensors, for pickles are "
                              "refused") from error


def base_of(name: str) -> str:
    """The name of the checkpoint that holds the weights: another one where this holds adapters."""
    folder = locate(name)
    return files.read_json(folder / BASE)["name"] if folder and (folder / BASE).is_file() else name


def load_adapters(name: str, dtype: str = "auto"):
    """A checkpoint's adapters on their base, ready to be trained on. A warning, where the base's
    weights are others than they were trained on; `CheckpointError`: they do not fit it."""
    from peft import PeftModel  # takes seconds, and few want it

    folder, base = locate(name), base_of(name)
    files.verify_folder(folder)
    model = load_model(base, dtype)
    if weights_hash(model, torch.bfloat16) != files.read_json(folder / BASE)["sha256"]:
        warnings.warn(f"the adapters of {name!r} were trained on other weights of {base!r} than "
                      "those here, so they do not do what their card says", stacklevel=3)
    try:
        return PeftModel.from_pretrained(model, folder, is_trainable=True)
    except (ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"the adapters of {name!r} do not fit {base!r} "
                              f"({str(error).splitlines()[0]}); name their own base") from error


def load_config(name: str):
    """A checkpoint's config, without its weights."""
    return _load(AutoConfig, base_of(name))


def load_model(name: str, dtype: str = "auto"):
    """A checkpoint's causal language model, in eval mode, in `dtype` ("auto": its own), adapters
    merged into it."""
    if base_of(name) != name:
        return load_adapters(name, dtype).merge_and_unload().requires_grad_(True).eval()
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise CheckpointError(f"unknown dtype {dtype!r}; name float32, float64, bfloat16 or auto")
    model, info = _load(AutoModelForCausalLM, name, dtype=dtype, use_safetensors=True,
                        output_loading_info=True)
    if info["missing_keys"]:  # they would be random numbers
        raise CheckpointError(f"the weights of {name!r} lack {min(info['missing_keys'])}; restore "
                              "the folder, or name another one")
    return model.eval()


def merge_adapters(name: str, out: Path) -> None:
    """Write adapters and their base as one whole checkpoint, in the base's precision, as engines
    want it that take no adapters. `CheckpointError`: no adapters, or `out` is not ours."""
    if base_of(name) == name:
        raise CheckpointError(f"{name!r} holds no adapters: there is nothing to merge")
    files.check_replaceable(out)
    model, tokenizer = load_model(name), own_tokenizer(name)

    def fill(folder: Path) -> None:
        for part in filter(None, (model, tokenizer)):
            part.save_pretrained(folder)

    files.write_folder(out, fill)


def check_saveable(model) -> None:
    """Refuse, before the first step, a model that cannot be saved after the last one."""
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        raise CheckpointError("the model could not be saved: mend its generation_config.json "
                              f"first ({' '.join(str(error).split())})") from error


def own_tokenizer(name: str):
    """The tokenizer that a checkpoint brought itself, for its heirs; None: a folder without one."""
    name = base_of(name)
    folder = locate(name)
    bare = folder and not (folder / "tokenizer_config.json").is_file()
    return None if bare else _load(AutoTokenizer, name)


def load_tokenizer(name: str, default: str | None = None):
    """The tokenizer of a checkpoint; `default`'s where it is a folder without one."""
    own = own_tokenizer(name) if default else None
    return own or _load(AutoTokenizer, default or base_of(name))


def check_tokenizer(config, tokenizer, name: str) -> None:
    """Refuse a tokenizer that has words for which the model of that name has no embedding."""
    size = config.get_text_config().vocab_size
    if len(tokenizer) > size:
        raise CheckpointError(f"{name!r} knows {size:,} tokens, the tokenizer {len(tokenizer):,}: "
                              "they do not belong together; save its own tokenizer in its folder")


def load_environment(world: World, checkpoint: str | None = None,
                     tokenizer: str | None = None) -> Environment:
    """A world with that tokenizer, or the checkpoint's own, or else the world's; it must fit."""
    words = load_tokenizer(tokenizer or checkpoint or world.tokenizer, world.tokenizer)
    if checkpoint and locate(base_of(checkpoint)):
        check_tokenizer(load_config(checkpoint), words, checkpoint)
    if not words.chat_template:
        raise CheckpointError(f"the tokenizer of {tokenizer or checkpoint!r} has no chat template: "
                              "name an instruct model, or the --tokenizer of one")
    return Environment(world, words)


def save_step(work: Path, model, optimizers, progress: dict) -> None:
    """Save weights, optimizer state and progress in `work/step-<progress["step"]>`, for an exact
    continuation; keep it and the one before. Only whole states of ours are removed."""
    def fill(folder: Path) -> None:
        safetensors.save_model(model, folder / "weights.safetensors")
        for i, optimizer in enumerate(optimizers):
            state = {f"{parameter}/{name}": torch.as_tensor(value)
                     for parameter, values in optimizer.state_dict()["state"].items()
                     for name, value in values.items()}
            safetensors.save_file(state, folder / f"optimizer-{i}.safetensors")
        files.write_json(folder / "progress.json", progress)

    folder = work / f"step-{progress['step']:06d}"
    files.write_folder(folder, fill)
    for old in sorted(path for path in work.glob("step-??????") if path <= folder)[:-2]:
        with suppress(CheckpointError):
            files.check_replaceable(old)
            shutil.rmtree(old)


def load_training_state(folder: Path, model, optimizers) -> dict:
    """Put back what `save_step` saved, and return the progress."""
    files.verify_folder(folder)
    safetensors.load_model(model, folder / "weights.safetensors")
    for i, optimizer in enumerate(optimizers):
        state: dict = {}
        for key, value in safetensors.load_file(folder / f"optimizer-{i}.safetensors").items():
            parameter, name = key.split("/")
            state.setdefault(int(parameter), {})[name] = value
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return files.read_json(folder / "progress.json")
