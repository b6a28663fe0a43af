"""LLaVA-1.5: CLIP sees an image as a square of 336 × 336 pixels, 576 tokens whatever its shape, then a Llama reads."""

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration as Network
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from grpo.engine.backbones.llama import positions, trunk, width  # noqa: F401  (the same in both)
from grpo.engine.files import read_json

IMAGE_TOKEN = "<image>"
END_TOKENS = ()
LANGUAGE_MODEL = "model.language_model"


def load_image_processor(model: str, max_pixels: int | None) -> LlavaImageProcessorPil:
    """From the numbers of the checkpoint. max_pixels has no say: the encoder knows one size.

    The processor that the Hub's checkpoints name cuts a square out of an image's middle; LLaVA-1.5 itself was trained
    on images padded to a square, where nothing is lost, and that is what happens here."""
    settings, config = (read_json(model, f"{name}.json") for name in ("preprocessor_config", "config"))
    config = LlavaConfig.from_dict(config)
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    processor = LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": side}, crop_size={"height": side, "width": side},
        **{name: settings[name] for name in ("image_mean", "image_std") if name in settings})
    processor.grid = (1, side // patch, side // patch)
    processor.class_tokens = int(config.vision_feature_select_strategy == "full")
    return processor


def preprocess(processor: LlavaImageProcessorPil, images: list[Image.Image]) -> tuple[Tensor, Tensor]:
    """(images, 3, side, side) pixels and (images, 3) grids."""
    return processor(images, return_tensors="pt")["pixel_values"], torch.tensor([processor.grid] * len(images))


def seen_size(processor: LlavaImageProcessorPil, width: int, height: int) -> tuple[int, int]:
    """(width, height) of the image itself in its square, which it fills in one direction."""
    scale = processor.crop_size["height"] / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def image_token_counts(processor: LlavaImageProcessorPil, grids: Tensor) -> list[int]:
    return (grids.prod(-1) + processor.class_tokens).tolist()


def banned(config) -> tuple[int, ...]:
    return (config.image_token_id,)


def visual(network: nn.Module) -> nn.Module:
    """Encoder and projector."""
    return nn.ModuleList([network.model.vision_tower, network.model.multi_modal_projector])


def features(network: nn.Module, pixels: Tensor, grids: Tensor) -> list[Tensor]:
    """(image tokens, width) of each image."""
    layer, strategy = network.config.vision_feature_layer, network.config.vision_feature_select_strategy
    return network.model.get_image_features(
        pixels, vision_feature_layer=layer, vision_feature_select_strategy=strategy).pooler_output
