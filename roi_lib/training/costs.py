"""What a model costs on a device, as formulas: numbers, FLOPs, bytes, seconds.

    Device, DEVICES                     what a device can do, and what our code gets of it
    Shape, read_shape                   sizes of a model built like Llama
    parameters, adapters                how many numbers it has; how many LoRA adds
    forward_flops, training_flops       FLOPs a token
    kv_bytes, step_seconds              decoding: what a token leaves behind; one step
    decoding_memory, training_memory    bytes at most; `check_memory` says what would fit

One process on one device; padding is not counted. A `size` is bytes a number, 2 or 4."""

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass

GIB = 2**30
USABLE = 0.9  # share of a device's memory; libraries and gaps take the rest
TILE = 4_096 * 32_768  # logits that TRL's trainers hold at a time: tokens x words


@dataclass(frozen=True)
class Device:
    """What a device can do at best, and the shares of it that our code gets."""

    flops16: float  # FLOP/s of dense matrix products in bfloat16
    flops32: float  # and in float32, as torch multiplies by default (no TF32)
    bandwidth: float  # bytes/s of its memory
    memory: float  # bytes
    # Large trainings report 0.38 (Llama 3) to 0.46 (PaLM); short rows and adapters do worse.
    arithmetic: float = 0.35
    reading: float = 0.6  # eager kernels write and read again between any two operations
    block_seconds: float = 4e-4  # to start some 40 kernels: a block of the model in a decoding step

    def speed(self, size: int) -> float:
        """FLOP/s that our code gets."""
        return self.arithmetic * (self.flops16 if size == 2 else self.flops32)


#: NVIDIA: datasheets of T4 (in float16: it has no bfloat16), A100 80GB SXM and H100 SXM (half of
#: what it does with sparsity); Ada architecture whitepaper for the RTX 4090 (sums in float32).
DEVICES = {
    # No peaks, but what was measured on two cores: `small` in bfloat16 (matrix units), `pocket` in
    # float32; larger matrices do better. 16 GiB are an assumption.
    "cpu2": Device(2.5e11, 4e10, 5e9, 16 * GIB, arithmetic=1.0, reading=1.0, block_seconds=0.0),
    "t4": Device(65e12, 8.1e12, 320e9, 15 * GIB),
    "4090": Device(165.2e12, 82.6e12, 1_008e9, 24 * GIB),
    "a100": Device(312e12, 19.5e12, 2_039e9, 80 * GIB),
    "h100": Device(989.4e12, 66.9e12, 3_350e9, 80 * GIB)}
#: Sizes of a model; `tied`: one matrix embeds tokens and gives logits; `bias`: of queries, keys and
#: values; `size`: of a number in its checkpoint.
Shape = namedtuple("Shape", "hidden layers heads kv_heads head_size intermediate vocab tied bias "
                            "size")


def read_shape(config) -> Shape:
    """From a model's config; `ValueError`: of another family, or with biases that Llama lacks."""
    c, qwen = config, config.model_type == "qwen2"
    if not qwen and (c.model_type != "llama" or c.attention_bias or c.mlp_bias):
        raise ValueError("costs are known of models like qwen2 and llama (without biases), not of "
                         f"this {c.model_type}; name another model")
    head_size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return Shape(c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads,
                 head_size, c.intermediate_size, c.vocab_size, c.tie_word_embeddings, qwen,
                 2 if "16" in str(c.dtype) else 4)


def matrices(s: Shape) -> list[tuple[int, int]]:
    """(inputs, outputs) of a block's matrices: q, k, v, o, gate, up, down."""
    wide, narrow = s.heads * s.head_size, s.kv_heads * s.head_size
    return [(s.hidden, wide), (s.hidden, narrow), (s.hidden, narrow), (wide, s.hidden),
            (s.hidden, s.intermediate), (s.hidden, s.intermediate), (s.intermediate, s.hidden)]


def parameters(s: Shape) -> int:
    """Numbers of a model: matrices, biases and two norms a block; a last norm; embeddings."""
    biases = sum(outputs for _, outputs in matrices(s)[:3]) if s.bias else 0
    block = sum(i * o for i, o in matrices(s)) + biases + 2 * s.hidden
    return s.layers * block + s.hidden + (2 - s.tied) * s.vocab * s.hidden


def adapters(s: Shape, rank: int) -> int:
    """Numbers of LoRA adapters on every matrix of the blocks: rank x (inputs + outputs) each."""
    return s.layers * sum(rank * (i + o) for i, o in matrices(s))


def forward_flops(s: Shape, context: float, scored: float = 1.0) -> float:
    """FLOPs of a forward pass for one token: a product and a sum for each number of a matrix, and
    in attention, twice (queries x keys, weights x values), for each token of its `context`;
    `scored`: share of the tokens that get logits."""
    attention = 2 * s.layers * s.heads * s.head_size * context
    blocks = s.layers * sum(i * o for i, o in matrices(s))
    return 2 * (blocks + attention + scored * s.vocab * s.hidden)


def training_flops(s: Shape, context: float, scored: float = 1.0, lora_rank: int = 0,
                   checkpointing: bool = False) -> float:
    """FLOPs of one token in an update. Backward costs a forward pass for the gradients of what came
    in, and another for those of the weights: of the adapters alone, where there are any.
    Checkpointing repeats the forward pass."""
    passes = 2 + (lora_rank == 0) + checkpointing
    return passes * forward_flops(s, context, scored) + 6 * adapters(s, lora_rank)


def kv_bytes(s: Shape, size: int) -> int:
    """Bytes of one token's keys and values."""
    return 2 * s.layers * s.kv_heads * s.head_size * size


def step_seconds(s: Shape, device: Device, size: int, rows: float, context: float,
                 cached: float) -> float:
    """Time of a decoding step of `rows`, each after `context` tokens, `cached` of them read for it
    alone. What takes longest hides the rest: arithmetic; reading the weights once, the caches, and
    to sample each logit in float64, some eight times; starting kernels."""
    read = size * parameters(s) + rows * (cached * kv_bytes(s, size) + 64 * s.vocab)
    return max(rows * forward_flops(s, context) / device.speed(size),
               read / (device.reading * device.bandwidth), s.layers * device.block_seconds)


def decoding_memory(s: Shape, size: int, cached: float, max_rows: int, beside: float = 0) -> float:
    """Bytes of weights, caches of `cached` tokens a row, and logits with two copies in float64 to
    sample from; `beside`: what else the process holds."""
    row = cached * kv_bytes(s, size) + (size + 16) * s.vocab
    return size * parameters(s) + max_rows * row + beside


def state_bytes(s: Shape, lora_rank: int) -> int:
    """Bytes of gradient and Adam's two states of all that is trained, in float32, and of adapters
    themselves."""
    return 16 * adapters(s, lora_rank) if lora_rank else 12 * parameters(s)


def training_memory(s: Shape, length: float, rows_at_once: int, lora_rank: int, bf16: bool,
                    checkpointing: bool, tiled: bool = True, beside: float = 0) -> float:
    """Bytes of an update on rows of `length` tokens: weights, `state_bytes`, activations, and
    logits: `tiled` as TRL has them, or whole in float32 with their log-softmax and a gradient of
    each; `beside`: what else the process holds."""
    numbers, size, tokens = parameters(s), 2 if bf16 else 4, rows_at_once * length
    # in float32, with copies in bfloat16 for the backward pass; below adapters these copies alone
    weights = numbers * (4 if not bf16 else 2 if lora_rank else 6)
    # of a block: inputs of six matrices and queries; keys and values; gate, its activation, up and
    # their product; in float32 what either norm takes in and makes of it
    block = size * (7 * s.hidden + 2 * s.kv_heads * s.head_size + 4 * s.intermediate)
    block += 16 * s.hidden
    kept = 4 * s.hidden * s.layers + block if checkpointing else s.layers * block
    logits = TILE * size if tiled else 16 * s.vocab * tokens
    return weights + state_bytes(s, lora_rank) + tokens * kept + logits + beside


def check_memory(stage: str, need: Callable[..., float], memory: float, **settings) -> None:
    """Refuse, in a sentence with what would fit, a stage whose `need(**settings)` bytes are too
    many for a device of `memory` bytes, with a `ValueError`. `settings` are what may change: first
    the number of rows, `rows_at_once` of a recipe or `max_rows` of an engine; then `lora_rank` and
    `checkpointing`, where `need` takes them."""
    def fits(way: dict) -> bool:
        return bool(need(**settings | way) <= USABLE * memory)

    if fits({}):
        return
    (name, rows), needed = next(iter(settings.items())), need(**settings)
    fewer = [{name: rows >> k} for k in range(1, rows.bit_length())]
    other = [{key: value} for key, value in (("lora_rank", 32), ("checkpointing", True))
             if not settings.get(key, True)]
    ways = [*filter(fits, fewer)][:1] + [*filter(fits, other)]
    every = {key: value for way in [{name: 1}, *other] for key, value in way.items()}
    ways = ways or [*filter(fits, [every])]
    words = [" with ".join(f"{key} {value}" for key, value in way.items()) for way in ways]
    words += [device for device, d in DEVICES.items() if d.memory > memory
              and needed <= USABLE * d.memory]
    raise ValueError(f"{stage} needs {needed / GIB:.1f} GiB, and of this device's "
                     f"{memory / GIB:.0f} only {USABLE * memory / GIB:.1f} are to be had; what "
                     f"would fit: {', or '.join(words) or 'nothing that is known here'}")
