"""Methods: who takes the exams (`Comparison`, `run_methods`), and what comes back (`Results`)."""

import os
from collections import ChainMap
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, BrokenExecutor, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import compress
from multiprocessing import get_context

import numpy as np
import pandas as pd
import torch

from roi_lib.engines import EngineConfig, LoggedEngine
from roi_lib.engines.replay import reference_engine
from roi_lib.exams import Environment, Exam, in_orders
from roi_lib.generation import Engine, Rollout
from roi_lib.osmckp import greedy_knapsack
from roi_lib.problems import Problem
from roi_lib.rational import SAMPLES, Outcomes, bounds, check_samples, sample_outcomes
from roi_lib.sitting import COLUMNS, sit, tabulate
from roi_lib.store.checkpoints import load_environment, locate
from roi_lib.store.files import CheckpointError
from roi_lib.worlds import ORDERS, RULES, SKIP_ANSWER, Method, World


@dataclass(frozen=True)
class Comparison:
    """What the methods of one comparison share."""
    world: World
    papers: Sequence[Sequence[Problem]]  # each a sequence of problems, whatever their order
    seed: int = 0  # of medium orders and of sampling
    temperature: float = 1.0  # of sampling; 0 is greedy
    model: str | None = None  # checkpoint instead of the methods' own
    tokenizer: str | None = None  # instead of the checkpoint's
    engine: EngineConfig = EngineConfig()
    samples: int = SAMPLES  # attempts a problem and effort behind bounds and rules
    orders: tuple[str, ...] = ORDERS  # in which the papers are sat

    def exams(self, order: str) -> list[Exam]:
        """The papers in one order."""
        return in_orders(self.papers, [order], self.seed)

    def places(self, order: str) -> np.ndarray:
        """Which of the paper's problems stands at each position, [papers, problems]."""
        return np.array([[list(paper).index(problem) for problem in exam.problems]
                         for paper, exam in zip(self.papers, self.exams(order), strict=True)])

    def checkpoint(self, name: str) -> str | None:
        """The checkpoint of a method; a `CheckpointError` where its own is not there."""
        own = self.world.method(name).checkpoint
        if self.model or own is None:
            return self.model
        if locate(own) is None and "/" not in own:
            raise CheckpointError(f"method {name!r} needs the checkpoint data/{own}: make it (see "
                                  "python -m roi_lib train --help), or leave the method out")
        return own

    def abilities(self, name: str) -> str:
        """The first method with the checkpoint of this one that answers alone as it does (with
        tags, in brief): it stands for what the two can do, and so for their bounds and rules."""
        own = self.world.method(name)
        return name if own.checkpoint is None else next(
            other for other, method in self.world.methods.items() if method.checkpoint
            and (self.model or method.checkpoint == own.checkpoint) and alone(method) == alone(own))

    def environment(self, name: str) -> Environment:
        """World and tokenizer of a method; a server's chat is charged as the world's."""
        chat = self.engine.name == "openai" and self.engine.options.get("api") == "chat"
        return load_environment(self.world, None if chat else self.checkpoint(name), self.tokenizer)

    def answering(self, name: str, env: Environment, title: str, budget: int) -> LoggedEngine:
        """The engine of a method's checkpoint, behind its log, TITLE-BUDGET."""
        model = self.checkpoint(name)
        run = {"world": self.world.name, "model": model, "seed": self.seed,
               "tokenizer": self.tokenizer}
        return self.engine.logged(self.engine.make(model, env.tokenizer, self.world.dtype), title,
                                  budget, run, len(env.tokenizer))


@dataclass
class Results:
    """What came back, of one method or of many."""
    table: pd.DataFrame  # `sitting`'s table without prompts, and with a column `method`
    bounds: pd.DataFrame  # `rational.bounds`, with `abilities` (a method) in front of its index
    outcomes: dict[str, Outcomes] = field(default_factory=dict)  # abilities -> what is behind them
    facts: dict = field(default_factory=dict)  # (method, budget) -> more columns of its records
    policies: list[str] = field(default_factory=list)  # methods that are read from the bounds
    usage: dict = field(default_factory=dict)  # (method, budget) -> what a server charged

    @classmethod
    def join(cls, parts: Sequence["Results"]) -> "Results":
        """Several as one, in their sequence."""
        return cls(pd.concat([p.table for p in parts], ignore_index=True),
                   pd.concat([p.bounds for p in parts]),
                   dict(ChainMap(*(p.outcomes for p in parts))),
                   dict(ChainMap(*(p.facts for p in parts))),
                   usage=dict(ChainMap(*(p.usage for p in parts))))


def find_methods(world: World, names: Sequence[str]) -> list[str]:
    """The world's methods of these names; "rules": all rules of thumb; "all": every method whose
    checkpoint is on this machine."""
    here = [name for name, method in world.methods.items()
            if method.checkpoint and locate(method.checkpoint)]
    if not names:
        raise ValueError(f"there is no method to compare; name some of {', '.join(world.methods)}")
    for name in set(names) - {"all", "rules"}:
        world.method(name)
    if "all" in names and not here:
        raise ValueError(f"no method of the world {world.name} has its checkpoint on this machine; "
                         "name methods whose checkpoints the hub has, such as --methods base")
    groups = {"all": here, "rules": RULES}
    return [name for word in names for name in groups.get(word, [word])]


def run_method(comparison: Comparison, name: str, budget: int) -> Results:
    """Let one method sit all papers in the comparison's orders under a budget; `ValueError`:
    unknown method, checkpoint not to be had, or the log of another run."""
    method, env = comparison.world.method(name), comparison.environment(name)
    exams = [exam for order in comparison.orders for exam in comparison.exams(order)]
    if method.checkpoint is None:
        engine = reference_engine(env, exams, [budget], method.style)
    else:
        engine = comparison.answering(name, env, name, budget)
    if method.strategy == "knapsack":
        table, facts = run_knapsack(comparison, method, env, engine, budget)
    else:  # the paper as one exam, which is what a model does by itself
        streams = [(i,) for _ in comparison.orders for i in range(len(comparison.papers))]
        table, facts = sit(env, engine, exams, budget, 1, method.style, comparison.temperature,
                           comparison.seed, streams), {}
        table["exam"] %= len(comparison.papers)  # the paper's number, in every order
    server = getattr(engine, "engine", None)
    table = table.assign(method=name, copied=copied_tokens(table))
    return Results(table.drop(columns="prompt"), pd.DataFrame(),
                   facts={(name, budget): facts},
                   usage={(name, budget): server.usage} if hasattr(server, "usage") else {})


def copied_tokens(table: pd.DataFrame, run: int = 8) -> list[int]:
    """How many tokens of each row's response stand in runs of so many that its prompt has, too:
    what a model spends on saying again what it was asked."""
    counts = {}
    for prompt, ids in zip(table["prompt"], table["ids"], strict=True):
        if (prompt, ids) not in counts:
            runs = {prompt[i : i + run] for i in range(len(prompt) - run + 1)}
            begins = [i for i in range(len(ids) - run + 1) if ids[i : i + run] in runs]
            counts[prompt, ids] = len({i + j for i in begins for j in range(run)})
    return [counts[pair] for pair in zip(table["prompt"], table["ids"], strict=True)]


def run_methods(comparison: Comparison, names: Sequence[str], budgets: Sequence[int],
                workers: int | None = None) -> Results:
    """All methods under all budgets, in the order of the names, by so many processes (None: as many
    as pay); see `run_method`. `ChildProcessError`: one was killed."""
    names, budgets = list(dict.fromkeys(names)), list(dict.fromkeys(budgets))
    strategies = {name: comparison.world.method(name).strategy for name in names}
    sat = [name for name in names if strategies[name] not in ("exact", "rule")]
    able = [] if sat == names else list(dict.fromkeys(
        comparison.abilities(name) for name in names if comparison.world.method(name).checkpoint))
    checkpoints = [comparison.checkpoint(name) for name in names]
    if able:
        check_samples(comparison.samples)
    if not 0 <= comparison.temperature < np.inf:
        raise ValueError(f"temperature must be 0 (greedy) or above, not {comparison.temperature}")
    for name in dict(zip(checkpoints, names, strict=True)).values():
        comparison.environment(name).check_budget(*budgets)
    workers = workers or default_workers(comparison, checkpoints)
    # Each with its size, for the largest are begun first.
    jobs = [(budget, partial(run_method, comparison, name, budget))
            for name in sat for budget in budgets]
    jobs += [(sum(budgets), partial(run_abilities, comparison, name, budgets)) for name in able]
    parts = [job() for _, job in jobs] if workers == 1 else run_parallel(jobs, workers)
    return replace(Results.join(parts), policies=[name for name in names if name not in sat])


def run_parallel(jobs: Sequence[tuple[int, Callable[[], Results]]], workers: int) -> list[Results]:
    """What jobs give, each with its size, by so many processes; all end with the first failure."""
    try:
        with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads,
                                 (max(1, (os.cpu_count() or 1) // workers),)) as pool:
            running = {i: pool.submit(jobs[i][1])
                       for i in sorted(range(len(jobs)), key=lambda i: -jobs[i][0])}
            wait(running.values(), return_when=FIRST_EXCEPTION)
            begun = {i: future for i, future in running.items() if not future.cancel()}
            return [begun[i].result() for i in sorted(begun)]
    except BrokenExecutor as error:
        raise ChildProcessError("a worker process was ended from outside, perhaps for lack of "
                                "memory; try --workers 1") from error


def default_workers(comparison: Comparison, checkpoints: Sequence[str | None]) -> int:
    """One process a core, four at most, where that pays: a small model cannot keep two cores busy,
    and a process takes some seconds to start."""
    folders = [locate(checkpoint) for checkpoint in checkpoints if checkpoint]
    pays = comparison.engine.name == "torch" and len(comparison.papers) * len(folders) >= 400
    small = all(folder and sum(f.stat().st_size for f in folder.glob("*.safetensors")) < 2**26
                for folder in folders)
    return min(os.cpu_count() or 1, 4) if pays and small else 1


def alone(method: Method) -> str:
    """The style in which a method answers one problem alone: there is nothing to plan or rate."""
    return method.style if method.style in ("roi", "brief") else "direct"


def run_abilities(comparison: Comparison, name: str, budgets: Sequence[int]) -> Results:
    """What the checkpoint of a method can do, tried under the largest budget; and the Score of the
    exact policies and of the rules with these abilities."""
    env, top = comparison.environment(name), max(budgets)
    engine = comparison.answering(name, env, f"{name}-abilities", top)
    outcomes = sample_outcomes(env, engine, comparison.papers, top, comparison.samples,
                               alone(comparison.world.method(name)), comparison.temperature,
                               comparison.seed)
    places = {order: comparison.places(order) for order in comparison.orders}
    found = pd.concat({name: bounds(outcomes, places, budgets)}, names=["abilities"])
    return Results(pd.DataFrame(), found, {name: outcomes})


def run_knapsack(comparison: Comparison, method: Method, env: Environment, engine: Engine,
                 budget: int) -> tuple[pd.DataFrame, dict]:
    """Greedy Knapsack (paper, baselines): predict the level of every problem alone (its prompt with
    the exam's budget, decoded no further than a header with a tag); of the costs that levels stand
    for, choose the cheapest while they fit; sit those. A `charged` method pays for predicting."""
    take = partial(sit, env, engine, style=method.style, temperature=comparison.temperature,
                   seed=comparison.seed)
    shape = len(comparison.papers), len(comparison.papers[0])
    predicted = take([Exam((problem,), "easy") for paper in comparison.papers for problem in paper],
                     budget, streams=list(np.ndindex(shape)), cap=env.smallest_budget)
    unread = predicted["predicted"] < 0
    levels = predicted["predicted"].mask(unread, env.world.skip_level).to_numpy().reshape(shape)
    tokens = predicted["tokens"].to_numpy().reshape(shape).sum(1)
    charges, tables = tokens * method.charged, []
    failed = predicted["failed"].to_numpy().reshape(shape).max(1)  # a paper's reason, if any
    for order in comparison.orders:
        exams, parts = comparison.exams(order), []
        own = np.take_along_axis(levels, comparison.places(order), 1)
        chosen = [[] if reason else greedy_knapsack(row, budget - charge, env.world.centroids)
                  for row, charge, reason in zip(own, charges, failed, strict=True)]
        for charge in sorted(set(charges)):  # one, unless a prediction ended before its tag
            rows = [i for i, some in enumerate(chosen) if any(some) and charges[i] == charge]
            if rows and budget - charge >= env.smallest_budget:
                some = [Exam(tuple(compress(exams[i].problems, chosen[i])), order) for i in rows]
                part = take(some, int(budget - charge))
                parts.append(part.assign(exam=np.take(rows, part["exam"])))
        tables.append(whole_papers(env, exams, budget, own, parts, charges))
    table = pd.concat(tables, ignore_index=True)
    table["failed"] = table["failed"].mask(table["failed"] == "", failed[table["exam"]])
    return table, {
        "prediction_tokens": float(pd.Series(tokens)[failed == ""].mean()),
        "prediction_charged": method.charged,
        "unread_levels": float(unread[predicted["failed"] == ""].mean())}


def whole_papers(env: Environment, exams: Sequence[Exam], budget: int, levels: np.ndarray,
                 parts: Sequence[pd.DataFrame], charges: np.ndarray) -> pd.DataFrame:
    """Tables of the problems chosen, as one of the whole papers; the others are skipped. What is
    charged for the prediction pass, one number an exam, is the response's preamble."""
    key, of_response = ["exam", "problem"], COLUMNS[COLUMNS.index("tokens"):]
    skips = tabulate(env, exams, budget, [[Rollout((), True)]] * len(exams)).assign(
        skipped=True, answer=SKIP_ANSWER, predicted=levels.ravel(), real=env.world.skip_level)
    rows = pd.concat([*parts, skips]).drop(columns="position")  # of two rows, the first counts
    whole = rows.drop_duplicates("exam")[["exam", *of_response]]
    table = rows.drop_duplicates(key).drop(columns=of_response).assign(budget=budget).merge(
        whole).merge(skips[[*key, "position"]])[COLUMNS]
    table = table.sort_values(["exam", "position"], ignore_index=True)
    extra = charges[table["exam"]]
    return table.assign(tokens=table["tokens"] + extra, preamble=table["preamble"] + extra)
