"""Twelve models of transformers, by small configurations of their own, without a download."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ._entry import Entry, images
from ._operators import declare_operators

__all__ = ["transformers"]

_VOCABULARY = 97
_TEXT = {"vocab_size": _VOCABULARY, "use_cache": False, "pad_token_id": 0}
_BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}
_LLAMA = _BERT | {"num_key_value_heads": 2, "head_dim": 8}
_VISION = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def transformers() -> list[Entry]:
    """Encoders, decoders, both, and models of images, speech, and images with text."""
    return [
        _entry("bert", "Bert", "ForSequenceClassification", _TEXT | _BERT, _masked_text),
        _entry(
            "gpt2",
            "GPT2",
            "LMHeadModel",
            _TEXT | {"n_positions": 40, "n_embd": 32, "n_layer": 2, "n_head": 4},
        ),
        _entry("vit", "ViT", "ForImageClassification", _VISION, images(32)),
        _entry(
            "distilbert",
            "DistilBert",
            "ForSequenceClassification",
            _TEXT | {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 40},
            _masked_text,
        ),
        _entry(
            "resnet",
            "ResNet",
            "ForImageClassification",
            {
                "embedding_size": 8,
                "hidden_sizes": [8, 16, 24],
                "depths": [1, 2, 1],
                "layer_type": "bottleneck",
            },
            images(32),
        ),
        _entry(
            "t5",
            "T5",
            "ForConditionalGeneration",
            _TEXT | {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
            _source_and_target,
        ),
        _entry("llama", "Llama", "ForCausalLM", _TEXT | _LLAMA),
        _entry("qwen3", "Qwen3", "ForCausalLM", _TEXT | _LLAMA),
        _entry("gemma", "Gemma", "ForCausalLM", _TEXT | _LLAMA),
        _entry(
            "whisper",
            "Whisper",
            "ForConditionalGeneration",
            _TEXT
            | {
                "d_model": 32,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_attention_heads": 4,
                "decoder_attention_heads": 4,
                "encoder_ffn_dim": 64,
                "decoder_ffn_dim": 64,
                "num_mel_bins": 8,
                "max_source_positions": 20,
                "max_target_positions": 20,
                "decoder_start_token_id": 1,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
            _speech_and_target,
        ),
        _entry(
            "clip",
            "CLIP",
            "Model",
            {
                "text_config": _TEXT | _BERT | {"eos_token_id": _VOCABULARY - 1, "bos_token_id": 1},
                "vision_config": _VISION,
                "projection_dim": 16,
            },
            _text_and_images,
        ),
        _entry("dinov2", "Dinov2", "ForImageClassification", _VISION, images(32)),
    ]


def _entry(
    name: str,
    family: str,
    task: str,
    config: dict[str, Any],
    inputs: Callable[[int], tuple[Any, ...]] | None = None,
) -> Entry:
    def build() -> nn.Module:
        declare_operators()  # it imports torchvision where that is installed
        import transformers as library

        return getattr(library, family + task)(getattr(library, f"{family}Config")(**config))

    return Entry("transformers", name, build, inputs or _text)


def _tokens(batch: int, length: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(3, _VOCABULARY - 1, (batch, length), generator=draw)


def _text(batch: int) -> tuple[Any, ...]:
    return (_tokens(batch, 12, 1),)


def _masked_text(batch: int) -> tuple[Any, ...]:
    mask = torch.ones(batch, 12, dtype=torch.long)
    mask[-1, 7:] = 0
    return _tokens(batch, 12, 1), mask


def _source_and_target(batch: int) -> tuple[Any, ...]:
    return (*_masked_text(batch), _tokens(batch, 6, 2))


def _speech_and_target(batch: int) -> tuple[Any, ...]:
    speech = torch.randn(batch, 8, 40, generator=torch.Generator().manual_seed(1))
    return speech, None, _tokens(batch, 6, 2)


def _text_and_images(batch: int) -> tuple[Any, ...]:
    tokens = _tokens(batch, 12, 1)
    tokens[:, -1] = _VOCABULARY - 1  # the end of a text, where CLIP reads it
    return tokens, *images(32)(batch)
