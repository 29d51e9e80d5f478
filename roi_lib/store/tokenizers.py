"""Tokenizers made here: the pocket world's own, and a stand-in for the paper's world.

The pocket tokenizer knows whole words, numbers up to 320 and tags as one token each. Transformers,
vLLM and TRL load it unchanged; its decoder puts the spaces back, so that text round-trips."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from roi_lib.problems import MAX_NUMBER, NAMES, THINGS, is_generated
from roi_lib.store.files import check_replaceable, write_folder
from roi_lib.store.sources import load_problems
from roi_lib.worlds import SKIP_ANSWER, TAG_CLOSE, TAG_OPEN, TIERS, World

#: A tag, a level, a box, a header, a number up to 320, a single digit of a larger one, a word, or a
#: sign.
TOKEN = (r"</?predicted_level>|Level-\d|\\boxed\{|Q\d+"
         r"|(?<!\d)(?:320|3[01]\d|[12]\d\d|[1-9]?\d)(?!\d)|\d"
         r"|[A-Za-z]+|[^\sA-Za-z\d]")
CONTROL = ("<|pad|>", "<|unk|>", "<|im_start|>", "<|im_end|>")
#: Words of statements, plans and prompts, besides names and things.
WORDS = """A a add and Answer answer are assistant at bought brief Budget buys by coins Count does
down each fewer Find first for get has have How how in is last level makes many mod modulo more
multiple Multiply multiply now number numbers of off on once or order pay Plan Predict Rate Rating
remainder riders rounds row shelves skip smallest sold Solve solve Start starts stops subtract
system than that The the Then then There there times tokens tram try user What with""".split()
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """The tokenizer of a world of generated problems, up to 8 an exam; 485 tokens for `POCKET`."""
    words = [*CONTROL, TAG_OPEN, TAG_CLOSE, *(f"Level-{k}" for k in range(world.skip_level + 1)),
             "\\boxed{", SKIP_ANSWER, *(f"Q{i}" for i in range(1, 9)),
             *map(str, range(MAX_NUMBER + 1)), *".,:;?!+-*=≡{}()<>|/%'\"",
             *NAMES, *THINGS, *TIERS, *WORDS]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), "removed", invert=True)
    join = {r" (?=[.,:;?})])": "", r"(?<=[{(]) ": "", r" (?=</?predicted|Level-)": "",
            r" (?=Q\d+\.)": "\n"}
    core.decoder = decoders.Sequence([
        decoders.WordPiece(prefix="##", cleanup=False), decoders.Fuse(),
        *(decoders.Replace(Regex(pattern), text) for pattern, text in join.items())])
    return _wrap(core, unk_token="<|unk|>")


def _wrap(core: Tokenizer, **options) -> PreTrainedTokenizerFast:
    """A tokenizer with the control tokens and the chat template of Qwen's family."""
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=CONTROL[0], eos_token=CONTROL[3],
        additional_special_tokens=[CONTROL[2]], chat_template=CHAT_TEMPLATE,
        model_max_length=4096, clean_up_tokenization_spaces=False, **options)


def train_bpe(texts: Iterable[str], size: int = 4_096) -> PreTrainedTokenizerFast:
    """A lossless byte-level BPE of `size` tokens, digits single as in Qwen2.5: a stand-in where no
    model's own tokenizer is at hand. Its counts are higher than Qwen's, most of all for LaTeX."""
    core, level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), level])
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(CONTROL), show_progress=False,
        initial_alphabet=level.alphabet()))
    return _wrap(core)


def make_tokenizer(world: World, out: Path, root: Path | None = None) -> None:
    """Save a world's own tokenizer in a folder of its own: in one with a Qwen2 `config.json`
    transformers 5 ignores its pipeline and takes Qwen's. `root`: see `sources.load_source`."""
    check_replaceable(out)
    tokenizer = build_tokenizer(world) if is_generated(world) else train_bpe(
        f"{problem.text}\n{problem.solution}"  # for the paper's world GSM8K's (MIT licence)
        for problem in load_problems(world.families["easy"][0], "easy", "train", root))
    write_folder(out, lambda folder: tokenizer.save_pretrained(folder))
