"""A backbone is one file here, named like the `model_type` in a checkpoint's config.json. It says, and nobody else does:

    Network, IMAGE_TOKEN, END_TOKENS  the stock class; what stands for an image in the chat template; what ends a
                                      completion besides the tokenizer's own end token
    load_image_processor, preprocess  images → pixels and grids
    image_token_counts, positions   what an image costs in tokens, and where they stand
    banned                            token ids that no completion can hold
    visual, features                  the modules that see; pixels → features
    width, trunk                      embeddings, `width` wide, → hidden states

`layout_attention` works on any language model whose attention is one of transformers' registered functions.
"""

import importlib
from pathlib import Path
from types import ModuleType

MODEL_TYPES = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))


def check_model_type(model_type: str | None, model: str = "the model") -> None:
    """ValueError, naming `model`, if there is no backbone for this type."""
    if model_type not in MODEL_TYPES:
        raise ValueError(f"{model}: config.json has model_type {model_type!r}; expected one of {', '.join(MODEL_TYPES)}")


def backbone(model_type: str | None, model: str = "the model") -> ModuleType:
    """The backbone's module. ValueError, naming `model`, if there is none for this type."""
    check_model_type(model_type, model)
    return importlib.import_module(f"grpo.engine.backbones.{model_type}")
