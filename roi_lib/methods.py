"""Methods: who sits the papers, with which engine, and what comes back.

    Setting       what the methods of one comparison share: papers, seed, temperature, engine
    sit_methods   several methods, side by side on the cores
    sit_method    one method under one or several budgets: its exams as sat, or the rational bound
    WAYS          how a method goes about a paper: whole, or by Greedy Knapsack

Greedy Knapsack (paper, baselines): the model predicts the level of every problem, each alone; a
level stands for a cost, and the cheapest problems are chosen while the sum fits the budget. Only
those are sat, as one exam, in the order of the paper.
"""

import gc
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from roi_lib.checkpoints import CheckpointError, load_tokenizer, locate
from roi_lib.engines import OpenAIGenerator, make_engine
from roi_lib.exams import (
    Exam,
    Response,
    Segment,
    encode_prompts,
    exam_prompt,
    in_orders,
    parse_response,
)
from roi_lib.generation import BudgetedGenerator, Request
from roi_lib.osmckp import greedy_knapsack
from roi_lib.problems import Problem
from roi_lib.rational import SAMPLES, Bound, Outcomes, rational_bounds, sample_outcomes
from roi_lib.runlog import LoggedGenerator, RunLog, model_hash
from roi_lib.sitting import (
    Sitting,
    check_budget,
    reference_drafts,
    reference_generator,
    sit,
    smallest_budget,
)
from roi_lib.worlds import ORDERS, SKIP_ANSWER, Method, World


@dataclass(frozen=True)
class EngineChoice:
    """Which engine answers, and what it writes on the way.

    Attributes:
        name: see `engines.ENGINES`; "replay" answers from the log alone.
        options: for the engine's constructor.
        log: folder of run logs, a file `METHOD-BUDGET.jsonl` each; None for no logs.
        every: seconds between progress lines; None for no such lines.
        dtype: arithmetic of the torch engine instead of the world's.
    """

    name: str = "torch"
    options: Mapping = field(default_factory=dict)
    log: Path | None = None
    every: float | None = None
    dtype: str | None = None

    def make(self, checkpoint: str, tokenizer, dtype: str) -> BudgetedGenerator | None:
        """The engine itself; a replay has none."""
        if self.name == "replay":
            return None
        return make_engine(self.name, checkpoint, tokenizer, self.dtype or dtype, **self.options)

    def logged(self, engine: BudgetedGenerator | None, budget: int, run: dict) -> LoggedGenerator:
        """The engine behind the log of one method under one budget.

        Raises:
            ValueError: a replay without a log, or the log of another run.
        """
        what, log = f"{run['method']}-{budget}", None
        path = self.log / f"{what}.jsonl" if self.log else None
        if self.name == "replay" and not (path and path.is_file()):
            raise ValueError(f"a replay needs the log of an earlier run: --log {self.log} has no "
                             f"{what}.jsonl")
        if path:
            self.log.mkdir(parents=True, exist_ok=True)
            if self.name != "replay":
                run = run | {"engine": self.name} | ({"dtype": self.dtype} if self.dtype else {})
            log = RunLog(path, run | {"budget": budget})
        return LoggedGenerator(engine, log, self.every, what)


@dataclass(frozen=True)
class Setting:
    """What the methods of one comparison share.

    Attributes:
        papers: each a sequence of problems, whatever their order.
        seed: of medium orders and of sampling.
        temperature: of sampling; 0 is greedy.
        model: checkpoint instead of the methods' own (for a replay: its tokenizer).
        tokenizer: instead of the checkpoint's.
        choice: which engine answers (a method of reference solutions needs none).
        samples: attempts a problem by which the rational method goes.
        orders: in which the papers are sat; records and rollouts are made of all of them.
    """

    world: World
    papers: Sequence[Sequence[Problem]]
    seed: int = 0
    temperature: float = 1.0
    model: str | None = None
    tokenizer: str | None = None
    choice: EngineChoice = EngineChoice()
    samples: int = SAMPLES
    orders: tuple[str, ...] = ORDERS

    def exams(self, order: str) -> list[Exam]:
        """The papers in one order."""
        return in_orders(self.papers, [order], self.seed)

    def places(self, order: str) -> np.ndarray:
        """Which of the paper's problems stands at each position, [papers, problems]."""
        return np.array([[list(paper).index(problem) for problem in exam.problems]
                         for paper, exam in zip(self.papers, self.exams(order), strict=True)])

    def checkpoint(self, name: str) -> str | None:
        """The checkpoint with which a method sits.

        Raises:
            ValueError: unknown method, or one whose own checkpoint is not there.
        """
        method = self.world.method(name)
        if self.model or method.checkpoint is None:
            return self.model
        if locate(method.checkpoint) is None and "/" not in method.checkpoint:
            raise CheckpointError(
                f"method {name!r} needs the checkpoint data/{method.checkpoint}, which is not "
                "there: make it (see python -m roi_lib train --help), or leave the method out")
        return method.checkpoint


def available(world: World) -> list[str]:
    """The world's methods with a model whose checkpoint is on this machine."""
    return [name for name, method in world.methods.items()
            if method.checkpoint and locate(method.checkpoint)]


@dataclass(frozen=True, eq=False)
class Sat:
    """One method under one budget.

    Attributes:
        sittings: order -> the exams, papers in the same sequence.
        facts: what its records say beside the scores, JSON-ready.
        usage: what a server charged for the whole run (`engines.Usage`).
    """

    method: str
    budget: int
    sittings: Mapping[str, list[Sitting]]
    facts: dict
    usage: dict | None = None


@dataclass(frozen=True, eq=False)
class Rational:
    """The rational test-taker under one budget, and the attempts that it goes by.

    Attributes:
        method: name of its records.
        tagged: whether it must tag every problem.
        bounds: order -> bound, papers in the same sequence.
        outcomes: of the attempts, without tags; problems in the papers' own order.
    """

    method: str
    budget: int
    tagged: bool
    bounds: Mapping[str, Bound]
    outcomes: Outcomes


def sit_method(setting: Setting, name: str, budgets: Sequence[int]) -> list[Sat | Rational]:
    """Let one method sit all papers in the setting's orders under every budget.

    The rational method gives two results a budget, without and with tags.

    Raises:
        ValueError: unknown method, checkpoint not to be had, a budget too small, or the log of
            another run.
    """
    world, method, checkpoint = setting.world, setting.world.method(name), setting.checkpoint(name)
    # What a chat server calls its model names no tokenizer: its text is charged in the world's.
    chat = setting.choice.name == "openai" and setting.choice.options.get("api") == "chat"
    own = None if chat and checkpoint and locate(checkpoint) is None else checkpoint
    tokenizer = load_tokenizer(setting.tokenizer or own or world.tokenizer,
                               default=world.tokenizer)
    for budget in budgets:
        check_budget(world, tokenizer, budget)
    if method.checkpoint is None:
        exams = [exam for order in setting.orders for exam in setting.exams(order)]
        engine = reference_generator(world, tokenizer, exams, budgets, method.style)
        return [Sat(name, budget, *sit_whole(setting, method, tokenizer, engine, budget))
                for budget in budgets]
    engine = setting.choice.make(checkpoint, tokenizer, world.dtype)
    run = {"world": world.name, "method": name, "model": model_hash(checkpoint),
           "seed": setting.seed}

    def logged(budget: int) -> LoggedGenerator:
        return setting.choice.logged(engine, budget, run)

    if method.way == "rational":
        return rational(setting, name, tokenizer, logged(max(budgets)), budgets)
    sat: dict[int, Sat] = {}
    for budget in sorted(budgets, reverse=True):
        sat[budget] = Sat(name, budget, *WAYS[method.way](
            setting, method, tokenizer, logged(budget), budget, [*sat.values()]))
    results = [sat[budget] for budget in budgets]
    if isinstance(engine, OpenAIGenerator):
        results[0] = replace(results[0], usage=asdict(engine.usage))
    return results


def sit_methods(
    setting: Setting, names: Sequence[str], budgets: Sequence[int], workers: int | None = None
) -> list[Sat | Rational]:
    """All methods under all budgets, in the order of the names.

    Args:
        workers: processes, each with its share of the cores; what they return does not depend on
            their number. None: `default_workers`.

    Raises:
        ValueError: see `sit_method`; names and checkpoints are checked before any exam is sat.
        ChildProcessError: a worker was killed.
    """
    names = list(dict.fromkeys(names))
    checkpoints = [setting.checkpoint(name) for name in names]
    if workers is None:
        workers = default_workers(setting, checkpoints)
    if workers == 1:
        return [result for name in names for result in sit_method(setting, name, budgets)]
    jobs = [(name, *part) for name in names for part in shares(setting, name, budgets)]
    longest_first = sorted(jobs, key=lambda job: -sum(job[1]) * len(job[2]))
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(workers, get_context("spawn"), begin_worker, (threads,)) as pool:
        running = {job: pool.submit(sit_method, replace(setting, orders=job[2]), *job[:2])
                   for job in longest_first}
        wait(running.values(), return_when=FIRST_EXCEPTION)
        begun = [future for future in running.values() if not future.cancel()]
        for error in filter(None, (future.exception() for future in begun)):
            if isinstance(error, BrokenProcessPool):
                raise ChildProcessError("a worker process was ended from outside, perhaps for lack "
                                        "of memory; try --workers 1") from error
            raise error
        results: dict[tuple[str, int], Sat | Rational] = {}
        for result in (result for job in jobs for result in running[job].result()):
            key = result.method, result.budget
            if key in results:
                result = replace(result, sittings=results[key].sittings | result.sittings)
            results[key] = result
    return [*results.values()]


def begin_worker(threads: int) -> None:
    """Make a fresh process ready; what it has imported is not searched for garbage again."""
    torch.set_num_threads(threads)
    gc.freeze()


def shares(setting: Setting, name: str, budgets: Sequence[int]) -> list[tuple]:
    """How several processes share a method: budgets and orders of each.

    Orders part, so that what was written under one budget can be the draft of the next; but a log
    is written by one process only, and Greedy Knapsack predicts once for all orders.
    """
    way, all_budgets, orders = setting.world.method(name).way, tuple(budgets), setting.orders
    if way == "rational":
        return [(all_budgets, orders)]
    if way == "whole" and setting.choice.name == "torch" and not setting.choice.log:
        return [(all_budgets, (order,)) for order in orders]
    return [((budget,), orders) for budget in budgets]


def default_workers(setting: Setting, checkpoints: Sequence[str | None]) -> int:
    """One process a core, four at most, where that pays: a small model keeps one core busy, but
    not two. A process takes some seconds to start."""
    folders = [locate(checkpoint) for checkpoint in checkpoints if checkpoint]
    small = all(folder and sum(f.stat().st_size for f in folder.glob("*.safetensors")) < 2**26
                for folder in folders)
    worth_it = len(setting.papers) * len(folders) >= 400
    if setting.choice.name == "torch" and small and worth_it:
        return min(os.cpu_count() or 1, 4)
    return 1


def sit_whole(
    setting: Setting, method: Method, tokenizer, generator: BudgetedGenerator, budget: int,
    earlier: Sequence[Sat] = (),
) -> tuple[dict[str, list[Sitting]], dict]:
    """The paper as one exam, which is what a model does by itself.

    Where the world has drafts, they are what the model wrote under the `earlier`, larger budget
    with the same random numbers. Before there is any: the reference solutions, unless the style
    asks for tags, which are hard to guess.
    """
    world, sittings = setting.world, {}
    for order in setting.orders:
        exams, drafts = setting.exams(order), ()
        if world.drafts and earlier:
            drafts = [s.ids for s in earlier[-1].sittings[order]]
        elif not method.tagged:
            drafts = reference_drafts(world, tokenizer, exams, method.style)
        sittings[order] = sit(world, tokenizer, generator, exams, budget, method.style,
                              setting.temperature, setting.seed, drafts)
    return sittings, {}


def rational(
    setting: Setting, name: str, tokenizer, generator: BudgetedGenerator, budgets: Sequence[int]
) -> list[Rational]:
    """Attempts under the largest budget, then the exact solution, without and with tags."""
    outcomes = sample_outcomes(setting.world, tokenizer, generator, setting.papers, max(budgets),
                               setting.samples, setting.temperature, setting.seed)
    places = {order: setting.places(order) for order in setting.orders}
    results = []
    for tagged in (False, True):
        bounds = rational_bounds(outcomes.tagged() if tagged else outcomes, places, budgets)
        results += [Rational(name + "_tagged" * tagged, budget, tagged,
                             {order: bounds[budget, order] for order in places}, outcomes)
                    for budget in budgets]
    return results


# ---------------------------------------------------------------- Greedy Knapsack
@dataclass(frozen=True)
class Prediction:
    """The predicted levels of one paper.

    Attributes:
        levels: problem id -> level; where no tag can be read, the skip level.
        tokens: what predicting them cost.
        unread: tags that could not be read.
    """

    levels: dict[str, int]
    tokens: int
    unread: int


def predict_levels(
    setting: Setting, method: Method, tokenizer, generator: BudgetedGenerator, budget: int
) -> list[Prediction]:
    """One paper after another: each problem alone, its prompt with the exam's budget, decoded no
    further than a header with its tag."""
    world, end = setting.world, smallest_budget(setting.world, tokenizer)
    alone = [Exam((problem,), "easy") for paper in setting.papers for problem in paper]
    seeds = [(setting.seed, i, j) for i, paper in enumerate(setting.papers)
             for j, _ in enumerate(paper)]
    messages = [exam_prompt(world, exam, budget, method.style) for exam in alone]
    requests = [Request(tuple(prompt), end, seed, message=message) for prompt, seed, message in zip(
        encode_prompts(tokenizer, messages), seeds, messages, strict=True)]
    rollouts = iter(generator.generate(requests, setting.temperature))
    predictions = []
    for paper in setting.papers:
        ids = [next(rollouts)[0].ids for _ in paper]
        read = [parse_response(world, tokenizer, i, 1).segments[0].level for i in ids]
        levels = {p.id: world.skip_level if level is None else level
                  for p, level in zip(paper, read, strict=True)}
        predictions.append(Prediction(levels, sum(map(len, ids)), read.count(None)))
    return predictions


def choose(world: World, exam: Exam, prediction: Prediction, budget: int) -> list[int]:
    """Positions (from 0) of the problems that Greedy Knapsack sits under `budget` tokens."""
    levels = [prediction.levels[p.id] for p in exam.problems]
    return np.flatnonzero(greedy_knapsack(levels, budget, world.centroids)).tolist()


def spread(
    exam: Exam, budget: int, chosen: Sequence[int], sitting: Sitting | None,
    prediction: Prediction, charged: int,
) -> Sitting:
    """The sitting of the chosen problems as one of the whole paper; the others are skipped.

    Where nothing was chosen there is no sitting, and nothing was written. The `charged` tokens
    of the prediction pass are the response's preamble.
    """
    segments = [Segment(0, "", SKIP_ANSWER, prediction.levels[p.id]) for p in exam.problems]
    correct = [False] * len(segments)
    if sitting is None:
        return Sitting(exam, budget, (), True, Response(tuple(segments), charged, charged, 0),
                       tuple(correct))
    for place, segment, mark in zip(chosen, sitting.response.segments, sitting.correct,
                                    strict=True):
        segments[place], correct[place] = segment, mark
    part = sitting.response
    whole = Response(tuple(segments), part.preamble + charged, part.total + charged, part.revisits)
    return replace(sitting, exam=exam, budget=budget, response=whole, correct=tuple(correct))


def sit_knapsack(
    setting: Setting, method: Method, tokenizer, generator: BudgetedGenerator, budget: int,
    earlier: Sequence[Sat] = (),
) -> tuple[dict[str, list[Sitting]], dict]:
    """Predict, choose, sit what was chosen. A method that is `charged` pays for its prediction."""
    world = setting.world
    predictions = predict_levels(setting, method, tokenizer, generator, budget)
    charges = [p.tokens * method.charged for p in predictions]
    least = smallest_budget(world, tokenizer)
    sittings = {}
    for order in setting.orders:
        exams = setting.exams(order)
        chosen = [choose(world, exam, prediction, budget - charge)
                  for exam, prediction, charge in zip(exams, predictions, charges, strict=True)]
        sat: dict[int, Sitting] = {}
        for charge in sorted(set(charges)):  # one, unless a prediction ended before its tag
            rows = [i for i, c in enumerate(charges)
                    if c == charge and chosen[i] and budget - c >= least]
            if not rows:
                continue
            parts = [Exam(tuple(exams[i].problems[n] for n in chosen[i]), order) for i in rows]
            levels = [[predictions[i].levels[p.id] for p in part.problems]
                      for i, part in zip(rows, parts, strict=True)]
            drafts = reference_drafts(world, tokenizer, parts, method.style, levels)
            sat |= zip(rows, sit(world, tokenizer, generator, parts, budget - charge, method.style,
                                 setting.temperature, setting.seed, drafts), strict=True)
        sittings[order] = [spread(exam, budget, chosen[i], sat.get(i), predictions[i], charges[i])
                           for i, exam in enumerate(exams)]
    problems = len(predictions) * len(predictions[0].levels)
    return sittings, {
        "prediction_tokens": float(np.mean([p.tokens for p in predictions])),
        "prediction_charged": method.charged,
        "unread_levels": sum(p.unread for p in predictions) / problems,
    }


#: `Method.way` -> how the papers are sat.
WAYS: dict[str, Callable] = {"whole": sit_whole, "knapsack": sit_knapsack}
