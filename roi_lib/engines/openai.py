"""OpenAI-compatible servers, over plain HTTP: every try has a deadline and a largest size."""

import asyncio
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from queue import SimpleQueue

import anyio
import httpx
from anyio.from_thread import start_blocking_portal

from roi_lib.engines.pool import Pool, Server
from roi_lib.engines.protocol import FailedTry, Usage, count, one_line, read_reply, with_request
from roi_lib.engines.vllm import stream_seed
from roi_lib.generation import Engine, Request, Rollout, Stream
from roi_lib.worlds import check_choice

LONGEST_WAIT = 60.0  # seconds before a retry; a server that asks for more ends the run


class OpenAIEngine(Engine):
    """Any OpenAI-compatible server. A request that fails for good is marked; the run goes on.

    Of several servers, the least busy is asked. What it loses (no connection, no reply in time,
    5xx) another is asked at once, with the same seed; the run ends when all are left out.
    `api="completions"` sends token ids and needs ids back, as a vLLM server gives them: the count
    is exact. `api="chat"` is for servers that take messages and give text (GPT-4o-mini, DeepSeek):
    the text is encoded once with the world's tokenizer, and *these* ids are charged, after hidden
    reasoning, so that every method pays in the same coin; `usage` has the server's own count, and
    what that is above the budget is overrun. `ValueError`: a bad option, key, address or proxy."""

    def __init__(
        self, model: str,  # the name under which the server knows it
        tokenizer,  # the model's (completions) or the world's (chat)
        eos_ids: Sequence[int],  # token ids that end a response
        # one or several; None: the environment's OPENAI_BASE_URL, or OpenAI's own
        base_url: str | Sequence[str] | None = None,
        api: str = "completions",  # or "chat"
        key_variable: str = "OPENAI_API_KEY",  # of the environment: it holds the API key
        concurrency: int = 8,  # requests under way at a time, per server
        retries: int = 4,  # after a time-out, 408, 409, 425, 429, 5xx, lost connection or bad reply
        timeout: float = 120.0,  # seconds before a try is given up, whatever has come
        backoff: float = 1.0,  # seconds before the first retry; doubled each time, 30 at most
        request: Sequence[str] = (),  # changes of the parameters, see `protocol.with_request`
    ) -> None:
        check_choice("api", api, ("completions", "chat"))
        if not (concurrency >= 1 and retries >= 0 and timeout > 0):
            raise ValueError("concurrency and timeout must be above 0, and retries 0 or more")
        self.api, self.retries = api, retries
        self.backoff, self.timeout, self.request = backoff, timeout, request
        self.model, self.eos_ids = model, sorted(set(eos_ids))
        self._encode = None if api == "completions" else lambda text: tokenizer(
            text, add_special_tokens=False, split_special_tokens=True).input_ids
        with_request({}, request)
        self._key = os.environ.get(key_variable, "").strip()
        base = base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        try:
            urls = [httpx.URL(one.strip()) for one in ([base] if isinstance(base, str) else base)]
            self._ssl = httpx.create_ssl_context()
            if not all(url.scheme in ("http", "https") and url.host for url in urls):
                raise ValueError("an address begins with http:// or https://")
            httpx.AsyncClient(verify=self._ssl)
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            raise ValueError(f"cannot use this address or the environment's proxy ({error}); mend "
                             "--base-url, or unset ALL_PROXY, HTTPS_PROXY, HTTP_PROXY") from error
        if not self._key and {url.host for url in urls} - {"127.0.0.1", "localhost", "::1"}:
            raise ValueError(f"the API key is read from the environment; set {key_variable}")
        if not re.fullmatch("[!-~]*", self._key):
            raise ValueError(f"{key_variable} holds characters that no API key has; copy it again")
        end = "chat/completions" if api == "chat" else "completions"
        servers = [Server(url.copy_with(path=f"{url.path.rstrip('/')}/{end}"),
                          str(url.copy_with(userinfo=b"", query=None))) for url in urls]
        if len({server.url for server in servers}) < len(servers):
            raise ValueError("--base-url names a server twice; --concurrency is for more requests")
        self._pool = Pool(servers, concurrency)
        self.usage = Usage(by_server={server.name: 0 for server in servers})

    def stop(self, error: BaseException) -> None:
        """Let `stream` ask nothing more, and raise this once what is under way has come."""
        self._events.put(error)  # both are what a signal handler may do
        self._loop.call_soon_threadsafe(self._halt.set)  # not only when its turn comes

    def stream(self, requests: Sequence[Request], temperature: float = 1.0) -> Stream:
        """See `Engine`. `ValueError`: no use in going on (key, model, quota). Before it, and after
        Ctrl-C, comes what is under way, within `timeout`; a second Ctrl-C aborts."""
        self._events, done, error = SimpleQueue(), [{} for _ in requests], None
        if self.api == "chat" and not all(request.message for request in requests):
            raise ValueError("a chat server begins an answer with its own words; to begin with "
                             "others, as exact policies and rules do, take --api completions")
        self._halt = asyncio.Event()
        self._pool.begin()
        usual = signal.getsignal(signal.SIGINT)
        ours = threading.current_thread() is threading.main_thread() and callable(usual)

        def first_interrupt(*_) -> None:
            signal.signal(signal.SIGINT, usual)
            self.stop(KeyboardInterrupt())

        with start_blocking_portal() as portal:  # its event loop: a notebook's own is busy
            self._loop = portal.call(asyncio.get_running_loop)
            try:  # our handler goes before the loop does, which it calls
                if ours:
                    signal.signal(signal.SIGINT, first_interrupt)
                asked = {portal.start_task_soon(self._ask, request, k, temperature): (i, k)
                         for i, request in enumerate(requests) for k in range(request.n)}
                for future in asked:
                    future.add_done_callback(self._events.put)
                while asked:
                    event = self._events.get()
                    job = asked.pop(event, None)
                    if trouble := event.exception() if job else event:
                        error = error or trouble
                        if isinstance(trouble, KeyboardInterrupt):
                            print(f"waiting {self.timeout:g} s at most for what is under way; "
                                  "Ctrl-C again gives it up", file=sys.stderr)
                    elif rollout := event.result():
                        i, k = job
                        done[i][k] = rollout
                        if len(done[i]) == requests[i].n:
                            yield i, [done[i][k] for k in range(requests[i].n)]
            finally:
                if ours:
                    signal.signal(signal.SIGINT, usual)
        if error:
            raise error

    async def _ask(self, request: Request, k: int, temperature: float) -> Rollout | None:
        """One rollout, with its retries; None where the run stops before it."""
        # All options are named: a model's generation config may have other defaults.
        options = {"model": self.model, "max_tokens": request.budget, "temperature": temperature,
                   "top_p": 1.0, "seed": stream_seed(request, k)}
        if self.api == "chat":
            options["messages"] = [{"role": "user", "content": request.message}]
        else:
            options |= {"prompt": request.prompt, "return_token_ids": True, "top_k": 0,
                        "stop_token_ids": self.eos_ids, "repetition_penalty": 1.0}
        body = json.dumps(with_request(options, self.request))
        tried: list[Server] = []
        async with self._pool.turns:
            for attempt in range(self.retries + 1):
                async with self._pool.slot(tried) as server:
                    if self._halt.is_set():
                        return None
                    try:
                        return await self._try(server, request, body)
                    except FailedTry as failure:
                        reason, again, seconds = failure.args
                    except Exception:  # at once: no other request may begin a try
                        self._halt.set()
                        raise
                if seconds is None:
                    self._pool.lose(server, body, reason)
                if attempt == self.retries or not again:
                    break
                self.usage.retries += 1  # all counts are kept in one thread: none is lost
                tried.append(server)
                if seconds is not None or self._pool.best(tried) in tried:
                    with anyio.move_on_after(seconds or min(self.backoff * 2**attempt, 30.0)):
                        await self._halt.wait()
        if all(server.back for server in self._pool.servers):
            self._halt.set()
            raise ValueError(f"no server is left: {reason}; the same command later goes on from "
                             "its --log")
        self.usage.failed += 1
        return Rollout((), False, failed=reason)

    async def _try(self, server: Server, request: Request, body: str) -> Rollout:
        """The response of one try. `FailedTry`: none; `ValueError`: nor will others have one."""
        got, data = await self._post(server.url, body, largest=2**19 + 100 * request.budget)
        if got.status_code < 500:  # it lives
            server.lost, server.back = set(), 0.0
        try:
            reply = json.loads(data)
        except (ValueError, RecursionError):
            reply = None
        told = one_line(f"HTTP {got.status_code}: {data.decode('utf-8', 'replace')}", self._key)
        sent, spent = count(reply, "prompt_tokens"), count(reply, "completion_tokens")
        self.usage.tokens_in += sent or 0
        self.usage.tokens_out += spent or 0
        if got.is_success and isinstance(reply, dict) and not reply.get("error"):
            rollout = read_reply(reply, told, request.budget, self.eos_ids, self._encode)
            self.usage.uncounted += None in (sent, spent)
            self.usage.tokens_in += len(request.prompt) * (sent is None)
            seen = len(rollout.ids) + rollout.hidden + rollout.overrun
            self.usage.tokens_out += seen * (spent is None)
            excess = max(rollout.overrun, (spent or 0) - request.budget)
            self.usage.overrun += excess
            self.usage.responses += 1
            self.usage.by_server[server.name] += 1
            return replace(rollout, overrun=excess)
        if got.status_code in (401, 402, 404) or b"insufficient_quota" in data:
            raise ValueError(f"{server.name} refuses: {told}; see the API key, --model, --base-url "
                             "and --api")
        wait = got.headers.get("retry-after", "")  # in seconds; few servers send a date
        seconds = float(wait) if re.fullmatch(r"\d{1,9}(\.\d+)?", wait) else 0.0
        if seconds > LONGEST_WAIT:
            raise ValueError(f"{server.name} asks to wait {seconds:g} s, longer than "
                             f"{LONGEST_WAIT:g} s ({told}); the same command later goes on from "
                             "its --log")
        if got.status_code >= 500:  # out of order, unless it says when it will be back
            raise FailedTry(told, True, seconds or None)
        if got.is_success or got.status_code in (408, 409, 425, 429):
            raise FailedTry(told, True, seconds)
        raise FailedTry(f"{told}; see --request, or --api chat if it takes no token ids", False, 0)

    async def _post(self, url: httpx.URL, body: str,
                    largest: int) -> tuple[httpx.Response, bytearray]:
        """Status and headers, and the whole body; `FailedTry`: lost, too late or too large."""
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        headers |= {"authorization": f"Bearer {self._key}"} if self._key else {}
        data = bytearray()
        try:
            with anyio.fail_after(self.timeout):
                async with (httpx.AsyncClient(verify=self._ssl, timeout=None) as client,
                            client.stream("POST", url, content=body, headers=headers) as got):
                    async for part in got.aiter_raw():
                        data += part
                        if len(data) > largest:
                            raise FailedTry(f"the reply is larger than {largest} bytes", True, None)
            return got, data
        except TimeoutError:
            reason = f"no whole reply within {self.timeout:g} s"
        except httpx.HTTPError as error:
            reason = one_line(f"{type(error).__name__}: {error}", self._key)
        raise FailedTry(reason, True, None)
