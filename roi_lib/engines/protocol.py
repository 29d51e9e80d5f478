"""What is sent to an OpenAI-compatible server, what comes back, which may be any JSON, and what it
costs."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from roi_lib.generation import Rollout, within_budget


@dataclass
class Usage:
    """What a server was asked for and what it charged, summed over one run."""

    responses: int = 0  # good ones
    failed: int = 0  # requests refused, or given up after all retries
    retries: int = 0  # requests sent again
    overrun: int = 0  # tokens sent beyond the budget
    tokens_in: int = 0  # prompt tokens, as the server counts them, in failed tries too
    tokens_out: int = 0  # response tokens, as the server counts them (hidden reasoning included)
    uncounted: int = 0  # good ones that the server did not count, so the tokenizer did
    by_server: dict[str, int] = field(default_factory=dict, compare=False)  # address -> good ones

    def report(self, price_in: float = 0.0, price_out: float = 0.0) -> str:
        """One line: counts, and the cost for prices per million tokens."""
        cost = (self.tokens_in * price_in + self.tokens_out * price_out) / 1e6
        unknown = f" (true cost unknown: the server did not count {self.uncounted} responses)"
        shares = ", ".join(f"{n} from {name}" for name, n in self.by_server.items())
        return (f"{self.responses} responses, {self.failed} failed, {self.retries} retries; "
                f"{self.tokens_in} tokens in, {self.tokens_out} out, {self.overrun} beyond the "
                f"budget; cost {cost:.4f} at {price_in:g} and {price_out:g} per million"
                + unknown * bool(self.uncounted) + f"; {shares}" * (len(self.by_server) > 1))


class FailedTry(Exception):
    """A try without a response: why, whether to try again, seconds to wait: 0 for as long as usual,
    None if it is the server that fails, so that another, if there is one, is asked at once."""


def with_request(options: dict, changes: Sequence[str]) -> dict:
    """A request's parameters, changed: NAME= drops one, NAME=WORD gives one that is there another
    name, any other NAME=VALUE (JSON or a word) sets one. `ValueError`: no NAME=."""
    for change in changes:
        name, equals, value = change.partition("=")
        if not (name and equals):
            raise ValueError(f"--request takes NAME=OTHER_NAME, NAME= or NAME=VALUE, not {change}")
        try:
            options = options | {name: json.loads(value)}
        except ValueError:  # a word, or nothing
            new = {value: options[name]} if name in options else {name: value}
            options = {n: v for n, v in options.items() if n != name} | (new if value else {})
    return options


def one_line(text: str, secret: str = "") -> str:
    """Up to 300 characters on one line, without the secret (which one of a few letters is not)."""
    text = text.replace(secret, "***") if len(secret) >= 8 else text
    return " ".join("".join(c if c.isprintable() else " " for c in text[:4_000]).split())[:300]


def dig(data, *path):
    """What stands in JSON of any shape under these names and places; None where nothing does."""
    with suppress(TypeError, KeyError, IndexError):
        for step in path:
            data = data[step]
        return data


def count(reply, *path: str) -> int | None:
    """A number of tokens of a reply's usage; None where it has none that can be one."""
    number = dig(reply, "usage", *path)
    return number if type(number) is int and 0 <= number < 2**31 else None


def text_of(content) -> str:
    """The text of a string or of a list of parts; half a surrogate pair, no character, becomes ?"""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    words = [dig(part, "text") for part in parts if dig(part, "type") == "text"]
    return "".join(w for w in words if isinstance(w, str)).encode("utf-8", "replace").decode()


def read_reply(reply, told: str, budget: int, eos_ids: list[int],
               encode: Callable | None) -> Rollout:
    """The response in a reply: the token ids of a completion or, where there is a function that
    encodes text, a chat message, which may be empty. Hidden reasoning goes before the text.
    `FailedTry`: there is no response; `ValueError`: nor will there be in others."""
    choice = dig(reply, "choices", 0)
    ids, message, finish = (dig(choice, name) for name in ("token_ids", "message", "finish_reason"))
    if encode is None:
        if ids is None and isinstance(dig(choice, "text"), str):
            raise ValueError("the server gives text without token ids; give --api chat")
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise FailedTry(f"no token ids in the reply: {told}", True, 0)
        return within_budget(ids, budget, eos_ids)
    content = dig(message, "content")
    if not isinstance(message, dict) or not isinstance(content, str | list | None):
        raise FailedTry(f"no message in the reply: {told}", True, 0)
    inner = [dig(part, "thinking") for part in content] if isinstance(content, list) else []
    thoughts = "".join(map(text_of, [message.get("reasoning_content"), *inner]))
    hidden = count(reply, "completion_tokens_details", "reasoning_tokens") or len(encode(thoughts))
    text = text_of(content)
    ids, end = encode(text), eos_ids[:1] * (finish == "stop")
    if not ids:  # what was spent was not spent on text
        spent = (count(reply, "completion_tokens") or 0) - len(end)
        hidden = max(hidden, spent) or budget * (finish == "length")
    hidden, refusal = min(hidden, budget), text_of(message.get("refusal"))
    note = "" if ids and not refusal and finish != "content_filter" else refusal or text_of(finish)
    return replace(within_budget([*ids, *end], budget - hidden, eos_ids), hidden=hidden,
                   note=one_line(note), text=text)
