"""The exam for Inspect AI, an optional extra: `inspect eval roi_lib/exam -T order=hard ...`. One
exam is one generation, which `max_tokens` cuts at the budget. Inspect hands back text: it is
encoded once, and charged as that of a chat server is (`engines.protocol.read_reply`)."""

from dataclasses import asdict

import pandas as pd
from anyio import CapacityLimiter, to_thread
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import ContentReasoning, GenerateConfig, ModelOutput
from inspect_ai.scorer import Metric, SampleScore, Score, Scorer, grouped, metric, scorer, stderr
from inspect_ai.solver import generate

from roi_lib import evaluation
from roi_lib.bridges.papers import draw_exams, open_world, read_exam
from roi_lib.engines.protocol import read_reply
from roi_lib.sitting import points, tabulate


@task
def exam(world: str = "paper", budget: int = 512, order: str = "hard", style: str = "direct",
         exams: int = 60, seed: int = 0, data: str | None = None, tokenizer: str | None = None,
         problems_per_exam: int = 3) -> Task:
    """Papers in an order and, for Regret, in the easy one; `budget` in tokens, which `tokenizer`
    counts (folder or hub id; None: the world's own). `data`: see `bridges.trl`. `ValueError`: a
    word is unknown, or the prompt cannot state the budget."""
    env, rest = open_world(world, budget, tokenizer), (exams, problems_per_exam, "test", seed, data)
    samples = [Sample(message, target=[p.answer for p in own.problems], id=f"{i:04}-{own.order}",
                      metadata={"paper": i, "asked": order, **asdict(own)})
               for each in dict.fromkeys((order, "easy"))
               for i, (own, message) in enumerate(draw_exams(env, budget, style, [each], *rest))]
    samples.sort(key=lambda sample: sample.metadata["paper"])  # --limit 2 is one whole paper
    return Task(samples, solver=generate(), scorer=problems_solved(world, budget, tokenizer),
                config=GenerateConfig(max_tokens=budget))


@metric
def score_and_regret() -> Metric:
    """Of the order asked for, with intervals: see `evaluation.score_and_regret`."""
    def measure(scores: list[SampleScore]) -> dict[str, float]:
        table = pd.DataFrame([s.sample_metadata | {"points": s.score.as_float()} for s in scores])
        wide = table.pivot_table("points", "paper", "order")  # NaN: a paper was not sat there
        return evaluation.score_and_regret(*(wide.reindex(columns=[order])[order].to_numpy()
                                             for order in (table["asked"].iloc[0], "easy")))

    return measure


@scorer(metrics=[score_and_regret(), grouped(stderr(), "order", all=False,
                                             name_template="stderr_{group_name}")])
def problems_solved(world: str, budget: int, tokenizer: str | None = None) -> Scorer:
    """Number of problems solved within the budget, and what each has cost in tokens."""
    env, one = open_world(world, budget, tokenizer), CapacityLimiter(1)  # a tokenizer has a state

    async def score(state, target) -> Score:
        rollout = read_reply(as_reply(state.output), str(state.output.error), budget,
                             [env.tokenizer.eos_token_id], lambda text: env.encode_data([text])[0])
        table = await to_thread.run_sync(  # grading may take seconds
            tabulate, env, [read_exam(state.metadata)], budget, [[rollout]], limiter=one)
        shown = table[["tier", "cost", "predicted", "real", "answer", "correct", "tokens"]]
        return Score(value=float(points(table)[0]), answer=" | ".join(map(str, table["answer"])),
                     metadata={"problems": shown.to_dict("records")})

    return score


def as_reply(output: ModelOutput) -> dict:
    """A response in the form of a chat server's reply."""
    message, usage, cut = output.message, output.usage, ("max_tokens", "model_length")
    thoughts = [part.reasoning for part in message.content if isinstance(part, ContentReasoning)]
    return {"choices": [{
        "message": {"content": message.text, "reasoning_content": "".join(thoughts)},
        "finish_reason": "length" if output.stop_reason in cut else output.stop_reason}],
        "usage": usage and {"completion_tokens": usage.output_tokens, "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning_tokens}}}
