"""Faster decoding for models built like Llama (Llama and Qwen2): same tokens, same interface.

    rotate, normalize, forward   the forward pass, with an attention of one's own
    LlamaDecoder                 rows of one batch, which share the keys and values of their prompts
    LlamaEngine                  `TorchEngine` with this decoder
    engine_for, load_engine      the one of the two that a model needs

A decoding step of a small model is bound by memory: it reads the keys and values of everything
before, in each layer. What makes it fast is what need not be read, copied or allocated.
"""

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import pad, rms_norm, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from roi_lib.generation import TorchEngine
from roi_lib.store.checkpoints import load_model


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of Llama's kind: the halves of a head are the two coordinates.

    Args:
        x: [rows, tokens, heads, head_dim].
    """
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
    """The forward pass of models built like Llama, with an attention of one's own.

    The projections are the model's own modules, so new weights and adapters count at once.

    Args:
        ids, position: token ids and their positions, [rows, tokens].
        attend: of the number of a layer, its scaled queries, its keys and values, all [rows,
            tokens, heads, head_dim]; returns what the queries gather.
        last: the column of each row's last token, [rows]; only its logits are wanted, so in the
            last layer no others go further than attention.

    Returns:
        Logits, [rows, vocabulary].
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
        mixed = attend(i, rotate(query, *scaled), rotate(key, cos, sin), value).flatten(2)
        if i == len(body.layers) - 1:
            rows = torch.arange(len(x), device=x.device)
            x, mixed = x[rows, last], mixed[rows, last]
        x = x + attention.o_proj(mixed)
        x = x + block.mlp(normalize(block.post_attention_layernorm, x))
    return head(normalize(body.norm, x))


def read_prompts(model, prompts: Sequence[tuple[int, ...]], pad_id: int) -> tuple:
    """Read prompts in one pass, padded on the right, where causal attention never looks.

    Returns:
        Logits after each prompt, [prompts, vocabulary], and for each prompt its keys and values:
        a pair a layer, [heads, tokens, head_dim].
    """
    lengths = [len(prompt) for prompt in prompts]
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True,
                       padding_value=pad_id).to(model.device)
    position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    cache = []

    def attend(_, query, key, value):
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        cache.append((key, value))
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0,
                                             enable_gqa=query.shape[1] != key.shape[1])
        return mixed.transpose(1, 2)

    logits = forward(model, ids, position, attend, torch.tensor(lengths, device=ids.device) - 1)
    return logits, [[(key[i, :, :n], value[i, :, :n]) for key, value in cache]
                    for i, n in enumerate(lengths)]


class LlamaDecoder:
    """Rows of one batch with a forward of our own; arguments and `logits` as in `CachedDecoder`.

    - Rows of one prompt read one copy of its keys and values. They form *prompt groups* of equally
      many slots, so that the queries of a group meet its prompt in one matrix product. A slot that
      stays empty repeats another row of its group, and nobody looks at its result.
    - The responses' keys and values lie in memory without gaps, [heads, slots, tokens, head_dim].
      There is room for a few tokens more, hidden until they come; then it is enlarged. In a buffer
      of the final size each row is followed by unused space, and where all of it exceeds the
      processor's caches, reading across these gaps costs far more than what is copied here.
    """

    #: Prompt tokens read at a time: few enough for a processor's caches.
    READ_TOKENS = 2_048
    #: Slots are at most this many times the rows.
    SLOTS_PER_ROW = 1.125
    #: Tokens by which the room for responses grows.
    GROWTH = 32

    def __init__(self, model, prompts: Sequence[tuple[int, ...]], longest: int, pad_id: int):
        place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        source = torch.tensor([place[prompt] for prompt in prompts], device=model.device)
        distinct, self.width = list(place), max(map(len, place))
        at_once = max(1, self.READ_TOKENS // self.width)
        read = [read_prompts(model, distinct[i : i + at_once], pad_id)
                for i in range(0, len(distinct), at_once)]
        self.model, self.longest, self.filled = model, longest, 0
        self.logits = torch.cat([logits for logits, _ in read])[source]
        self._arrange(source)
        length = torch.tensor(list(map(len, distinct)), device=source.device)
        self.position = length[source[self.row]]
        hidden = torch.arange(self.width, device=source.device) >= length[self.group][:, None]
        self.bias = torch.zeros(hidden.shape, dtype=model.dtype, device=source.device)
        self.bias = self.bias.masked_fill_(hidden, -torch.inf)[:, None]
        caches = [cache for _, some in read for cache in some]
        self.prompts = [[self._side_by_side([pair[i] for pair in layer]) for i in (0, 1)]
                        for layer in zip(*caches, strict=True)]
        self.own = [[tensor.new_empty(len(tensor), len(self.row), 0, tensor.shape[-1])
                     for tensor in layer] for layer in self.prompts]

    def _side_by_side(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """What all prompts have of a layer, [heads, tokens, head_dim] each, in one tensor,
        [heads, groups, width, head_dim]."""
        heads, _, size = tensors[0].shape
        target = tensors[0].new_zeros(heads, len(self.group), self.width, size)
        for i, prompt in enumerate(self.group.tolist()):
            target[:, i, : tensors[prompt].shape[1]] = tensors[prompt]
        return target

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
        slot = self.slot[rows]  # where they lie until now
        place = {prompt: i for i, prompt in enumerate(self.group.tolist())}
        self._arrange(self.source[rows])
        group = torch.tensor([place[prompt] for prompt in self.group.tolist()], device=rows.device)
        slot = slot[self.row]
        self.position, self.bias = self.position[slot], self.bias[group]
        for places, layers in ((group, self.prompts), (slot, self.own)):
            for layer in layers:
                layer[:] = [tensor.index_select(1, places) for tensor in layer]


class LlamaEngine(TorchEngine):
    """`TorchEngine` for models built like Llama, several times faster on a processor."""

    Decoder = LlamaDecoder
    #: `config.model_type` of the architectures whose layers `forward` computes.
    ARCHITECTURES = ("llama", "qwen2")

    @classmethod
    def fits(cls, config) -> bool:
        """Whether `forward` is that of the model: known layers, no sliding window."""
        layers = getattr(config, "layer_types", None) or ["full_attention"]
        return config.model_type in cls.ARCHITECTURES and set(layers) == {"full_attention"}


def engine_for(model, tokenizer, **options) -> TorchEngine:
    """The torch engine of a model: a `LlamaEngine` where it fits."""
    kind = LlamaEngine if LlamaEngine.fits(model.config) else TorchEngine
    return kind.of(model, tokenizer, **options)


def load_engine(checkpoint: str, tokenizer, dtype: str, **options) -> TorchEngine:
    """The same of a checkpoint, on a GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return engine_for(load_model(checkpoint, dtype).to(device), tokenizer, **options)
