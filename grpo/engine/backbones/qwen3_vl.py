"""Qwen3-VL: as Qwen2.5-VL, but an image has features for the first few layers too, added after each (DeepStack).

An image's token is then several vectors side by side: its embedding and what each layer adds; a word's are zero."""

import torch
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration as Network

from grpo.engine.backbones.qwen2_5_vl import (  # noqa: F401  (the same in both)
    END_TOKENS, IMAGE_TOKEN, LANGUAGE_MODEL, banned, image_token_counts, load_image_processor, positions, preprocess,
    seen_size, visual)
from grpo.engine.joined import choose_vision_attention


def features(network: nn.Module, pixels: Tensor, grids: Tensor) -> list[Tensor]:
    """(image tokens, width) of each image."""
    choose_vision_attention(visual(network))
    seen = network.model.get_image_features(pixels, grids)
    images = [len(image) for image in seen.pooler_output]
    # from some transformers on a layer's features come by image, as the embeddings do; before, end to end
    layers = [layer if torch.is_tensor(layer) else torch.cat(layer) for layer in seen.deepstack_features]
    return list(torch.cat([torch.cat(seen.pooler_output), *layers], dim=-1).split(images))


def width(config) -> int:
    return config.text_config.hidden_size * (1 + len(config.vision_config.deepstack_visual_indexes))


def trunk(language_model: nn.Module, embedded: Tensor, positions: Tensor, layout) -> Tensor:
    """(B, T, width), or (B, T, hidden) where there are only words, and (3, B, T) → (B, T, hidden)."""
    embedded, *deeper = embedded.split(language_model.config.hidden_size, dim=-1)
    return language_model(
        inputs_embeds=embedded, position_ids=positions, attention_mask=None, use_cache=False, layout=layout,
        visual_pos_masks=torch.ones(embedded.shape[:2], dtype=torch.bool, device=embedded.device),
        deepstack_visual_embeds=[layer.flatten(0, 1) for layer in deeper] or None).last_hidden_state
