"""Qwen2.5-VL: an image keeps its shape and costs one token for every 2 × 2 patches, on a grid of 3-axis positions."""

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration as Network
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from grpo.engine.backbones.llama import width  # noqa: F401  (the same in both)
from grpo.engine.files import read_json
from grpo.engine.joined import choose_vision_attention
from grpo.engine.rope import rope_positions

IMAGE_TOKEN = "<|image_pad|>"
END_TOKENS = ("<|endoftext|>",)  # a turn ends with <|im_end|>; this one ends a text altogether
LANGUAGE_MODEL = "model.language_model"
PATCH = 14
MERGE = 2  # patches a side that become one token


def load_image_processor(model: str, max_pixels: int | None) -> Qwen2VLImageProcessorPil:
    """The processor class itself, from the numbers in preprocessor_config.json: the Auto class needs torchvision
    on some versions. A limit below the checkpoint's smallest image lowers that too."""
    settings = read_json(model, "preprocessor_config.json")
    side = settings.get("patch_size", PATCH) * settings.get("merge_size", MERGE)
    size = settings.get("size") or {}
    smallest = settings.get("min_pixels") or size.get("shortest_edge") or 4 * side**2
    largest = max_pixels or settings.get("max_pixels") or size.get("longest_edge") or 16_384 * side**2
    if largest < side**2:
        raise ValueError(f"max_pixels is {largest}; one token of an image is already {side} × {side} = {side**2}")
    keep = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
    return Qwen2VLImageProcessorPil(size={"shortest_edge": min(smallest, largest), "longest_edge": largest},
        **{name: settings[name] for name in keep if name in settings})


def preprocess(processor: Qwen2VLImageProcessorPil, images: list[Image.Image]) -> tuple[Tensor, Tensor]:
    """(patches, values) pixels and (images, 3) grids; an image smaller than one token is enlarged."""
    side = processor.patch_size * processor.merge_size
    out = processor([at_least(image, side) for image in images], return_tensors="pt")
    return out["pixel_values"], out["image_grid_thw"]


def at_least(image: Image.Image, side: int) -> Image.Image:
    """Enlarged, in proportion, until both sides have `side` pixels."""
    size = enlarged(*image.size, side)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def enlarged(width: int, height: int, side: int) -> tuple[int, int]:
    scale = max(1, side / min(width, height))
    return max(side, round(width * scale)), max(side, round(height * scale))


def seen_size(processor: Qwen2VLImageProcessorPil, width: int, height: int) -> tuple[int, int]:
    """(width, height) after `preprocess`, from those before: what a box is measured in. ValueError beyond 200:1."""
    side = processor.patch_size * processor.merge_size
    width, height = enlarged(width, height, side)
    height, width = smart_resize(height, width, side, processor.size["shortest_edge"], processor.size["longest_edge"])
    return width, height


def image_token_counts(processor: Qwen2VLImageProcessorPil, grids: Tensor) -> list[int]:
    return (grids.prod(-1) // processor.merge_size**2).tolist()


def positions(processor: Qwen2VLImageProcessorPil, tokens: Tensor, grids: Tensor | None, image_token: int) -> Tensor:
    """(3, P): time, height, width."""
    return rope_positions(tokens, grids, image_token, processor.merge_size)


def banned(config) -> tuple[int, ...]:
    return config.image_token_id, config.video_token_id


def visual(network: nn.Module) -> nn.Module:
    """The encoder; transformers keeps the projector inside it as its merger."""
    return network.model.visual


def features(network: nn.Module, pixels: Tensor, grids: Tensor) -> list[Tensor]:
    """(image tokens, width) of each image."""
    choose_vision_attention(visual(network))
    return network.model.get_image_features(pixels, grids).pooler_output


def trunk(language_model: nn.Module, embedded: Tensor, positions: Tensor, layout) -> Tensor:
    """(B, T, width) and (3, B, T) → (B, T, hidden)."""
    return language_model(
        inputs_embeds=embedded, position_ids=positions,  # always ours: the model would keep stale offsets of its own
        attention_mask={"full_attention": None}, use_cache=False, layout=layout).last_hidden_state
