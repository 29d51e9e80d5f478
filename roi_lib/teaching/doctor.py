"""Installation check: is what this library was built with what is installed?"""

import re
import sys
from importlib import metadata

from roi_lib.store.files import DATA, CheckpointError, verify_folder
from roi_lib.worlds import POCKET


def check_pins():
    """(good, what, remedy) of each pinned package, extras aside; RuntimeError without roi_lib."""
    try:
        pins = [re.fullmatch(r"([\w-]+)==([\w.]+)", line) for line in metadata.requires("roi-lib")]
    except metadata.PackageNotFoundError as error:
        raise RuntimeError("roi_lib is not installed; run: pip install -e .") from error
    for name, wanted in (pin.groups() for pin in pins if pin):
        try:
            found = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            found = "missing"
        yield found == wanted, f"{name} {found}", f"pip install {name}=={wanted}"


def check_data():
    """(good, what, remedy) of the folders in `data`, and of those that the pocket world needs."""
    needed = {POCKET.tokenizer, *(m.checkpoint for m in POCKET.methods.values() if m.checkpoint)}
    bad = []
    for name in sorted(needed | {path.parent.name for path in DATA.glob("*/manifest.json")}):
        try:
            verify_folder(DATA / name)
        except CheckpointError:
            fault = "differs from its hashes" if (DATA / name).is_dir() else "is missing"
            bad.append((False, f"data/{name} {fault}", f"git checkout -- data/{name}" if
                        DATA.is_dir() else "pip install -e . in a clone of the repository"))
    return bad or [(True, "checkpoints and tokenizers in data match their hashes", "")]


def check_installation() -> bool:
    """Print one [OK] or [FAIL] line a requirement, with its remedy; returns whether all hold."""
    results = [((3, 11) <= sys.version_info < (3, 13), "python {}.{}".format(*sys.version_info),
                "Python 3.11 or 3.12"), *check_pins(), *check_data()]
    for good, what, remedy in results:
        print(f"[OK]   {what}" if good else f"[FAIL] {what}; mend it with: {remedy}")
    return all(good for good, _, _ in results)
