"""Times the torch engine beside transformers' `generate` and vLLM, on the same exam rollouts.

The work is that of a training step: 16 papers in the hard order with 16 rollouts each, sampled at
temperature 1 under B=128 with the pocket model in float32. A second measurement has 256 papers with
one rollout each, so that no prompt can be shared. torch and `generate` take turns, so that a busy
machine hurts both alike; vLLM comes last, in a process of its own. Speeds are medians over the
repeats, in response tokens a second, prefill included.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from roi_lib.engines import engine_for, make_engine
from roi_lib.engines.vllm import vllm_installed
from roi_lib.exams import Environment, draw_papers, in_orders
from roi_lib.generation import Request
from roi_lib.store.checkpoints import load_environment, load_model
from roi_lib.worlds import POCKET

BUDGET = 128
SHAPES = {"shared": (16, 16), "apart": (256, 1)}  # papers, rollouts each


def exam_requests(env: Environment, papers: int, n: int, seed: int) -> list[Request]:
    """`n` rollouts of each of `papers` papers in the hard order."""
    exams = in_orders(draw_papers(env.world, papers, seed=seed), ["hard"], seed)
    return [Request(env.prompt(exam, BUDGET), BUDGET, (0, i), n) for i, exam in enumerate(exams)]


def engine_tokens(engine, requests: Sequence[Request]) -> int:
    """Response tokens of one run of an engine."""
    return sum(len(r.ids) for group in engine.generate(requests) for r in group)


@torch.inference_mode()
def hf_tokens(model, tokenizer, requests: Sequence[Request]) -> int:
    """The same by transformers' own `generate`, all rows in one batch."""
    prompts, pad = [r.prompt for r in requests for _ in range(r.n)], tokenizer.pad_token_id
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0,
                         top_k=0, top_p=1.0, max_new_tokens=BUDGET, pad_token_id=pad)[:, width:]
    ends = out == tokenizer.eos_token_id
    return int((ends.long().cumsum(1) - ends.long() == 0).sum())


def speeds_of(runs: Mapping[str, Callable], env: Environment, shape: tuple[int, int],
              repeats: int) -> dict[str, list[float]]:
    """Tokens a second of each repeat; the engines take turns, after a round to warm up.

    Each repeat has papers of its own: an engine that keeps what it has read is not to know them.
    """
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        requests = exam_requests(env, *shape, repeat)
        for name, run in runs.items():
            start = time.perf_counter()
            tokens = run(requests)
            if repeat:
                speeds[name].append(tokens / (time.perf_counter() - start))
    return speeds


def vllm_speeds(repeats: int) -> dict[str, list[float]]:
    """Those of vLLM. It sets threads and memory of its process, and so gets one of its own."""
    env = load_environment(POCKET)
    engine = make_engine("vllm", "pocket-base", env.tokenizer, "float32", chunk=256)
    return {name: speeds_of({"vllm": partial(engine_tokens, engine)}, env, shape, repeats)["vllm"]
            for name, shape in SHAPES.items()}


def summary(speeds: Mapping[str, Sequence[float]]) -> dict:
    """Medians, ranges, and torch's ratio to the others (None: not installed)."""
    median = {name: float(np.median(s)) if s else None for name, s in speeds.items()}
    return {"tokens_per_second": median,
            "ratio": {name: speed and median["torch"] / speed
                      for name, speed in median.items() if name != "torch"},
            "range": {name: [min(s), max(s)] if s else None for name, s in speeds.items()}}


def bench(repeats: int = 5) -> dict:
    """All measurements as one JSON-ready dict; a few minutes. `RuntimeError`: no start of vLLM."""
    env, model = load_environment(POCKET), load_model("pocket-base", "float32")
    runs = {"torch": partial(engine_tokens, engine_for(model, env.tokenizer)),
            "hf_generate": partial(hf_tokens, model, env.tokenizer)}
    speeds = {name: speeds_of(runs, env, shape, repeats) | {"vllm": []}
              for name, shape in SHAPES.items()}
    if vllm_installed():
        worker = subprocess.run([sys.executable, "-m", __name__, str(repeats)], text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        if worker.returncode:
            raise RuntimeError("vLLM did not start; see: python -m roi_lib exam --engine vllm")
        for name, found in json.loads(worker.stdout.splitlines()[-1]).items():
            speeds[name]["vllm"] = found
    return summary(speeds["shared"]) | {
        "one_rollout_a_paper": summary(speeds["apart"]), "rollouts": 256, "budget": BUDGET,
        "dtype": "float32", "repeats": repeats, "threads": torch.get_num_threads()}


if __name__ == "__main__":
    print(json.dumps(vllm_speeds(int(sys.argv[1]))))
