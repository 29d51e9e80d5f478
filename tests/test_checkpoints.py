"""Checkpoints are loaded whole or refused in one sentence; training states go on exactly."""

import json
import shutil
from hashlib import sha256

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from roi_lib.engines import engine_for
from roi_lib.problems import MAX_NUMBER
from roi_lib.store import checkpoints
from roi_lib.store.checkpoints import load_environment, load_model, load_tokenizer
from roi_lib.store.files import DATA, newest_complete
from roi_lib.store.tokenizers import make_tokenizer, train_bpe
from roi_lib.worlds import PAPER, POCKET


@pytest.fixture
def folder(tmp_path, model):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def cut(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1_000])


def lose_a_matrix(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def become_a_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def grow(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"hidden_size": 32', '"hidden_size": 64'))


def replace(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(("spoil", "words"), [
    (cut, "whole *.safetensors"), (replace("model.safetensors", ""), "whole *.safetensors"),
    (lose_a_matrix, "lack model.layers.0.mlp.up_proj.weight"),
    (lambda folder: save_file({}, folder / "model.safetensors", {"format": "pt"}), " lack "),
    (become_a_pickle, "pickles are refused"),
    (replace("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
     "git lfs pull"),
    (lambda folder: (folder / "config.json").unlink(), "with config.json"),
    (replace("config.json", "[]"), "config.json"),
    (grow, "cannot be loaded"),
    (replace("manifest.json", '{"name": "a web page"}'), "restore the folder"),
    (shutil.rmtree, "name a local folder")])
def test_a_spoilt_folder_is_one_sentence(folder, refusal, spoil, words):
    spoil(folder)
    said = refusal(load_model, str(folder))
    assert words in said and str(folder) in said


@pytest.mark.parametrize("text", ["", "{}", '{"model": ', "version https://git-lfs"])
def test_a_spoilt_tokenizer_is_one_sentence(tmp_path, refusal, text):
    shutil.copytree(DATA / "pocket-tokenizer", tmp_path / "words")
    (tmp_path / "words" / "tokenizer.json").write_text(text)
    assert "restore the folder" in refusal(load_tokenizer, str(tmp_path / "words"))
    (tmp_path / "words" / "manifest.json").unlink()
    assert "name a local folder" in refusal(load_tokenizer, str(tmp_path / "words"))


@pytest.mark.parametrize("name", ["nowhere", "", "a/b/c", "../data/nowhere", "org/name@"])
def test_what_names_nothing_is_one_sentence(refusal, name):
    for load in (load_model, load_tokenizer):
        assert "name a local folder" in refusal(load, name)


def test_an_unknown_dtype_is_one_sentence(refusal):
    for dtype in ("float9", "Tensor", ""):
        assert f"unknown dtype {dtype!r}; name float32" in refusal(load_model, "pocket-base", dtype)
    model = load_model("pocket-base", "float64")
    assert model.dtype == torch.float64 and model.num_parameters() <= 3_000_000


def test_a_model_that_could_not_be_saved_is_refused_before_the_first_step(folder, refusal):
    checkpoints.check_saveable(load_model(str(folder)))
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.9,
                                                               "do_sample": False}))
    model = load_model(str(folder))
    assert "mend its generation_config.json" in refusal(checkpoints.check_saveable, model)
    with pytest.raises(ValueError):
        model.save_pretrained(folder.parent / "after-the-last-step")


def test_without_the_hub_a_folder_is_asked_for(monkeypatch, refusal):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for default in (None, "gsm8k-bpe"):  # which is for folders
        said = refusal(load_tokenizer, "some-org/some-model@main", default)
        assert "some-org/some-model" in said and "name a local folder" in said


def test_hub_models_are_pinned_and_told_apart(monkeypatch, model):
    asked = []

    def from_pretrained(name, revision, trust_remote_code, **options):
        asked.append((name, revision, trust_remote_code))
        return model, {"missing_keys": []}

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    names = [f"Qwen/Qwen2.5-{size}-Instruct{pin}" for size in ("1.5B", "7B") for pin in ("", "@v1")]
    for name in names:
        load_model(name)
    assert asked == [(name.partition("@")[0], name.partition("@")[2] or "main", False)
                     for name in names]
    assert [checkpoints.model_label(name) for name in names] == names
    assert [checkpoints.model_hash(name) for name in names] == names


def test_labels_and_hashes_are_those_of_the_weights(folder, model):
    manifest = (DATA / "pocket-base" / "manifest.json").read_bytes()
    wanted = sha256(sha256(manifest).hexdigest().encode()).hexdigest()[:12]
    assert checkpoints.model_label("pocket-base") == wanted, "as the tables have it"
    loaded, label = load_model(str(folder)), checkpoints.model_label(str(folder))
    assert checkpoints.weights_hash(loaded) == checkpoints.weights_hash(model)
    with torch.no_grad():
        loaded.model.norm.weight[0] += 1
    loaded.save_pretrained(folder)
    assert checkpoints.weights_hash(loaded) != checkpoints.weights_hash(model)
    assert checkpoints.model_label(str(folder)) != label


# ---------------------------------------------------------------- tokenizers
@pytest.mark.parametrize("world", [POCKET, PAPER], ids=lambda world: world.name)
def test_shipped_tokenizers_are_those_the_code_makes(tmp_path, request, world):
    root = request.getfixturevalue("real_data") if world is PAPER else None
    make_tokenizer(world, tmp_path / "made", root)
    for path in (DATA / world.tokenizer).iterdir():
        assert path.read_bytes() == (tmp_path / "made" / path.name).read_bytes()


def test_the_pocket_tokenizer_knows_all_words_of_the_prompts(tokenizer):
    for prompt in POCKET.prompts.values():
        text = prompt.format(budget=64, n=3, problems="Q1. Q2. Q3.")
        assert tokenizer.unk_token_id not in tokenizer(text).input_ids


def test_numbers_up_to_the_largest_budget_are_one_token_each(tokenizer):
    """Digits of a larger one are single, so that it is told from any other; none is unknown."""
    assert POCKET.largest_budget == MAX_NUMBER == 320
    ids = [tokenizer(f"Budget: {number} tokens.").input_ids for number in range(1_200)]
    assert len({tuple(some) for some in ids}) == 1_200
    assert [len(some) - 4 for some in ids] == [1 if n <= 320 else len(str(n)) for n in range(1_200)]
    assert not any(tokenizer.unk_token_id in some for some in ids)


def test_a_tokenizer_comes_with_its_checkpoint_or_from_the_world(folder, tokenizer, small_world):
    assert checkpoints.own_tokenizer(str(folder)) is None
    found = load_environment(small_world, str(folder))
    assert found.tokenizer.get_vocab() == tokenizer.get_vocab()
    own = train_bpe(["Q1. 3 + 4 = 7", "Level-1"], size=262)
    own.save_pretrained(folder)
    found = load_environment(POCKET, str(folder))
    assert found.world is POCKET and found.encode("Q1. 3 + 47") == own("Q1. 3 + 47").input_ids
    assert checkpoints.own_tokenizer(str(folder)).chat_template == own.chat_template
    assert len(load_environment(PAPER).tokenizer) == 4_096
    words = small_world.tokenizer
    assert len(load_environment(POCKET, str(folder), words).tokenizer) == len(tokenizer)


def test_a_tokenizer_that_does_not_fit_its_model_is_refused(tokenizer, small_world, refusal):
    base = small_world.method("base").checkpoint
    words = f"base' knows {len(tokenizer)} tokens, the tokenizer 4,096: they do not belong together"
    assert f"{words}; save its own" in refusal(load_environment, PAPER, base)
    assert words in refusal(load_environment, POCKET, base, "gsm8k-bpe")
    assert words in refusal(engine_for, load_model(base), load_tokenizer("gsm8k-bpe"))


# ---------------------------------------------------------------- the state of a training run
def train(model, optimizers, steps):
    for step in steps:
        ids = torch.randint(0, 264, (2, 8), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def start(tokenizer):
    model = tiny_model(tokenizer)
    embedding, *others = model.parameters()
    matrices = [p for p in others if p.ndim == 2]
    return model, [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW([embedding], lr=0.01)]


def test_a_continued_run_equals_an_unbroken_one(tmp_path, tokenizer):
    model, optimizers = start(tokenizer)
    train(model, optimizers, range(3))
    checkpoints.save_step(tmp_path, model, optimizers, {"step": 3, "loss": 0.1})
    train(model, optimizers, range(3, 6))
    again, others = start(tokenizer)
    progress = checkpoints.load_training_state(newest_complete(tmp_path), again, others)
    train(again, others, range(3, 6))
    assert progress == {"step": 3, "loss": 0.1}
    assert checkpoints.weights_hash(again) == checkpoints.weights_hash(model)


def test_the_newest_two_states_are_kept_and_only_ours_are_removed(tmp_path, tokenizer, refusal):
    """Nor does a broken state that comes later remove the whole ones before it."""
    model, optimizers = start(tokenizer)
    for name in ("step-000002", "step-best", "step-000009", "step-000020"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text(name)
    for step in (1, 3, 4, 8):
        checkpoints.save_step(tmp_path, model, optimizers, {"step": step})
    assert "step-000009 is not replaced" in refusal(
        checkpoints.save_step, tmp_path, model, optimizers, {"step": 9})
    assert {path.name for path in tmp_path.glob("step-*")} == {
        "step-000002", "step-000004", "step-000008", "step-000009", "step-000020", "step-best"}
    assert sorted(path.read_text() for path in tmp_path.rglob("mine")) == [
        "step-000002", "step-000009", "step-000020", "step-best"]
    with pytest.warns(UserWarning, match="step-0000(20|09)"):
        assert newest_complete(tmp_path).name == "step-000008"
