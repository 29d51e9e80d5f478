"""Decoding many rows in lock step, with a cache of keys and values.

    Prefix      where the cache of what a row has read lies
    AnyRows     every architecture with attention, by the model's own forward
    LlamaRows   models built like Llama, by a forward of our own
    choose      tokens from logits and uniform random numbers

`generation.TorchGenerator` makes responses of it.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad, rms_norm, scaled_dot_product_attention
from transformers import Cache, CacheLayerMixin, DynamicLayer
from transformers.cache_utils import DynamicSlidingWindowLayer

#: Of models that remember their prompt in another way (Mamba and the like).
NO_CACHE = ("the torch engine needs a model that keeps the keys and values of its tokens, and a {} "
            "model does not; --engine vllm may have it")


@dataclass(frozen=True, eq=False)
class Prefix:
    """Where the keys and values of tokens that were read lie.

    Attributes:
        cache: what `read` returned.
        text: which of the texts that were read together.
        start, stop: its first column there, and the one after its last.
    """

    cache: Any
    text: int
    start: int
    stop: int


#: Token ids of a prompt, and of a draft of what follows.
Text = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Read:
    """Texts that were read in one pass.

    Attributes:
        logits: after the prompt and after each token of the draft, [texts, draft + 1, vocabulary].
        draft: token ids, [texts, draft]; shorter ones are padded with a token that was read, too,
            and so is a guess like any other, then with -1.
        prompts: where the prompts lie; the drafts follow there.
    """

    logits: torch.Tensor
    draft: torch.Tensor
    prompts: list[Prefix]


class Memory:
    """Pieces of memory that are used again and again.

    To get fresh memory from the system takes several times as long as to fill it.
    """

    def __init__(self) -> None:
        self.pieces: list[torch.Tensor] = []

    def take(self, like: torch.Tensor, shape: Sequence[int], capacity: int) -> torch.Tensor:
        """A tensor of this shape, not filled, in a piece that holds `capacity` numbers or more."""
        size = math.prod(shape)
        while self.pieces and self.pieces[-1].numel() < size:
            self.pieces.pop()
        piece = self.pieces.pop() if self.pieces else like.new_empty(max(size, capacity))
        return piece[:size].view(shape)

    def give(self, tensor: torch.Tensor) -> None:
        """Take back what `take` gave; nobody may use it any more."""
        self.pieces.append(tensor.new_empty(0).set_(tensor.untyped_storage()))


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
        prefixes: what the rows have read; here of one cache, and up to its last column.
        source: the prefix of each row.
        longest: response tokens to make room for.
        memory: for the cache of rows after rows (`LlamaRows`).

    Raises:
        ValueError: the model keeps something else than keys and values of its tokens.
    """

    #: Tokens to be read at a time: all.
    TOKENS_AT_ONCE = sys.maxsize
    #: Whether prefixes may be of many caches and end anywhere, as they do where drafts go wrong.
    JOINS = False

    @staticmethod
    def read(model, texts: Sequence[Text], pad_id: int, head: Prefix | None = None) -> Read:
        """Read texts in one pass; here padded on the left, and without drafts.

        Args:
            pad_id: token id for padding; nobody looks at it.
            head: what all prompts begin with, if that was read before; here it is read again.
        """
        width = max(len(prompt) for prompt, _ in texts)
        ids = torch.full((len(texts), width), pad_id)
        mask = torch.zeros_like(ids)
        for row, (prompt, _) in enumerate(texts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        ids, mask = ids.to(model.device), mask.to(model.device)
        out = model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1,
                    position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        cache = getattr(out, "past_key_values", None)
        if cache is None:
            raise ValueError(NO_CACHE.format(model.config.model_type))
        return Read(out.logits, ids[:, width:], [Prefix(cache, i, width - len(prompt), width)
                                                 for i, (prompt, _) in enumerate(texts)])

    def __init__(self, model, prefixes: Sequence[Prefix], source: torch.Tensor, longest: int,
                 memory: Memory) -> None:
        text, start, stop = (torch.tensor(x, device=source.device)[source] for x in zip(
            *((p.text, p.start, p.stop) for p in prefixes), strict=True))
        self.model, self.end, self.position = model, int(stop.max()), stop - start
        columns = torch.arange(self.end + longest, device=source.device)
        self.mask = (columns >= start[:, None]).long()
        self.cache = Cache(layers=[self._layer(layer, text, self.end + longest)
                                   for layer in prefixes[0].cache.layers])

    def _layer(self, read: CacheLayerMixin, text: torch.Tensor, capacity: int):
        """One layer's cache with a row each; a sliding window stays as short as it is."""
        if type(read) is DynamicLayer:
            return PreallocatedLayer(read, text, capacity)
        if type(read) is DynamicSlidingWindowLayer:
            read.batch_select_indices(text)
            return read
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

    def close(self) -> None:
        """Give the memory back; nothing can be decoded any more."""


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, room: int = 0) -> torch.Tensor:
    """Rotary position embedding of Llama's kind: the halves of a head are the two coordinates.

    Args:
        x: [rows, tokens, heads, head_dim].
        room: columns of zeros to put in front of the tokens.
    """
    full, half = x.new_empty(x.shape[0], room + x.shape[1], *x.shape[2:]), x.shape[-1] // 2
    full[:, :room] = 0
    rotated = torch.mul(x, cos, out=full[:, room:])
    rotated[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return full


def normalize(norm, x: torch.Tensor) -> torch.Tensor:
    """Root-mean-square norm in the precision of `x` (transformers goes through float32)."""
    return rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def forward(model, ids: torch.Tensor, position: torch.Tensor, attend: Callable,
            wanted: torch.Tensor, room: int = 0) -> torch.Tensor:
    """The forward pass of models built like Llama, with an attention of one's own.

    Args:
        ids, position: token ids and their positions, [rows, tokens].
        attend: of the number of a layer, its scaled queries, its keys and values, all [rows,
            tokens, heads, head_dim]; returns what the queries gather.
        wanted: columns whose logits are wanted, [rows, wanted]; in the last layer no others go
            further than attention.
        room: columns in front of queries and keys that `attend` gets empty.

    Returns:
        Logits, [rows, wanted, vocabulary].
    """
    body, head = model.get_decoder(), model.get_output_embeddings()
    x = body.embed_tokens(ids)
    cos, sin = (t[:, :, None] for t in body.rotary_emb(x, position))
    size = cos.shape[-1]
    scaled = cos * size**-0.5, sin * size**-0.5
    for i, block in enumerate(body.layers):
        attention, y = block.self_attn, normalize(block.input_layernorm, x)
        query, key, value = (project(y).unflatten(-1, (-1, size)) for project in (
            attention.q_proj, attention.k_proj, attention.v_proj))
        query, key = rotate(query, *scaled, room), rotate(key, cos, sin, room)
        mixed = attend(i, query, key, value).flatten(2)
        if i == len(body.layers) - 1:
            row = torch.arange(len(x), device=x.device)[:, None]
            x, mixed = x[row, wanted], mixed[row, wanted]
        x = x + attention.o_proj(mixed)
        x = x + block.mlp(normalize(block.post_attention_layernorm, x))
    return head(normalize(body.norm, x))


class LlamaRows:
    """Rows being decoded with a forward of our own, for models built like Llama.

    Faster than `AnyRows`, because a decoding step of a small model is bound by memory:

    - Rows of one prefix read one copy of its keys and values. They sit together at *desks* of
      equally many seats, so that the queries of a desk meet its prefix in one matrix product. A
      seat that stays empty repeats another row of its desk, and nobody looks at its result.
      Once no two rows share a prefix, each has a copy of it in front of its own tokens.
    - The responses' keys and values lie in memory without gaps, [heads, seats, tokens, head_dim].
      There is room for a few tokens more, masked until they come; then it is enlarged. In a
      buffer of the final size each row is followed by unused space, and where all of it exceeds
      the processor's caches, reading across these gaps costs far more than what is copied here.
    - What is copied goes to and fro between pieces of memory of the final size (`Memory`).

    The projections are the model's own modules, so new weights and LoRA adapters count at once.
    Arguments: see `AnyRows`; the prefixes may be of many caches, and end anywhere.
    """

    #: `config.model_type` of the architectures whose layers this forward computes.
    ARCHITECTURES = ("llama", "qwen2")
    #: Tokens to be read at a time: few enough for a processor's caches.
    TOKENS_AT_ONCE = 2_048
    JOINS = True
    #: Seats are at most this many times the rows.
    SEATS_PER_ROW = 1.125
    #: Tokens by which the room for responses grows.
    GROWTH = 32

    @classmethod
    def fits(cls, config) -> bool:
        """Whether this forward is that of the model (known layers, no sliding window)."""
        layers = getattr(config, "layer_types", None) or ["full_attention"]
        return config.model_type in cls.ARCHITECTURES and set(layers) == {"full_attention"}

    @staticmethod
    def read(model, texts: Sequence[Text], pad_id: int, head: Prefix | None = None) -> Read:
        """See `AnyRows.read`; here padded on the right, where causal attention never looks."""
        n = head.stop if head else 0
        drafted = max(len(draft) for _, draft in texts)
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor((prompt + draft)[n:]) for prompt, draft in texts], batch_first=True,
            padding_value=pad_id).to(model.device)
        position = n + torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        prompt = torch.tensor([len(prompt) - n for prompt, _ in texts], device=ids.device)[:, None]
        wanted = prompt - 1 + torch.arange(drafted + 1, device=ids.device)
        beyond, wanted = wanted >= ids.shape[1], wanted.clamp(max=ids.shape[1] - 1)
        cache = []

        def attend(layer, query, key, value):
            if head:
                value = pad(value, (0, 0, 0, 0, n, 0))
                for tensor, known in zip((key, value), head.cache[layer], strict=True):
                    tensor[:, :n] = known[head.text].transpose(0, 1)
            query, key, value = (t.transpose(1, 2) for t in (query, key, value))
            cache.append((key, value))
            mixed = scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0,
                                                 enable_gqa=query.shape[1] != key.shape[1])
            return mixed.transpose(1, 2)[:, n:]

        logits = forward(model, ids, position, attend, wanted, n)
        return Read(logits, ids.gather(1, wanted[:, 1:]).masked_fill_(beyond[:, 1:], -1),
                    [Prefix(cache, i, 0, len(prompt)) for i, (prompt, _) in enumerate(texts)])

    def __init__(self, model, prefixes: Sequence[Prefix], source: torch.Tensor, longest: int,
                 memory: Memory) -> None:
        lengths = torch.tensor([p.stop - p.start for p in prefixes], device=source.device)
        self.model, self.width = model, int(lengths.max())
        self._seat(source)
        self.position = lengths[source][self.row]
        self.bias = None  # where all prefixes have one length, nothing is hidden
        hidden = (self.width - lengths[self.desks])[:, None]
        hidden = torch.arange(self.width, device=source.device) < hidden
        if hidden.any():
            self.bias = torch.zeros(hidden.shape, dtype=model.dtype, device=source.device)
            self.bias = self.bias.masked_fill_(hidden, torch.finfo(model.dtype).min)[:, None]
        at_desk = [prefixes[p] for p in self.desks]
        _, heads, _, size = prefixes[0].cache[0][0].shape
        self.longest, self.filled, self.prompts = longest, 0, None
        if len(self.desks) == len(self.row):
            self.longest, self.filled = longest + self.width, self.width
        self.memory, self.capacity = memory, heads * len(self.row) * self.longest * size

        def empty(like: torch.Tensor, tokens: int) -> torch.Tensor:
            return memory.take(like, (heads, len(self.row), tokens, size), self.capacity)

        self.own = [[empty(tensor, self.filled) for tensor in layer] for layer in at_desk[0].cache]
        read = self.own
        if not self.filled:
            shape = heads, len(self.desks), self.width, size
            read = self.prompts = [[tensor.new_empty(shape) for tensor in layer]
                                   for layer in self.own]
        for layer, tensors in enumerate(read):
            for i, tensor in enumerate(tensors):
                self._gather(tensor, at_desk, layer, i)

    @staticmethod
    def _gather(target: torch.Tensor, prefixes: Sequence[Prefix], layer: int, i: int) -> None:
        """Put a layer's keys (i = 0) or values (1) of prefixes side by side, at the right end."""
        for desk, p in enumerate(prefixes):
            hidden = target.shape[2] - (p.stop - p.start)
            target[:, desk, :hidden] = 0
            target[:, desk, hidden:] = p.cache[layer][i][p.text, :, p.start : p.stop]

    @staticmethod
    def copy(prefix: Prefix) -> Prefix:
        """The same with memory of its own, so that what was read together can be forgotten."""
        cache = [tuple(tensor[prefix.text, None, :, prefix.start : prefix.stop].clone()
                       for tensor in layer) for layer in prefix.cache]
        return Prefix(cache, 0, 0, prefix.stop - prefix.start)

    def _seat(self, source: torch.Tensor) -> None:
        """Seat rows of these prefixes: the prefix of each desk, the row of each seat, the seat of
        each row."""
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

        self.source, self.desks = source, [prompt for prompt, _ in desks]
        self.row = torch.tensor(row_of_seat, device=source.device)
        self.seat = torch.tensor([seat_of_row[row] for row in range(len(source))],
                                 device=source.device)

    def _remake(self, seats: int, tokens: int, fill: Callable) -> None:
        """Make all keys and values anew, for so many seats and tokens; `fill` takes the new
        tensor, the old one, and that of the prompts (None without prompts)."""
        for n, layer in enumerate(self.own):
            for i, old in enumerate(layer):
                shape = old.shape[0], seats, tokens, old.shape[3]
                layer[i] = self.memory.take(old, shape, self.capacity)
                fill(layer[i], old, None if self.prompts is None else self.prompts[n][i])
                self.memory.give(old)

    def _part(self) -> None:
        """Where no desk has two seats, put prompts and responses into one buffer a layer."""
        if len(self.desks) < len(self.row):
            return
        tokens = self.width + self.own[0][0].shape[2]
        self.filled, self.longest = self.filled + self.width, self.longest + self.width
        self._remake(len(self.row), tokens,
                     lambda new, old, prompt: torch.cat((prompt, old), 2, out=new))
        self.prompts = None

    def _make_room(self) -> None:
        """Room for more tokens in every layer, if it is full."""
        if self.own[0][0].shape[2] > self.filled:
            return

        def fill(new, old, _):
            new[:, :, : self.filled] = old
            new[:, :, self.filled :] = 0  # hidden, but a NaN would show

        self._remake(len(self.row), min(self.filled + self.GROWTH, self.longest), fill)

    def _attend(self, layer: int, query, key, value) -> torch.Tensor:
        """One query a seat over its prefix and its own response; see `forward`."""
        keys, values = self.own[layer]
        keys[:, :, self.filled] = key[:, 0].transpose(0, 1)
        values[:, :, self.filled] = value[:, 0].transpose(0, 1)
        heads, seats, tokens, size = keys.shape
        query = query.view(seats, heads, -1, size).transpose(0, 1).contiguous()
        on_own = query @ keys.transpose(-1, -2)
        on_own[..., self.filled + 1 :] = -torch.inf
        if self.prompts is None:
            if self.bias is not None:
                on_own[..., : self.width] += self.bias
            return (torch.softmax(on_own, -1) @ values).transpose(0, 1).flatten(1, 2)[:, None]
        prompt_keys, prompt_values = self.prompts[layer]
        by_desk = query.view(heads, len(self.desks), -1, size)
        on_prompt = by_desk @ prompt_keys.transpose(-1, -2)
        if self.bias is not None:
            on_prompt += self.bias
        scores = torch.cat((on_prompt.view(heads, seats, -1, self.width), on_own), -1)
        on_prompt, on_own = torch.softmax(scores, -1).split([self.width, tokens], -1)
        mixed = on_prompt.reshape(heads, len(self.desks), -1, self.width) @ prompt_values
        mixed = mixed.view(query.shape) + on_own @ values
        return mixed.transpose(0, 1).flatten(1, 2)[:, None]

    def step(self, token: torch.Tensor) -> torch.Tensor:
        """Logits after one more token a row, [rows, vocabulary]."""
        self._make_room()
        position = self.position[:, None]
        logits = forward(self.model, token[self.row][:, None], position, self._attend,
                         torch.zeros_like(position))
        self.filled, self.position = self.filled + 1, self.position + 1
        return logits[:, 0][self.seat]

    def keep(self, kept: torch.Tensor) -> None:
        """Drop all rows but these."""
        seat = self.seat[kept]  # where they sit until now
        hidden = 0  # columns that none of those who stay can see
        if self.prompts is None:
            self.row = self.seat = torch.arange(len(kept), device=kept.device)
            hidden = self.filled - int(self.position[seat].max())
            self.width, self.filled = self.width - hidden, self.filled - hidden
            self.longest -= hidden
            self.bias = None if self.bias is None else self.bias[seat, :, hidden:]
        else:
            desk = {prompt: i for i, prompt in enumerate(self.desks)}
            self._seat(self.source[kept])
            desk = torch.tensor([desk[prompt] for prompt in self.desks], device=kept.device)
            self.prompts = [[tensor[:, desk] for tensor in layer] for layer in self.prompts]
            self.bias = None if self.bias is None else self.bias[desk]
            seat = seat[self.row]
        self.position = self.position[seat]
        self._remake(len(seat), self.own[0][0].shape[2] - hidden, lambda new, old, _:
                     torch.index_select(old[:, :, hidden:], 1, seat, out=new))
        if self.prompts is not None:
            self._part()

    def close(self) -> None:
        """See `AnyRows`."""
        for tensor in sum(self.own, []):
            self.memory.give(tensor)


def choose(logits: torch.Tensor, uniform: torch.Tensor, temperature: float) -> torch.Tensor:
    """A token for each logits [..., vocabulary]: the largest, or the inverse of the cumulative
    distribution at a uniform number [...]."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
    threshold = uniform[..., None] * cumulative[..., -1:]
    chosen = torch.searchsorted(cumulative, threshold, right=True)[..., 0]
    return chosen.clamp(max=logits.shape[-1] - 1)


