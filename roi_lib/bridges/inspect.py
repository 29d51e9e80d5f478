"""The exam as a task of Inspect AI: `inspect eval roi_lib/exam -T budget=512 --model ...`

Every paper is taken in one order and in the easy one, which Regret needs. One exam is one
generation, cut hard by `max_tokens`; what a provider sends beyond the budget, counted by the
tokenizer of the world, is not read."""

from pathlib import Path

from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import (
    Metric,
    SampleScore,
    Score,
    Scorer,
    Target,
    grouped,
    mean,
    metric,
    scorer,
    stderr,
)
from inspect_ai.solver import TaskState, generate

from roi_lib.exams import Environment, Exam, draw_papers, in_orders
from roi_lib.generation import Rollout
from roi_lib.sitting import tabulate
from roi_lib.store.checkpoints import load_environment
from roi_lib.store.sources import load_pool
from roi_lib.worlds import check_choice, get_world


@metric
def regret() -> Metric:
    """(Score_easy - Score) / Score_easy; NaN where nothing is solved in the easy order."""
    def compute(scores: list[SampleScore]) -> float:
        means = {}
        for order in {score.sample_metadata["order"] for score in scores}:
            own = [s.score.as_float() for s in scores if s.sample_metadata["order"] == order]
            means[order] = sum(own) / len(own)
        easy = means.pop("easy", 0.0)
        (other,) = means.values() or [easy]
        return (easy - other) / easy if easy else float("nan")

    return compute


@scorer(metrics=[grouped(mean(), "order", all=False), stderr(cluster="paper"), regret()])
def problems_solved(env: Environment, exams: dict[str, Exam], budget: int) -> Scorer:
    """How many problems of its exam a response solves within the budget."""
    async def score(state: TaskState, target: Target) -> Score:
        text, ended = state.output.completion, state.output.stop_reason == "stop"
        ids = tuple(env.encode_data([text])[0]) if text else ()
        rollout = Rollout(ids[:budget], ended and len(ids) <= budget, max(len(ids) - budget, 0))
        table = tabulate(env, [exams[str(state.sample_id)]], budget, [[rollout]])
        return Score(value=int(table["correct"].sum()), answer=", ".join(
            "none" if answer is None else answer for answer in table["answer"]))

    return score


@task
def exam(world: str = "paper", budget: int = 512, order: str = "hard", exams: int = 64,
         seed: int = 0, style: str = "direct", tokenizer: str | None = None,
         data: str | None = None) -> Task:
    """Papers of three problems under one hard budget in tokens. `data`: a local folder with the
    datasets under their hub ids."""
    check_choice("order", order, ("medium", "hard"))
    env = load_environment(get_world(world), None, tokenizer)
    env.check_budget(budget)
    pool = load_pool(env.world, "test", Path(data) if data else None)
    papers = draw_papers(env.world, exams, seed=seed, pool=pool)
    drawn = {f"{name}-{i}": exam for name in ("easy", order)
             for i, exam in enumerate(in_orders(papers, [name], seed))}
    samples = [Sample(env.message(exam, budget, style), id=name,
                      target=[problem.answer for problem in exam.problems],
                      metadata={"order": exam.order, "paper": name.rpartition("-")[2]})
               for name, exam in drawn.items()]
    return Task(samples, generate(), problems_solved(env, drawn, budget),
                config=GenerateConfig(max_tokens=budget))
