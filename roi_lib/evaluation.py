"""Evaluation: sit papers, then Score and Regret with intervals.

`sit` runs exams through a generator, the parser and the grader; `Sitting` is one exam as sat.
`Score` is the mean number of problems solved an exam; `Regret` is the share of the easy-order
Score that is lost in another order of the same problems (paper, evaluation metrics):
(Score_easy - Score) / Score_easy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from roi_lib.checkpoints import load_tokenizer
from roi_lib.engines import OpenAIGenerator, make_engine
from roi_lib.exams import (
    Exam,
    Response,
    encode_prompt,
    exam_prompt,
    order_problems,
    parse_response,
    reference_response,
)
from roi_lib.generation import BudgetedGenerator, ReplayGenerator, Request
from roi_lib.grading import grade
from roi_lib.problems import Problem
from roi_lib.runlog import LoggedGenerator, RunLog, model_hash
from roi_lib.worlds import ORDERS, TAG_CLOSE, TAG_OPEN, TIERS, World

BOOTSTRAP_RESAMPLES = 2_000


@dataclass(frozen=True)
class Sitting:
    """One exam as sat: the paper, the response cut into segments, and each problem's mark.

    Attributes:
        exam: the paper.
        budget: the hard budget in tokens.
        ids: the response as token ids.
        finished: whether the response ended by itself.
        response: the segments.
        correct: one mark a position.
        overrun: tokens that the back end sent beyond the budget; they were cut.
        failed: why there is no response ("" where there is one).
    """

    exam: Exam
    budget: int
    ids: tuple[int, ...]
    finished: bool
    response: Response
    correct: tuple[bool, ...]
    overrun: int = 0
    failed: str = ""


def smallest_budget(world: World, tokenizer) -> int:
    """Tokens of one header with one tag: under a smaller budget nothing can be said."""
    words = f"{world.header.format(i=1)} {TAG_OPEN}Level-{world.skip_level}{TAG_CLOSE}"
    return len(tokenizer(words, add_special_tokens=False).input_ids)


def check_budget(world: World, tokenizer, budget: int) -> None:
    """Refuse a budget under which nothing can be said.

    Raises:
        ValueError: the budget is smaller than a header with a level tag.
    """
    least = smallest_budget(world, tokenizer)
    if budget < least:
        raise ValueError(f"budget {budget} is smaller than one level tag with its header; "
                         f"give at least {least} tokens")


def sit(
    world: World,
    tokenizer,
    generator: BudgetedGenerator,
    exams: Sequence[Exam],
    budget: int,
    style: str = "direct",
    temperature: float = 1.0,
    seed: int = 0,
) -> list[Sitting]:
    """Sit every exam once under one hard budget in tokens.

    Raises:
        ValueError: no exams, or a budget smaller than a header with a tag.
    """
    if not exams:
        raise ValueError("there are no exams to sit")
    check_budget(world, tokenizer, budget)
    messages = [exam_prompt(world, exam, budget, style) for exam in exams]
    requests = [Request(tuple(encode_prompt(tokenizer, m)), budget, (seed, i), message=m)
                for i, m in enumerate(messages)]
    rollouts = [rollout for (rollout,) in generator.generate(requests, temperature)]
    responses = [parse_response(world, tokenizer, rollout.ids, len(exam.problems))
                 for exam, rollout in zip(exams, rollouts, strict=True)]
    points = iter(grade(world, [
        pair for exam, response in zip(exams, responses, strict=True)
        for pair in zip(exam.problems, response.segments, strict=True)]))
    sittings = []
    for exam, rollout, response in zip(exams, rollouts, responses, strict=True):
        correct = tuple(islice(points, len(exam.problems)))
        sittings.append(Sitting(exam, budget, rollout.ids, rollout.finished, response, correct,
                                rollout.overrun, rollout.failed))
    return sittings


def bootstrap_means(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Means of resampled exams, [resamples, columns], for values [exams, columns].

    All columns share each resample, so differences and ratios of columns are paired.
    """
    n = len(values)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), BOOTSTRAP_RESAMPLES)
    return counts @ values / n


def interval(samples: np.ndarray) -> list[float]:
    """95 % percentile interval of bootstrap samples."""
    return [float(x) for x in np.percentile(samples, [2.5, 97.5])]


def marks(sittings: Sequence[Sitting]) -> np.ndarray:
    """Number of problems solved, one an exam."""
    return np.array([sum(s.correct) for s in sittings], float)


def regret(score: float, score_easy: float) -> float | None:
    """(Score_easy - Score) / Score_easy; None where nothing is solved in the easy order."""
    return (score_easy - score) / score_easy if score_easy > 0 else None


def segment_table(world: World, sittings: Sequence[Sitting]) -> dict[str, np.ndarray]:
    """One entry a problem sat, column by column.

    Columns: `tier`, `family`; `position` (from 1); `cost` in tokens; `predicted` level (-1: no
    tag); `real` level of the cost (a skip is at the skip level by definition; an unfinished
    segment counts with what it spent); `skipped`; `correct`; `reached` (any token spent on it).
    """
    rows = [
        (problem.tier, problem.family, position, segment.cost,
         -1 if segment.level is None else segment.level,
         world.skip_level if segment.skipped else world.level_of(segment.cost),
         segment.skipped, correct, segment.cost > 0)
        for s in sittings
        for position, (problem, segment, correct) in enumerate(
            zip(s.exam.problems, s.response.segments, s.correct, strict=True), start=1)
    ]
    names = ("tier", "family", "position", "cost", "predicted", "real", "skipped", "correct",
             "reached")
    return {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True),
                                                           strict=True)}


def confusion(world: World, predicted: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Counts [predicted level, real level]; entries without a prediction (-1) are left out."""
    levels = world.skip_level + 1
    given = predicted >= 0
    flat = np.bincount(predicted[given] * levels + real[given], minlength=levels * levels)
    return flat.reshape(levels, levels)


def summarize(
    world: World, sittings: Sequence[Sitting], easy: Sequence[Sitting], seed: int = 0
) -> dict:
    """The numbers of one order under one budget, as a JSON-ready dict.

    Args:
        sittings: exams in the order in question.
        easy: the same papers, in the same sequence, in the easy order.
        seed: of the bootstrap.

    Raises:
        ValueError: the two do not hold the same papers.
    """
    same = [{p.id for p in s.exam.problems} for s in sittings] == [
        {p.id for p in s.exam.problems} for s in easy]
    if not same:
        raise ValueError("regret compares orders of the same papers, and these papers differ")
    samples = bootstrap_means(np.stack([marks(sittings), marks(easy)], axis=1), seed)
    score, score_easy = marks(sittings).mean(), marks(easy).mean()
    table = segment_table(world, sittings)
    hits = (table["predicted"] == table["real"])[table["predicted"] >= 0]
    easy_samples = samples[:, 1]
    return {
        "score": float(score),
        "score_ci": interval(samples[:, 0]),
        "score_easy": float(score_easy),
        "regret": regret(float(score), float(score_easy)),
        "regret_ci": interval((easy_samples - samples[:, 0]) / easy_samples)
        if easy_samples.min() > 0 else None,
        "position_accuracy": np.mean([s.correct for s in sittings], axis=0).tolist(),
        "position_tokens": np.mean(
            [[segment.cost for segment in s.response.segments] for s in sittings], axis=0).tolist(),
        "mean_tokens": float(np.mean([s.response.total for s in sittings])),
        "skip_rate": float(table["skipped"].mean()),
        "level_accuracy": float(hits.mean()) if len(hits) else None,
        "over_budget": sum(s.response.total > s.budget for s in sittings),
        "overrun_cut": sum(s.overrun > 0 for s in sittings),
        "failed": sum(bool(s.failed) for s in sittings),
    }



def family_costs(
    world: World, tokenizer, papers: Sequence[Sequence[Problem]]
) -> dict[str, np.ndarray]:
    """Family -> costs in response tokens of its reference solutions alone, header included.

    Families come in the order of their tiers.
    """
    costs: dict[str, list[int]] = {}
    problems = [problem for paper in papers for problem in paper]
    for problem in sorted(problems, key=lambda p: (TIERS.index(p.tier), p.family)):
        words = reference_response(world, [problem])
        ids = tokenizer(words, add_special_tokens=False).input_ids
        costs.setdefault(problem.family, []).append(len(ids) + 1)  # and end-of-sequence
    return {family: np.array(c) for family, c in costs.items()}


def family_marks(
    world: World,
    tokenizer,
    generator: BudgetedGenerator,
    papers: Sequence[Sequence[Problem]],
    budget: int,
    alone: bool,
    seed: int = 0,
) -> tuple[dict[str, np.ndarray], float]:
    """Marks of problems sat one by one or within their papers, and the share of responses cut.

    Papers are sat in the medium order, under an ample budget. Marks (0 or 1) are by family.
    Within papers, those that the budget cut all the same are left out: a search that never ends
    would be charged to whatever comes after it.
    """
    exams = [Exam(order_problems(paper, "medium", f"{seed}/{i}"), "medium")
             for i, paper in enumerate(papers)]
    if alone:
        exams = [Exam((problem,), "medium") for exam in exams for problem in exam.problems]
    marks: dict[str, list[bool]] = {}
    sittings = sit(world, tokenizer, generator, exams, budget, seed=seed)
    for s in sittings:
        for problem, correct in zip(s.exam.problems, s.correct, strict=True):
            if s.finished or alone:
                marks.setdefault(problem.family, []).append(correct)
    cut = 1 - float(np.mean([s.finished for s in sittings]))
    return {family: np.array(m, float) for family, m in marks.items()}, cut


def reference_generator(
    world: World, tokenizer, exams: Sequence[Exam], budgets: Sequence[int], style: str
) -> ReplayGenerator:
    """A generator that writes out the reference solutions of these exams under these budgets."""
    responses = {}
    for exam in exams:
        words = reference_response(world, exam.problems, style)
        ids = tokenizer(words, add_special_tokens=False, split_special_tokens=True).input_ids
        for budget in budgets:
            prompt = encode_prompt(tokenizer, exam_prompt(world, exam, budget, style))
            responses[tuple(prompt)] = ids
    return ReplayGenerator(responses, tokenizer.eos_token_id)


@dataclass(frozen=True)
class EngineChoice:
    """Which engine answers, and what it writes on the way.

    Attributes:
        name: see `engines.ENGINES`; "replay" answers from the log alone.
        options: for the engine's constructor.
        log: folder of run logs, a file `METHOD-BUDGET.jsonl` each; None for no logs.
        every: seconds between progress lines; None for no such lines.
    """

    name: str = "torch"
    options: Mapping = field(default_factory=dict)
    log: Path | None = None
    every: float | None = None

    def make(self, checkpoint: str, tokenizer, dtype: str) -> BudgetedGenerator | None:
        """The engine itself; a replay has none."""
        if self.name == "replay":
            return None
        return make_engine(self.name, checkpoint, tokenizer, dtype, **self.options)

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
            engine_key = {} if self.name == "replay" else {"engine": self.name}
            log = RunLog(path, run | {"budget": budget} | engine_key)
        return LoggedGenerator(engine, log, self.every, what)


def run_method(
    world: World,
    name: str,
    papers: Sequence[Sequence[Problem]],
    budgets: Sequence[int],
    model: str | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    tokenizer_name: str | None = None,
    choice: EngineChoice = EngineChoice(),  # noqa: B008 - it is frozen
) -> list[dict]:
    """Sit the same papers in every order under every budget; one record each.

    Args:
        papers: each a sequence of problems, whatever their order.
        model: checkpoint instead of the method's own (for a replay: its tokenizer).
        tokenizer_name: tokenizer instead of the checkpoint's.
        choice: which engine answers (a method of reference solutions needs none).

    Raises:
        ValueError: unknown method, checkpoint not to be had, a budget too small, or the log of
            another run.
    """
    method = world.method(name)
    exams = {order: [Exam(order_problems(paper, order, f"{seed}/{i}"), order)
                     for i, paper in enumerate(papers)] for order in ORDERS}
    checkpoint = model or method.checkpoint
    tokenizer = load_tokenizer(tokenizer_name or checkpoint or world.tokenizer,
                               default=world.tokenizer)
    for budget in budgets:
        check_budget(world, tokenizer, budget)
    if method.checkpoint is None:
        every = [exam for order in ORDERS for exam in exams[order]]
        engine = reference_generator(world, tokenizer, every, budgets, method.style)
    else:
        engine = choice.make(checkpoint, tokenizer, world.dtype)
        run = {"world": world.name, "method": name, "model": model_hash(checkpoint), "seed": seed}
    records = []
    for budget in budgets:
        generator = choice.logged(engine, budget, run) if method.checkpoint else engine
        sat = {order: sit(world, tokenizer, generator, exams[order], budget, method.style,
                          temperature, seed) for order in ORDERS}
        for order in ORDERS:
            head = {"world": world.name, "method": name, "order": order, "budget": budget,
                    "n_exams": len(papers), "n_problems": len(papers[0]), "seed": seed,
                    "temperature": temperature}
            records.append(head | summarize(world, sat[order], sat["easy"], seed))
    if isinstance(engine, OpenAIGenerator):
        records[0]["usage"] = asdict(engine.usage)  # of the whole run
    return records


def exam_table(records: list[dict]) -> str:
    """Records as a text table."""
    lines = [f"{'method':<16}{'budget':>6} {'order':<7}{'Score':>6} {'95 % interval':<15}"
             f"{'Regret':>7} {'95 % interval':<17}{'tokens':>6} {'right at position':<18}"]
    for r in records:
        regret = "   --  " if r["regret"] is None else f"{r['regret']:7.3f}"
        spread = "--" if r["regret_ci"] is None else "[{:6.3f},{:6.3f}]".format(*r["regret_ci"])
        positions = " ".join(f"{a:.2f}" for a in r["position_accuracy"])
        score = "[{:.3f},{:.3f}]".format(*r["score_ci"])
        lines.append(f"{r['method']:<16}{r['budget']:>6} {r['order']:<7}{r['score']:6.3f} "
                     f"{score:<15}{regret} {spread:<17}{r['mean_tokens']:6.1f} {positions}")
    return "\n".join(line.rstrip() for line in lines)
