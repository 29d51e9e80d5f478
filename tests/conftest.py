"""Shared by all tests: the pocket world, a tiny random model, and where the real data lies."""

import random
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from roi_lib import rarl
from roi_lib.exams import Environment, tag
from roi_lib.generation import Engine, TorchEngine, within_budget
from roi_lib.store.tokenizers import build_tokenizer
from roi_lib.worlds import POCKET, TRLRecipe, standard_methods

ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = ROOT.parent / "shared" / "data"


def tiny_model(tokenizer, seed=0) -> Qwen2ForCausalLM:
    """A random model of 24,000 weights in float64; the same at every call."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)).double().eval()
    with torch.no_grad():  # its sampled responses have all lengths: end-of-sequence is likely
        model.model.embed_tokens.weight.normal_(std=0.2)
        model.model.embed_tokens.weight[tokenizer.eos_token_id] *= 5
    return model


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer(POCKET)


@pytest.fixture(scope="session")
def env(tokenizer):
    return Environment(POCKET, tokenizer)


@pytest.fixture(scope="session")
def model(tokenizer):
    return tiny_model(tokenizer)


@pytest.fixture(scope="session")
def engine(model, tokenizer):
    return TorchEngine.of(model, tokenizer)


@pytest.fixture(scope="session")
def small_world(tokenizer, tmp_path_factory):
    """The pocket world with random models for its checkpoints, which needs nothing from data/."""
    root = tmp_path_factory.mktemp("world")
    tokenizer.save_pretrained(root / "words")
    names = [str(root / name) for name in ("base", "mft", "rarl")]
    for seed, name in enumerate(names):
        tiny_model(tokenizer, seed).save_pretrained(name)
    return replace(POCKET, tokenizer=str(root / "words"), methods=standard_methods(*names))


class Student(Engine):
    """Answers the known problems that a prompt holds, at once, in brief or in full: as the level
    that it is made to begin with says, else as its luck, which the seed decides. The more it
    writes, the more often it is right. Keeps its requests."""

    def __init__(self, env, problems):
        self.env, self.known, self.asked = env, list(problems), []

    def answer(self, problem, effort, rng):
        words = (f"\\boxed{{{problem.answer}}}", problem.brief, problem.solution)[effort]
        right = rng.random() < (0.3, 0.6, 0.9)[effort]
        return words if right else words.replace(f"{{{problem.answer}}}", "{320}")

    def stream(self, requests, temperature=1.0):
        self.asked += requests
        for i, request in enumerate(requests):
            asked, _, opening = self.env.tokenizer.decode(request.prompt).rpartition("assistant")
            begun = re.search(r"Level-(\d)", opening)
            places = {asked.find(p.text): p for p in self.known}
            found = [places[place] for place in sorted(places) if place >= 0]
            tagged, rng = "Predict each level" in asked, random.Random(str(request.seed))
            rollouts = []
            for _ in range(request.n):
                parts = []
                for j, problem in enumerate(found, 1):
                    effort = int(begun[1]) if begun else rng.randrange(3)
                    head = "" if begun else f"Q{j}. {tag(effort) if tagged else ''} "
                    parts.append(head + self.answer(problem, effort, rng))
                ids = [*self.env.encode(" ".join(parts)), self.env.tokenizer.eos_token_id]
                rollouts.append(within_budget(ids, request.budget, ids[-1:]))
            yield i, rollouts


@pytest.fixture(scope="session")
def real_data():
    if not REAL_DATA.is_dir():
        pytest.skip("the real datasets are not beside this checkout (../shared/data)")
    return REAL_DATA


@pytest.fixture
def refusal():
    """The one sentence with which a `ValueError` refuses something."""
    def sentence(call, *arguments, **options) -> str:
        with pytest.raises(ValueError) as told:
            call(*arguments, **options)
        assert "\n" not in str(told.value)
        return str(told.value)

    return sentence


@pytest.fixture
def tiny(tokenizer):
    """`tiny_model` in float32, to be trained."""
    return tiny_model(tokenizer).float()


SMALL_RARL = replace(POCKET.rarl, steps=6, exams=2, rollouts=4, budgets=(16, 24),
                     sizes=((3, 1.0),), learning_rate=1e-3, save_every=2, log_every=2)
SMALL_TRL = replace(SMALL_RARL, steps=4, trl=TRLRecipe(
    rows_at_once=4, lora_rank=0, bf16=False, checkpointing=False))
#: `python -c TRAIN rarl FOLDER`, or trl: a short training in a process of its own.
TRAIN = """
import importlib, pathlib, sys, conftest
from roi_lib import rarl
from roi_lib.exams import Environment
from roi_lib.store.tokenizers import build_tokenizer
name, rarl.problem_rewards = sys.argv[1], conftest.token_rewards
env = Environment(conftest.POCKET, build_tokenizer(conftest.POCKET))
recipe = {"rarl": conftest.SMALL_RARL, "trl": conftest.SMALL_TRL}[name]
importlib.import_module(f"roi_lib.training.{name}").train(
    env, conftest.tiny_model(env.tokenizer).float(), recipe, pathlib.Path(sys.argv[2]))
"""


def log_of(work):
    """The log of a run, without what every run has of its own."""
    return pd.read_csv(work / "log.csv").drop(columns="seconds")


def token_rewards(table, *_):
    """Stands in for `rarl.problem_rewards`: rewards that a random model earns now and then."""
    return (table["ids"].map(sum) % 4).where(table["position"] == 1, 0).astype(float)


@pytest.fixture(scope="module")
def paid():
    """The random model earns `token_rewards`; and TRL says nothing of `rollout_func`'s youth."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rarl, "problem_rewards", token_rewards)
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
        # sums are rounded alike only with as many threads
        patch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
        yield
