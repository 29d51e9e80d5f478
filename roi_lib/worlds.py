"""Worlds: every choice that differs between the pocket world and the paper's world, as data.

A `World` is one frozen object: where problems come from, how a prompt reads, the budgets, the
edges of the levels. Functions take what they need from it; none asks which world it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

#: The repository's own data folder (checkpoints, logs); `ROOT / "data"` of a checkout.
DATA = Path(__file__).resolve().parent.parent / "data"

TIERS = ("easy", "medium", "hard")
ORDERS = ("easy", "medium", "hard")
#: What a skipped problem carries in its box (paper, section on refusal learning).
SKIP_ANSWER = "NA"
TAG_OPEN, TAG_CLOSE = "<predicted_level>", "</predicted_level>"


@dataclass(frozen=True)
class Method:
    """One way of answering: a checkpoint under a prompting style.

    Attributes:
        checkpoint: a folder, a name below `data/`, or a hub id; None: reference solutions are
            played back instead of a model.
        style: key of `World.prompts`.
        way: how it goes about a paper (see `methods`): "whole", "knapsack", or "rational" for the
            bound that the checkpoint's own abilities allow.
        charged: whether Greedy Knapsack pays for its prediction pass out of the budget.
    """

    checkpoint: str | None
    style: str
    way: str = "whole"
    charged: bool = False

    @property
    def tagged(self) -> bool:
        """Whether a level tag is asked for, and so must be paid."""
        return self.style == "roi"


@dataclass(frozen=True)
class MFTRecipe:
    """How Meta-Cognitive Fine-Tuning is done. The paper leaves all of these open.

    Attributes:
        problems: training problems sampled a tier (fewer where a source has fewer).
        samples: answers sampled a problem, at temperature 1.
        keep: which right answer is taught: "shortest" or "median" (by cost).
        exams: rows with several problems, after one row for every problem alone.
        sizes: (number of problems, weight) of those rows.
        mix: weights of the tiers in those rows. A tier whose level hangs on its length wants more:
            the others' tags are soon learned, or cannot be.
        rows, rows_at_once: rows an optimizer step, and of these at a time on a device.
        learning_rate: AdamW's peak; linear warm-up and decay.
        muon_rate: Muon's peak, for the weight matrices; 0 leaves everything to AdamW.
        tag_weight: weight of a level's token in the loss, where any other token has 1.
        max_length: longest row in tokens; longer ones are left out and counted.
        lora_rank: rank of the adapters on every linear layer; 0 trains all weights.
        bf16: multiply in bfloat16.
        checkpointing: recompute activations in the backward pass, for less memory.
        dev_exams: unseen papers of the training split behind the log's accuracies.
        card_papers: unseen papers of the test split behind the model card; 0: none is measured.
        log_every, save_every: in optimizer steps; the second a multiple of the first, so that what
            is saved has been looked at.
    """

    problems: int
    samples: int
    keep: str
    exams: int
    sizes: tuple[tuple[int, int], ...]
    mix: tuple[float, float, float]
    rows: int
    rows_at_once: int
    learning_rate: float
    muon_rate: float
    tag_weight: float
    max_length: int
    lora_rank: int
    bf16: bool
    checkpointing: bool
    dev_exams: int
    card_papers: int
    log_every: int
    save_every: int
    seed: int = 0


@dataclass(frozen=True)
class TRLRecipe:
    """How TRL's GRPOTrainer spreads the update of RARL over a machine.

    Attributes:
        rows_at_once: rollouts a forward pass and device.
        lora_rank: rank of the adapters on every linear layer; 0 trains all weights.
        bf16: multiply in bfloat16.
        checkpointing: recompute activations in the backward pass, for less memory.
        vllm_memory: share of a GPU's memory for a vLLM in the trainer's own process.
    """

    rows_at_once: int
    lora_rank: int
    bf16: bool
    checkpointing: bool
    vllm_memory: float = 0.3


@dataclass(frozen=True)
class RARLRecipe:
    """How Rationality-Aware RL is done. The paper fixes reward and loss; the numbers are ours.

    Attributes:
        steps: updates; each has fresh rollouts (on policy, one update a batch).
        exams, rollouts: exams a step, and rollouts of each (the group of Dr. GRPO).
        budgets: taken in turn, one a step; the prompt states it. The largest one is the constant
            normaliser of the loss.
        learning_rate: of AdamW, constant, without weight decay. Too high a rate destroys the
            policy: accuracy falls and skipping dies out (see `diagnosis`).
        orders: (order, weight) of the exams.
        n_problems: problems an exam.
        temperature: of sampling, and of the log-probabilities.
        reward: see `rarl.problem_reward`; `skip_bonus` counts for the variant of that name only.
        scale, normalizer: see `rarl.advantages`, `rarl.policy_loss`. ("none", "constant") is
            Dr. GRPO, ("std", "length") is GRPO.
        max_grad_norm: gradients are clipped to this norm.
        log_every, save_every: steps between printed lines, and between checkpoints.
        keep: steps after which a copy of the model is kept, where the run comes so far; 0 is the
            start.
        trl: for TRL's trainer; None: the library's own, for one process and small models.

    Raises:
        ValueError: a choice that does not exist, or a number that cannot be.
    """

    steps: int
    exams: int
    rollouts: int
    budgets: tuple[int, ...]
    learning_rate: float
    orders: tuple[tuple[str, float], ...] = (("hard", 0.5), ("medium", 0.3), ("easy", 0.2))
    n_problems: int = 3
    temperature: float = 1.0
    reward: str = "level"
    skip_bonus: float = 0.1
    scale: str = "none"
    normalizer: str = "constant"
    max_grad_norm: float = 1.0
    log_every: int = 10
    save_every: int = 20
    keep: tuple[int, ...] = ()
    seed: int = 0
    trl: TRLRecipe | None = None

    def __post_init__(self) -> None:
        choices = {"reward": ("level", "answer", "skip_bonus"), "scale": ("none", "std"),
                   "normalizer": ("constant", "length")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, "
                                 f"not {getattr(self, name)!r}")
        if unknown := {order for order, _ in self.orders} - set(ORDERS):
            raise ValueError(f"unknown order {min(unknown)!r}; choose from {', '.join(ORDERS)}")
        if self.rollouts < 2 or min(self.exams, self.steps, self.log_every, self.save_every) < 1:
            raise ValueError("a group needs at least 2 rollouts; steps, exams, log_every and "
                             "save_every must be at least 1")
        if self.temperature <= 0 or self.learning_rate <= 0 or self.max_grad_norm <= 0:
            raise ValueError("temperature, learning_rate and max_grad_norm must be above 0")
        if not self.budgets or not self.orders:
            raise ValueError("name at least one budget and one order")
        if missed := [step for step in self.keep if step < 0]:
            raise ValueError(f"step {missed[0]} cannot be kept: the start is step 0")


@dataclass(frozen=True)
class World:
    """One world of the method. Costs and budgets are in response tokens.

    Attributes:
        name: "pocket" or "paper".
        budgets: the hard budgets of the evaluation.
        level_edges: largest cost of Level-0, Level-1, ...; the level after the last one is "skip".
        centroids: the cost that Greedy Knapsack assumes for Level-0, Level-1, ...
        families: tier -> names of its problem sources (families or dataset ids).
        header: how problem i is announced, in the prompt and in the response.
        header_pattern: regular expression of a header in a response; group 1 is the number.
        grader: how answers are compared (see `grading.GRADERS`).
        prompts: prompting style -> user message, with fields {budget}, {n} and {problems}.
        tokenizer: default tokenizer: a folder below `data/`, or a hub id.
        dtype: arithmetic of the torch engine; "auto" for the checkpoint's own. In float64 a seed
            gives the same tokens on every processor.
        table_dtype: the same for the commands `exam` and `sweep`. In float32 they take half the
            time, and one token in millions may fall otherwise on another processor.
        methods: name -> what the evaluation compares.
        drafts: whether its models write so much like the reference solutions, and so much the
            same under any budget, that these make good drafts (see `generation.Request`).
        mft: recipe of Meta-Cognitive Fine-Tuning.
        rarl: recipe of Rationality-Aware RL.
    """

    name: str
    budgets: tuple[int, ...]
    level_edges: tuple[int, ...]
    centroids: tuple[int, ...]
    families: Mapping[str, tuple[str, ...]]
    header: str
    header_pattern: str
    grader: str
    prompts: Mapping[str, str]
    tokenizer: str
    dtype: str
    table_dtype: str
    methods: Mapping[str, Method]
    drafts: bool
    mft: MFTRecipe
    rarl: RARLRecipe

    @property
    def skip_level(self) -> int:
        """The level that stands for "skip" (3 in both worlds)."""
        return len(self.level_edges)

    def level_of(self, cost: int) -> int:
        """Level of a cost in tokens; a cost above the last edge is at the skip level."""
        return sum(cost > edge for edge in self.level_edges)

    def method(self, name: str) -> Method:
        """The method of that name.

        Raises:
            ValueError: this world has none.
        """
        if name not in self.methods:
            known = ", ".join(self.methods)
            raise ValueError(f"unknown method {name!r}; world {self.name} has {known}")
        return self.methods[name]


POCKET = World(
    name="pocket",
    budgets=(64, 128),
    level_edges=(32, 64, 128),
    centroids=(16, 48, 96),
    families={
        "easy": ("comparison", "boxes"),
        "medium": ("bus", "shopping"),
        "hard": ("remainders", "cycle"),
    },
    header="Q{i}.",
    header_pattern=r"Q(\d+)\.",
    grader="integer",
    prompts={
        "direct": "Budget: {budget} tokens. Solve in order.\n{problems}",
        "plan_and_solve": "Budget: {budget} tokens. Plan first, then solve in order.\n{problems}",
        "least_to_most": "Budget: {budget} tokens. Rate first, then solve in order or skip.\n"
        "{problems}",
        "roi": "Budget: {budget} tokens. Predict each level, then solve in order or skip.\n"
        "{problems}",
    },
    tokenizer="pocket-tokenizer",
    dtype="float64",
    table_dtype="float32",
    methods={
        "replay": Method(None, "direct"),
        "base": Method("pocket-base", "direct"),
        "plan_and_solve": Method("pocket-base", "plan_and_solve"),
        "least_to_most": Method("pocket-base", "least_to_most"),
        "mft": Method("pocket-mft", "roi"),
        "mft_greedy_knapsack": Method("pocket-mft", "roi", "knapsack"),
        "mft_greedy_knapsack_charged": Method("pocket-mft", "roi", "knapsack", charged=True),
        "rarl": Method("pocket-rarl", "roi"),
        "optimal": Method("pocket-base", "direct", "rational"),
    },
    drafts=True,
    mft=MFTRecipe(
        problems=1_200, samples=4, keep="shortest", exams=16_000,
        sizes=((2, 10), (3, 28), (4, 2), (5, 1), (6, 1)), mix=(0.12, 0.72, 0.16), rows=32,
        rows_at_once=8, learning_rate=2.5e-3, muon_rate=0.01, tag_weight=10.0, max_length=1_024,
        lora_rank=0, bf16=True, checkpointing=False, dev_exams=63, card_papers=400, log_every=100,
        save_every=200),
    rarl=RARLRecipe(
        steps=200, exams=16, rollouts=16, budgets=(64, 128, 128), learning_rate=2e-4,
        orders=(("hard", 0.3), ("medium", 0.3), ("easy", 0.4)),
        keep=(0, 4, 8, 12, 16, 20, 40, 60, 100, 200)),
)

_EXAM_RULES = """\
You are sitting an exam of {n} math problems. All your answers together may use at most {budget} \
tokens; whatever comes after that is lost. Answer the problems in the given order and never go \
back. Open each answer with its heading, for example "### Problem 1", and put the final answer in \
\\boxed{{}}."""

PAPER = World(
    name="paper",
    budgets=(512, 1024),
    level_edges=(256, 512, 1024),
    centroids=(128, 384, 768),
    families={"easy": ("gsm8k",), "medium": ("math",), "hard": ("aime",)},
    header="### Problem {i}",
    header_pattern=r"(?m)^\s{0,3}#{1,6}\s*Problem\s+(\d{1,3})\b",
    grader="math",
    prompts={
        "direct": _EXAM_RULES + "\n\n{problems}",
        "plan_and_solve": _EXAM_RULES + """ Before the first answer, write a short plan: what \
each problem needs, and how many tokens you will give it. Then carry out the plan.

{problems}""",
        "least_to_most": _EXAM_RULES + """ Before the first answer, rate each problem as easy, \
medium or hard. Then answer; a problem that looks too hard for the budget may be skipped with \
\\boxed{{NA}}.

{problems}""",
        "roi": _EXAM_RULES + """ Right after each heading, predict what the problem will cost: \
<predicted_level>Level-0</predicted_level> for up to 256 tokens, Level-1 for up to 512, Level-2 \
for up to 1024. If it is not worth its tokens, write \
<predicted_level>Level-3</predicted_level> \\boxed{{NA}} and go on.

{problems}""",
    },
    tokenizer="gsm8k-bpe",
    dtype="auto",
    table_dtype="auto",
    methods={
        "replay": Method(None, "direct"),
        "base": Method("Qwen/Qwen2.5-1.5B-Instruct", "direct"),
        "plan_and_solve": Method("Qwen/Qwen2.5-1.5B-Instruct", "plan_and_solve"),
        "least_to_most": Method("Qwen/Qwen2.5-1.5B-Instruct", "least_to_most"),
        "mft": Method("paper-mft", "roi"),
        "mft_greedy_knapsack": Method("paper-mft", "roi", "knapsack"),
        "mft_greedy_knapsack_charged": Method("paper-mft", "roi", "knapsack", charged=True),
        "rarl": Method("paper-rarl", "roi"),
        "optimal": Method("Qwen/Qwen2.5-1.5B-Instruct", "direct", "rational"),
    },
    drafts=False,
    mft=MFTRecipe(
        problems=3_000, samples=8, keep="shortest", exams=6_000, sizes=((2, 1), (3, 3)),
        mix=(1.0, 1.0, 1.0), rows=64, rows_at_once=4, learning_rate=1e-4, muon_rate=0.0,
        tag_weight=1.0, max_length=4_096, lora_rank=32, bf16=True,
        checkpointing=True, dev_exams=32, card_papers=100, log_every=20,
        save_every=40),
    rarl=RARLRecipe(
        steps=300, exams=32, rollouts=8, budgets=(512, 1024), learning_rate=2e-5, log_every=1,
        trl=TRLRecipe(rows_at_once=4, lora_rank=32, bf16=True, checkpointing=True)),
)

WORLDS = {world.name: world for world in (POCKET, PAPER)}


def get_world(name: str) -> World:
    """The world of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in WORLDS:
        raise ValueError(f"unknown world {name!r}; choose from {', '.join(WORLDS)}")
    return WORLDS[name]
