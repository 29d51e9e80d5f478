"""Faster decoding for models built like Llama (Llama and Qwen2): same tokens, same interface.

A decoding step of a small model is bound by memory: it reads the keys and values of everything
before, in each layer. What makes it fast is what need not be read, copied or allocated."""

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import pad, rms_norm, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from roi_lib.generation import TorchEngine, sample_token
from roi_lib.store.checkpoints import check_tokenizer

BLOCK = 128  # tokens


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding as in Llama, of [rows, tokens, heads, head_dim], half by half."""
    half = x.shape[-1] // 2
    rotated = x * cos
    rotated[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return rotated


def normalize(norm, x: torch.Tensor) -> torch.Tensor:
    """Root-mean-square norm in the precision of `x` (transformers goes through float32)."""
    return rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def forward(model, ids: torch.Tensor, position: torch.Tensor, attend: Callable,
            last: torch.Tensor) -> torch.Tensor:
    """Logits [rows, vocabulary] after the tokens in the columns `last` [rows], from token ids and
    their positions [rows, tokens], with the model's own modules: new weights and adapters count.
    `attend(layer, queries, keys, values)`, all [rows, tokens, heads, head_dim] and the queries
    scaled, returns what the queries gather."""
    body, head = model.get_decoder(), model.get_output_embeddings()
    x = body.embed_tokens(ids)
    cos, sin = (t[:, :, None] for t in body.rotary_emb(x, position))
    size = cos.shape[-1]
    scaled = cos * size**-0.5, sin * size**-0.5
    for i, block in enumerate(body.layers):
        attention, y = block.self_attn, normalize(block.input_layernorm, x)
        query, key, value = (project(y).unflatten(-1, (-1, size)) for project in (
            attention.q_proj, attention.k_proj, attention.v_proj))
        mixed = attend(i, rotate(query, *scaled), rotate(key, cos, sin), value).flatten(2)
        if i == len(body.layers) - 1:  # no other token's logits are wanted
            rows = torch.arange(len(x), device=x.device)
            x, mixed = x[rows, last], mixed[rows, last]
        x = x + attention.o_proj(mixed)
        x = x + block.mlp(normalize(block.post_attention_layernorm, x))
    return head(normalize(body.norm, x))


def read_prompts(model, prompts: Sequence[tuple[int, ...]], width: int, pad_id: int) -> tuple:
    """Logits after each prompt, [prompts, vocabulary], and a pair of keys and values for each
    layer, [prompts, width, heads, head_dim]; prompts are padded on the right, where causal
    attention never looks."""
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True,
                       padding_value=pad_id).to(model.device)
    position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=ids.device)
    cache = []

    def attend(_, query, key, value):
        cache.append([pad(t, (0, 0, 0, 0, 0, width - ids.shape[1])) for t in (key, value)])
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0,
                                             enable_gqa=query.shape[1] != key.shape[1])
        return mixed.transpose(1, 2)

    return forward(model, ids, position, attend, last), cache


class LlamaDecoder:
    """Rows of one batch with a forward of our own; arguments and `logits` as in `CachedDecoder`.

    - Rows of one prompt form *prompt groups* of equally many slots, whose queries meet one copy of
      its keys and values in one matrix product. A slot that stays empty repeats another row of its
      group, and nobody looks at its result.
    - The responses' keys and values, [heads, slots, tokens, head_dim], have hidden room for a few
      tokens more, and are copied where it is used up. A buffer of the final size has long gaps:
      once it exceeds the processor's caches, reading across these costs more than the copies."""

    READ_TOKENS = 2_048  # prompt tokens read at a time: few enough for a processor's caches
    SLOTS_PER_ROW = 1.125  # slots are at most this many times the rows
    GROWTH = 32  # tokens by which the room for responses grows

    def __init__(self, model, prompts: Sequence[tuple[int, ...]], longest: int, pad_id: int):
        place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        source = torch.tensor([place[prompt] for prompt in prompts], device=model.device)
        distinct, self.width = list(place), max(map(len, place))
        at_once = max(1, self.READ_TOKENS // self.width)
        logits, caches = zip(*(read_prompts(model, distinct[i : i + at_once], self.width, pad_id)
                               for i in range(0, len(distinct), at_once)), strict=True)
        self.model, self.longest, self.filled = model, longest, 0
        self.logits = torch.cat(logits)[source]
        self._arrange(source)
        length = torch.tensor(list(map(len, distinct)), device=source.device)
        self.position = length[source[self.row]]
        hidden = torch.arange(self.width, device=source.device) >= length[self.group][:, None]
        self.bias = torch.where(hidden, -torch.inf, 0.0).to(model.dtype)[:, None]
        self.prompts = [[torch.cat(tensors).permute(2, 0, 1, 3).index_select(1, self.group)
                         for tensors in zip(*layer, strict=True)]  # [heads, groups, width, size]
                        for layer in zip(*caches, strict=True)]
        self.own = [[tensor.new_empty(len(tensor), len(self.row), 0, tensor.shape[-1])
                     for tensor in layer] for layer in self.prompts]

    def _arrange(self, source: torch.Tensor) -> None:
        """Give rows of these prompts, [rows], their slots: sets the prompt of each group, the row
        of each slot and the slot of each row."""
        rows_of: dict[int, list[int]] = {}
        for row, prompt in enumerate(source.tolist()):
            rows_of.setdefault(prompt, []).append(row)
        slots = max(map(len, rows_of.values()))  # of a group: as many as leave few of them empty
        while slots * sum(-(-len(rows) // slots) for rows in rows_of.values()) > (
                self.SLOTS_PER_ROW * len(source)):
            slots -= 1
        groups = [(prompt, rows[i : i + slots])
                  for prompt, rows in rows_of.items() for i in range(0, len(rows), slots)]
        row_of_slot = [row for _, rows in groups for row in rows + rows[:1] * (slots - len(rows))]
        slot_of_row = {row: slot for slot, row in enumerate(row_of_slot)}
        self.source, self.group, self.row, self.slot = source, *(
            torch.tensor(numbers, device=source.device) for numbers in (
                [prompt for prompt, _ in groups], row_of_slot,
                [slot_of_row[row] for row in range(len(source))]))

    def _attend(self, layer: int, query, key, value) -> torch.Tensor:
        """One query a slot over its prompt and its own response; see `forward`."""
        (prompt_keys, prompt_values), (keys, values) = self.prompts[layer], self.own[layer]
        keys[:, :, self.filled] = key[:, 0].transpose(0, 1)
        values[:, :, self.filled] = value[:, 0].transpose(0, 1)
        heads, slots, tokens, size = keys.shape
        query = query.view(slots, heads, -1, size).transpose(0, 1).contiguous()
        on_prompt = query.view(heads, len(self.group), -1, size) @ prompt_keys.transpose(-1, -2)
        on_prompt += self.bias
        on_own = query @ keys.transpose(-1, -2)
        on_own[..., self.filled + 1 :] = -torch.inf
        scores = torch.cat((on_prompt.view(heads, slots, -1, self.width), on_own), -1)
        on_prompt, on_own = torch.softmax(scores, -1).split([self.width, tokens], -1)
        mixed = on_prompt.reshape(heads, len(self.group), -1, self.width) @ prompt_values
        mixed = mixed.view(query.shape) + on_own @ values
        return mixed.transpose(0, 1).flatten(1, 2)[:, None]

    def step(self, token: torch.Tensor) -> torch.Tensor:
        """Logits after one more token a row, [rows, vocabulary]."""
        if self.filled == self.own[0][0].shape[2]:
            room = min(self.GROWTH, self.longest - self.filled)
            for layer in self.own:  # zeros, although hidden: 0 times a NaN would show
                layer[:] = [pad(tensor, (0, 0, 0, room)) for tensor in layer]
        logits = forward(self.model, token[self.row][:, None], self.position[:, None],
                         self._attend, torch.zeros_like(self.row))
        self.filled, self.position = self.filled + 1, self.position + 1
        return logits[self.slot]

    def select(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone, in this sequence; a row may come several times."""
        lay, slots = self.slot[rows], len(self.row) // len(self.group)  # where they lie until now
        self._arrange(self.source[rows])
        slot = lay[self.row]
        group = slot[:: len(slot) // len(self.group)] // slots
        self.position, self.bias = self.position[slot], self.bias[group]
        for places, layers in ((group, self.prompts), (slot, self.own)):
            for layer in layers:
                layer[:] = [tensor.index_select(1, places) for tensor in layer]


def sample_in_blocks(logits: torch.Tensor, uniform: torch.Tensor,
                     temperature: float) -> torch.Tensor:
    """`sample_token` for half precision, [rows, vocabulary]: first a block of tokens, then one in
    it. A large vocabulary takes a third of the time so, which is half of a step's."""
    if temperature == 0 or logits.dtype.itemsize > 2:
        return sample_token(logits, uniform, temperature)
    weights = torch.softmax(logits.float() / temperature, -1)
    if rest := -weights.shape[-1] % BLOCK:
        weights = pad(weights, (0, rest))
    blocks = weights.unflatten(-1, (-1, BLOCK))
    sums, rows = blocks.sum(-1).double(), torch.arange(len(blocks), device=blocks.device)
    ends, below = sums.cumsum(-1), 1 - 1e-9  # below the sum: a token of no weight is never chosen
    place = uniform[:, None].clamp(max=below) * ends[:, -1:]
    block = torch.searchsorted(ends, place, right=True)
    inner = blocks[rows, block[:, 0]].double().cumsum(-1)
    place = torch.minimum(place - (ends - sums).gather(1, block), inner[:, -1:] * below)
    return (block * BLOCK + torch.searchsorted(inner, place, right=True))[:, 0]


class LlamaEngine(TorchEngine):
    """`TorchEngine` for models built like Llama, several times faster on a processor."""

    Decoder = LlamaDecoder
    sample = staticmethod(sample_in_blocks)


def engine_for(model, tokenizer, **options) -> TorchEngine:
    """The torch engine of a model: a `LlamaEngine` where `forward` is that of the model (known
    layers, no sliding window); see `check_tokenizer`."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # adapters count
    config = model.config
    check_tokenizer(config, tokenizer, model.name_or_path or "the model")
    fits = config.model_type in ("llama", "qwen2") and set(
        getattr(config, "layer_types", None) or ()) <= {"full_attention"}
    return (LlamaEngine if fits else TorchEngine).of(model, tokenizer, **options)
