"""Random Qwen2.5-VL checkpoints in the proportions that the benchmarks ask for, and prompts of an exact length.

big-head   45M parameters, almost all in the real vocabulary's 151,936 rows: hidden 256, 6 layers, head tied
trunk      7B's proportions, where the layers dominate: hidden 512, 12 layers, vocabulary 8,192, head not tied; the
           vision encoder has 7B's proportion in width (192) and a quarter of it in depth (4)
planned    107M parameters, 429 MB, large enough for its memory to be told from the interpreter's; the matrices are
           few and large, as in real models
table      104M parameters, almost all in one table of which the tokenizer has few rows: hundreds of megabytes that cost
           no time, and layers that can read 65,536 tokens on a CPU
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from data.toy.model import model_config, token_ids, write_settings, write_tokenizer, write_weights

SHAPES = {
    "big-head": dict(hidden=256, layers=6, heads=4, key_value_heads=2, intermediate=704, vision_hidden=64,
                     vision_depth=2, tied=True, vocabulary=151_936),
    "trunk": dict(hidden=512, layers=12, heads=8, key_value_heads=2, intermediate=2688, vision_hidden=192,
                  vision_depth=4, tied=False, vocabulary=8_192),
    "middle": dict(hidden=256, layers=6, heads=4, key_value_heads=2, intermediate=1344, vision_hidden=96,
                   vision_depth=2, tied=False, vocabulary=8_192),
    "planned": dict(hidden=1024, layers=3, heads=8, key_value_heads=2, intermediate=8704, vision_hidden=128,
                    vision_depth=2, tied=False, vocabulary=8_704),
    "table": dict(hidden=256, layers=2, heads=2, key_value_heads=1, intermediate=512, vision_hidden=64,
                  vision_depth=2, tied=True, vocabulary=400_000),
    # for warming up, and for trying a benchmark's code
    "small": dict(hidden=64, layers=2, heads=2, key_value_heads=1, intermediate=128, vision_hidden=32,
                  vision_depth=2, tied=True, vocabulary=1_024),
}
SEVEN = dict(  # the published 7B's config.json, in short
    model_type="qwen2_5_vl", hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_hidden_layers=28,
    num_key_value_heads=4, tie_word_embeddings=False, vocab_size=152_064, image_token_id=151655, video_token_id=151656,
    vision_config=dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584,
                       fullatt_block_indexes=[7, 15, 23, 31]),
    rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]))

THREE = SEVEN | dict(hidden_size=2048, intermediate_size=11008, num_attention_heads=16, num_hidden_layers=36,
                     num_key_value_heads=2, tie_word_embeddings=True, vocab_size=151_936,
                     vision_config=SEVEN["vision_config"] | dict(out_hidden_size=2048))
PUBLISHED = {"3B": THREE, "7B": SEVEN}
WORD = "word"
MODELS = Path("runs/benchmarks")  # where the checkpoints are written


def write_model(folder: Path, shape: str) -> Path:
    """The checkpoint, unless it is there already. Its tokenizer knows few words; the embedding has all the rows."""
    if not (folder / "model.safetensors").exists():
        write_all_but_weights(folder, **SHAPES[shape])
        write_weights(folder, seed=0)
    return folder


def write_all_but_weights(folder: Path, *, vocabulary: int, vision: dict = {}, **numbers) -> Path:
    """vision: what of the encoder's config is not as `model_config` has it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, [f" {WORD}"] * 50, vocabulary=300)
    write_settings(folder, 28 * 28, 1280 * 28 * 28)
    config = model_config(token_ids(folder), initial_std=0.02, **numbers) | {"vocab_size": vocabulary}
    config["vision_config"] |= vision
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def whole_vocabulary() -> None:
    """The tokenizers here know few words: without this, we would leave the head's other rows out, others would not."""
    from grpo.engine import encode, weights

    encode.vocabulary_size = weights.vocabulary_size = lambda tokenizer: 1 << 30


def images(seed: int, side: int, count: int = 2) -> list[Image.Image]:
    """Noise, side × side pixels: (side / 28)² tokens each."""
    random = np.random.default_rng(seed)
    return [Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def words_for(encoder, tokens: int, side: int) -> str:
    """The text with which a prompt of two such images has exactly so many tokens."""
    empty = len(encoder.encode(images(0, side), ""))
    if tokens < empty:
        raise ValueError(f"a prompt with two images of {side} pixels has at least {empty} tokens; {tokens} asked for")
    text = f" {WORD}" * (tokens - empty)
    found = len(encoder.encode(images(0, side), text))
    if found != tokens:
        raise ValueError(f"the prompt has {found} tokens instead of {tokens}")
    return text
