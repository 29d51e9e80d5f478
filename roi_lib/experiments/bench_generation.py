"""Times the torch engine beside transformers' `generate` and vLLM, on the same exam rollouts.

As in a training step, 16 papers have 16 rollouts each; then 256 papers have one each, so that no
prompt can be shared. torch and `generate` take turns, so that a busy machine hurts both alike."""

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


def speeds_of(runs: Mapping[str, Callable], env: Environment, repeats: int) -> dict[str, dict]:
    """Shape -> name -> response tokens a second, prefill included, of each repeat after a first to
    warm up. Each has papers of its own: an engine that keeps what it read is not to know them."""
    speeds: dict[str, dict] = {shape: {name: [] for name in runs} for shape in SHAPES}
    for shape, (papers, n) in SHAPES.items():
        for repeat in range(repeats + 1):
            exams = in_orders(draw_papers(env.world, papers, seed=repeat), ["hard"], repeat)
            requests = [Request(env.prompt(exam, BUDGET), BUDGET, (0, i), n)
                        for i, exam in enumerate(exams)]
            for name, run in runs.items():
                begin = time.perf_counter()
                speed = run(requests) / (time.perf_counter() - begin)
                speeds[shape][name] += [speed] if repeat else []
    return speeds


def summary(speeds: Mapping[str, Sequence[float]]) -> dict:
    """Medians, ranges, and torch's ratio to the others (None: not installed)."""
    median = {name: float(np.median(s)) if s else None for name, s in speeds.items()}
    return {"tokens_per_second": median,
            "ratio": {name: speed and median["torch"] / speed
                      for name, speed in median.items() if name != "torch"},
            "range": {name: [min(s), max(s)] if s else None for name, s in speeds.items()}}


def bench(repeats: int = 5) -> dict:
    """All measurements, JSON-ready; a few minutes. `CalledProcessError`: vLLM did not start."""
    env, model = load_environment(POCKET), load_model("pocket-base", "float32")
    speeds = speeds_of({"torch": partial(engine_tokens, engine_for(model, env.tokenizer)),
                        "hf_generate": partial(hf_tokens, model, env.tokenizer)}, env, repeats)
    found = {shape: {"vllm": []} for shape in SHAPES}
    if vllm_installed():  # it sets threads and memory of its process, and so gets one of its own
        command = [sys.executable, "-m", __name__, str(repeats)]
        found = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
    shared, apart = (summary(speeds[shape] | found[shape]) for shape in SHAPES)
    return shared | {"one_rollout_a_paper": apart, "rollouts": 256, "budget": BUDGET,
                     "dtype": "float32", "repeats": repeats, "threads": torch.get_num_threads()}


if __name__ == "__main__":
    env = load_environment(POCKET)
    engine = make_engine("vllm", "pocket-base", env.tokenizer, "float32")
    print(json.dumps(speeds_of({"vllm": partial(engine_tokens, engine)}, env, int(sys.argv[1]))))
