"""Any OpenAI-compatible server, through the official client."""

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import astuple, dataclass, replace
from operator import add
from urllib.parse import urlsplit

from roi_lib.engines.vllm import stream_seed
from roi_lib.generation import Engine, Request, Rollout, Stream, within_budget
from roi_lib.worlds import check_choice


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
    """The API key, from the environment alone, or a `ValueError`; a server on this machine needs
    none."""
    host = urlsplit(base_url).hostname if base_url else None
    local = host in ("127.0.0.1", "localhost", "::1")
    key = os.environ.get(variable, "none" if local else "")
    if not key:
        raise ValueError(f"the API key is read from the environment; set {variable}")
    return key


class OpenAIEngine(Engine):
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
        ValueError: unknown api, no API key, or an address or proxy that the client cannot use.
    """

    def __init__(self, model: str, tokenizer, eos_ids: Sequence[int], base_url: str | None = None,
                 api: str = "completions", key_variable: str = "OPENAI_API_KEY",
                 concurrency: int = 8, retries: int = 4, timeout: float = 120.0,
                 backoff: float = 1.0) -> None:
        import httpx
        import openai

        check_choice("api", api, ("completions", "chat"))
        self.model, self.tokenizer, self.eos_ids = model, tokenizer, sorted(set(eos_ids))
        self.api, self.concurrency, self.retries, self.backoff = api, concurrency, retries, backoff
        self._key, self.usage = server_key(key_variable, base_url), Usage()
        try:
            # The client's own retries are off: it does not know an empty choice for a failure.
            self.client = openai.OpenAI(api_key=self._key, base_url=base_url, timeout=timeout,
                                        max_retries=0)
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            raise ValueError(
                f"the client cannot use this address or the proxy of the environment ({error}); "
                "mend --base-url, or unset ALL_PROXY, HTTPS_PROXY and HTTP_PROXY") from error

    def stream(self, requests: Sequence[Request], temperature: float = 1.0) -> Stream:
        """See `Engine`; `ValueError`: the server refuses a request (key, model, parameters)."""
        done: dict[int, dict[int, Rollout]] = {}
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            asked = {pool.submit(self._ask, request, k, temperature): (i, k)
                     for i, request in enumerate(requests) for k in range(request.n)}
            for future in as_completed(asked):
                i, k = asked[future]
                rollouts = done.setdefault(i, {})
                rollouts[k], usage = future.result()  # added up in one thread: no count is lost
                self.usage = Usage(*map(add, astuple(self.usage), astuple(usage)))
                if len(rollouts) == requests[i].n:
                    yield i, [rollouts[k] for k in range(requests[i].n)]
        finally:  # on an interrupt, too: only what is under way is waited for
            pool.shutdown(cancel_futures=True)

    def _ask(self, request: Request, k: int, temperature: float) -> tuple[Rollout, Usage]:
        """One rollout, with its retries, and what it adds to the usage."""
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
        failure = Rollout((), False, failed=self._without_key(reason))
        return failure, Usage(failed=1, retries=self.retries)

    def _without_key(self, words: str) -> str:
        return words.replace(self._key, "***")[:300]

    def _refusal(self, error) -> str:
        """One sentence for a status that no retry mends."""
        if error.status_code in (401, 403):
            return f"the server refused the API key (HTTP {error.status_code})"
        return self._without_key(f"the server refused a request (HTTP {error.status_code}): "
                                 f"{error.message}; see --model, --base-url and --api")

    def _reply(self, request: Request, k: int, temperature: float,
               retries: int) -> tuple[Rollout, Usage]:
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
        rollout, charged = within_budget(ids, request.budget, self.eos_ids), reply.usage
        tokens_in = charged.prompt_tokens if charged else len(request.prompt)
        tokens_out = charged.completion_tokens if charged else len(ids)
        excess = max(rollout.overrun, tokens_out - request.budget)
        return replace(rollout, overrun=excess), Usage(1, 0, retries, excess, tokens_in, tokens_out)

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
