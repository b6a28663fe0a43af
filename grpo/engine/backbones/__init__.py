"""A backbone is one file here, named like the `model_type` in a checkpoint's config.json. It alone says:

    Network                           the stock class
    LANGUAGE_MODEL                    the name in it of the module that has the decoder's `layers`
    IMAGE_TOKEN, END_TOKENS           what stands for an image in the chat template; what ends a completion besides the
                                      tokenizer's own end token
    positions                         where a prompt's tokens stand
    banned                            token ids that no completion can hold
    visual                            the modules that see
    width, trunk                      embeddings, `width` wide, → hidden states, by the language model
and, unless its IMAGE_TOKEN is None because it reads text alone,
    load_image_processor, preprocess  images → pixels and grids
    image_token_counts                what an image costs in tokens
    seen_size                         (width, height) of an image as the model sees it, in pixels
    features                          pixels → features

`layout_attention` works on any language model whose attention is one of transformers' registered functions."""

import importlib
from pathlib import Path
from types import ModuleType

MODEL_TYPES = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))


def check_model_type(model_type: str | None, model: str = "the model") -> None:
    """ValueError, naming `model`, if there is no backbone for this type."""
    if model_type not in MODEL_TYPES:
        raise ValueError(f"{model}: config.json has model_type {model_type!r}; expected one of "
                         f"{', '.join(MODEL_TYPES)} (another one is a file more in {Path(__file__).parent})")


def backbone(model_type: str | None, model: str = "the model") -> ModuleType:
    """The backbone's module. ValueError, naming `model`, if there is none for this type."""
    check_model_type(model_type, model)
    return importlib.import_module(f"grpo.engine.backbones.{model_type}")
