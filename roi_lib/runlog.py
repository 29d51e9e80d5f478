"""Run logs: responses on disk as they come, so that a run can stop, go on, and be replayed.

A log is a JSON Lines file. Its first line names the run (world, method, model, ...); each other
line holds the rollouts of one request, found again by a hash of all that decides them. A log of
another run is refused, a bad line is named, and a last line cut short by a kill is dropped.
Many may read a log while one process writes it.
"""

import hashlib
import json
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock, Timeout

from roi_lib.checkpoints import MANIFEST, file_hash, locate
from roi_lib.generation import BudgetedGenerator, Request, Rollout


def model_hash(name: str) -> str:
    """What identifies a model: the hash of a folder's manifest or weights, or else its name."""
    folder = locate(name)
    if folder is None:
        return name
    files = [folder / MANIFEST] if (folder / MANIFEST).is_file() else sorted(
        folder.glob("*.safetensors"))
    return hashlib.sha256("".join(map(file_hash, files)).encode()).hexdigest()


def request_key(request: Request, temperature: float) -> str:
    """A hash of prompt, budget, seed, number of rollouts and temperature."""
    words = [list(request.prompt), request.budget, list(request.seed), request.n, temperature]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:24]


class RunLog:
    """One log file. Rows whose request failed are not kept: they will be asked again.

    Args:
        path: continued if it exists, otherwise started with the first response; None: the log is
            kept in memory alone.
        header: what the run is, JSON-ready.

    Raises:
        ValueError: a log of another run, or a bad line, with file and line.
    """

    def __init__(self, path: Path | None, header: dict) -> None:
        self.path, self.header = path, header
        self.rows: dict[str, list[Rollout]] = {}
        if path and path.exists():
            self._read()

    def _read(self) -> None:
        lines = self.path.read_bytes().split(b"\n")
        if lines.pop():
            warnings.warn(f"{self.path}, line {len(lines) + 1}: cut short; dropped", stacklevel=4)
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                if number == 1:
                    self._compare(row["run"])
                    continue
                rollouts = [Rollout(**r | {"ids": tuple(r["ids"])}) for r in row["rollouts"]]
                self.rows[row["key"]] = rollouts
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path}, line {number}: not a line of a run log "
                                 f"({error}); remove the line or the file") from error

    def _compare(self, found: dict) -> None:
        other = [key for key in self.header if found.get(key) != self.header[key]]
        if other:
            key = other[0]
            raise ValueError(f"{self.path} is the log of another run: its {key} is "
                             f"{found.get(key)!r}, not {self.header[key]!r}; name another folder")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep the file to this process (FAULTS F5); the lock goes with it, however it ends.

        Raises:
            ValueError: another process is writing it.
        """
        if self.path is None:
            yield
            return
        try:
            with FileLock(f"{self.path}.lock", timeout=0):
                if self.path.exists():  # only now: the line cut short may have been under way
                    with self.path.open("rb+") as stream:
                        stream.truncate(stream.read().rfind(b"\n") + 1)
                yield
        except Timeout as error:
            raise ValueError(f"another process is writing {self.path}; wait for it, or name "
                             "another folder with --log") from error

    def append(self, key: str, rollouts: Sequence[Rollout]) -> None:
        """Keep the rollouts of one request; on disk when this returns. Needs `writing`."""
        if any(r.failed for r in rollouts):
            return
        self.rows[key] = list(rollouts)
        if self.path is None:
            return
        start = not self.path.exists() or self.path.stat().st_size == 0
        with self.path.open("a") as stream:
            if start:
                stream.write(json.dumps({"run": self.header}) + "\n")
            stream.write(json.dumps({"key": key, "rollouts": list(map(asdict, rollouts))}) + "\n")


class Progress:
    """A line of text every so many seconds: how much is done, how fast, how long it will take.

    Engines give their rows by the batch: when a row is late, the batch before it is complete. So
    the rate is that of the rows before this one, and there is none at the first.
    """

    def __init__(self, what: str, total: int, every: float, file=None) -> None:
        self.what, self.total, self.every, self.file = what, total, every, file
        self.start = self.last = self.seen = time.monotonic()
        self.fresh = 0  # rows there at the time `seen`

    def show(self, done: int, fresh: int) -> None:
        """`done` of the total are there, `fresh` of them made by this run."""
        now = time.monotonic()
        if not self.fresh:
            self.last = now
        elif now - self.last >= self.every and self.seen > self.start:
            self.last, rate = now, self.fresh / (self.seen - self.start)
            left = max((self.total - done + fresh) / rate - (now - self.start), 0)
            print(f"{self.what}: {done}/{self.total} responses, {rate:.1f}/s, {left:.0f} s left",
                  file=self.file or sys.stderr, flush=True)
        self.fresh, self.seen = fresh, now


class LoggedGenerator(BudgetedGenerator):
    """A generator that looks into a log first, and keeps there what it has to make.

    So equal requests of several calls are answered once.

    Args:
        engine: makes what the log does not hold; None: everything must be in the log (a replay).
        log: the log; None for one in memory.
        every: seconds between progress lines; None for no such lines.
        what: what the lines call this run.
    """

    def __init__(self, engine: BudgetedGenerator | None, log: RunLog | None = None,
                 every: float | None = None, what: str = "run") -> None:
        self.engine, self.every, self.what = engine, every, what
        self.log = RunLog(None, {}) if log is None else log

    def stream(
        self, requests: Sequence[Request], temperature: float = 1.0
    ) -> Iterator[tuple[int, list[Rollout]]]:
        """See `BudgetedGenerator`.

        Raises:
            ValueError: a replay of a request that the log does not hold; a log that another
                process is writing.
        """
        keys = [request_key(request, temperature) for request in requests]
        known = self.log.rows
        missing = [i for i, key in enumerate(keys) if key not in known]
        if missing and self.engine is None:
            raise ValueError(f"{self.log.path} lacks {len(missing)} of {len(requests)} responses; "
                             "replay the exams, budgets, seed and temperature it was made with")
        for i, key in enumerate(keys):
            if key in known:
                yield i, known[key]
        if not missing:
            return
        progress = Progress(self.what, len(requests), self.every or float("inf"))
        fresh = self.engine.stream([requests[i] for i in missing], temperature)
        with self.log.writing():
            for n, (j, rollouts) in enumerate(fresh, start=1):
                self.log.append(keys[missing[j]], rollouts)
                progress.show(len(requests) - len(missing) + n, n)
                yield missing[j], rollouts
