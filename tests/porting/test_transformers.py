"""Small models of a hub of transformers are ported and agree."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from tests.marking import slow_but
from torchjax_bridge import port

transformers = pytest.importorskip("transformers", reason="the ecosystem group is not installed")

_IDS = torch.arange(14).reshape(2, 7) % 13 + 1
_SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_DECODER = {**_SIZES, "num_key_value_heads": 2}


def _gpt2(t: Any) -> tuple[nn.Module, Mapping[str, Any]]:
    config = t.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return t.GPT2LMHeadModel(config), {"input_ids": _IDS, "use_cache": False}


def _t5(t: Any) -> tuple[nn.Module, Mapping[str, Any]]:
    config = t.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return t.T5Model(config), {"input_ids": _IDS, "decoder_input_ids": _IDS, "use_cache": False}


_MODELS: dict[str, Callable[[Any], tuple[nn.Module, Mapping[str, Any]]]] = {
    "BERT": lambda t: (t.BertModel(t.BertConfig(**_SIZES)), {"input_ids": _IDS}),
    "GPT-2": _gpt2,
    "T5": _t5,
    "Llama": lambda t: (
        t.LlamaForCausalLM(t.LlamaConfig(**_DECODER)),
        {"input_ids": _IDS, "use_cache": False},
    ),
    "Gemma": lambda t: (
        t.GemmaForCausalLM(t.GemmaConfig(head_dim=8, **_DECODER)),
        {"input_ids": _IDS, "use_cache": False},
    ),
}


@pytest.mark.parametrize("name", slow_but(["Gemma"], ["GPT-2", "BERT", "T5", "Llama", "Gemma"]))
def test_a_transformer_is_ported_and_proved(name: str) -> None:
    torch.manual_seed(0)
    module, kwargs = _MODELS[name](transformers)
    ported = port(module.eval(), kwargs=kwargs)
    assert ported.proof is not None
    assert all(check.difference <= 1e-5 for check in ported.proof.checks)
