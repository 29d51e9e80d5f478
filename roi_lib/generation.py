"""Budgeted generation: one hard token budget for everything that a response holds.

A `Request` is a prompt as token ids, a budget in tokens and a seed; a `Rollout` is what came
back, as token ids, never more of them than the budget. The end-of-sequence token is charged like
any other. Here are `TorchGenerator` (any causal language model of transformers) and
`ReplayGenerator` (responses written beforehand, cut in the same way); `engines` has vLLM and
OpenAI-compatible servers behind the same interface.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn.functional import pad

from roi_lib.decoding import AnyRows, LlamaRows, Memory, Text, choose


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
        rows: request and number of the rollout.
        names: what error messages call them.
        eos_ids: token ids that end a response.

    Attributes:
        ids: tokens so far, [rows, largest budget].
        length: how many they are, [rows].
        finished: whether the response ended by itself, [rows].
        going: whether it goes on, [rows].
    """

    def __init__(self, rows: Sequence[tuple[Request, int]], names: Sequence[tuple[int, int]],
                 eos_ids: torch.Tensor) -> None:
        device = eos_ids.device
        self.requests, self.names, self.eos_ids = [r for r, _ in rows], names, eos_ids
        self.budget = torch.tensor([r.budget for r in self.requests], device=device)
        longest = int(self.budget.max())
        self.uniforms = torch.tensor(np.stack(
            [np.random.default_rng([*r.seed, k]).random(longest) for r, k in rows]), device=device)
        self.ids = torch.zeros((len(rows), longest), dtype=torch.long, device=device)
        self.length = torch.zeros(len(rows), dtype=torch.long, device=device)
        self.finished = torch.zeros(len(rows), dtype=torch.bool, device=device)
        self.going = torch.ones(len(rows), dtype=torch.bool, device=device)

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
            i, k = self.names[row]
            raise FloatingPointError("the model gave NaN or infinite logits at decoding step "
                                     f"{step} of request {i}, rollout {k} (all from 0)")
        self.ids[rows[:, None].expand_as(place)[counts], place[counts]] = token[counts]
        self.length[rows] += counts.sum(1)
        self.finished[rows] |= (counts & ends).any(1)
        self.going[rows] = ~self.finished[rows] & (self.length[rows] < self.budget[rows])

    def rollouts(self) -> list[Rollout]:
        """One a row."""
        return [Rollout(tuple(ids[:length]), finished) for ids, length, finished in zip(
            self.ids.tolist(), self.length.tolist(), self.finished.tolist(), strict=True)]


class TorchGenerator(BudgetedGenerator):
    """Batched, cached decoding with any causal language model, on its own device.

    Rows decode in lock step; each distinct prompt is prefilled once, together with the request's
    draft, and finished rows leave the batch. Sampling inverts the cumulative distribution at one
    uniform number a token, taken from the row's own stream: speculative sampling (Leviathan et
    al. 2023), in which draft and model share their random numbers, so that no token changes.

    Args:
        model: a causal language model of transformers, in eval mode.
        eos_ids: token ids that end a response (a model may have several).
        pad_id: id that fills up prompts and drafts of one batch; never charged.
        max_rows: rows decoded at a time (memory grows with it).

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
        rows = [(i, k) for i, request in enumerate(requests) for k in range(request.n)]
        lengths = [sum(map(len, self._text(request))) for request in requests]
        rows.sort(key=lambda row: (requests[row[0]].budget, lengths[row[0]]), reverse=True)
        done: dict[int, dict[int, Rollout]] = {}
        memory = Memory()
        for start in range(0, len(rows), self.max_rows):
            chunk = rows[start : start + self.max_rows]
            batch = Batch([(requests[i], k) for i, k in chunk], chunk, self.eos_ids)
            self._decode(batch, temperature, memory)
            for (i, k), rollout in zip(chunk, batch.rollouts(), strict=True):
                done.setdefault(i, {})[k] = rollout
                if len(done[i]) == requests[i].n:
                    yield i, [done[i][k] for k in range(requests[i].n)]
                    del done[i]

    def start(
        self, prompts: Sequence[tuple[int, ...]], source: torch.Tensor, longest: int
    ) -> tuple[torch.Tensor, AnyRows | LlamaRows]:
        """Read distinct prompts, and get rows of them ready to decode.

        Args:
            prompts: token ids.
            source: the prompt of each row.
            longest: response tokens to make room for.

        Returns:
            The rows' logits after their prompts, [rows, vocabulary], and the rows, whose
            `step` takes a token each and gives the logits that follow.
        """
        read = [self.rows.read(self.model, part, self.pad_id)
                for part in self._parts([(prompt, ()) for prompt in prompts])]
        logits = torch.cat([r.logits[:, 0] for r in read])[source]
        return logits, self.rows(self.model, sum((r.prompts for r in read), []), source, longest,
                                 Memory())

    def _text(self, request: Request) -> Text:
        """What is read of a request before it is decoded."""
        return request.prompt, request.draft[: request.budget - 1] if self.rows.DRAFTS else ()

    def _parts(self, texts: Sequence[Text]) -> list[Sequence[Text]]:
        """Texts, as many as are read at a time."""
        at_once = max(1, self.rows.TOKENS_AT_ONCE // max(len(p) + len(d) for p, d in texts))
        return [texts[i : i + at_once] for i in range(0, len(texts), at_once)]

    def _begin(self, batch: Batch, temperature: float, memory: Memory):
        """Read prompts and drafts, and draw what can be drawn from that.

        Returns:
            The rows of the batch that go on, and the same ready to decode (None without any).
        """
        rows_of: dict[Text, list[int]] = {}
        for row, request in enumerate(batch.requests):
            rows_of.setdefault(self._text(request), []).append(row)
        alive, source, prefixes = [], [], []
        for part in self._parts(list(rows_of)):
            read = self.rows.read(self.model, part, self.pad_id)
            pairs = [(row, text) for text, key in enumerate(part) for row in rows_of[key]]
            rows, texts = torch.tensor(pairs, device=read.draft.device).T
            batch.draw(rows, read.logits[texts], read.draft[texts], temperature)
            place: dict[tuple[int, int], int] = {}  # rows that leave a draft at one token share it
            for (row, text), going, length in zip(pairs, batch.going[rows].tolist(),
                                                  batch.length[rows].tolist(), strict=True):
                if not going:
                    continue
                if (text, length) not in place:
                    place[text, length] = len(prefixes)
                    prompt = read.prompts[text]  # the last token drawn was not read
                    prefixes.append(replace(prompt, stop=prompt.stop + length - 1))
                alive.append(row)
                source.append(place[text, length])
        alive, source = (torch.tensor(x, dtype=torch.long, device=batch.ids.device)
                         for x in (alive, source))
        if not prefixes:
            return alive, None
        longest = int((batch.budget - batch.length)[alive].max())
        return alive, self.rows(self.model, prefixes, source, longest, memory)

    def _decode(self, batch: Batch, temperature: float, memory: Memory) -> None:
        """Decode one batch to the end."""
        alive, decoding = self._begin(batch, temperature, memory)
        while batch.going.any():
            n_going = int(batch.going[alive].sum())
            if n_going <= (1 - self.DROP_SHARE) * len(alive):
                kept = batch.going[alive].nonzero()[:, 0]
                alive = alive[kept]
                decoding.keep(kept)
            logits = decoding.step(batch.last(alive))
            batch.draw(alive, logits[:, None], batch.ids[alive, :0], temperature)
        if decoding:
            decoding.close()


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
