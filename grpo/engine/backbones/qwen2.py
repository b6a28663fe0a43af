"""Qwen2 and Qwen2.5: as Llama, with biases on queries, keys and values."""

from transformers import Qwen2ForCausalLM as Network  # noqa: F401

from grpo.engine.backbones.llama import (  # noqa: F401  (the same in both)
    IMAGE_TOKEN, LANGUAGE_MODEL, banned, positions, trunk, visual, width)

END_TOKENS = ("<|endoftext|>",)  # a turn ends with <|im_end|>; this one ends a text altogether
