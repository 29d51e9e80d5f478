"""Worlds: every choice that differs between the pocket world and the paper's, as data.

A `World` says where problems come from, how a prompt reads, budgets, level edges, methods, and the
recipes of training. Functions take what they need from it; none asks which one it is. Notebook 00.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

TIERS = ("easy", "medium", "hard")
ORDERS = ("easy", "medium", "hard")
#: Rules of thumb that the learned allocation is compared with (see `rational.rule_policies`).
RULES = ("always_full", "always_brief", "skip_hard", "skip_hard_unless_last", "equal_share",
         "cheapest_first")
#: What a skipped problem carries in its box (paper, section on refusal learning).
SKIP_ANSWER = "NA"
TAG_OPEN, TAG_CLOSE = "<predicted_level>", "</predicted_level>"


@dataclass(frozen=True)
class Method:
    """One way of answering an exam."""

    checkpoint: str | None  # folder, name below data/, or hub id; None: reference solutions
    style: str  # key of World.prompts
    # Or "knapsack" (greedy); "exact" and "rule", whose Score follows from abilities (`rational`).
    strategy: str = "whole"
    charged: bool = False  # whether Greedy Knapsack pays for its prediction pass

    @property
    def tagged(self) -> bool:
        """Whether a level tag is asked for, and so must be paid."""
        return self.style == "roi"


def check_choice(name: str, value: str, known: Collection[str]) -> None:
    """Refuse a value that is not among the known ones, with a `ValueError` that lists them."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")


@dataclass(frozen=True)
class MFTRecipe:
    """How Meta-Cognitive Fine-Tuning is done. The paper leaves all of these open."""

    problems: int  # training problems sampled a tier (fewer where a source has fewer)
    styles: tuple[str, ...]  # prompting styles under which answers are sampled
    samples: int  # answers sampled a problem and style
    target: str  # which right answer is taught alone: shortest or median (by cost), or any of them
    exams: int  # rows with several problems, after one row for every problem alone
    combinations: int  # each the best of so many under its budget; 0: what is taught alone
    budgets: tuple[int, ...]  # that prompts of rows state
    sizes: tuple[tuple[int, int], ...]  # (number of problems, weight) of rows with several
    rows: int  # rows an optimizer step
    rows_at_once: int  # rows at a time on a device
    learning_rate: float  # AdamW's peak; linear warm-up and decay
    muon_rate: float  # Muon's peak, for the weight matrices; 0 leaves everything to AdamW
    tag_weight: float  # weight of a level's token in the loss, where any other token has 1
    max_length: int  # longest row in tokens; longer ones are left out and counted
    lora_rank: int  # rank of the adapters on every linear layer; 0 trains all weights
    bf16: bool  # multiply in bfloat16
    checkpointing: bool  # recompute activations in the backward pass, for less memory
    dev_exams: int  # unseen papers of the training split behind the log's accuracies
    card_papers: int  # unseen papers of the test split behind the model card; 0: no measurement
    log_every: int  # optimizer steps between rows of the log
    save_every: int  # optimizer steps between checkpoints; a multiple of log_every
    steps: int = -1  # stop after so many optimizer steps; -1: after all rows
    report_to: str = "none"  # or tensorboard, wandb, trackio, as transformers has it
    temperature: float = 1.0  # of the sampled answers
    seed: int = 0  # of problems, samples, rows and weights

    def __post_init__(self) -> None:
        check_choice("target", self.target, ("shortest", "median", "any"))
        if min(self.problems, self.samples, self.rows, self.rows_at_once, self.dev_exams,
               self.log_every, self.save_every) < 1 or self.exams < 0 or self.steps < -1:
            raise ValueError("problems, samples, rows, rows_at_once, dev_exams, log_every and "
                             "save_every must be at least 1, exams at least 0, steps at least -1")


@dataclass(frozen=True)
class TRLRecipe:
    """How TRL's GRPOTrainer spreads the update of RARL over a machine."""

    rows_at_once: int  # rollouts a forward pass and device
    lora_rank: int  # rank of the adapters on every linear layer; 0 trains all weights
    bf16: bool  # multiply in bfloat16
    checkpointing: bool  # recompute activations in the backward pass, for less memory
    vllm_memory: float = 0.3  # share of a GPU's memory for a vLLM in the trainer's own process
    report_to: str = "none"  # or tensorboard, wandb, trackio, as transformers has it


@dataclass(frozen=True)
class RARLRecipe:
    """How Rationality-Aware RL is done. The paper fixes reward and loss; the numbers are ours."""

    steps: int  # updates; each has fresh rollouts (on policy, one update a batch)
    exams: int  # exams a step
    rollouts: int  # responses to each exam: the group of Dr. GRPO
    budgets: tuple[int, ...]  # in tokens; the largest is the loss's normaliser
    budget_for: str  # who draws one: each exam, or each step for all, which compares no budgets
    learning_rate: float  # AdamW's, falling linearly to zero; too high a rate destroys the policy
    # (order, weight) of the exams
    orders: tuple[tuple[str, float], ...] = (("hard", 0.5), ("medium", 0.3), ("easy", 0.2))
    sizes: tuple[tuple[int, float], ...] = ((3, 1.0),)  # (number of problems, weight)
    temperature: float = 1.0  # of sampling, and of the log-probabilities
    reward: str = "level"  # right answer and level; answer: alone; skip_bonus: right skips, too
    skip_bonus: float = 0.1  # see reward
    scale: str = "none"  # none as in Dr. GRPO; std: divide by the group's deviation, as GRPO
    normalizer: str = "constant"  # constant as in Dr. GRPO; length: divide by a row's own, as GRPO
    cut: bool = True  # rollouts end at their budget; False: at twice the largest, or the world's
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    log_every: int = 10  # steps between printed lines
    save_every: int = 20  # steps between checkpoints
    seed: int = 0  # of papers, orders and rollouts
    trl: TRLRecipe | None = None  # for TRL's trainer; None: the library's own, for small models

    def __post_init__(self) -> None:
        check_choice("budget_for", self.budget_for, ("exam", "step"))
        check_choice("reward", self.reward, ("level", "answer", "skip_bonus"))
        check_choice("scale", self.scale, ("none", "std"))
        check_choice("normalizer", self.normalizer, ("constant", "length"))
        if self.rollouts < 2 or min(self.exams, self.log_every, self.save_every) < 1:
            raise ValueError("give at least 2 rollouts; exams, log_every, save_every of at least 1")
        if min(self.temperature, self.learning_rate, self.max_grad_norm) <= 0:
            raise ValueError("temperature, learning_rate and max_grad_norm must be above 0")
        if not self.budgets or not self.orders or self.steps < 0:
            raise ValueError("name at least one budget and one order; steps must be at least 0")


@dataclass(frozen=True)
class World:
    """One world of the method. Costs and budgets are in response tokens."""

    name: str
    budgets: tuple[int, ...]  # the hard budgets of the evaluation
    level_edges: tuple[int, ...]  # largest cost of Level-0, Level-1, ...; what follows is "skip"
    centroids: tuple[int, ...]  # the cost that Greedy Knapsack assumes for Level-0, Level-1, ...
    families: Mapping[str, tuple[str, ...]]  # tier -> its problem sources (families or datasets)
    header: str  # how problem i is announced, in the prompt and in the response
    header_pattern: str  # regular expression of a header in a response; group 1 is the number
    grader: str  # how answers are compared: "integer" or "math" (see `grading`)
    prompts: Mapping[str, str]  # style -> user message with {budget}, {n} and {problems}
    largest_budget: float  # that a prompt can state
    tokenizer: str  # default tokenizer: a folder below data/, or a hub id
    dtype: str  # of the torch engine; "auto": the checkpoint's. float64: the same tokens everywhere
    table_dtype: str  # of exam and sweep: float32 takes half the time, and may differ in a token
    methods: Mapping[str, Method]  # what the evaluation compares
    mft: MFTRecipe
    rarl: RARLRecipe
    #: Token of a tag -> word of the base that its embedding starts from; {}: the base knows both.
    tag_words: Mapping[str, str] = field(default_factory=dict)

    @property
    def skip_level(self) -> int:
        """The level that stands for "skip" (3 in both worlds)."""
        return len(self.level_edges)

    def level_of(self, cost: int) -> int:
        """Level of a cost in tokens; a cost above the last edge is at the skip level."""
        return sum(cost > edge for edge in self.level_edges)

    def method(self, name: str) -> Method:
        """The method of that name; `ValueError`: this world has none."""
        check_choice("method", name, self.methods)
        return self.methods[name]


def standard_methods(base: str, mft: str, rarl: str) -> dict[str, Method]:
    """The evaluation's methods, from a base model, the same after MFT, and after RARL."""
    return {
        "replay": Method(None, "direct"),
        "base": Method(base, "direct"),
        "brief": Method(base, "brief"),
        "plan_and_solve": Method(base, "plan_and_solve"),
        "least_to_most": Method(base, "least_to_most"),
        "mft": Method(mft, "roi"),
        "mft_greedy_knapsack": Method(mft, "roi", "knapsack"),
        "mft_greedy_knapsack_charged": Method(mft, "roi", "knapsack", charged=True),
        "rarl": Method(rarl, "roi"),
        **dict.fromkeys((*RULES, "best_rule"), Method(rarl, "roi", "rule")),
        "optimal": Method(rarl, "roi", "exact"),
    }


#: One number, said last: so what is learned of some budgets carries over to others.
_BUDGET = "\n{problems}\nBudget: {budget} tokens."
#: Budgets of training, without some in between; in equal ratios, for few tokens matter most (RARL).
TRAINED = tuple(b for b in range(40, 257) if b not in (72, 144, 208))
GEOMETRIC = tuple(sorted({round(40 * 6.4 ** (i / 149)) for i in range(150)} & {*TRAINED}))
POCKET = World(
    name="pocket",
    budgets=(64, 128, 256),
    # The first lies between what medium problems cost in brief and in full.
    level_edges=(24, 64, 128),
    centroids=(16, 40, 88),
    families={"easy": ("marbles", "shelves"), "medium": ("tram", "market"),
              "hard": ("residues", "rounds")},
    header="Q{i}.",
    header_pattern=r"Q(\d{1,3})\.",
    grader="integer",
    prompts={
        "direct": "Solve in order." + _BUDGET,
        "brief": "Answer in brief, in order." + _BUDGET,
        "at_once": "Answer at once, in order." + _BUDGET,
        "rated": "Rate each, then solve in order." + _BUDGET,
        "rated_brief": "Rate each, then answer in brief, in order." + _BUDGET,
        "counted": "Count down, then solve in order." + _BUDGET,
        "counted_brief": "Count down, then answer in brief, in order." + _BUDGET,
        "plan_and_solve": "Plan first, then solve in order." + _BUDGET,
        "least_to_most": "Rate first, then solve in order or skip." + _BUDGET,
        "roi": "Predict each level, then solve in order or skip." + _BUDGET,
    },
    largest_budget=320,  # that the base was trained under
    tokenizer="pocket-tokenizer",
    dtype="float64",
    table_dtype="float32",
    methods=standard_methods("pocket-base", "pocket-mft", "pocket-rarl"),
    mft=MFTRecipe(
        problems=1_200, styles=("direct", "brief"), samples=4, target="any",
        exams=14_000, combinations=100, budgets=TRAINED,
        sizes=((2, 2), (3, 8), (4, 2), (5, 2)), rows=32, rows_at_once=8,
        learning_rate=2.5e-3, muon_rate=0.006, tag_weight=5.0, max_length=1_024,
        lora_rank=0, bf16=True, checkpointing=False, dev_exams=63, card_papers=400, log_every=100,
        save_every=200),
    rarl=RARLRecipe(
        steps=340, exams=20, rollouts=12, budgets=GEOMETRIC, budget_for="exam", learning_rate=6e-4,
        orders=(("hard", 0.4), ("medium", 0.4), ("easy", 0.2)),
        sizes=((2, 1.0), (3, 4.0), (4, 1.0), (5, 1.0))),
    tag_words={TAG_OPEN: "(", TAG_CLOSE: ")", "Level-0": "easy", "Level-1": "medium",
               "Level-2": "hard", "Level-3": "skip"},
)

_EXAM_RULES = """\
You are sitting an exam of {n} math problems. All your answers together may use at most {budget} \
tokens; whatever comes after that is lost. Answer the problems in the given order and never go \
back. Open each answer with its heading, for example "### Problem 1", and put the final answer in \
\\boxed{{}}."""

_LEVEL_RULES = """ Right after each heading, predict what the problem will cost: \
<predicted_level>Level-0</predicted_level> for up to {} tokens, Level-1 for up to {}, Level-2 for \
up to {}. If it is not worth its tokens, write <predicted_level>Level-3</predicted_level> \
\\boxed{{{{NA}}}} and go on.

{{problems}}"""

PAPER = World(
    name="paper",
    budgets=(512, 1024),
    level_edges=(256, 512, 1024),
    centroids=(128, 384, 768),
    families={"easy": ("gsm8k",), "medium": ("math",), "hard": ("aime",)},
    header="### Problem {i}",
    header_pattern=r"(?mi)^\s{0,3}(?:#{1,6}\s*(?:\*\*)?|\*\*)\s*Problem\s+(\d{1,3})\b",
    grader="math",
    prompts={
        "direct": _EXAM_RULES + "\n\n{problems}",
        "brief": _EXAM_RULES + " Write as little as you can.\n\n{problems}",
        "plan_and_solve": _EXAM_RULES + """ Before the first answer, write a short plan: what \
each problem needs, and how many tokens you will give it. Then carry out the plan.

{problems}""",
        "least_to_most": _EXAM_RULES + """ Before the first answer, rate each problem as easy, \
medium or hard. Then answer; a problem that looks too hard for the budget may be skipped with \
\\boxed{{NA}}.

{problems}""",
        "roi": _EXAM_RULES + _LEVEL_RULES.format(256, 512, 1024),
    },
    largest_budget=float("inf"),
    tokenizer="gsm8k-bpe",
    dtype="auto",
    table_dtype="auto",
    methods=standard_methods("Qwen/Qwen2.5-1.5B-Instruct@989aa7980e4cf806f80c7fef2b1adb7bc71aa306",
                             "paper-mft", "paper-rarl"),
    mft=MFTRecipe(
        problems=3_000, styles=("direct",), samples=8, target="shortest", exams=6_000,
        combinations=30, budgets=(512, 1024), sizes=((2, 1), (3, 3)),
        rows=64, rows_at_once=4, learning_rate=1e-4, muon_rate=0.0,
        tag_weight=1.0, max_length=4_096, lora_rank=32, bf16=True, checkpointing=True,
        dev_exams=32, card_papers=100, log_every=20, save_every=40),
    rarl=RARLRecipe(
        steps=300, exams=32, rollouts=8, budgets=(512, 1024), budget_for="exam",
        learning_rate=2e-5, log_every=1,
        trl=TRLRecipe(rows_at_once=4, lora_rank=32, bf16=True, checkpointing=True)),
)

_SMALL_RULES = """\
Solve these {n} problems in order; all answers together may use at most {budget} tokens. Begin \
each answer with its heading, such as "### Problem 1". Do not repeat the problem: reason step by \
step, briefly, and put each final answer in \\boxed{{}}."""
#: The paper's world in small: a model of half a billion weights, for two cores or one small GPU.
SMALL = replace(
    PAPER, name="small", budgets=(512,), level_edges=(128, 256, 512), centroids=(64, 192, 384),
    # Such a model repeats what it read last: the problems come first, and are not to be repeated.
    prompts={style: "{problems}\n\n" + words.replace(_EXAM_RULES, _SMALL_RULES).replace(
        "\n\n{problems}", "") for style, words in (PAPER.prompts | {
            "roi": _EXAM_RULES + _LEVEL_RULES.format(128, 256, 512)}).items()},
    methods=standard_methods("Qwen/Qwen2.5-Coder-0.5B-Instruct", "small-mft", "small-rarl"),
    mft=replace(PAPER.mft, problems=60, samples=3, temperature=0.7, exams=240, budgets=(512,),
                rows=8, rows_at_once=2, learning_rate=3e-4, max_length=1_280, lora_rank=8,
                checkpointing=False, dev_exams=9, card_papers=0, log_every=20, save_every=20),
    rarl=replace(PAPER.rarl, steps=10, exams=8, rollouts=4, budgets=(512,), save_every=1,
                 trl=replace(PAPER.rarl.trl, rows_at_once=2, lora_rank=8)))
WORLDS = {world.name: world for world in (POCKET, PAPER, SMALL)}


def get_world(name: str) -> World:
    """The world of that name; `ValueError`: there is none."""
    check_choice("world", name, tuple(WORLDS))
    return WORLDS[name]
