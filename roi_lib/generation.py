"""Budgeted generation: one hard token budget for everything that a response holds.

A `Request` is a prompt as token ids, a budget in tokens and a seed; a `Rollout` is what came
back, as token ids, never more of them than the budget. The end-of-sequence token is charged like
any other. Here are `TorchGenerator` (any causal language model of transformers) and
`ReplayGenerator` (responses written beforehand, cut in the same way); `engines` has vLLM and
OpenAI-compatible servers behind the same interface.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from os.path import commonprefix

import numpy as np
import torch
from torch.nn.functional import pad

from roi_lib.decoding import AnyRows, LlamaRows, Memory, Prefix, Text, choose


@dataclass(frozen=True)
class Request:
    """One prompt to be answered `n` times under a budget.

    Attributes:
        prompt: token ids, chat template included.
        budget: largest number of response tokens, end-of-sequence included (at least 1).
        seed: any integers; with the rollout's number they fix its random stream, whatever other
            requests share the call.
        n: number of rollouts.
        message: the user message that the prompt encodes, for servers that take nothing else.
        draft: a guess of the response, as token ids. It changes no token of any rollout; where it
            is right the torch engine is faster, the others pass it over.

    Raises:
        ValueError: empty prompt, or budget or n below 1.
    """

    prompt: tuple[int, ...]
    budget: int
    seed: tuple[int, ...] = (0,)
    n: int = 1
    message: str = ""
    draft: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("a request needs a prompt of at least one token")
        if self.budget < 1 or self.n < 1:
            raise ValueError(f"budget and n must be at least 1, not {self.budget} and {self.n}")


@dataclass(frozen=True)
class Rollout:
    """One response.

    Attributes:
        ids: response token ids, at most the request's budget, end-of-sequence included.
        finished: whether it ended by itself (False: cut by the budget).
        overrun: tokens that a back end sent beyond the budget; they are not in `ids`.
        failed: why there is no response ("" where there is one).
    """

    ids: tuple[int, ...]
    finished: bool
    overrun: int = 0
    failed: str = ""


def within_budget(ids: Sequence[int], budget: int, eos_ids: Sequence[int]) -> Rollout:
    """What counts of a back end's tokens: up to the first end-of-sequence, within the budget.

    Whatever a server was asked for, this is where the budget is enforced (FAULTS F12). Ids alone
    end a response: there are no stop strings, so none can end inside a token (F9).
    """
    end = next((i + 1 for i, token in enumerate(ids) if token in eos_ids), len(ids))
    finished = end <= budget and end > 0 and ids[end - 1] in eos_ids
    return Rollout(tuple(ids[: min(end, budget)]), finished, max(len(ids) - budget, 0))


def all_eos_ids(config, tokenizer) -> list[int]:
    """End-of-sequence ids, sorted, of a generation config (None: it has none) and a tokenizer."""
    ends = config.eos_token_id if config else None
    ends = ends if isinstance(ends, list) else [ends]
    return sorted({i for i in (*ends, tokenizer.eos_token_id) if i is not None})


class BudgetedGenerator:
    """What every back end offers; each has its own `stream`."""

    def stream(
        self, requests: Sequence[Request], temperature: float = 1.0
    ) -> Iterator[tuple[int, list[Rollout]]]:
        """(number of a request, its rollouts), each as soon as it is complete, in any order."""
        raise NotImplementedError

    def generate(
        self, requests: Sequence[Request], temperature: float = 1.0
    ) -> list[list[Rollout]]:
        """The requests' rollouts, in their order; temperature 0 is greedy decoding."""
        done = dict(self.stream(requests, temperature))
        return [done[i] for i in range(len(requests))]


class Batch:
    """Responses on their way, a row each: tokens are drawn, written and counted here.

    Args:
        requests: what the rows answer.
        rows: request and number of the rollout of each.
        eos_ids: token ids that end a response.

    Attributes:
        ids: tokens so far, [rows, largest budget].
        length: how many they are, [rows].
        finished: whether the response ended by itself, [rows].
        going: whether it goes on, [rows].
    """

    def __init__(self, requests: Sequence[Request], rows: Sequence[tuple[int, int]],
                 eos_ids: torch.Tensor) -> None:
        device = eos_ids.device
        self.requests, self.rows, self.eos_ids = requests, rows, eos_ids
        self.budget = torch.tensor([requests[i].budget for i, _ in rows], device=device)
        longest = max((r.budget for r in requests), default=0)
        self.uniforms = torch.empty((len(rows), longest), dtype=torch.double)
        for row, (i, k) in enumerate(rows):
            np.random.default_rng([*requests[i].seed, k]).random(out=self.uniforms[row].numpy())
        self.uniforms = self.uniforms.to(device)
        self.ids = torch.zeros((len(rows), longest), dtype=torch.long, device=device)
        self.length = torch.zeros(len(rows), dtype=torch.long, device=device)
        self.finished = torch.zeros(len(rows), dtype=torch.bool, device=device)
        self.going = torch.ones(len(rows), dtype=torch.bool, device=device)
        self.done: dict[int, dict[int, Rollout]] = {}

    def last(self, rows: torch.Tensor) -> torch.Tensor:
        """The last token of these rows."""
        return self.ids[rows, self.length[rows] - 1]

    def draw(self, rows: torch.Tensor, logits: torch.Tensor, draft: torch.Tensor,
             temperature: float) -> None:
        """Draw the next tokens of these rows, and write those that count.

        Each token is drawn from the model at the row's own random numbers. It stands as long as
        all before it agree with the draft, for then its logits are those of the response.

        Args:
            logits: after the row's last token and after each of the draft, [rows, draft + 1,
                vocabulary].
            draft: token ids, [rows, draft].

        Raises:
            FloatingPointError: NaN or infinite logits.
        """
        place = self.length[rows, None] + torch.arange(logits.shape[1], device=rows.device)
        inside = place.clamp(max=self.ids.shape[1] - 1)
        token = choose(logits, self.uniforms[rows[:, None], inside], temperature)
        ends = torch.isin(token, self.eos_ids)
        over = (pad(token[:, :-1] != draft, (1, 0)) | pad(ends[:, :-1], (1, 0))).cummax(1).values
        counts = ~over & (place < self.budget[rows, None]) & self.going[rows, None]
        broken = counts & ~torch.isfinite(logits).all(-1)
        if broken.any():
            row, step = (int(x[broken][0]) for x in (rows[:, None].expand_as(place), place))
            i, k = self.rows[row]
            raise FloatingPointError("the model gave NaN or infinite logits at decoding step "
                                     f"{step} of request {i}, rollout {k} (all from 0)")
        self.ids[rows[:, None].expand_as(place)[counts], place[counts]] = token[counts]
        self.length[rows] += counts.sum(1)
        self.finished[rows] |= (counts & ends).any(1)
        self.going[rows] = ~self.finished[rows] & (self.length[rows] < self.budget[rows])

    def complete(self, rows: torch.Tensor) -> Iterator[tuple[int, list[Rollout]]]:
        """The requests that are complete now that these rows have ended."""
        for row, ids, length, finished in zip(
                rows.tolist(), self.ids[rows].tolist(), self.length[rows].tolist(),
                self.finished[rows].tolist(), strict=True):
            i, k = self.rows[row]
            rollouts = self.done.setdefault(i, {})
            rollouts[k] = Rollout(tuple(ids[:length]), finished)
            if len(rollouts) == self.requests[i].n:
                del self.done[i]
                yield i, [rollouts[k] for k in range(len(rollouts))]


class TorchGenerator(BudgetedGenerator):
    """Batched, cached decoding with any causal language model, on its own device.

    What all prompts begin with is read once; then each distinct prompt, together with the
    request's draft. Rows that are not finished by that are collected and decode in lock step;
    finished rows leave the batch. Sampling inverts the cumulative distribution at one uniform
    number a token, taken from the row's own stream: speculative sampling (Leviathan et al. 2023),
    in which draft and model share their random numbers, so that no token changes.

    Args:
        model: a causal language model of transformers, in eval mode.
        eos_ids: token ids that end a response (a model may have several).
        pad_id: id that fills up prompts and drafts of one batch; never charged.
        max_rows: rows decoded at a time (memory grows with it; with drafts, as many again wait).

    Raises:
        ValueError: no end-of-sequence id.
    """

    #: Finished rows are dropped once they are this share of the batch (dropping copies the rest).
    DROP_SHARE = 0.25

    def __init__(self, model, eos_ids: Sequence[int], pad_id: int, max_rows: int = 256) -> None:
        if not eos_ids:
            raise ValueError("a generator needs at least one end-of-sequence id")
        self.model, self.pad_id, self.max_rows = model, pad_id, max_rows
        self.eos_ids = torch.tensor(sorted(set(eos_ids)), device=model.device)
        self.rows = LlamaRows if LlamaRows.fits(model.config) else AnyRows

    @classmethod
    def of(cls, model, tokenizer, max_rows: int = 256) -> "TorchGenerator":
        """A generator with the end-of-sequence ids of both the model and its tokenizer."""
        eos_ids = all_eos_ids(model.generation_config, tokenizer)
        pad_id = tokenizer.pad_token_id
        return cls(model, eos_ids, min(eos_ids) if pad_id is None else pad_id, max_rows)

    @torch.inference_mode()
    def stream(
        self, requests: Sequence[Request], temperature: float = 1.0
    ) -> Iterator[tuple[int, list[Rollout]]]:
        """See `BudgetedGenerator`.

        Raises:
            ValueError: negative temperature.
            FloatingPointError: the model gave NaN or infinite logits (FAULTS F24); the message
                names decoding step, request and rollout.
        """
        if temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or above, not {temperature}")
        # Rows of like length together: less padding. The longest first: they need most memory.
        texts = [self._text(request) for request in requests]
        by_length = sorted(range(len(requests)), reverse=True,
                           key=lambda i: (requests[i].budget, sum(map(len, texts[i]))))
        batch = Batch(requests, [(i, k) for i in by_length for k in range(requests[i].n)],
                      self.eos_ids)
        parts, memory = deque(self._parts([texts[i] for i, _ in batch.rows])), Memory()
        several = self.rows.JOINS and len(parts) > 1
        head = self._head([prompt for prompt, _ in texts]) if several else None
        while parts:
            begun: list[tuple[int, Prefix]] = []
            while parts and self._fits(len(begun), parts[0]):
                rows, prefixes = self._read(batch, parts.popleft(), temperature, head)
                going = batch.going[rows]
                begun += zip(rows[going].tolist(), prefixes, strict=True)
                yield from batch.complete(rows[~going])
            # Rows that have come equally far together: a step costs what the longest one costs.
            begun.sort(key=lambda row: row[1].stop - row[1].start)
            n_chunks = math.ceil(len(begun) / self.max_rows)
            for first, last in pairwise(np.linspace(0, len(begun), n_chunks + 1).astype(int)):
                rows = self._decode(batch, begun[first:last], temperature, memory)
                yield from batch.complete(rows)

    def start(
        self, prompt: tuple[int, ...], rows: int, longest: int
    ) -> tuple[torch.Tensor, AnyRows | LlamaRows]:
        """Read a prompt, and get rows of it ready to decode.

        Args:
            prompt: token ids.
            longest: response tokens to make room for.

        Returns:
            The rows' logits after their prompt, [rows, vocabulary], and the rows, whose
            `step` takes a token each and gives the logits that follow.
        """
        read = self.rows.read(self.model, [(prompt, ())], self.pad_id)
        source = torch.zeros(rows, dtype=torch.long, device=read.logits.device)
        return read.logits[source, 0], self.rows(self.model, read.prompts, source, longest,
                                                 Memory())

    def _text(self, request: Request) -> Text:
        """What is read of a request before it is decoded."""
        return request.prompt, request.draft[: request.budget - 1] if self.rows.JOINS else ()

    def _head(self, prompts: Sequence[tuple[int, ...]]) -> Prefix | None:
        """Read what all prompts begin with; each goes on from there, with a token at least."""
        common = commonprefix(prompts)[: min(map(len, prompts)) - 1]
        if not common:
            return None
        (head,) = self.rows.read(self.model, [(common, ())], self.pad_id).prompts
        return head

    def _parts(self, texts: Sequence[Text]) -> Iterator[dict[Text, list[int]]]:
        """Rows by their texts, as many as are read at a time."""
        part: dict[Text, list[int]] = {}
        width = 0
        for row, text in enumerate(texts):
            width = max(width, sum(map(len, text)))
            crowded = text not in part and width * (len(part) + 1) > self.rows.TOKENS_AT_ONCE
            if part and (crowded or row % self.max_rows == 0):
                yield part
                part, width = {}, sum(map(len, text))
            part.setdefault(text, []).append(row)
        if part:
            yield part

    def _fits(self, n_begun: int, part: Mapping[Text, Sequence[int]]) -> bool:
        """Whether this part may be read before the rows that have begun are decoded.

        Drafts leave rows at very different tokens: from more of them, more even batches are made.
        """
        most = self.max_rows * (2 if any(draft for _, draft in part) else 1)
        n_rows = n_begun + sum(map(len, part.values()))
        return not n_begun or (self.rows.JOINS and n_rows <= most)

    def _read(
        self, batch: Batch, part: Mapping[Text, Sequence[int]], temperature: float,
        head: Prefix | None,
    ) -> tuple[torch.Tensor, list[Prefix]]:
        """Read prompts and drafts, and draw what can be drawn from that.

        Returns:
            The rows, and for those of them that go on what they have read.
        """
        read = self.rows.read(self.model, list(part), self.pad_id, head)
        pairs = [(row, text) for text, rows in enumerate(part.values()) for row in rows]
        rows, texts = torch.tensor(pairs, device=read.draft.device).T
        batch.draw(rows, read.logits[texts], read.draft[texts], temperature)
        going = batch.going[rows]
        left = list(zip(texts[going].tolist(), batch.length[rows[going]].tolist(), strict=True))
        prefixes = {}  # rows that leave a draft at one token share it; that token was not read
        for text, length in left:
            prompt = read.prompts[text]
            prefixes[text, length] = replace(prompt, stop=prompt.stop + length - 1)
        if 2 * len(prefixes) < len(part) and self.rows.JOINS:  # few need not keep memory of all
            prefixes = {key: self.rows.copy(prefix) for key, prefix in prefixes.items()}
        return rows, [prefixes[key] for key in left]

    def _decode(self, batch: Batch, begun: Sequence[tuple[int, Prefix]], temperature: float,
                memory: Memory) -> torch.Tensor:
        """Decode rows that have read their prefixes to the end, and return them."""
        place = {prefix: n for n, prefix in enumerate(dict.fromkeys(p for _, p in begun))}
        rows, source = torch.tensor([(row, place[prefix]) for row, prefix in begun],
                                    device=batch.ids.device).T
        longest = int((batch.budget - batch.length)[rows].max())
        decoding, alive = self.rows(self.model, list(place), source, longest, memory), rows
        while batch.going[alive].any():
            n_going = int(batch.going[alive].sum())
            if n_going <= (1 - self.DROP_SHARE) * len(alive):
                kept = batch.going[alive].nonzero()[:, 0]
                alive = alive[kept]
                decoding.keep(kept)
            logits = decoding.step(batch.last(alive))
            batch.draw(alive, logits[:, None], batch.ids[alive, :0], temperature)
        decoding.close()
        return rows


class ReplayGenerator(BudgetedGenerator):
    """Plays back responses that exist already, under the same hard budget.

    Args:
        responses: prompt as token ids -> response as token ids, without end-of-sequence.
        eos_id: the end-of-sequence id that closes each response, charged as usual.
    """

    def __init__(
        self, responses: Mapping[tuple[int, ...], Sequence[int]], eos_id: int
    ) -> None:
        self.responses, self.eos_id = responses, eos_id

    def stream(
        self, requests: Sequence[Request], temperature: float = 1.0
    ) -> Iterator[tuple[int, list[Rollout]]]:
        """See `BudgetedGenerator`; every rollout of a request is the same.

        Raises:
            KeyError: a prompt that has no recorded response.
        """
        for i, request in enumerate(requests):
            whole = (*self.responses[request.prompt], self.eos_id)
            cut = within_budget(whole[: request.budget], request.budget, [self.eos_id])
            yield i, [cut] * request.n
