"""Budgeted generation: one hard token budget for everything that a response holds.

    Request, Rollout        a prompt with a budget and a seed; what came back, never above it
    within_budget           where the budget is enforced, whatever a back end sends
    Engine, TorchEngine     what every back end offers; the decode loop, for any causal model
    sample_token, CachedDecoder    its parts: one token a row; the model's forward, step by step

The end-of-sequence token is charged like any other. `engines` has faster and other back ends
behind the same interface. Notebook 03."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


@dataclass(frozen=True)
class Request:
    """One prompt to be answered `n` times under a budget (a `ValueError` if that is no sense)."""

    prompt: tuple[int, ...]  # token ids, chat template included
    budget: int  # largest number of response tokens, end-of-sequence included
    # Any integers; with the rollout's number they fix its random stream, whatever other requests
    # share the call.
    seed: tuple[int, ...] = (0,)
    n: int = 1  # number of rollouts
    message: str = ""  # the user message that the prompt encodes, for servers

    def __post_init__(self) -> None:
        if min(found := (self.budget, self.n, len(self.prompt))) < 1:
            raise ValueError(f"budget, n, and tokens of the prompt: {found}, must be at least 1")


@dataclass(frozen=True)
class Rollout:
    """One response."""

    ids: tuple[int, ...]  # token ids, at most the request's budget, end-of-sequence included
    finished: bool  # whether it ended by itself (False: cut by the budget)
    overrun: int = 0  # tokens that a back end sent beyond the budget; they are not in `ids`
    failed: str = ""  # why there is no response ("" where there is one)
    hidden: int = field(default=0, repr=False)  # tokens spent on reasoning that was not shown
    note: str = field(default="", repr=False)  # why a response is empty, where a server says so
    text: str = field(default="", repr=False)  # as a server sent it; some words may have no tokens


def within_budget(ids: Sequence[int], budget: int, eos_ids: Sequence[int]) -> Rollout:
    """What counts of a back end's tokens: up to the first end-of-sequence, within the budget.

    Ids alone end a response: there are no stop strings, so none can end inside a token."""
    end = next((i + 1 for i, token in enumerate(ids) if token in eos_ids), len(ids))
    finished = end <= budget and end > 0 and ids[end - 1] in eos_ids
    return Rollout(tuple(ids[: min(end, budget)]), finished, max(len(ids) - budget, 0))


def all_eos_ids(config, tokenizer) -> list[int]:
    """End-of-sequence ids, sorted, of a generation config (None: it has none) and a tokenizer."""
    ends = config.eos_token_id if config else None
    ends = ends if isinstance(ends, list) else [ends]
    return sorted({i for i in (*ends, tokenizer.eos_token_id) if i is not None})


#: (number of a request, its rollouts), each as soon as it is complete.
Stream = Iterator[tuple[int, list[Rollout]]]


class Engine:
    """What every back end offers; each has its own `stream`."""

    def stream(self, requests: Sequence[Request], temperature: float = 1.0) -> Stream:
        """(number of a request, its rollouts), each request once, in any order."""
        raise NotImplementedError

    on_tokens = staticmethod(lambda n: None)  # told how many were just made; to be replaced

    def generate(self, requests: Sequence[Request],
                 temperature: float = 1.0) -> list[list[Rollout]]:
        """The requests' rollouts, in their order; temperature 0 is greedy decoding."""
        done = dict(self.stream(requests, temperature))
        return [done[i] for i in range(len(requests))]


def sample_token(logits: torch.Tensor, uniform: torch.Tensor, temperature: float) -> torch.Tensor:
    """A token for each row of logits [..., vocabulary]: the likeliest at temperature 0, else the
    inverse of the cumulative distribution at a uniform number [...]."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
    threshold = uniform[..., None] * cumulative[..., -1:]
    chosen = torch.searchsorted(cumulative, threshold, right=True)[..., 0]
    return chosen.clamp(max=logits.shape[-1] - 1)


class CachedDecoder:
    """Rows of one batch with the model's own forward and cache: every architecture with attention.

    There is a prompt a row; equal ones are read once. `longest` response tokens may follow, which
    is for other decoders to know. `logits`: after the prompts, [rows, vocabulary]. `ValueError`:
    the model keeps something else than keys and values of its tokens."""

    def __init__(self, model, prompts: Sequence[tuple[int, ...]], longest: int, pad_id: int):
        place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        source = torch.tensor([place[prompt] for prompt in prompts], device=model.device)
        rows = [torch.tensor(prompt, device=model.device) for prompt in place]
        # Padded on the left: all go on at the same column.
        ids = pad_sequence(rows, True, pad_id, "left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left")
        out = model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1,
                    position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        self.model, self.cache = model, getattr(out, "past_key_values", None)
        kinds = {type(layer) for layer in getattr(self.cache, "layers", [None])}
        if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
            raise ValueError("the torch engine needs a model that keeps the keys and values of its "
                             f"tokens, and a {model.config.model_type} model does not; --engine "
                             "vllm may have it")
        self.logits, self.mask, self.position = out.logits[source, -1], mask, mask.sum(1)
        self.select(source)

    def step(self, token: torch.Tensor) -> torch.Tensor:
        """Logits after one more token a row, [rows, vocabulary]."""
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        out = self.model(input_ids=token[:, None], attention_mask=self.mask, use_cache=True,
                         position_ids=self.position[:, None], past_key_values=self.cache)
        self.position = self.position + 1
        return out.logits[:, -1]

    def select(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone, in this sequence; a row may come several times."""
        self.mask, self.position = self.mask[rows], self.position[rows]
        self.cache.batch_select_indices(rows)


class TorchEngine(Engine):
    """Batched, cached decoding with any causal language model, on its own device.

    Each distinct prompt of a batch is read once; then all rows, `max_rows` at most, decode in lock
    step, and finished rows leave the batch. Every row has a random stream of its own, with one
    uniform number a token. `pad_id` fills up prompts of one batch, and is never charged."""

    Decoder, sample = CachedDecoder, staticmethod(sample_token)
    #: Finished rows are dropped once they are this share of the batch (dropping copies the rest).
    DROP_SHARE = 0.25

    def __init__(self, model, eos_ids: Sequence[int], pad_id: int, max_rows: int = 256) -> None:
        if not eos_ids:
            raise ValueError("an engine needs at least one end-of-sequence id")
        self.model, self.pad_id, self.max_rows = model, pad_id, max_rows
        self.eos_ids = torch.tensor(sorted(set(eos_ids)), device=model.device)

    @classmethod
    def of(cls, model, tokenizer, max_rows: int = 256) -> "TorchEngine":
        """An engine with the end-of-sequence ids of both the model and its tokenizer."""
        eos_ids, pad_id = all_eos_ids(model.generation_config, tokenizer), tokenizer.pad_token_id
        return cls(model, eos_ids, min(eos_ids) if pad_id is None else pad_id, max_rows)

    def stream(self, requests: Sequence[Request], temperature: float = 1.0) -> Stream:
        """See `Engine`. `FloatingPointError`: NaN or infinite logits; names step and rollout."""
        if temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or above, not {temperature}")
        # Rows of like length together: less padding. The longest first: they need most memory.
        by_length = sorted(range(len(requests)), reverse=True,
                           key=lambda i: (requests[i].budget, len(requests[i].prompt)))
        rows = [(i, k) for i in by_length for k in range(requests[i].n)]
        ends = np.linspace(0, len(rows), math.ceil(len(rows) / self.max_rows) + 1).astype(int)
        done: dict[int, dict[int, Rollout]] = {i: {} for i in by_length}
        for first, last in pairwise(ends):
            for (i, k), rollout in self._decode(requests, rows[first:last], temperature):
                done[i][k] = rollout
                if len(done[i]) == requests[i].n:
                    yield i, [done[i][k] for k in range(requests[i].n)]

    @torch.inference_mode()
    def _decode(self, requests: Sequence[Request], rows: Sequence[tuple[int, int]],
                temperature: float) -> Iterator[tuple[tuple[int, int], Rollout]]:
        """The rows of one batch (numbers of a request and of its rollout) with their rollouts, each
        as soon as it has ended: what is logged of a long batch is not lost."""
        device, budgets = self.model.device, [requests[i].budget for i, _ in rows]
        budget, longest = torch.tensor(budgets, device=device), max(budgets)
        streams = [np.random.default_rng([*requests[i].seed, k]) for i, k in rows]
        uniform = torch.tensor(np.stack([s.random(longest) for s in streams]), device=device)
        prompts = [requests[i].prompt for i, _ in rows]
        decoder = self.Decoder(self.model, prompts, longest, self.pad_id)
        ids = torch.zeros((len(rows), longest), dtype=torch.long, device=device)
        alive = torch.arange(len(rows), device=device)  # the rows that are still decoded
        going, logits = torch.ones_like(alive, dtype=torch.bool), decoder.logits
        eos_ids = self.eos_ids.tolist()
        for step in range(longest):
            broken = going & ~torch.isfinite(logits.sum(-1))
            if broken.any():
                i, k = rows[int(alive[broken][0])]
                raise FloatingPointError("the model gave NaN or infinite logits at decoding step "
                                         f"{step} of request {i}, rollout {k} (all from 0)")
            token = self.sample(logits, uniform[alive, step], temperature)
            ids[alive, step] = token
            self.on_tokens(int(going.sum()))
            ended = going & (torch.isin(token, self.eos_ids) | (budget[alive] == step + 1))
            for row in alive[ended].tolist():
                yield rows[row], within_budget(ids[row, : step + 1].tolist(), budgets[row], eos_ids)
            going = going & ~ended
            kept = going.nonzero()[:, 0]
            if not len(kept):
                break
            if len(kept) <= (1 - self.DROP_SHARE) * len(alive):
                decoder.select(kept)
                alive, token, going = alive[kept], token[kept], going[kept]
            logits = decoder.step(token)
