"""Writing files in one piece."""

import json
import os
from pathlib import Path


def write_json(path: Path, content) -> None:
    """Write JSON in one piece: an earlier file stays as it was until the new one is whole."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)
