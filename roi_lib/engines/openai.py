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
    """What a server was asked for and what it charged, summed over one run."""

    responses: int = 0  # good ones
    failed: int = 0  # requests given up after all retries
    retries: int = 0  # requests sent again
    overrun: int = 0  # tokens sent beyond the budget
    tokens_in: int = 0  # prompt tokens, as the server counts them
    tokens_out: int = 0  # response tokens, as the server counts them (hidden reasoning included)

    def report(self, price_in: float = 0.0, price_out: float = 0.0) -> str:
        """One line: counts, and the cost for prices per million tokens."""
        cost = (self.tokens_in * price_in + self.tokens_out * price_out) / 1e6
        return (f"{self.responses} responses, {self.failed} failed, {self.retries} retries; "
                f"{self.tokens_in} tokens in, {self.tokens_out} out, {self.overrun} beyond the "
                f"budget; cost {cost:.4f} at {price_in:g} and {price_out:g} per million")


class BadAnswer(ValueError):
    """A server's reply that holds no response: empty choice, malformed JSON, ids missing."""


class OpenAIEngine(Engine):
    """Any OpenAI-compatible server. A request that fails for good is marked; the run goes on.

    `api="completions"` sends token ids and needs ids back, as a vLLM server gives them: the count
    is exact. `api="chat"` is for servers that take messages and give text (GPT-4o-mini, DeepSeek):
    the text is encoded once with the world's tokenizer, and *these* ids are charged, so that every
    method pays in the same coin; `usage` has the server's own count, and where that is above the
    budget, the excess is flagged as overrun. `ValueError`: unknown api, no API key, bad address."""

    def __init__(
        self, model: str,  # the name under which the server knows it
        tokenizer,  # the model's (completions) or the world's (chat)
        eos_ids: Sequence[int],  # token ids that end a response
        base_url: str | None = None,  # the client's default
        api: str = "completions",  # or "chat"
        key_variable: str = "OPENAI_API_KEY",  # of the environment: it holds the API key
        concurrency: int = 8,  # requests under way at a time
        retries: int = 4,  # after a time-out, 408, 409, 429, 5xx, lost connection or bad reply
        timeout: float = 120.0,  # seconds before a try is given up
        backoff: float = 1.0,  # seconds before the first retry; doubled each time, 30 at most
    ) -> None:
        import httpx
        import openai

        check_choice("api", api, ("completions", "chat"))
        self.model, self.tokenizer, self.eos_ids = model, tokenizer, sorted(set(eos_ids))
        self.api, self.concurrency, self.retries, self.backoff = api, concurrency, retries, backoff
        local = urlsplit(base_url or "").hostname in ("127.0.0.1", "localhost", "::1")
        self._key, self.usage = os.environ.get(key_variable) or "none" * local, Usage()
        if not self._key:  # a server on this machine needs none
            raise ValueError(f"the API key is read from the environment; set {key_variable}")
        try:
            self.client = openai.OpenAI(api_key=self._key, base_url=base_url, timeout=timeout,
                                        max_retries=0)  # for its own, an empty choice is no failure
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            raise ValueError("the client cannot use this address or the proxy of the environment "
                             f"({error}); mend --base-url, or unset ALL_PROXY, HTTPS_PROXY and "
                             "HTTP_PROXY") from error

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
                status, wait = error.status_code, error.response.headers.get("retry-after")
                reason = f"HTTP {status}"
                if status in (401, 403):
                    raise ValueError(f"the server refused the API key ({reason})") from None
                if status not in (408, 409, 429) and status < 500:
                    told = error.message.replace(self._key, "***")[:300]
                    raise ValueError(f"the server refused a request ({reason}): {told}; see "
                                     "--model, --base-url and --api") from None
            # The client lets a reply that is no JSON, or none of the right shape, through as is.
            except (openai.APIError, json.JSONDecodeError, BadAnswer) as error:
                reason, wait = f"{type(error).__name__}: {error}", None
            if attempt < self.retries:
                seconds = float(wait) if wait and wait.isdigit() else self.backoff * 2**attempt
                time.sleep(min(seconds, 30.0))
        failure = Rollout((), False, failed=reason.replace(self._key, "***")[:300])
        return failure, Usage(failed=1, retries=self.retries)

    def _reply(self, request: Request, k: int, temperature: float, retries: int) -> tuple:
        """One try. All options are named: a model's generation config may have other defaults."""
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
        if not getattr(reply, "choices", None):
            raise BadAnswer("the reply has no choice")
        ids, charged = self._ids(reply.choices[0]), reply.usage
        rollout = within_budget(ids, request.budget, self.eos_ids)
        tokens_in = charged.prompt_tokens if charged else len(request.prompt)
        tokens_out = charged.completion_tokens if charged else len(ids)
        excess = max(rollout.overrun, tokens_out - request.budget)
        return replace(rollout, overrun=excess), Usage(1, 0, retries, excess, tokens_in, tokens_out)

    def _ids(self, choice) -> list[int]:
        """The token ids of a choice: as sent, or of its text."""
        if self.api == "completions":
            if ids := getattr(choice, "token_ids", None):
                return ids
            raise BadAnswer("the reply has no token ids (vLLM gives them; others need --api chat)")
        if not (choice.message and choice.message.content):
            raise BadAnswer("the reply has no text")
        ids = self.tokenizer(choice.message.content, add_special_tokens=False,
                             split_special_tokens=True).input_ids
        return ids + [self.eos_ids[0]] * (choice.finish_reason == "stop")
