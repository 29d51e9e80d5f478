"""Environment check: is what this library was built with what is installed?"""

import platform
import re
import sys
from importlib import metadata

from roi_lib.checkpoints import CheckpointError, verify_folder
from roi_lib.worlds import DATA

#: Checked in this order; the pins themselves stand in pyproject.toml alone.
PACKAGE = "roi-lib"


def pinned_versions() -> dict[str, str]:
    """Package -> version that this library pins, without the optional extras.

    Raises:
        RuntimeError: the library itself is not installed.
    """
    try:
        requirements = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError as error:
        raise RuntimeError("roi_lib is not installed; run: pip install -e .") from error
    pairs = (re.fullmatch(r"([\w-]+)==([\w.]+)", line) for line in requirements)
    return {pair[1]: pair[2] for pair in pairs if pair}


def broken_folders() -> list[str]:
    """Names of the folders in `data` whose files are not those of their manifest."""
    broken = []
    for folder in sorted(path.parent for path in DATA.glob("*/manifest.json")):
        try:
            verify_folder(folder)
        except CheckpointError:
            broken.append(folder.name)
    return broken


def check_environment() -> bool:
    """Print one [OK] or [FAIL] line a requirement, with its remedy; returns whether all hold."""
    results = [(sys.version_info[:2] >= (3, 11), f"python {platform.python_version_tuple()[0]}."
                f"{platform.python_version_tuple()[1]}", "use Python 3.11 or later")]
    for name, wanted in pinned_versions().items():
        try:
            found = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            found = "missing"
        results.append((found == wanted, f"{name} {found}", f"pip install {name}=={wanted}"))
    results += [(False, f"data/{name} differs from its hashes", f"git checkout -- data/{name}")
                for name in broken_folders()] or [
        (True, "checkpoints and tokenizers in data match their hashes", "")]
    for good, what, remedy in results:
        print(f"[OK]   {what}" if good else f"[FAIL] {what}; mend it with: {remedy}")
    return all(good for good, _, _ in results)
