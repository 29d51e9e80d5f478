"""Budgeted generation: one hard token budget for everything that a response holds.

A `Request` is a prompt as token ids, a budget in tokens and a seed; a `Rollout` is what came
back, as token ids, never more of them than the budget. The end-of-sequence token is charged like
any other. Here are `TorchGenerator` (any causal language model of transformers) and
`ReplayGenerator` (responses written beforehand, cut in the same way); `engines` has vLLM and
OpenAI-compatible servers behind the same interface.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import pad, rms_norm
from transformers import Cache, CacheLayerMixin, DynamicLayer
from transformers.cache_utils import DynamicSlidingWindowLayer


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

    Raises:
        ValueError: empty prompt, or budget or n below 1.
    """

    prompt: tuple[int, ...]
    budget: int
    seed: tuple[int, ...] = (0,)
    n: int = 1
    message: str = ""

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


#: Of models that remember their prompt in another way (Mamba and the like).
NO_CACHE = ("the torch engine needs a model that keeps the keys and values of its tokens, and a {} "
            "model does not; --engine vllm may have it")


class PreallocatedLayer(CacheLayerMixin):
    """Keys and values of one layer, [rows, heads, capacity, head_dim], allocated once.

    transformers' `DynamicLayer` concatenates, and so allocates and copies all of it, every step.
    """

    is_compileable = False
    is_sliding = False

    def __init__(self, prefilled: CacheLayerMixin, rows: torch.Tensor, capacity: int) -> None:
        super().__init__()
        self.keys, self.values = (
            self._spread(tensor, rows, capacity) for tensor in (prefilled.keys, prefilled.values)
        )
        self.length, self.is_initialized = prefilled.keys.shape[2], True

    @staticmethod
    def _spread(prefilled: torch.Tensor, rows: torch.Tensor, capacity: int) -> torch.Tensor:
        _, heads, length, size = prefilled.shape
        buffer = prefilled.new_empty(len(rows), heads, capacity, size)
        buffer[:, :, :length] = prefilled[rows]
        return buffer

    def lazy_initialization(self, key_states, value_states) -> None:
        """Nothing to do: the buffers exist from the start."""

    def update(self, key_states, value_states, *args, **kwargs):
        end = self.length + key_states.shape[2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Drop all rows but these."""
        self.keys, self.values = self.keys[indices], self.values[indices]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.keys.shape[2]


class AnyRows:
    """Rows being decoded with the model's own forward: for every architecture with attention.

    Args:
        model: the causal language model.
        prefilled: caches of its distinct prompts, padded on the left, as `TorchGenerator` reads
            them; here one.
        mask: 1 for prompt tokens, 0 for padding, [prompts, width].
        source: the prompt of each row.
        longest: response tokens to make room for.

    Raises:
        ValueError: the model keeps something else than keys and values of its tokens.
    """

    #: Prompt tokens to be read at a time: all.
    PROMPT_TOKENS = sys.maxsize

    def __init__(self, model, prefilled, mask, source, longest: int) -> None:
        (cache,), width = prefilled, mask.shape[1]
        self.model, self.end, self.position = model, width, mask.sum(1)[source]
        self.mask = torch.cat((mask[source], mask.new_ones(len(source), longest)), 1)
        self.cache = Cache(layers=[self._layer(layer, source, width + longest)
                                   for layer in cache.layers])

    def _layer(self, prefilled: CacheLayerMixin, source: torch.Tensor, capacity: int):
        """One layer's cache with a row each; a sliding window stays as short as it is."""
        if type(prefilled) is DynamicLayer:
            return PreallocatedLayer(prefilled, source, capacity)
        if type(prefilled) is DynamicSlidingWindowLayer:
            prefilled.batch_select_indices(source)
            return prefilled
        raise ValueError(NO_CACHE.format(self.model.config.model_type))

    def step(self, token: torch.Tensor) -> torch.Tensor:
        """Logits after one more token a row, [rows, vocabulary]."""
        self.end += 1
        logits = self.model(
            input_ids=token[:, None], position_ids=self.position[:, None], use_cache=True,
            attention_mask=self.mask[:, : self.end], past_key_values=self.cache,
        ).logits[:, -1]
        self.position = self.position + 1
        return logits

    def keep(self, kept: torch.Tensor) -> None:
        """Drop all rows but these."""
        self.position, self.mask = self.position[kept], self.mask[kept]
        for layer in self.cache.layers:
            layer.batch_select_indices(kept)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of Llama's kind: the halves of a head are the two coordinates."""
    rotated, half = x * cos, x.shape[-1] // 2
    rotated[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return rotated


def normalize(norm, x: torch.Tensor) -> torch.Tensor:
    """Root-mean-square norm in the precision of `x` (transformers goes through float32)."""
    return rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


class LlamaRows:
    """Rows being decoded with a forward of our own, for models built like Llama.

    Faster than `AnyRows`, because a decoding step of a small model is bound by memory:

    - Rows of one prompt read one copy of its keys and values. They sit together at *desks* of
      equally many seats, so that the queries of a desk meet its prompt in one matrix product. A
      seat that stays empty repeats another row of its desk, and nobody looks at its result.
      Once no two rows share a prompt, each has its prompt's copy in front of its own tokens.
    - The responses' keys and values lie in memory without gaps, [heads, seats, tokens, head_dim].
      There is room for a few tokens more, masked until they come; then it is enlarged. In a
      buffer of the final size each row is followed by unused space, and where all of it exceeds
      the processor's caches, reading across these gaps costs far more than what is copied here.

    The projections are the model's own modules, so new weights and LoRA adapters count at once.
    Arguments: see `AnyRows`.
    """

    #: `config.model_type` of the architectures whose layers this forward computes.
    ARCHITECTURES = ("llama", "qwen2")
    #: Prompt tokens to be read at a time: few enough for a processor's caches.
    PROMPT_TOKENS = 2_048
    #: Seats are at most this many times the rows.
    SEATS_PER_ROW = 1.125
    #: Tokens by which the room for responses grows.
    GROWTH = 32

    @classmethod
    def fits(cls, config) -> bool:
        """Whether this forward is that of the model (known layers, no sliding window)."""
        layers = getattr(config, "layer_types", None) or ["full_attention"]
        return config.model_type in cls.ARCHITECTURES and set(layers) == {"full_attention"}

    def __init__(self, model, prefilled, mask, source, longest: int) -> None:
        self.body, self.head = model.get_decoder(), model.get_output_embeddings()
        self.longest, self.filled, self.width = longest, 0, mask.shape[1]
        self.prompts = [self._joined(layers, self.width)
                        for layers in zip(*(cache.layers for cache in prefilled), strict=True)]
        self.bias = None  # where all prompts have one length, nothing is hidden
        if not mask.all():
            self.bias = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device)[:, None]
            self.bias.masked_fill_(mask[:, None] == 0, torch.finfo(model.dtype).min)
        self.desks = list(range(len(mask)))  # the prompt of each
        row_of_seat = self._seat(source)
        self.position = mask.sum(1)[source][row_of_seat]
        heads, _, _, size = self.prompts[0][0].shape
        self.own = [tuple(keys.new_empty(heads, len(row_of_seat), 0, size) for _ in range(2))
                    for keys, _ in self.prompts]
        self._part()

    @staticmethod
    def _joined(layers: Sequence[CacheLayerMixin], width: int) -> tuple[torch.Tensor, ...]:
        """Keys and values of one layer for all prompts, [heads, prompts, width, head_dim]."""
        return tuple(torch.cat([pad(t, (0, 0, width - t.shape[2], 0)) for t in parts]
                               ).transpose(0, 1)
                     for parts in zip(*((x.keys, x.values) for x in layers), strict=True))

    def _seat(self, source: torch.Tensor) -> torch.Tensor:
        """Seat rows of these prompts; returns the row of each seat."""
        rows_of: dict[int, list[int]] = {}
        for row, prompt in enumerate(source.tolist()):
            rows_of.setdefault(prompt, []).append(row)
        seats = max(map(len, rows_of.values()))  # at a desk: as many as leave few of them empty
        while seats * sum(-(-len(rows) // seats) for rows in rows_of.values()) > (
                self.SEATS_PER_ROW * len(source)):
            seats -= 1
        desks = [(prompt, rows[i : i + seats])
                 for prompt, rows in rows_of.items() for i in range(0, len(rows), seats)]
        row_of_seat = [row for _, rows in desks for row in rows + rows[:1] * (seats - len(rows))]
        seat_of_row = {row: seat for seat, row in enumerate(row_of_seat)}

        before = {prompt: desk for desk, prompt in enumerate(self.desks)}
        self.desks = [prompt for prompt, _ in desks]
        moved = torch.tensor([before[prompt] for prompt in self.desks], device=source.device)
        self.prompts = [(keys[:, moved], values[:, moved]) for keys, values in self.prompts]
        self.bias = None if self.bias is None else self.bias[moved]
        self.source = source
        self.seat = torch.tensor([seat_of_row[row] for row in range(len(source))],
                                 device=source.device)
        self.row = torch.tensor(row_of_seat, device=source.device)
        return self.row

    def _part(self) -> None:
        """Where no desk has two seats, put prompts and responses into one buffer a layer."""
        if self.prompts is None or len(self.desks) < len(self.row):
            return
        self.own = [tuple(torch.cat(parts, 2) for parts in zip(*layer, strict=True))
                    for layer in zip(self.prompts, self.own, strict=True)]
        self.filled, self.longest = self.filled + self.width, self.longest + self.width
        self.prompts = None

    def _make_room(self) -> None:
        """Room for more tokens in every layer, if it is full."""
        room = min(self.GROWTH, self.longest - self.filled)
        if self.own[0][0].shape[2] == self.filled:
            self.own = [tuple(torch.cat((t, t.new_zeros(*t.shape[:2], room, t.shape[3])), 2)
                              for t in layer) for layer in self.own]

    def _attend(self, layer: int, query, key, value) -> torch.Tensor:
        """One query a seat over its prompt and its own response.

        Args:
            query: [heads, seats, group, head_dim], contiguous and scaled.
            key, value: [heads, seats, head_dim].
        """
        keys, values = self.own[layer]
        keys[:, :, self.filled], values[:, :, self.filled] = key, value
        on_own = query @ keys.transpose(-1, -2)
        on_own[..., self.filled + 1 :] = -torch.inf
        if self.prompts is None:
            if self.bias is not None:
                on_own[..., : self.width] += self.bias
            return torch.softmax(on_own, -1) @ values
        (prompt_keys, prompt_values), width = self.prompts[layer], self.width
        heads, seats, group, size = query.shape
        by_desk = query.view(heads, len(self.desks), -1, size)
        on_prompt = by_desk @ prompt_keys.transpose(-1, -2)
        if self.bias is not None:
            on_prompt += self.bias
        scores = torch.cat((on_prompt.view(heads, seats, group, width), on_own), -1)
        on_prompt, on_own = torch.softmax(scores, -1).split([width, keys.shape[2]], -1)
        mixed = on_prompt.reshape(heads, len(self.desks), -1, width) @ prompt_values
        return mixed.view(query.shape) + on_own @ values

    def step(self, token: torch.Tensor) -> torch.Tensor:
        """Logits after one more token a row, [rows, vocabulary]."""
        self._make_room()
        x = self.body.embed_tokens(token[self.row])
        cos, sin = self.body.rotary_emb(x, self.position[:, None])  # [seats, 1, head_dim]
        heads, seats, _, size = self.own[0][0].shape
        scale = size**-0.5
        for i, block in enumerate(self.body.layers):
            attention, y = block.self_attn, normalize(block.input_layernorm, x)
            query, key, value = (project(y).view(seats, -1, size) for project in (
                attention.q_proj, attention.k_proj, attention.v_proj))
            query = rotate(query, cos * scale, sin * scale).view(seats, heads, -1, size)
            mixed = self._attend(i, query.transpose(0, 1).contiguous(),
                                 rotate(key, cos, sin).transpose(0, 1), value.transpose(0, 1))
            x = x + attention.o_proj(mixed.transpose(0, 1).flatten(1))
            x = x + block.mlp(normalize(block.post_attention_layernorm, x))
        self.filled, self.position = self.filled + 1, self.position + 1
        return self.head(normalize(self.body.norm, x))[self.seat]

    def keep(self, kept: torch.Tensor) -> None:
        """Drop all rows but these."""
        seat = self.seat[kept]  # where they sit until now
        if self.prompts is None:
            self.bias = None if self.bias is None else self.bias[seat]
            self.row = self.seat = torch.arange(len(kept), device=kept.device)
        else:
            seat = seat[self._seat(self.source[kept])]
        self.position = self.position[seat]
        self.own = [(keys[:, seat], values[:, seat]) for keys, values in self.own]
        self._part()


class TorchGenerator(BudgetedGenerator):
    """Batched, cached decoding with any causal language model, on its own device.

    Rows decode in lock step; each distinct prompt is prefilled once, and finished rows leave the
    batch. Sampling inverts the cumulative distribution at one uniform number a token, taken from
    the row's own stream.

    Args:
        model: a causal language model of transformers, in eval mode.
        eos_ids: token ids that end a response (a model may have several).
        pad_id: id used to fill up prompts on the left; it is masked, never charged.
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
        # Rows of like length together: less padding.
        rows = [(i, k) for i, request in enumerate(requests) for k in range(request.n)]
        rows.sort(key=lambda row: (requests[row[0]].budget, len(requests[row[0]].prompt)))
        done: dict[int, list[Rollout]] = {}
        for start in range(0, len(rows), self.max_rows):
            chunk = rows[start : start + self.max_rows]
            decoded = self._decode(requests, chunk, temperature)
            for (i, _), rollout in zip(chunk, decoded, strict=True):
                done.setdefault(i, []).append(rollout)
                if len(done[i]) == requests[i].n:
                    yield i, done.pop(i)

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
        logits, prefilled, mask = self._prefill(prompts)
        return logits[source], self.rows(self.model, prefilled, mask, source, longest)

    def _prefill(self, prompts: Sequence[tuple[int, ...]]):
        """Last logits of distinct prompts, caches of as many as are read at a time, their mask."""
        width = max(map(len, prompts))
        at_once = max(1, self.rows.PROMPT_TOKENS // width)
        parts = [self._read(prompts[i : i + at_once]) for i in range(0, len(prompts), at_once)]
        logits, caches, masks = zip(*parts, strict=True)
        masks = [pad(mask, (width - mask.shape[1], 0)) for mask in masks]
        return torch.cat(logits), caches, torch.cat(masks)

    def _read(self, prompts: Sequence[tuple[int, ...]]):
        """Run some prompts in one pass: last logits, cache, mask, padded on the left."""
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.pad_id)
        mask = torch.zeros((len(prompts), width), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=positions,
                         use_cache=True, logits_to_keep=1)
        if getattr(out, "past_key_values", None) is None:
            raise ValueError(NO_CACHE.format(self.model.config.model_type))
        return out.logits[:, -1], out.past_key_values, mask

    def _decode(self, requests, chunk, temperature) -> list[Rollout]:
        """Decode one batch of (request, rollout number) rows to the end."""
        device, batch = self.model.device, [requests[i] for i, _ in chunk]
        prompts = list(dict.fromkeys(request.prompt for request in batch))
        place = {prompt: i for i, prompt in enumerate(prompts)}
        source = torch.tensor([place[request.prompt] for request in batch], device=device)
        budgets = torch.tensor([request.budget for request in batch], device=device)
        longest = int(budgets.max())
        uniforms = torch.tensor(
            np.stack([np.random.default_rng([*r.seed, k]).random(longest)
                      for r, (_, k) in zip(batch, chunk, strict=True)]), device=device)

        logits, decoding = self.start(prompts, source, longest)
        out = torch.full((len(batch), longest), self.pad_id, device=device)
        length = torch.zeros(len(batch), dtype=torch.long, device=device)
        finished = torch.zeros(len(batch), dtype=torch.bool, device=device)
        alive = torch.arange(len(batch), device=device)  # the batch rows still in the cache
        going = torch.ones(len(batch), dtype=torch.bool, device=device)  # of these, not yet over
        for step in range(longest):
            broken = ~torch.isfinite(logits).all(-1)
            if broken.any():
                i, k = chunk[int(alive[broken][0])]
                raise FloatingPointError("the model gave NaN or infinite logits at decoding step "
                                         f"{step} of request {i}, rollout {k} (all from 0)")
            token = self._choose(logits, uniforms[alive, step], temperature)
            rows = alive[going]
            out[rows, step] = token[going]
            length[rows] = step + 1
            finished[rows] = torch.isin(token[going], self.eos_ids)
            going = going & ~finished[alive] & (budgets[alive] > step + 1)
            n_going = int(going.sum())
            if n_going == 0:
                break
            if n_going <= (1 - self.DROP_SHARE) * len(alive):
                kept = going.nonzero()[:, 0]
                alive, token, going = alive[kept], token[kept], going[kept]
                decoding.keep(kept)
            logits = decoding.step(token)
        out, length, finished = out.tolist(), length.tolist(), finished.tolist()
        return [Rollout(tuple(out[row][: length[row]]), finished[row]) for row in range(len(batch))]

    @staticmethod
    def _choose(logits: torch.Tensor, uniform: torch.Tensor, temperature: float) -> torch.Tensor:
        """One token a row, [rows]: the arg max, or the inverse of the cumulative distribution."""
        if temperature == 0:
            return logits.argmax(-1)
        cumulative = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
        threshold = uniform[:, None] * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
        return chosen.clamp(max=logits.shape[-1] - 1)


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
