"""Three measurements side by side, each a JSON-ready dict: the command `bench`.

    osmckp        the solver, and the hindsight problem beside scipy's mixed-integer program
    generation    the torch engine beside transformers' `generate` and vLLM, on the same rollouts
    rarl          a step of our trainer beside one of TRL's GRPOTrainer, on the same exams

What is compared takes turns, so that a busy machine hurts all alike."""

import json
import subprocess
import sys
import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from scipy.optimize import LinearConstraint, milp

from roi_lib.engines import EngineConfig, engine_for
from roi_lib.engines.vllm import vllm_installed
from roi_lib.exams import Environment, draw_papers, in_orders
from roi_lib.experiments import knapsack
from roi_lib.generation import Request, Rollout
from roi_lib.osmckp import SKIP, Action, Instance, solve
from roi_lib.rarl import STYLE, exam_rewards, problem_rewards, train_step, training_exams
from roi_lib.sitting import tabulate
from roi_lib.store.checkpoints import load_environment, load_model
from roi_lib.worlds import POCKET, RARLRecipe, TRLRecipe

BUDGET = 128  # of `generation`
#: Papers and rollouts of each: as in a step of training; and so that no prompt is shared.
SHAPES = {"shared": (16, 16), "apart": (256, 1)}
RARL = RARLRecipe(
    steps=3, exams=16, rollouts=16, budgets=(64,), budget_for="exam", learning_rate=1e-4,
    trl=TRLRecipe(  # its fastest way
        rows_at_once=256, lora_rank=0, bf16=False, checkpointing=False))


def random_instance(n: int, budget: int, k: int, s: int) -> Instance:
    """N classes of SKIP and k - 1 actions with s outcomes each; costs up to 0.7 B, rewards 0/1."""
    rng = np.random.default_rng(0)

    def act(name):
        cost = rng.integers(1, int(0.7 * budget), s)
        return Action(name, np.column_stack([rng.dirichlet(np.ones(s)), cost, rng.random(s) < 0.7]))

    return Instance(budget, [[SKIP] + [act(f"effort {j}") for j in range(1, k)] for _ in range(n)])


def milp_value(owner: np.ndarray, cost: np.ndarray, reward: np.ndarray, budget: int) -> float:
    """One exam with known outcomes (class, cost, reward of each action), by milp with gap 0."""
    one_each = (owner == np.unique(owner)[:, None]).astype(float)
    return -milp(-reward, integrality=np.ones(len(owner)), bounds=(0, 1), constraints=[
        LinearConstraint(one_each, 1, 1), LinearConstraint(cost[None], -np.inf, budget)],
        options={"mip_rel_gap": 0}).fun


def best_ms(function: Callable, repeats: int) -> float:
    """The shortest time of a few calls."""
    return 1e3 * min(timeit.repeat(function, number=1, repeat=repeats))


def osmckp(exams: int = 200, repeats: int = 5) -> dict:
    """About ten seconds; hindsight by the dynamic program and by milp, on the same draws."""
    instance, offline = random_instance(3, 4096, 4, 256), []
    for n in (3, 12):
        exam = random_instance(n, 1024, 4, 64)
        draws = knapsack.draw(exam, exams)
        known = [np.array([(i, a.cost[pick[run, k]], a.reward[pick[run, k]])
                           for i, pick in enumerate(draws) for k, a in enumerate(exam.classes[i])],
                          float).T for run in range(exams)]
        begin = time.perf_counter()
        values = [milp_value(*one, 1024) for one in known]
        milp_ms = 1e3 * (time.perf_counter() - begin)
        by_dp = partial(knapsack.hindsight_scores, exam, draws)
        dp_ms = best_ms(by_dp, repeats)
        offline.append({"exams": exams, "N": n, "B": 1024, "K": 4, "dp_ms_per_exam": dp_ms / exams,
                        "milp_ms_per_exam": milp_ms / exams, "speedup": milp_ms / dp_ms,
                        "largest_difference": float(np.abs(by_dp() - values).max())})
    return {"one_instance": {"N": 3, "B": 4096, "K": 4, "S": 256, "target_ms": 25,
                             "ms": best_ms(lambda: solve(instance), repeats),
                             "value": solve(instance).value}, "offline_vs_milp": offline}


def engine_tokens(engine, requests: Sequence[Request]) -> int:
    """Response tokens of one run of an engine."""
    return sum(len(r.ids) for group in engine.generate(requests) for r in group)


@torch.inference_mode()
def hf_tokens(model, tokenizer, requests: Sequence[Request]) -> int:
    """The same by transformers' own `generate`, all rows in one batch."""
    rows = tokenizer.pad({"input_ids": [list(r.prompt) for r in requests for _ in range(r.n)]},
                         padding_side="left", return_tensors="pt")
    out = model.generate(**rows, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                         max_new_tokens=BUDGET, pad_token_id=tokenizer.pad_token_id)
    ends = out[:, rows.input_ids.shape[1]:] == tokenizer.eos_token_id
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


def generation(repeats: int = 5) -> dict:
    """A few minutes: medians, ranges, and torch's ratio to the others (None: vLLM is not
    installed). `CalledProcessError`: vLLM did not start."""
    env, model = load_environment(POCKET), load_model("pocket-base", "float32")
    speeds = speeds_of({"torch": partial(engine_tokens, engine_for(model, env.tokenizer)),
                        "hf_generate": partial(hf_tokens, model, env.tokenizer)}, env, repeats)
    vllm = {shape: {"vllm": []} for shape in SHAPES}
    if vllm_installed():  # it sets threads and memory of its process, and so gets one of its own
        command = [sys.executable, "-m", __name__, str(repeats)]
        vllm = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
    found = {}
    for shape in SHAPES:
        own = speeds[shape] | vllm[shape]
        median = {name: float(np.median(s)) if s else None for name, s in own.items()}
        found[shape] = {"tokens_per_second": median, "ratio": {
            name: speed and median["torch"] / speed for name, speed in median.items()
            if name != "torch"}, "range": {
                name: [min(s), max(s)] if s else None for name, s in own.items()}}
    return found["shared"] | {
        "one_rollout_a_paper": found["apart"], "rollouts": 256, "budget": BUDGET,
        "dtype": "float32", "repeats": repeats, "threads": torch.get_num_threads()}


def plain_trainer(env: Environment, model, recipe: RARLRecipe, work: Path):
    """A GRPOTrainer as its documentation has it: it tokenizes the prompts, and generates."""
    from datasets import Dataset
    from trl import GRPOTrainer

    from roi_lib.training.trl import grpo_config
    n, (budget,) = recipe.rollouts, recipe.budgets
    exams = {env.tokenizer.decode(env.prompt(exam, budget, STYLE)): exam
             for step in range(recipe.steps)
             for exam in training_exams(env.world, recipe, step)[0]}

    def reward(prompts, completion_ids, **kwargs) -> list[float]:
        groups = [[Rollout(tuple(ids), True) for ids in completion_ids[i : i + n]]
                  for i in range(0, len(prompts), n)]
        table = tabulate(env, [exams[prompt] for prompt in prompts[::n]], budget, groups)
        table["reward"] = problem_rewards(table)
        return exam_rewards(table).ravel().tolist()

    return GRPOTrainer(model, reward, grpo_config(recipe, work), processing_class=env.tokenizer,
                       train_dataset=Dataset.from_dict({"prompt": list(exams)}))


def rarl(turns: int = 3, recipe: RARLRecipe = RARL, start: str = "pocket-mft") -> dict:
    """A few minutes: seconds a step and their ratio, from `start`, by TRL alone, by TRL with our
    rollouts (`training.trl`), and by `rarl.train_step`. A step is 16 exams x 16 rollouts under B=64
    and one update in float32; medians are over the steps, without the first of each turn."""
    from transformers import PrinterCallback

    from roi_lib.training.trl import make_trainer
    env, found = load_environment(POCKET, start), []
    for _ in range(turns):
        seconds, model = {}, load_model(start, "float32")
        with TemporaryDirectory() as work:
            for name, make in (("trl", plain_trainer), ("trl_with_our_rollouts", make_trainer)):
                trainer = make(env, load_model(start, "float32"), recipe, Path(work, name))
                trainer.remove_callback(PrinterCallback)
                trainer.train()  # logs the time of each step, but for AdamW's own, a few ms
                seconds[name] = pd.DataFrame(trainer.state.log_history)["step_time"].dropna()
        engine = engine_for(model, env.tokenizer)
        optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=0.0)
        seconds["ours"] = []
        for step in range(recipe.steps):
            begin = time.perf_counter()
            train_step(env, model, engine, optimizer, recipe, step)
            seconds["ours"].append(time.perf_counter() - begin)
        found.append(pd.DataFrame(seconds)[1:])
    median = (table := pd.concat(found)).median().to_dict()
    return {"seconds_per_step": median, "ratio": median["trl"] / median["ours"],
            "range": table.agg(["min", "max"]).to_dict("list"),
            "exams": recipe.exams, "rollouts": recipe.rollouts, "budget": recipe.budgets[0],
            "start": start, "dtype": "float32", "threads": torch.get_num_threads()}


if __name__ == "__main__":
    env = load_environment(POCKET)
    engine = EngineConfig("vllm").make("pocket-base", env.tokenizer, "float32")
    print(json.dumps(speeds_of({"vllm": partial(engine_tokens, engine)}, env, int(sys.argv[1]))))
