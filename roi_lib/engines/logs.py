"""Run logs: responses on disk as they come, so that a run can stop, go on, and be replayed.

A log is JSON Lines: the first line names the run, each other one holds the rollouts of a request,
found again by a hash of all that decides them, or says why there are none, and is then passed over.
A log of another run is refused, a bad line is named, a last line cut short by a kill is dropped.
Many may read a log while one process writes it.
"""

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from roi_lib.generation import Engine, Request, Rollout, Stream, within_budget
from roi_lib.store.deadline import NEVER, Deadline
from roi_lib.store.files import lock

ENOUGH = 8  # requests: if the first so many all fail, others will
#: Progress, in seconds: only where it takes long.
BAR = {"delay": 5.0, "mininterval": 5.0, "miniters": 0, "smoothing": 0}


def read_rollout(row: dict, vocabulary: int) -> Rollout:
    """A rollout from its row of a log; `TypeError` or `ValueError` where it is none."""
    r = Rollout(**row | {"ids": tuple(row["ids"])})
    kinds = [type(value) for value in (r.finished, r.overrun, r.failed, r.hidden, r.note, r.text)]
    if kinds != [bool, int, str, int, str, str] or r.hidden < 0 or not all(
            type(i) is int and 0 <= i < vocabulary for i in r.ids):
        raise ValueError(f"a field is of another type, or an id is none of {vocabulary:,} tokens")
    return r


class RunLog:
    """One log file, continued if it exists; without a path, a log in memory. `header` says what the
    run is, JSON-ready: world, model, seed, the tokenizer's name where one is given and so on; to
    read a log, a value may be a tuple of those that will do. `vocabulary`: the tokenizer's size.
    `ValueError`: the log of another run, or a bad line, with file and line."""

    def __init__(self, path: Path | None, header: dict, vocabulary: int = 2**31) -> None:
        self.path, self.header = path, header
        self.rows: dict[str, list[Rollout]] = {}
        lines = path.read_bytes().split(b"\n") if path and path.exists() else [b""]
        if lines.pop():
            warnings.warn(f"{path}, line {len(lines) + 1}: cut short; dropped", stacklevel=3)
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                if number == 1:
                    found = dict(row["run"])
                elif set(dict(row)) != {"key", "failed"}:
                    self.rows[row["key"]] = [read_rollout(r, vocabulary) for r in row["rollouts"]]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not a line of a run log ({error}); "
                                 "remove the line or the file") from error
        for key, value in header.items() if lines else ():
            wanted = value if isinstance(value, tuple) else (value,)
            if found.get(key) not in wanted:
                raise ValueError(f"{path} is the log of another run: its {key} is "
                                 f"{found.get(key)!r}, not {wanted[0]!r}; name another folder")

    def read(self, key: str, request: Request) -> list[Rollout]:
        """The rollouts of a request, cut to its budget; `ValueError`: another number of them."""
        rollouts, budget = self.rows[key], request.budget
        if len(rollouts) != request.n:
            raise ValueError(f"{self.path}, key {key}: {len(rollouts)} responses, but {request.n} "
                             "are asked for; remove the line or the file")
        if any(len(r.ids) > budget for r in rollouts):
            warnings.warn(f"{self.path}, key {key}: a response longer than its budget of {budget} "
                          "tokens is cut", stacklevel=3)
        return [within_budget(r.ids, budget, ()) if len(r.ids) > budget else r for r in rollouts]

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep the file to this process; `ValueError`: another one is writing it."""
        with lock(self.path) if self.path else nullcontext():
            if self.path and self.path.exists():
                with self.path.open("rb+") as stream:  # a line cut short may be there
                    stream.truncate(stream.read().rfind(b"\n") + 1)
            yield

    def append(self, key: str, rollouts: Sequence[Rollout]) -> None:
        """Keep the rollouts of one request, on disk when this returns, but of a failed one, which
        will be asked again, only the reason. Needs `writing`."""
        if failed := next((r.failed for r in rollouts if r.failed), ""):
            row = {"key": key, "failed": failed}
        else:
            self.rows[key] = list(rollouts)
            row = {"key": key, "rollouts": [  # only a server's have the last three
                {name: value for name, value in asdict(r).items()
                 if value or name not in ("hidden", "note", "text")} for r in rollouts]}
        if self.path:
            with self.path.open("a") as stream:
                lines = [row] if stream.tell() else [{"run": self.header}, row]
                stream.write("".join(json.dumps(line) + "\n" for line in lines))


class LoggedEngine(Engine):
    """An engine that looks into a log first, and keeps there what it has to make; None for one that
    makes nothing (a replay). Without a log, one in memory: equal requests are answered once.
    `progress` names the run on a bar on standard error, if it takes long; None for no bar. It ends
    with `OutOfTime` at the first response after the `deadline`; those under way are not kept."""

    def __init__(self, engine: Engine | None, log: RunLog | None = None,
                 progress: str | None = None, deadline: Deadline = NEVER) -> None:
        self.engine, self.log, self.progress = engine, log or RunLog(None, {}), progress
        self.deadline = deadline

    def stream(self, requests: Sequence[Request], temperature: float = 1.0) -> Stream:
        """See `Engine`; `ValueError`: a replay of what is not in the log, or a log in use."""
        # All that decides a response; of the prompt the ids only where there is no user message,
        # for a chat template may write a date into them.
        words = [[r.message or list(r.prompt), r.budget, list(r.seed), r.n, float(temperature)]
                 for r in requests]
        keys = [hashlib.sha256(json.dumps(row).encode()).hexdigest()[:24] for row in words]
        known = self.log.rows
        missing = [i for i, key in enumerate(keys) if key not in known]
        if missing and self.engine is None:
            raise ValueError(f"{self.log.path or 'no --log: it'} lacks {len(missing)} of "
                             f"{len(keys)} responses; ask for the exams, budgets and seed it has")
        yield from [(i, self.log.read(k, requests[i])) for i, k in enumerate(keys) if k in known]
        if not missing:
            return
        failed, tokens, done = set(), 0, len(requests) - len(missing)
        with self.log.writing(), tqdm(
                desc=self.progress, disable=self.progress is None, total=len(requests),
                initial=done, **BAR) as bar:
            def count(n: int) -> None:
                nonlocal tokens
                tokens += n
                bar.set_postfix_str(f"{tokens:,} tokens", refresh=False)
                bar.update(0)  # which shows it, every few seconds

            self.engine.on_tokens = count
            for j, rollouts in self.engine.stream([requests[i] for i in missing], temperature):
                self.log.append(keys[missing[j]], rollouts)
                bar.update()
                done += 1
                if j < ENOUGH and rollouts[0].failed:  # as only a server's do
                    failed.add(j)
                    if len(failed) == ENOUGH and not known:
                        self.engine.stop(ValueError(f"the first {ENOUGH} requests all failed, so "
                                                    f"no others are sent: {rollouts[0].failed}"))
                yield missing[j], rollouts
                if done < len(requests):
                    self.deadline.check(f"{done:,} of {len(requests):,} responses are in "
                                        f"{self.log.path or 'no log'}")
