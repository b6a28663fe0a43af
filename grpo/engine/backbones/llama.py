"""Llama (SmolLM2, Llama 3) and what all text-only models share: words alone, counted along one axis, nothing to see."""

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM as Network  # noqa: F401

IMAGE_TOKEN = None
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "<|eom_id|>")  # a turn ends with the tokenizer's own end token
LANGUAGE_MODEL = "model"


def positions(processor: None, tokens: Tensor, grids: None, image_token: None) -> Tensor:
    """(3, P): one axis, three times over, so that a prompt looks the same whatever its backbone."""
    return torch.arange(len(tokens)).expand(3, -1)


def banned(config) -> tuple[int, ...]:
    return ()


def visual(network: nn.Module) -> nn.Module:
    """No module at all."""
    return nn.ModuleList()


def width(config) -> int:
    return config.get_text_config().hidden_size


def trunk(language_model: nn.Module, embedded: Tensor, positions: Tensor, layout) -> Tensor:
    """(B, T, width) and (3, B, T) → (B, T, hidden)."""
    return language_model(
        inputs_embeds=embedded, position_ids=positions[0], use_cache=False, layout=layout).last_hidden_state
