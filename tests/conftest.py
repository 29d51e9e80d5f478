"""Shared by all tests: worlds, a tiny random model, and where the real data lies."""

from pathlib import Path

import pytest
import torch

from roi_lib.generation import TorchGenerator
from roi_lib.pretrain import PretrainConfig, new_model
from roi_lib.tokenizer import build_tokenizer
from roi_lib.worlds import POCKET

ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = ROOT.parent / "shared" / "data"
TINY = PretrainConfig(hidden=32, layers=2, heads=2, kv_heads=1, intermediate=48, batch_tokens=512,
                      rows_at_once=16, steps=4, save_every=2, log_every=1)


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer(POCKET)


@pytest.fixture(scope="session")
def model(tokenizer):
    """A random model whose sampled responses have all lengths: end-of-sequence is likely."""
    model = new_model(tokenizer, TINY).double().eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(std=0.5)
        model.model.embed_tokens.weight[tokenizer.eos_token_id] *= 2
    return model


@pytest.fixture(scope="session")
def generator(model, tokenizer):
    return TorchGenerator.of(model, tokenizer)


@pytest.fixture(scope="session")
def real_data():
    if not REAL_DATA.is_dir():
        pytest.skip("the real datasets are not beside this checkout (../shared/data)")
    return REAL_DATA
