"""Engines by name: torch, vLLM, an OpenAI-compatible server, the replay of a log."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from roi_lib.engines.llama import engine_for
from roi_lib.engines.logs import LoggedEngine, RunLog
from roi_lib.engines.openai import OpenAIEngine
from roi_lib.engines.vllm import VLLMEngine
from roi_lib.generation import Engine
from roi_lib.store.checkpoints import load_model, model_hash
from roi_lib.store.deadline import NEVER, Deadline
from roi_lib.worlds import check_choice


@dataclass(frozen=True)
class EngineConfig:
    """Which engine answers, and what it writes on the way; `ValueError`: a bad name or dtype."""

    name: str = "torch"  # torch, vllm, openai, or replay, which answers from the log alone
    options: dict = field(default_factory=dict)  # for the engine's constructor
    log: Path | None = None  # folder of run logs, METHOD-BUDGET.jsonl each
    progress: bool = False  # whether a long run shows a bar
    dtype: str | None = None  # arithmetic instead of the one that `make` is given
    deadline: Deadline = NEVER  # ends a run with `OutOfTime`

    def __post_init__(self) -> None:
        check_choice("engine", self.name, ("torch", "vllm", "openai", "replay"))
        check_choice("dtype", self.dtype or "auto",
                     ("auto", "float64", "float32", "bfloat16", "float16"))

    def make(self, checkpoint: str, tokenizer, dtype: str) -> Engine | None:
        """The engine for a checkpoint, or a server's name of its model; None for a replay."""
        ends, dtype = [tokenizer.eos_token_id], self.dtype or dtype
        if self.name == "openai":
            return OpenAIEngine(checkpoint, tokenizer, ends, **self.options)
        if self.name == "vllm":
            return VLLMEngine(checkpoint, ends, dtype, **self.options)
        if self.name == "torch":
            device = "cuda" if torch.cuda.is_available() else "cpu"
            return engine_for(load_model(checkpoint, dtype).to(device), tokenizer, **self.options)
        return None

    def logged(self, engine: Engine | None, method: str, budget: int, run: dict,
               vocabulary: int = 2**31) -> LoggedEngine:
        """The engine behind its log; `run`: its header, with the checkpoint; see `RunLog`."""
        what, model = f"{method}-{budget}", run["model"]
        header = run | {"method": method, "budget": budget, "model": (model_hash(model), model)}
        if self.name != "replay":  # which takes any engine's log
            header |= {"engine": self.name, "dtype": self.dtype,
                       "model": model if self.name == "openai" else model_hash(model)}
        if "request" in self.options:
            header["request"] = sorted(self.options["request"]) or None
        log = RunLog(self.log / f"{what}.jsonl", header, vocabulary) if self.log else None
        return LoggedEngine(engine, log, what if self.progress else None, self.deadline)
