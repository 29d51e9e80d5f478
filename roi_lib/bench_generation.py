"""Times the torch engine beside transformers' `generate` and vLLM, on the same exam rollouts.

Run as `python -m roi_lib bench generation --out FILE`. The work is that of a training step: papers
in the hard order, 16 rollouts each, sampled at temperature 1 under B=128 with the pocket model in
float32; 256 rollouts in all. A second measurement has 256 papers and one rollout each, so that no
prompt can be shared. Each repeat has papers of its own. torch and `generate` take turns, so that a
busy machine hurts both alike; vLLM comes last, in a process of its own. Speeds are medians over the
repeats, in response tokens a second, prefill included.

Where the time goes: `time_shares` has the parts of a run (where prompts are shared, nearly all of
it is decoding), `kernel_shares` what the processor does meanwhile. Products with the weights are as
fast as the processor multiplies; attention reads the keys and values of all rows once a step and is
bound by memory, which is why `LlamaRows` shares prompts and leaves no gaps. transformers'
`generate` does more for the same tokens: it copies its whole cache every step, holds a prompt for
each rollout, and keeps finished rows in the batch.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from unittest.mock import patch

import numpy as np
import torch

from roi_lib import generation
from roi_lib.checkpoints import load_model, load_tokenizer
from roi_lib.engines import make_engine, vllm_installed
from roi_lib.exams import draw_papers, encode_prompt, exam_prompt, in_orders
from roi_lib.generation import Request, TorchGenerator
from roi_lib.worlds import POCKET, World

BUDGET, ROWS, GROUP = 128, 256, 16


def exam_requests(world: World, tokenizer, papers: int, n: int, seed: int = 1) -> list[Request]:
    """`n` rollouts of each of `papers` papers in the hard order."""
    exams = in_orders(draw_papers(world, papers, seed=seed), ["hard"], seed)
    prompts = [encode_prompt(tokenizer, exam_prompt(world, exam, BUDGET)) for exam in exams]
    return [Request(tuple(prompt), BUDGET, (0, i), n) for i, prompt in enumerate(prompts)]


def engine_tokens(engine, requests: Sequence[Request]) -> int:
    """Response tokens of one run of an engine."""
    return sum(len(r.ids) for group in engine.generate(requests) for r in group)


@torch.inference_mode()
def hf_tokens(model, tokenizer, requests: Sequence[Request]) -> int:
    """The same by transformers' own `generate`, all rows in one batch."""
    prompts = [r.prompt for r in requests for _ in range(r.n)]
    width = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0,
                         top_k=0, top_p=1.0, max_new_tokens=BUDGET,
                         pad_token_id=tokenizer.pad_token_id)[:, width:]
    ended = (out == tokenizer.eos_token_id).long().cumsum(1)
    return int(((ended == 0) | ((ended == 1) & (out == tokenizer.eos_token_id))).sum())


def serve_vllm() -> None:
    """Answer each line "PAPERS N SEED" on standard input with tokens and seconds (a process apart).

    vLLM sets threads and memory of the process it lives in, so it gets one of its own.
    """
    tokenizer = load_tokenizer(POCKET.tokenizer)
    engine = make_engine("vllm", "pocket-base", tokenizer, "float32", chunk=ROWS)
    for line in sys.stdin:
        requests = exam_requests(POCKET, tokenizer, *map(int, line.split()))
        start = time.perf_counter()
        tokens = engine_tokens(engine, requests)
        print("result", json.dumps([tokens, time.perf_counter() - start]), flush=True)


class VLLMWorker:
    """The other end of `serve_vllm`."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "roi_lib.bench_generation"], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def run(self, papers: int, n: int, seed: int) -> tuple[int, float]:
        """Tokens and seconds of one run.

        Raises:
            RuntimeError: vLLM did not start.
        """
        self.process.stdin.write(f"{papers} {n} {seed}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("result "):
                return tuple(json.loads(line.removeprefix("result ")))
        raise RuntimeError("vLLM did not start; see: python -m roi_lib exam --engine vllm")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def timed(work, *arguments) -> tuple[int, float]:
    """Tokens and seconds of one call."""
    start = time.perf_counter()
    return work(*arguments), time.perf_counter() - start


def parts(engine: TorchGenerator, requests: Sequence[Request]) -> dict[str, float]:
    """Shares of one run's time: reading the prompts, decoding, choosing tokens."""
    clocks = {"prefill": (engine.rows, "read"), "choose": (generation, "choose")}
    seconds = dict.fromkeys(clocks, 0.0)

    def clocked(name, function):
        def call(*arguments, **options):
            start = time.perf_counter()
            result = function(*arguments, **options)
            seconds[name] += time.perf_counter() - start
            return result
        return call

    with ExitStack() as stack:
        for name, (owner, attribute) in clocks.items():
            timer = clocked(name, getattr(owner, attribute))
            stack.enter_context(patch.object(owner, attribute, timer))
        total = timed(engine_tokens, engine, requests)[1]
    seconds["decode"] = total - sum(seconds.values())
    return {name: value / total for name, value in seconds.items()}


def kernels(engine: TorchGenerator, requests: Sequence[Request]) -> dict[str, float]:
    """Shares of one run's time in kernels: products with weights, attention, all others."""
    kinds = {"aten::mm": "weights", "aten::addmm": "weights",
             "aten::bmm": "attention", "aten::_softmax": "attention",
             "aten::_scaled_dot_product_flash_attention_for_cpu": "attention"}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        engine.generate(requests)
    time_of = dict.fromkeys(["weights", "attention", "other"], 0.0)
    for row in profile.key_averages():
        time_of[kinds.get(row.key, "other")] += row.self_cpu_time_total
    return {kind: value / sum(time_of.values()) for kind, value in time_of.items()}


def speeds_of(runs: dict, repeats: int) -> dict[str, list[float]]:
    """Tokens per second of each repeat; the engines take turns, after a round to warm up.

    `runs` has functions of the repeat's number, which chooses the papers: an engine that keeps
    what it has read (vLLM) is not to know them from the repeat before.
    """
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            tokens, seconds = run(repeat)
            if repeat:
                speeds[name].append(tokens / seconds)
    return speeds


def summary(speeds: dict[str, list[float]]) -> dict:
    """Medians, ranges, and torch's ratio to the others (None: not installed)."""
    median = {name: float(np.median(s)) if s else None for name, s in speeds.items()}
    return {"tokens_per_second": median,
            "ratio": {name: speed and median["torch"] / speed
                      for name, speed in median.items() if name != "torch"},
            "range": {name: [min(s), max(s)] if s else None for name, s in speeds.items()}}


def bench(repeats: int = 5) -> dict:
    """All measurements as one JSON-ready dict; a few minutes."""
    tokenizer = load_tokenizer(POCKET.tokenizer)
    model = load_model("pocket-base", "float32")
    engine = TorchGenerator.of(model, tokenizer)
    shapes = {"shared": (ROWS // GROUP, GROUP), "apart": (ROWS, 1)}
    speeds = {}
    for name, shape in shapes.items():
        requests = [exam_requests(POCKET, tokenizer, *shape, seed) for seed in range(repeats + 1)]
        speeds[name] = speeds_of({
            "torch": lambda k, r=requests: timed(engine_tokens, engine, r[k]),
            "hf_generate": lambda k, r=requests: timed(hf_tokens, model, tokenizer, r[k])}, repeats)
        speeds[name]["vllm"] = []
    if vllm_installed():  # last, and gone before any other: its idle workers take time, too
        worker = VLLMWorker()
        try:
            for name, shape in shapes.items():
                speeds[name] |= speeds_of({"vllm": lambda k, s=shape: worker.run(*s, k)}, repeats)
        finally:
            worker.close()
    requests = exam_requests(POCKET, tokenizer, *shapes["shared"])
    return summary(speeds["shared"]) | {
        "one_rollout_a_paper": summary(speeds["apart"]),
        "time_shares": parts(engine, requests), "kernel_shares": kernels(engine, requests[:4]),
        "rollouts": ROWS, "budget": BUDGET, "dtype": "float32", "repeats": repeats,
        "threads": torch.get_num_threads()}


if __name__ == "__main__":
    serve_vllm()
