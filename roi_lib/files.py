"""Writing files in one piece."""

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write text in one piece: an earlier file stays as it was until the new one is whole."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, newline="")
    os.replace(temporary, path)


def write_json(path: Path, content) -> None:
    """Write JSON in one piece."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[dict]) -> None:
    """Write CSV in one piece; each row has these columns and no others."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
