"""Budgeted generation: budgets hold, tokens agree with transformers, seeds decide."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from roi_lib.engines import engine_for
from roi_lib.engines.llama import LlamaDecoder, LlamaEngine
from roi_lib.engines.replay import ReplayEngine
from roi_lib.exams import Exam, draw_papers
from roi_lib.generation import CachedDecoder, Request, Rollout, TorchEngine, within_budget
from roi_lib.sitting import sit
from roi_lib.store.checkpoints import load_model
from roi_lib.worlds import POCKET


@pytest.fixture(scope="module")
def prompts(env):
    return env.prompts([env.message(Exam(p, "easy"), 64) for p in draw_papers(POCKET, 24, seed=1)])


@pytest.fixture(scope="module")
def llama(model, tokenizer):
    return LlamaEngine.of(model, tokenizer)


@pytest.fixture(params=["engine", "llama"])
def either(request):
    """The plain engine, and the fast one."""
    return request.getfixturevalue(request.param)


def hf_generate(model, tokenizer, prompts, n, **options):
    width = max(map(len, prompts))
    rows = [[tokenizer.pad_token_id] * (width - len(p)) + list(p) for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    out = model.generate(input_ids=torch.tensor(rows), attention_mask=torch.tensor(mask),
                         max_new_tokens=n, do_sample=False, **options)[:, width:].tolist()
    return [within_budget(row, n, [tokenizer.eos_token_id]).ids for row in out]


def test_greedy_tokens_equal_those_of_hugging_face(model, tokenizer, either, prompts):
    ours = either.generate([Request(p, 40) for p in prompts], temperature=0)
    assert [group[0].ids for group in ours] == hf_generate(model, tokenizer, prompts, 40)


def test_the_budget_is_never_exceeded(tokenizer, either, prompts):
    requests = [Request(p, 1 + 3 * i, (i,), n=3) for i, p in enumerate(prompts)]
    groups = either.generate(requests)
    for request, group in zip(requests, groups, strict=True):
        assert len(group) == 3
        for r in group:
            assert 1 <= len(r.ids) <= request.budget and tokenizer.eos_token_id not in r.ids[:-1]
            assert r.finished == (r.ids[-1] == tokenizer.eos_token_id)
            assert r.finished or len(r.ids) == request.budget
    assert len({len(r.ids) for group in groups for r in group}) > 10, "of many lengths"


def test_neither_batches_nor_groups_change_a_token(model, tokenizer, either, prompts, monkeypatch):
    """Groups of 1 to 9 rollouts, many of which end early, so that groups are filled and redone."""
    requests = [Request(p, 40, (5, i), n=1 + i % 9) for i, p in enumerate(prompts)]
    wanted = [either.generate([r])[0] for r in requests]
    assert TorchEngine.of(model, tokenizer).generate(requests) == wanted
    assert type(either).of(model, tokenizer, max_rows=5).generate(requests) == wanted
    monkeypatch.setattr(LlamaDecoder, "READ_TOKENS", 250)
    monkeypatch.setattr(LlamaDecoder, "GROWTH", 7)
    monkeypatch.setattr(TorchEngine, "DROP_SHARE", 0.01)
    for slots_per_row in (1.0, 1.5, 9.0):
        monkeypatch.setattr(LlamaDecoder, "SLOTS_PER_ROW", slots_per_row)
        assert either.generate(requests) == wanted


def test_a_few_shared_prompts_among_many(tokenizer, prompts):
    """Too few for groups of two slots. The trained model reads its prompt; of the random one's
    tokens the prompt decides few."""
    model = load_model("pocket-base", "float64")
    llama = LlamaEngine.of(model, tokenizer)
    requests = [Request(p, 24, (i,)) for i, p in enumerate([*prompts, *prompts[3:5]])]
    together = llama.generate(requests)
    assert together == [llama.generate([request])[0] for request in requests]
    assert together == TorchEngine.of(model, tokenizer).generate(requests)


@torch.inference_mode()
@pytest.mark.parametrize("decoder", [CachedDecoder, LlamaDecoder])
def test_decoders_give_the_models_own_logits(model, prompts, decoder):
    """After prompts, after tokens, and after a selection that repeats and permutes rows."""
    rows = [prompts[i] for i in (0, 1, 0, 2, 0, 1)]
    decoding = decoder(model, rows, longest=4, pad_id=0)
    logits = decoding.logits
    for step in range(4):
        for row, found in zip(rows, logits, strict=True):
            wanted = model(torch.tensor([row])).logits[0, -1]  # its norms go through float32
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
        if step == 2:
            decoding.select(torch.tensor([5, 2, 2, 3]))
            rows = [rows[i] for i in (5, 2, 2, 3)]
        token = torch.arange(len(rows)) + 10 * step + 5
        rows = [(*row, one) for row, one in zip(rows, token.tolist(), strict=True)]
        logits = decoding.step(token)


def test_seeds_decide(either, prompts):
    one, again, other = (either.generate([Request(p, 20, (seed,), n=2) for p in prompts])
                         for seed in (1, 1, 2))
    assert one == again != other
    assert any(a != b for a, b in one), "rollouts of one request have their own streams"


def test_sampling_follows_the_models_distribution(model, llama, prompts):
    with torch.no_grad():
        logits = model(torch.tensor([prompts[0]])).logits[0, -1]
    for temperature in (1.0, 0.5):
        wanted = torch.softmax(logits / temperature, -1)
        (group,) = llama.generate([Request(prompts[0], 1, (0,), n=4_000)], temperature)
        found = torch.bincount(torch.tensor([r.ids[0] for r in group]), minlength=len(wanted))
        error = (found / 4_000 - wanted).abs()
        assert (error < 5 * (wanted * (1 - wanted) / 4_000).sqrt() + 1e-3).all()


def test_several_ends_of_sequence_one_of_them_the_padding(model, tokenizer, either, prompts):
    first = either.generate([Request(p, 1, (i,), n=8) for i, p in enumerate(prompts)])
    common = int(torch.tensor([r.ids[0] for group in first for r in group]).mode().values)
    ends = {tokenizer.eos_token_id, common}
    several = type(either)(model, sorted(ends), pad_id=tokenizer.eos_token_id)
    rollouts = [r for g in several.generate([Request(p, 50, n=4) for p in prompts]) for r in g]
    assert common in {r.ids[-1] for r in rollouts}
    assert all(r.finished == (r.ids[-1] in ends) and not ends & {*r.ids[:-1]} for r in rollouts)
    never = type(either)(model, [len(tokenizer) + 7], tokenizer.pad_token_id)
    (group,) = never.generate([Request(prompts[0], 300, n=2)])
    assert [len(r.ids) for r in group] == [300, 300] and not any(r.finished for r in group)
    with pytest.raises(ValueError, match="end-of-sequence"):
        type(either)(model, [], 0)


def test_nan_logits_stop_with_a_message(tokenizer, prompts, model):
    broken = copy.deepcopy(model)
    broken.model.norm.weight.data[0] = float("nan")
    for kind in (TorchEngine, LlamaEngine):
        with pytest.raises(FloatingPointError, match="step 0 of request 0, rollout 0"):
            kind.of(broken, tokenizer).generate([Request(prompts[0], 5)])

    class Breaks(LlamaDecoder):  # the second row of the batch, at the third step
        def step(self, token):
            logits = super().step(token)
            logits[1, 7] = float("nan") if self.filled == 2 else 0.0
            return logits
    never = LlamaEngine(model, [len(tokenizer) + 7], tokenizer.pad_token_id)
    never.Decoder = Breaks
    requests = [Request(prompts[0], 8, n=2), Request(prompts[0], 9)]  # the longer one goes first
    with pytest.raises(FloatingPointError, match="step 2 of request 0, rollout 0"):
        never.generate(requests)


def test_a_request_is_handed_on_as_soon_as_its_rollouts_have_ended(model, tokenizer, either,
                                                                   prompts):
    """So that what is logged of a long batch is not lost."""
    never, steps = type(either)(model, [len(tokenizer) + 7], tokenizer.pad_token_id), []

    class Counts(never.Decoder):
        def step(self, token):
            steps.append(len(token))
            return super().step(token)

    never.Decoder = Counts
    stream = never.stream([Request(prompts[0], 30, n=2), Request(prompts[1], 3)])
    (i, (short,)), before = next(stream), len(steps)
    assert (i, len(short.ids), before) == (1, 3, 2)
    ((i, long),) = stream
    assert (i, [len(r.ids) for r in long], len(steps)) == (0, [30, 30], 29)


def test_bad_requests(either, prompts, refusal):
    for prompt, budget, n in (((1,), 0, 1), ((1,), 5, 0), ((), 5, 1)):
        assert "at least" in refusal(Request, prompt, budget, n=n)
    assert "must be 0 (greedy)" in refusal(either.generate, [Request(prompts[0], 5)], -1)
    assert either.generate([]) == []


def test_whatever_is_sent_the_budget_cuts_it():
    assert within_budget([5, 6, 3], 3, [3]) == Rollout((5, 6, 3), True)
    assert within_budget([5, 6, 3], 2, [3]) == Rollout((5, 6), False, 1)
    assert within_budget([5, 3, 6, 7], 9, [3]) == Rollout((5, 3), True)
    assert within_budget([], 9, [3]) == Rollout((), False)
    replay = ReplayEngine({(1, 2): [7, 8, 9]}, eos_id=0)
    assert replay.generate([Request((1, 2), 4)]) == [[Rollout((7, 8, 9, 0), True)]]
    assert replay.generate([Request((1, 2), 3, n=2)]) == [[Rollout((7, 8, 9), False)] * 2]


def test_text_is_never_encoded_again(env):
    """Costs count ids: the text of a response with control tokens encodes to fewer."""
    exam, tokenizer = Exam(draw_papers(POCKET, 1)[0], "hard"), env.tokenizer
    start, words = tokenizer.convert_tokens_to_ids("<|im_start|>"), env.encode("Q1. 5 Q2. 6")
    ids = [word for pair in zip(words, [start] * len(words), strict=True) for word in pair]
    table = sit(env, ReplayEngine({env.prompt(exam, 64): ids}, tokenizer.eos_token_id), [exam], 64)
    assert table["cost"].sum() + table["preamble"][0] == table["tokens"][0] == len(ids) + 1
    assert len(env.encode(tokenizer.decode(ids, skip_special_tokens=True))) == len(words) < len(ids)


def small_model(kind, tokenizer, **more):
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2} if kind == "gpt2" else {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **sizes, **more)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for weights in model.parameters():
            weights.normal_(std=0.3)
    return model


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("temperature", [0, 1])
def test_the_forward_of_our_own_is_that_of_the_model(tokenizer, prompts, kind, temperature):
    """Grouped queries, scaled rotary positions, untied heads, biases; no pad token, two ends."""
    model = small_model(kind, tokenizer, eos_token_id=[3, 7], pad_token_id=None, rope_parameters={
        "rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    fast, plain = engine_for(model, tokenizer), TorchEngine.of(model, tokenizer)
    assert isinstance(fast, LlamaEngine) and fast.eos_ids.tolist() == [3, 7]
    requests = [Request(p, 25 + i, (i,), n=1 + i % 4) for i, p in enumerate(prompts)]
    assert fast.generate(requests, temperature) == plain.generate(requests, temperature)
    model.config.layer_types = ["full_attention", "sliding_attention"]
    assert not isinstance(engine_for(model, tokenizer), LlamaEngine)


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text", "gpt2", "qwen3"])
def test_any_architecture_with_attention(tokenizer, prompts, kind):
    """Sliding windows shorter than the prompts, learned positions, norms of queries: like theirs,
    which reads prompt and response anew for each token."""
    window = {"sliding_window": 8} if kind in ("mistral", "gemma3_text") else {}
    model = small_model(kind, tokenizer, eos_token_id=3, pad_token_id=0, bos_token_id=3, **window)
    engine = engine_for(model, tokenizer)
    assert not isinstance(engine, LlamaEngine)
    found = engine.generate([Request(p, 16) for p in prompts[:6]], 0)
    assert [[r.ids for r in group] for group in found] == [
        hf_generate(model, tokenizer, [p], 16, use_cache=False) for p in prompts[:6]]


def test_a_model_without_keys_and_values_is_refused(tokenizer, prompts):
    config = AutoConfig.for_model("mamba", vocab_size=len(tokenizer), hidden_size=16,
                                  num_hidden_layers=1, eos_token_id=3)
    engine = engine_for(AutoModelForCausalLM.from_config(config).eval(), tokenizer)
    with pytest.raises(ValueError, match="a mamba model does not; --engine vllm"):
        engine.generate([Request(prompts[0], 5)])


def test_new_weights_and_adapters_count_at_once(model, tokenizer, prompts):
    model = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules="all-linear"))
    base, requests = model.get_base_model(), [Request(p, 30) for p in prompts]
    engine, plain, seen = LlamaEngine.of(base, tokenizer), TorchEngine.of(base, tokenizer), []
    for changed in ("none", "lora_B", "norm"):
        with torch.no_grad():
            for name, weights in model.named_parameters():
                if changed in name:
                    weights.normal_(std=0.5)
        seen.append(engine.generate(requests))
        assert seen[-1] == plain.generate(requests)
    assert seen[0] != seen[1] != seen[2]
