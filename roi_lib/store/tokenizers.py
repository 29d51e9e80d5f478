"""Tokenizers made here: the pocket world's own, and a stand-in for the paper's world.

The pocket tokenizer knows whole words, numbers up to 99 and tags as one token each. It is a
word-level model of `tokenizers` in a `PreTrainedTokenizerFast`, so that transformers, vLLM and TRL
load it unchanged; its decoder puts the spaces back, so text and tokens round-trip.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from roi_lib.problems import MAX_NUMBER, NAMES, THINGS, is_generated
from roi_lib.store.files import write_folder
from roi_lib.store.sources import load_problems
from roi_lib.worlds import SKIP_ANSWER, TAG_CLOSE, TAG_OPEN, TIERS, World

#: One token: a tag, a level, an opening box, a header, a pair of digits, a word, or one sign.
#: Digits are paired from the right, so that 128 reads 1, 28.
TOKEN = (r"</?predicted_level>|Level-\d|\\boxed\{|Q\d+|\d{1,2}(?=(?:\d\d)*(?!\d))"
         r"|[A-Za-z]+|[^\sA-Za-z\d]")
CONTROL = ("<|pad|>", "<|unk|>", "<|im_start|>", "<|im_end|>")
#: Words of statements, plans and prompts, besides names and things.
WORDS = """
A After Each Find How Start The Then There add and appear are at boxes bought bus buys by coins
count does each fewer first for get has have how keep many mod modulo more multiply now number
numbers of off on pay positive remainder riders round rounds smallest sold starts subtract than
the there try with
Budget tokens Solve Plan Predict Rate Rating in order or skip solve then level user assistant
system
""".split()
SIGNS = list(".,:;?!+-*=≠{}()<>|/%'\"")
MAX_PROBLEMS = 8  # headers Q1 ... Q8
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """The tokenizer of a world of generated problems, 264 tokens for the pocket world; a
    `ValueError` where its prompts use other words."""
    words = [TAG_OPEN, TAG_CLOSE, *(f"Level-{k}" for k in range(world.skip_level + 1)), "\\boxed{",
             SKIP_ANSWER, *(f"Q{i}" for i in range(1, MAX_PROBLEMS + 1)),
             *map(str, range(MAX_NUMBER + 1)), *(f"0{i}" for i in range(10)), *SIGNS, *NAMES,
             *THINGS, *TIERS, *WORDS]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*CONTROL, *words]))}
    prompts = re.sub(r"{\w+}", "", " ".join(world.prompts.values()))
    if missing := set(re.findall("[A-Za-z]+", prompts)) - set(vocabulary):
        raise ValueError(f"the prompts use words that are no tokens: {', '.join(sorted(missing))}")
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), "removed", invert=True)
    join = [(r" (?=[.,:;?}])", ""), (r"(?<=\{) ", ""), (r" (?=</?predicted|Level-)", ""),
            (r" (?=Q\d+\.)", "\n")]
    core.decoder = decoders.Sequence([
        decoders.WordPiece(prefix="##", cleanup=False), decoders.Fuse(),
        *(decoders.Replace(Regex(pattern), text) for pattern, text in join)])
    return _wrap(core, unk_token="<|unk|>")


def _wrap(core: Tokenizer, **options) -> PreTrainedTokenizerFast:
    """A tokenizer with the control tokens and the chat template of Qwen's family."""
    pad, _, start, end = CONTROL
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=pad, eos_token=end, additional_special_tokens=[start],
        chat_template=CHAT_TEMPLATE, model_max_length=4096, clean_up_tokenization_spaces=False,
        **options)


def train_bpe(texts: Iterable[str], size: int = 4_096) -> PreTrainedTokenizerFast:
    """A lossless byte-level BPE of `size` tokens, digits single as in Qwen2.5. Trained on GSM8K's
    training split (MIT licence) it stands in for the paper world where no model's own tokenizer is
    at hand; its counts are higher than Qwen's, most of all for LaTeX."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(CONTROL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return _wrap(core)


def make_tokenizer(world: World, out: Path, root: Path | None = None) -> None:
    """Make a world's own tokenizer and save it in a folder of its own: in one with a Qwen2
    `config.json` transformers 5 ignores the pipeline of `tokenizer.json` and puts Qwen's in its
    place. `root`: see `sources.load_source`."""
    if is_generated(world):
        tokenizer = build_tokenizer(world)
    else:
        problems = load_problems(world.families["easy"][0], "easy", "train", root)
        tokenizer = train_bpe(f"{p.text}\n{p.solution}" for p in problems)
    write_folder(out, lambda folder: tokenizer.save_pretrained(folder))
