"""Files and folders that are whole or not there, and never cost anybody a file.

A folder is filled beside its place, given a manifest (sizes, SHA-256 hashes) as its last file, and
renamed: a killed run leaves the earlier one. Only what is as its manifest says is ever replaced."""

import hashlib
import json
import re
import shutil
import time
import warnings
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from glob import escape
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
from filelock import FileLock, Timeout

DATA = Path(__file__).resolve().parents[2] / "data"
MANIFEST = "manifest.json"
#: How the tables, JSON files and pictures begin that commands write: these may be replaced.
OURS = re.compile(rb'(world,method|method,budget|sweep,x|question,x|variant,budget|step),|'
                  rb'\x89PNG.{,60}\0roi_lib|\Z|'
                  rb'{\n "(world|one_instance|tokens_per_second|seconds_per_step)"', re.DOTALL)


class CheckpointError(ValueError):
    """A file or folder is missing, incomplete, changed, not ours, or does not fit its use."""


def read_json(path: Path) -> dict:
    """The object in a JSON file of any origin; `CheckpointError` where there is none."""
    try:
        if isinstance(found := json.loads(path.read_text(encoding="utf-8-sig")), dict):
            return found
        raise ValueError("it holds no object")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is cut short or no JSON of ours ({error})") from error


def read_csv(path: Path, columns: Collection[str]) -> pd.DataFrame:
    """A table from a CSV file of any origin; `CheckpointError` where it lacks one of `columns`."""
    try:
        table = pd.read_csv(path)
        if missing := [column for column in columns if column not in table]:
            raise ValueError(f"it has no column {missing[0]!r}")
    except ValueError as error:  # those of pandas too
        raise CheckpointError(f"{path} is no log or table of ours: {error}") from error
    return table


def check_file(path: Path, option: str = "--out") -> None:
    """Refuse, before the work, an output file that is not ours to replace, or not to be written."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder of {option} does not exist: {path.parent}")
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"{option} names something that is no file: {path}")
    if path.exists():
        with path.open("rb") as stream:
            if not OURS.match(stream.read(100)) or not path.stat().st_mode & 0o200:
                raise ValueError(f"{option} names a file that is read-only or not ours, {path}; "
                                 "move it away, or name another one")
    TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent).cleanup()  # `OSError`: read-only


def write_text(path: Path, text: str) -> None:
    """Write text in one piece; `ValueError` over a folder, a device or a symlink."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"{path} is no ordinary file and is not replaced; name another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as work:
        (Path(work) / "text").write_text(text, encoding="utf-8", newline="")
        (Path(work) / "text").replace(path)


def write_json(path: Path, content) -> None:
    """Write JSON in one piece."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_csv(path: Path, table: pd.DataFrame | Iterable[dict]) -> None:
    """Write a table, or rows that share their columns, as CSV in one piece."""
    rows = table if isinstance(table, pd.DataFrame) else pd.DataFrame(list(table), dtype=object)
    write_text(path, rows.to_csv(index=False, lineterminator="\n"))


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _facts(folder: Path) -> dict[str, dict | None]:
    """Size and hash of all that lies below a folder (None: of what is no file)."""
    return {path.relative_to(folder).as_posix():
            {"bytes": path.stat().st_size, "sha256": file_hash(path)} if path.is_file() else None
            for path in sorted(folder.rglob("*"))
            if path != folder / MANIFEST and (path.is_symlink() or not path.is_dir())}


def write_manifest(folder: Path) -> None:
    """Sizes and hashes of all files of a folder; written last, it says that the folder is whole."""
    write_json(folder / MANIFEST, _facts(folder))


def verify_folder(folder: Path, exactly: bool = False) -> None:
    """`CheckpointError`: a file of the manifest is missing or changed, or (`exactly`) not in it."""
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else None
    if not manifest:
        raise CheckpointError(f"{folder} is not there, not whole or not ours: no valid {MANIFEST}")
    found = _facts(folder)
    for name in [*manifest, *found] if exactly else manifest:
        if name not in found or found[name] != manifest.get(name, "of somebody else"):
            raise CheckpointError(f"{folder / name} is missing, cut short, changed or not ours; "
                                  "restore the folder")


def check_replaceable(folder: Path) -> None:
    """Refuse (`CheckpointError`) all but a new name, an empty folder, and a whole one of ours."""
    try:
        above = [path for path in folder.absolute().parents if path.exists()]
        other = not is_there(folder) and folder.exists()
        if folder.is_symlink() or other or not above[0].is_dir():
            raise CheckpointError("a file, a device or a symlink is in its place")
        TemporaryDirectory(prefix=f".{folder.name}.", dir=above[0]).cleanup()  # is it read-only?
        if folder.exists() and any(folder.iterdir()):
            verify_folder(folder, exactly=True)
    except CheckpointError as error:
        raise CheckpointError(f"{folder} is not replaced: {error}; move it away, or "
                              "name another --out") from error


def is_there(folder: Path) -> bool:
    """Whether a folder is there; one that a kill between `write_folder`'s renames hid is put back,
    but after a minute only: no writer alive takes that long between the two."""
    for earlier in folder.parent.glob(f".{escape(folder.name)}.*.earlier"):
        with suppress(CheckpointError):
            if not folder.exists() and time.time() - earlier.stat().st_ctime > 60:
                verify_folder(earlier, exactly=True)
                earlier.rename(folder)
    return folder.is_dir()


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a fresh folder and put it in place; an error leaves the earlier one."""
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as work:
        fresh, earlier = Path(work) / "fresh", Path(f"{work}.earlier")
        fresh.mkdir()
        fill(fresh)
        write_manifest(fresh)
        check_replaceable(folder)  # again: filling may have taken hours
        if folder.exists():
            folder.rename(earlier)  # stopped here, `is_there` puts it back
        fresh.rename(folder)
    shutil.rmtree(earlier, ignore_errors=True)


def newest_complete(root: Path, prefix: str = "step-") -> Path | None:
    """The newest whole folder `PREFIX<step>` below `root`; broken ones are named, passed over."""
    steps = [path for path in root.glob(f"{prefix}*") if path.name[len(prefix):].isdigit()]
    for path in sorted(steps, key=lambda path: int(path.name[len(prefix):]), reverse=True):
        try:
            verify_folder(path)
            return path
        except CheckpointError as error:
            warnings.warn(f"passing over an incomplete checkpoint: {error}", stacklevel=2)
    return None


def lock(place: Path) -> FileLock:
    """Keep a folder, or a file, to this process in a `with`, however the process ends;
    `ValueError`: another process holds it."""
    try:
        return FileLock(place / ".roi_lib.lock" if place.is_dir() else f"{place}.lock",
                        timeout=0).acquire()
    except Timeout as error:
        raise ValueError(f"another process is writing {place}; wait, or name another") from error
