"""Evaluation: Score and Regret with intervals, what is missing from rational, and comparisons.

`Score` is the mean number of problems solved an exam; `Regret` is the share of the easy-order
Score that is lost in another order of the same problems (paper, evaluation metrics):
(Score_easy - Score) / Score_easy. Beside the rational test-taker of `rational`, whose Score in an
order is V*(order), what a method leaves behind falls into two parts:

    lost to order   V*(easy) - V*(order)   no policy could have avoided it
    lost to folly   V*(order) - Score      better allocation would have saved it

and its optimality gap is folly as a share, 1 - Score / V*(order). Folly can be negative: the
bound has the base model's abilities, and training may add to them. All intervals are 95 %
percentile intervals of a bootstrap over papers; whatever is compared shares its resamples.

What is sat is in `sitting`, by whom in `methods`; their names are here as well.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from roi_lib.exams import Exam, in_orders, reference_response
from roi_lib.generation import BudgetedGenerator
from roi_lib.methods import (  # noqa: F401 - some for those who import them from here
    EngineChoice,
    Rational,
    Sat,
    Setting,
    sit_method,
    sit_methods,
)
from roi_lib.problems import Problem
from roi_lib.rational import Bound
from roi_lib.runlog import model_hash
from roi_lib.sitting import (  # noqa: F401 - likewise
    Sitting,
    check_budget,
    confusion,
    reference_generator,
    segment_table,
    sit,
    smallest_budget,
)
from roi_lib.worlds import ORDERS, TIERS, World

BOOTSTRAP_RESAMPLES = 2_000


@lru_cache(maxsize=2)
def resample_counts(n: int, seed: int) -> np.ndarray:
    """How often each of `n` exams is drawn, [resamples, n]."""
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), BOOTSTRAP_RESAMPLES)
    return counts.astype(float)


def bootstrap_means(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Means of resampled exams, [resamples, columns], for values [exams, columns].

    All columns share each resample, so differences and ratios of columns are paired.

    Raises:
        ValueError: fewer than two exams.
    """
    if len(values) < 2:
        raise ValueError("one exam has no interval: give two at least")
    return resample_counts(len(values), seed) @ values / len(values)


def interval(samples: np.ndarray) -> list[float]:
    """95 % percentile interval of bootstrap samples."""
    return [float(x) for x in np.percentile(samples, [2.5, 97.5])]


def paired_interval(
    columns: Sequence[np.ndarray], statistic: Callable, seed: int = 0
) -> list[float] | None:
    """Interval of a statistic of the means of columns that hold one number an exam.

    None for a single exam, which has none, and where a resample makes the statistic infinite.
    """
    if len(columns[0]) < 2:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        samples = statistic(*bootstrap_means(np.stack(columns, axis=1), seed).T)
    return interval(samples) if np.isfinite(samples).all() else None


def check_same_papers(*columns: np.ndarray) -> None:
    """Refuse columns of which one has more papers than another.

    Raises:
        ValueError: names the numbers.
    """
    if len(set(map(len, columns))) > 1:
        raise ValueError("a paired difference needs the same papers, not "
                         + " and ".join(str(len(column)) for column in columns))


def paired_difference(a: np.ndarray, b: np.ndarray, seed: int = 0) -> tuple[float, list | None]:
    """Mean of a - b, points of the same papers in the same sequence, and its interval.

    Raises:
        ValueError: not as many of one as of the other.
    """
    check_same_papers(a, b)
    return float(a.mean() - b.mean()), paired_interval([a, b], lambda x, y: x - y, seed)


def regret_difference(
    a: np.ndarray, a_easy: np.ndarray, b: np.ndarray, b_easy: np.ndarray, seed: int = 0
) -> tuple[float, list | None]:
    """Regret of method a minus that of b, and its interval.

    All four are points of the same papers in the same sequence: each method's in the order in
    question and in the easy one.

    Raises:
        ValueError: not as many of one as of another.
    """
    columns = [a, a_easy, b, b_easy]
    check_same_papers(*columns)

    def statistic(x, x_easy, y, y_easy):
        return (x_easy - x) / x_easy - (y_easy - y) / y_easy

    return float(statistic(*(c.mean() for c in columns))), paired_interval(columns, statistic, seed)


def marks(sittings: Sequence[Sitting]) -> np.ndarray:
    """Number of problems solved, one an exam."""
    return np.array([sum(s.correct) for s in sittings], float)


def regret(score: float, score_easy: float) -> float | None:
    """(Score_easy - Score) / Score_easy; None where nothing is solved in the easy order."""
    return (score_easy - score) / score_easy if score_easy > 0 else None


def score_and_regret(points: np.ndarray, easy: np.ndarray, seed: int = 0) -> dict:
    """Score and Regret with intervals, from the points of the same papers in two orders."""
    score, score_easy = float(points.mean()), float(easy.mean())
    return {
        "score": score,
        "score_ci": paired_interval([points], lambda x: x, seed),
        "score_easy": score_easy,
        "regret": regret(score, score_easy),
        "regret_ci": paired_interval([points, easy], lambda x, e: (e - x) / e, seed),
    }


def by_position(accuracy: np.ndarray, seed: int = 0) -> dict:
    """Accuracy at each position with its interval, from marks or expectations [papers, problems].

    All intervals are None for a single exam.
    """
    return {
        "position_accuracy": accuracy.mean(0).tolist(),
        "position_accuracy_ci": [paired_interval([column], lambda x: x, seed)
                                 for column in accuracy.T],
    }


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
    table = segment_table(world, sittings)
    hits = (table["predicted"] == table["real"])[table["predicted"] >= 0]
    accuracy = np.array([s.correct for s in sittings], float)
    return score_and_regret(marks(sittings), marks(easy), seed) | by_position(accuracy, seed) | {
        "position_tokens": np.mean(
            [[segment.cost for segment in s.response.segments] for s in sittings], axis=0).tolist(),
        "mean_tokens": float(np.mean([s.response.total for s in sittings])),
        "skip_rate": float(table["skipped"].mean()),
        "level_accuracy": float(hits.mean()) if len(hits) else None,
        "over_budget": sum(s.response.total > s.budget for s in sittings),
        "overrun_cut": sum(s.overrun > 0 for s in sittings),
        "failed": sum(bool(s.failed) for s in sittings),
    }


def summarize_bound(bound: Bound, easy: Bound, seed: int = 0) -> dict:
    """The rational test-taker's numbers, under the same keys as `summarize`.

    Its Score is the achievable side; see `rational` for the others.
    """
    scores = score_and_regret(bound.achievable, easy.achievable, seed)
    return scores | by_position(bound.accuracy, seed) | {
        "plug_in": float(bound.plug_in.mean()),
        "plug_in_ci": paired_interval([bound.plug_in], lambda x: x, seed),
        "by_family": float(bound.by_family.mean()),
        "by_family_ci": paired_interval([bound.by_family], lambda x: x, seed),
        "prophet": float(bound.prophet.mean()),
        "prophet_ci": paired_interval([bound.prophet], lambda x: x, seed),
        "position_tokens": bound.tokens.mean(0).tolist(),
        "mean_tokens": float(bound.tokens.sum(1).mean()),
        "skip_rate": float(bound.skipped.mean()),
        "level_accuracy": None, "over_budget": 0, "overrun_cut": 0, "failed": 0,
    }


def shortfall(points: np.ndarray, bound: Bound, easy: Bound, seed: int = 0) -> dict:
    """What a method leaves behind, in points and beside V*, the achievable side of the bound.

    Args:
        points: one number a paper, in the order of `bound`.
        easy: the bound of the same papers in the easy order.
    """
    columns = [points, bound.achievable, easy.achievable]
    score, best, best_easy = (float(column.mean()) for column in columns)
    return {
        "rational": best,
        "rational_plug_in": float(bound.plug_in.mean()),
        "rational_by_family": float(bound.by_family.mean()),
        "prophet": float(bound.prophet.mean()),
        "optimality_gap": 1 - score / best if best > 0 else None,
        "optimality_gap_ci": paired_interval(columns, lambda x, v, e: 1 - x / v, seed),
        "lost_to_order": best_easy - best,
        "lost_to_order_ci": paired_interval(columns, lambda x, v, e: e - v, seed),
        "lost_to_folly": best - score,
        "lost_to_folly_ci": paired_interval(columns, lambda x, v, e: v - x, seed),
    }


def points_of(result: Sat | Rational, order: str) -> np.ndarray:
    """One number a paper: problems solved, or what the rational test-taker may expect."""
    if isinstance(result, Rational):
        return result.bounds[order].achievable
    return marks(result.sittings[order])


def models_of(setting: Setting, results: Sequence[Sat | Rational]) -> dict[str, str]:
    """Method -> first 12 digits of the hash of its checkpoint; "" where there is none.

    A checkpoint that serves several methods is read once.
    """
    checkpoints = {r.method: setting.checkpoint(
        r.method.removesuffix("_tagged") if isinstance(r, Rational) else r.method) for r in results}
    hashes = {name: model_hash(name)[:12] if name else "" for name in set(checkpoints.values())}
    return {method: hashes[name] for method, name in checkpoints.items()}


def make_records(setting: Setting, results: Sequence[Sat | Rational]) -> list[dict]:
    """One JSON-ready record for each result and order.

    Where the rational test-taker is among the results, those of the others say what they leave
    behind (`shortfall`); where several methods are, how they differ from the first.
    """
    world, seed, records = setting.world, setting.seed, []
    bounds = {(r.tagged, r.budget): r.bounds for r in results if isinstance(r, Rational)}
    first = {r.budget: r for r in results if r.method == results[0].method}
    models = models_of(setting, results)
    for result in results:
        for order in ORDERS:
            record = {"world": world.name, "method": result.method,
                      "model_hash": models[result.method], "order": order,
                      "budget": result.budget, "n_exams": len(setting.papers),
                      "n_problems": len(setting.papers[0]), "seed": seed,
                      "temperature": setting.temperature}
            points = points_of(result, order)
            if isinstance(result, Rational):
                record |= summarize_bound(result.bounds[order], result.bounds["easy"], seed)
            else:
                tagged = world.method(result.method).tagged
                record |= summarize(world, result.sittings[order], result.sittings["easy"], seed)
                record |= result.facts
                if bound := bounds.get((tagged, result.budget)):
                    record |= shortfall(points, bound[order], bound["easy"], seed)
                if result.usage and order == ORDERS[0]:
                    record["usage"] = result.usage
            reference = first[result.budget]
            if reference.method != result.method:
                difference, spread = paired_difference(points, points_of(reference, order), seed)
                record |= {"difference_from": reference.method, "difference": difference,
                           "difference_ci": spread}
            records.append(record)
    return records


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
    exams = in_orders(papers, ["medium"], seed)
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

    Args: see `methods.Setting`.

    Raises:
        ValueError: see `methods.sit_method`.
    """
    setting = Setting(world, papers, seed, temperature, model, tokenizer_name, choice)
    return make_records(setting, sit_method(setting, name, budgets))


def brackets(ends: Sequence[float] | None, form: str = ".3f") -> str:
    """An interval as text; "--" where there is none."""
    return "--" if ends is None else f"[{ends[0]:{form}},{ends[1]:{form}}]"


def name_width(records: list[dict]) -> int:
    """Width of a table's column of methods."""
    return max(16, 1 + max(len(r["method"]) for r in records))


def text_table(records: list[dict], head: str, cells: Callable[[dict], str]) -> str:
    """A text table: each record's method, budget and order, then what `cells` makes of it."""
    width = name_width(records)
    lines = [f"{'method':<{width}}{'budget':>6} {'order':<7}{head}"]
    lines += [f"{r['method']:<{width}}{r['budget']:>6} {r['order']:<7}{cells(r)}" for r in records]
    return "\n".join(line.rstrip() for line in lines)


def exam_table(records: list[dict]) -> str:
    """Records as a text table."""
    def cells(r: dict) -> str:
        regret = "   --  " if r["regret"] is None else f"{r['regret']:7.3f}"
        positions = " ".join(f"{a:.2f}" for a in r["position_accuracy"])
        return (f"{r['score']:6.3f} {brackets(r['score_ci']):<15}{regret} "
                f"{brackets(r['regret_ci'], '6.3f'):<17}{r['mean_tokens']:6.1f} {positions}")
    return text_table(records, f"{'Score':>6} {'95 % interval':<15}{'Regret':>7} "
                      f"{'95 % interval':<17}{'tokens':>6} {'right at position':<18}", cells)


def position_table(records: list[dict]) -> str:
    """Accuracy at each position with its interval, as a text table."""
    def cells(r: dict) -> str:
        pairs = zip(r["position_accuracy"], r["position_accuracy_ci"], strict=True)
        return " ".join(f"{a:.3f} {brackets(ends):<13}" for a, ends in pairs)
    positions = len(records[0]["position_accuracy"])
    return text_table(records, " ".join(f"{f'right at position {i + 1}':<19}"
                                        for i in range(positions)), cells)


def shortfall_table(records: list[dict]) -> str:
    """What the methods leave behind, beside the rational test-taker, as a text table.

    The rational Score stands as its achievable and its plug-in side. "" where no record has one.
    """
    rows = [r for r in records if "rational" in r]
    if not rows:
        return ""

    def cells(r: dict) -> str:
        def part(key, form):
            return "--" if r[key] is None else f"{r[key]:{form}} {brackets(r[key + '_ci'], '.2f')}"
        return (f"{r['score']:6.3f}  {r['rational']:.3f}-{r['rational_plug_in']:<6.3f}"
                f"{r['rational_by_family']:9.3f} {r['prophet']:7.3f}  "
                f"{part('optimality_gap', '5.2f'):<20}{part('lost_to_order', '6.3f'):<21}"
                f"{part('lost_to_folly', '6.3f')}")
    return text_table(rows, f"{'Score':>6}  {'rational':<12}{'by family':>9} {'prophet':>7}  "
                      f"{'optimality gap':<20}{'lost to order':<21}lost to folly", cells)


def difference_table(records: list[dict]) -> str:
    """How the methods' Scores differ from the first method's, as a text table; "" for a single
    method."""
    rows = [r for r in records if "difference" in r]
    if not rows:
        return ""
    width = name_width(rows)
    title = f"Score minus that of {rows[0]['difference_from']}"
    width = max(width, len(title) - 6)
    lines = [f"{title:<{width + 7}}" + "".join(f"{order:<24}" for order in ORDERS)]
    for method, budget in dict.fromkeys((r["method"], r["budget"]) for r in rows):
        cells = [f"{r['difference']:+.3f} {brackets(r['difference_ci'], '+.3f')}" for r in rows
                 if (r["method"], r["budget"]) == (method, budget)]
        lines.append(f"{method:<{width}}{budget:>6} " + "".join(f"{c:<24}" for c in cells))
    return "\n".join(line.rstrip() for line in lines)
