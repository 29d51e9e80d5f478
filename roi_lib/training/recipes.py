"""The recipe of pre-training. Those of MFT and RARL belong to a world (`worlds`)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PretrainRecipe:
    """How the base model is made: Qwen2's architecture, tied embeddings, float32 weights."""

    hidden: int = 128  # width
    layers: int = 4  # blocks of attention and feed-forward
    heads: int = 4  # of the queries
    kv_heads: int = 2  # of the keys and values
    intermediate: int = 384  # width inside the feed-forward layers
    steps: int = 3_200  # optimizer steps; 0: the random start
    batch_tokens: int = 8_192  # padded tokens a step
    muon_lr: float = 0.02  # Muon's peak, for the matrices
    adamw_lr: float = 5e-3  # AdamW's peak, for everything else
    warmup: float = 0.02625  # share of the steps for linear warm-up
    hold: float = 0.4  # share of the steps before linear decay sets in
    alone: float = 0.5  # share of rows with a single problem
    styles: tuple[tuple[str, float], ...] = (  # (prompting style, share of rows)
        ("direct", 0.30), ("rated", 0.06), ("counted", 0.08), ("brief", 0.22),
        ("rated_brief", 0.05), ("counted_brief", 0.05), ("at_once", 0.04),
        ("plan_and_solve", 0.06), ("least_to_most", 0.14))
    longest_row: int = 512  # in tokens; longer ones are drawn again
    rows_at_once: int = 2_048  # rows sorted by length at a time
    log_every: int = 25  # steps between rows of the log
    save_every: int = 250  # steps between training states
    bf16: bool = True  # multiply in bfloat16 (the weights stay float32)
    seed: int = 0  # of weights and data

    def __post_init__(self) -> None:
        counts = (self.batch_tokens, self.rows_at_once, self.log_every, self.save_every)
        if min(*counts, self.steps + 1) < 1:
            raise ValueError("batch_tokens, rows_at_once, log_every and save_every must be at "
                             "least 1, steps at least 0")
