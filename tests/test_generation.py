"""The budgeted generator: budgets hold, tokens agree with transformers, seeds decide."""

import copy
import dataclasses
import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from roi_lib.checkpoints import load_model
from roi_lib.decoding import AnyRows, LlamaRows
from roi_lib.evaluation import sit
from roi_lib.exams import Exam, draw_papers, encode_prompt, exam_prompt
from roi_lib.generation import (
    ReplayGenerator,
    Request,
    TorchGenerator,
    within_budget,
)
from roi_lib.worlds import POCKET


@pytest.fixture(scope="module")
def prompts(tokenizer):
    papers = draw_papers(POCKET, 24, seed=1)
    return [tuple(encode_prompt(tokenizer, exam_prompt(POCKET, Exam(p, "easy"), 64)))
            for p in papers]


def ids(rollouts):
    return [[r.ids for r in group] for group in rollouts]


def hf_generate(model, tokenizer, prompts, n):
    width = max(map(len, prompts))
    rows = [[tokenizer.pad_token_id] * (width - len(p)) + list(p) for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    out = model.generate(input_ids=torch.tensor(rows), attention_mask=torch.tensor(mask),
                         max_new_tokens=n, do_sample=False)[:, width:].tolist()
    ends = [row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else n
            for row in out]
    return [tuple(row[:end]) for row, end in zip(out, ends, strict=True)]


def test_greedy_tokens_equal_those_of_hugging_face(model, tokenizer, generator, prompts):
    ours = generator.generate([Request(p, 40) for p in prompts], temperature=0)
    assert [group[0].ids for group in ours] == hf_generate(model, tokenizer, prompts, 40)


def test_the_budget_is_never_exceeded(tokenizer, generator, prompts):
    requests = [Request(p, 1 + 3 * i, (i,), n=3) for i, p in enumerate(prompts)]
    lengths = set()
    for request, group in zip(requests, generator.generate(requests), strict=True):
        assert len(group) == 3
        for rollout in group:
            assert 1 <= len(rollout.ids) <= request.budget
            assert rollout.finished == (rollout.ids[-1] == tokenizer.eos_token_id)
            assert tokenizer.eos_token_id not in rollout.ids[:-1]
            assert rollout.finished or len(rollout.ids) == request.budget
            lengths.add(len(rollout.ids))
    assert len(lengths) > 10, "the random model should end at many different steps"


def test_F11_batching_changes_nothing(model, tokenizer, prompts):
    """Rows that finish at different steps, in batches of any size: the same tokens."""
    requests = [Request(p, 30, (5, i), n=2) for i, p in enumerate(prompts)]
    whole = TorchGenerator.of(model, tokenizer, max_rows=256).generate(requests)
    small = TorchGenerator.of(model, tokenizer, max_rows=5).generate(requests)
    alone = [TorchGenerator.of(model, tokenizer).generate([r])[0] for r in requests]
    assert ids(whole) == ids(small) == ids(alone)


def test_F11_neither_desks_nor_room_nor_prompts_at_a_time_change_anything(
        model, tokenizer, prompts, monkeypatch):
    """Groups of 1 to 9 rollouts, many finishing early, so that desks are filled up and redone."""
    requests = [Request(p, 40, (5, i), n=1 + i % 9) for i, p in enumerate(prompts)]
    wanted = ids(TorchGenerator.of(model, tokenizer).generate(requests))
    monkeypatch.setattr(LlamaRows, "TOKENS_AT_ONCE", 250)
    monkeypatch.setattr(TorchGenerator, "DROP_SHARE", 0.01)
    for seats_per_row in (1.0, 1.5, 9.0):
        monkeypatch.setattr(LlamaRows, "SEATS_PER_ROW", seats_per_row)
        monkeypatch.setattr(LlamaRows, "GROWTH", 7)
        assert ids(TorchGenerator.of(model, tokenizer).generate(requests)) == wanted


def test_F11_a_few_shared_prompts_among_many(tokenizer, prompts):
    """Too few for desks of two seats: every row sits alone, and rows of one prompt lie apart.

    The trained model reads its prompt; of the random one's tokens the prompt decides few.
    """
    generator = TorchGenerator.of(load_model("pocket-base", "float64"), tokenizer)
    first = next(p for i, p in enumerate(prompts)
                 if any(len(p) == len(other) for other in prompts[i + 1 :]))
    requests = [Request(p, 24, (i,)) for i, p in enumerate([*prompts, first])]
    alone = [generator.generate([request])[0] for request in requests]
    assert ids(generator.generate(requests)) == ids(alone)


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_draft_changes_no_token(tokenizer, prompts, temperature):
    """Right, right for a while, right but too long, wrong, noise, ended too early."""
    generator = TorchGenerator.of(load_model("pocket-base", "float64"), tokenizer, max_rows=16)
    requests = [Request(p, 12 + 3 * i, (i,), n=1 + i % 3) for i, p in enumerate(prompts)]
    wanted = generator.generate(requests, temperature)
    end, rng = tokenizer.eos_token_id, random.Random(0)
    drafts = {"right": [group[0].ids for group in wanted],
              "long": [group[-1].ids + (5, 6, 7) * 9 for group in wanted],
              "wrong": [wanted[i - 1][0].ids for i in range(len(wanted))],
              "noise": [tuple(rng.choices(range(len(tokenizer)), k=9 * i)) for i in range(24)]}
    for name, other in (("ends early", end), ("a slip", 9)):
        drafts[name] = [ids[:k] + (other,) + ids[k + 1 :] for ids in drafts["right"]
                        for k in [rng.randrange(len(ids))]]
    for name, guesses in drafts.items():
        drafted = [dataclasses.replace(request, draft=draft)
                   for request, draft in zip(requests, guesses, strict=True)]
        assert generator.generate(drafted, temperature) == wanted, name


def test_few_rows_left_by_many_drafts_are_decoded_together(tokenizer, prompts, monkeypatch):
    """They wait with memory of their own, and are parted by how far they have come."""
    generator = TorchGenerator.of(load_model("pocket-base", "float64"), tokenizer, max_rows=4)
    monkeypatch.setattr(LlamaRows, "TOKENS_AT_ONCE", 400)
    requests = [Request(p, 30, (i,)) for i, p in enumerate(prompts)]
    wanted = generator.generate(requests)
    drafts = [rollout.ids for (rollout,) in wanted]
    for i in (1, 4, 5, 11, 12, 20):  # a slip in each of these
        drafts[i] = drafts[i][: 2 * i // 3] + (9,) + drafts[i][2 * i // 3 + 1 :]
    copied, decoded, copy_one = [], [], LlamaRows.copy

    class Spy(LlamaRows):
        @staticmethod
        def copy(prefix):
            copied.append(prefix)
            return copy_one(prefix)

        def __init__(self, model, prefixes, *arguments):
            decoded.append([p.stop - p.start for p in prefixes])
            super().__init__(model, prefixes, *arguments)

    generator.rows = Spy
    assert generator.generate([dataclasses.replace(request, draft=draft) for request, draft in
                               zip(requests, drafts, strict=True)]) == wanted
    assert copied
    assert [len(lengths) for lengths in decoded] == [3, 3]
    assert sum(decoded, []) == sorted(sum(decoded, []))


def test_what_all_prompts_begin_with_is_read_once(model, tokenizer, prompts):
    """One of them is no more than that; it goes on with its last token."""
    generator, read = TorchGenerator.of(model, tokenizer, max_rows=2), []

    class Spy(LlamaRows):
        @staticmethod
        def read(model, texts, pad_id, head=None):
            read.append((head.stop if head else 0, [len(prompt) for prompt, _ in texts]))
            return LlamaRows.read(model, texts, pad_id, head)

    generator.rows = Spy
    begun = [prompts[0][:30], *(prompts[0][:30] + prompt[-20 - i :]
                                for i, prompt in enumerate(prompts[:5]))]
    requests = [Request(p, 20, (i,), draft=(7, 8)[: i % 3]) for i, p in enumerate(begun)]
    alone = sum((generator.generate([request]) for request in requests), [])
    assert read == [(0, [len(prompt)]) for prompt in begun]
    read.clear()
    assert generator.generate(requests) == alone
    assert read == [(0, [29]), (29, [54, 53]), (29, [51, 52]), (29, [50, 30])]
    read.clear()
    generator.generate([Request(p, 5) for p in ((5, 6, 7), (6, 7), (7,))])
    assert read == [(0, [3, 2]), (0, [1])], "nothing in common"


@torch.inference_mode()
def test_a_draft_beyond_the_longest_text_is_no_guess(model, prompts):
    """Short prompts with long drafts beside long prompts: nothing was read there."""
    texts = [(prompts[0][:20], (7,) * 30), (prompts[1][:60], (8, 9))]
    read = LlamaRows.read(model, texts, pad_id=0)
    assert read.draft.tolist() == [[7] * 30, [8, 9] + [-1] * 28]
    alone = LlamaRows.read(model, texts[1:], pad_id=0)
    torch.testing.assert_close(read.logits[1, :3], alone.logits[0])


def test_a_right_draft_leaves_nothing_to_decode(tokenizer, prompts, monkeypatch):
    generator = TorchGenerator.of(load_model("pocket-base", "float64"), tokenizer)
    requests = [Request(p, 40, (i,)) for i, p in enumerate(prompts)]
    steps, step = [], LlamaRows.step
    monkeypatch.setattr(LlamaRows, "step", lambda self, token: steps.append(0) or step(self, token))
    wanted = generator.generate(requests)
    assert len(steps) == 39
    drafted = [dataclasses.replace(request, draft=group[0].ids)
               for request, group in zip(requests, wanted, strict=True)]
    assert generator.generate(drafted) == wanted
    assert len(steps) == 39


def test_F24_what_follows_a_wrong_draft_is_nobodys_fault(model, tokenizer, prompts):
    """A model that gives NaN after one token only: drafted, but not drawn."""
    class Breaks(LlamaRows):
        @staticmethod
        def read(*arguments):
            read = LlamaRows.read(*arguments)
            read.logits[:, 5:] = float("nan")
            return read
    generator = TorchGenerator.of(model, tokenizer)
    (wanted,), generator.rows = generator.generate([Request(prompts[0], 9)]), Breaks
    right, slip = wanted[0].ids, (wanted[0].ids[0] + 1,)
    for draft in (right[:4], right[:2] + slip + right[3:], slip * 8):
        assert generator.generate([Request(prompts[0], 9, draft=draft)]) == [wanted]
    with pytest.raises(FloatingPointError, match="step 5 of request 0, rollout 0"):
        generator.generate([Request(prompts[0], 9, draft=right)])


def test_seeds_decide(generator, prompts):
    def sample(seed):
        return ids(generator.generate([Request(p, 20, (seed,), n=2) for p in prompts]))
    assert sample(1) == sample(1) != sample(2)
    assert any(a != b for a, b in sample(1)), "rollouts of one request have their own streams"


def test_sampling_follows_the_models_distribution(model, tokenizer, generator, prompts):
    prompt = prompts[0]
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    for temperature in (1.0, 0.5):
        wanted = torch.softmax(logits / temperature, -1)
        (group,) = generator.generate([Request(prompt, 1, (0,), n=4_000)], temperature)
        found = torch.bincount(torch.tensor([r.ids[0] for r in group]), minlength=len(wanted))
        error = (found / 4_000 - wanted).abs()
        assert (error < 5 * (wanted * (1 - wanted) / 4_000).sqrt() + 1e-3).all()


def test_F8_several_eos_ids_and_no_pad(model, tokenizer, prompts):
    common = int(torch.bincount(torch.tensor(
        [r.ids[0] for g in TorchGenerator.of(model, tokenizer).generate(
            [Request(p, 1, (i,), n=8) for i, p in enumerate(prompts)]) for r in g])).argmax())
    ends = {tokenizer.eos_token_id, common}
    generator = TorchGenerator(model, sorted(ends), pad_id=tokenizer.eos_token_id)
    rollouts = [r for g in generator.generate([Request(p, 50, n=4) for p in prompts]) for r in g]
    assert common in {r.ids[-1] for r in rollouts}
    assert all(r.finished == (r.ids[-1] in ends) and not ends & {*r.ids[:-1]} for r in rollouts)
    with pytest.raises(ValueError, match="end-of-sequence"):
        TorchGenerator(model, [], 0)


def test_F7_a_model_that_never_ends(model, tokenizer, prompts):
    never = TorchGenerator(model, [len(tokenizer) + 7], tokenizer.pad_token_id)
    (group,) = never.generate([Request(prompts[0], 300, n=2)])
    assert [len(r.ids) for r in group] == [300, 300] and not any(r.finished for r in group)


def test_F24_nan_logits_stop_with_a_message(tokenizer, prompts, model):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match="step 0 of request 0, rollout 0"):
        TorchGenerator.of(broken, tokenizer).generate([Request(prompts[0], 5)])

    class Breaks(AnyRows):  # the second row of the batch, at the third step
        def step(self, token):
            logits = super().step(token)
            logits[1, 7] = float("nan") if self.end == self.start + 2 else 0.0
            return logits

        def __init__(self, *args):
            super().__init__(*args)
            self.start = self.end
    never = TorchGenerator(model, [len(tokenizer) + 7], tokenizer.pad_token_id)
    never.rows = Breaks
    requests = [Request(prompts[0], 8, n=2), Request(prompts[0], 9)]  # the longer one goes first
    with pytest.raises(FloatingPointError, match="step 2 of request 0, rollout 0"):
        never.generate(requests)


@pytest.mark.parametrize(("budget", "n", "prompt"), [(0, 1, (1,)), (5, 0, (1,)), (5, 1, ())])
def test_F6_bad_requests(budget, n, prompt):
    with pytest.raises(ValueError, match="at least"):
        Request(prompt, budget, n=n)


def test_F6_a_budget_of_one_token(model, generator, prompts):
    rollouts = [r for g in generator.generate([Request(p, 1, n=5) for p in prompts]) for r in g]
    assert all(len(r.ids) == 1 for r in rollouts)
    end = rollouts[0].ids[0]  # for a model that ends with this token, one is enough
    ends = TorchGenerator(model, [end], 0).generate([Request(p, 1, n=5) for p in prompts])
    again = [r for g in ends for r in g]
    assert [r.ids for r in again] == [r.ids for r in rollouts]
    assert [r.finished for r in again] == [r.ids == (end,) for r in rollouts]


def test_F10_no_token_is_forced(model, generator, prompts):
    """Each id is the model's own choice after what precedes it, the last before the cut too."""
    groups = generator.generate([Request(p, 4 + i % 5) for i, p in enumerate(prompts)], 0)
    assert not all(rollout.finished for rollout, in groups), "some are cut by the budget"
    for prompt, (rollout,) in zip(prompts, groups, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + rollout.ids])).logits[0]
        assert rollout.ids == tuple(logits.argmax(-1)[len(prompt) - 1 : -1].tolist())


def test_negative_temperature(generator, prompts):
    with pytest.raises(ValueError, match="temperature must be 0"):
        generator.generate([Request(prompts[0], 5)], temperature=-1)


def test_replay_is_cut_by_the_same_budget():
    replay = ReplayGenerator({(1, 2): [7, 8, 9]}, eos_id=0)
    assert replay.generate([Request((1, 2), 4)])[0][0].ids == (7, 8, 9, 0)
    cut = replay.generate([Request((1, 2), 3, n=2)])[0]
    assert [r.ids for r in cut] == [(7, 8, 9)] * 2 and not cut[0].finished


def test_F9_text_is_never_encoded_again(tokenizer, generator, prompts):
    """Costs count ids; the text of a response with control tokens encodes to fewer."""
    exams = [Exam(p, "hard") for p in draw_papers(POCKET, 24, seed=1)]
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    words = tokenizer("Q1. 5 Q2. 6", add_special_tokens=False).input_ids
    ids = [word for pair in zip(words, [start] * len(words), strict=True) for word in pair]
    class Always(dict):
        def __missing__(self, key):
            return ids
    crafted = sit(POCKET, tokenizer, ReplayGenerator(Always(), tokenizer.eos_token_id), exams, 64)
    for s in crafted + sit(POCKET, tokenizer, generator, exams, 64):
        total = s.response.preamble + sum(seg.cost for seg in s.response.segments)
        assert total == s.response.total == len(s.ids) <= 64
    text = tokenizer.decode(crafted[0].ids, skip_special_tokens=True)
    assert len(tokenizer(text).input_ids) == len(words) < len(crafted[0].ids)


def test_F9_the_words_of_an_end_of_sequence_end_nothing(tokenizer):
    written = tokenizer(f"5{tokenizer.eos_token}6", split_special_tokens=True).input_ids
    assert tokenizer.eos_token_id not in written
    rollout = within_budget(written, 100, [tokenizer.eos_token_id])
    assert rollout.ids == tuple(written) and not rollout.finished


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("temperature", [0, 1])
def test_the_forward_of_our_own_is_that_of_the_model(tokenizer, prompts, kind, temperature):
    """Grouped queries, scaled rotary positions, untied heads, n > 1; others take the model's own.

    A model without pad token and with end-of-sequence ids of its own sits as well (FAULTS F8).
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=[3, 7], pad_token_id=None,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        sliding_window=None)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        model.lm_head.weight.normal_(std=1.0)
    generator = TorchGenerator.of(model, tokenizer)
    assert generator.rows is (AnyRows if kind == "mistral" else LlamaRows)
    assert generator.eos_ids.tolist() == [3, 7]
    requests = [Request(p, 25 + i, (i,), n=1 + i % 4) for i, p in enumerate(prompts)]
    ours = generator.generate(requests, temperature)
    drafted = [dataclasses.replace(r, draft=group[-1].ids)
               for r, group in zip(requests, ours, strict=True)]
    assert generator.generate(drafted, temperature) == ours
    generator.rows = AnyRows
    assert generator.generate(drafted, temperature) == ours


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text", "gpt2", "qwen3"])
def test_any_architecture_with_attention(tokenizer, prompts, kind):
    """Sliding windows shorter than the prompts, learned positions, norms of queries: like theirs.

    The model itself is the judge: it reads prompt and response anew for each token.
    """
    torch.manual_seed(0)
    names = {"n_embd": 32, "n_layer": 2, "n_head": 2} if kind == "gpt2" else {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    window = {"sliding_window": 8} if kind in ("mistral", "gemma3_text") else {}
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), eos_token_id=3, pad_token_id=0,
                                  bos_token_id=3, **names, **window)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for weights in model.parameters():
            weights.normal_(std=0.3)
    generator = TorchGenerator.of(model, tokenizer)
    assert generator.rows is AnyRows
    for prompt, (rollout,) in zip(prompts[:6], generator.generate(
            [Request(p, 12 + i) for i, p in enumerate(prompts[:6])], 0), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + rollout.ids]), use_cache=False).logits[0]
        assert rollout.ids == tuple(logits.argmax(-1)[len(prompt) - 1 : -1].tolist())


def test_a_model_without_keys_and_values_is_refused(tokenizer, prompts):
    config = AutoConfig.for_model("mamba", vocab_size=len(tokenizer), hidden_size=16,
                                  num_hidden_layers=1, eos_token_id=3)
    generator = TorchGenerator.of(AutoModelForCausalLM.from_config(config).eval(), tokenizer)
    with pytest.raises(ValueError, match="a mamba model does not; --engine vllm"):
        generator.generate([Request(prompts[0], 5)])


def test_F26_new_weights_count_at_once(model, tokenizer, prompts):
    model = copy.deepcopy(model)
    generator, requests = TorchGenerator.of(model, tokenizer), [Request(p, 30) for p in prompts]
    before = ids(generator.generate(requests))
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.normal_()
    after = ids(generator.generate(requests))
    assert after != before and after == ids(TorchGenerator.of(model, tokenizer).generate(requests))


def test_rollouts_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Request((1,), 5).budget = 9
