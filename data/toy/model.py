"""A tiny random Qwen2.5-VL and its tokenizer, written as an ordinary Hugging Face folder.

It has the flat layout of the Hub's Qwen2.5-VL checkpoints (`config.json` without a text part of its own, tensors
`model.layers.*`, `visual.*`, `lm_head.weight`). `checkpoint/` beside this file holds that folder's settings; where a
setting is a token's id, the token stands there. The generation settings may reach no rollout."""

import json
import shutil
from collections import Counter
from pathlib import Path

CHECKPOINT = Path(__file__).with_name("checkpoint")
# What the tokenizer cuts text into before merging: a tag; "1:" as one piece; a word or a whole relation
# label, with the space before it; punctuation; white space. A label is then one token of a small vocabulary.
PIECES = r" ?</?\w+>| ?\d+:| ?/?[A-Za-z][\w/]*| ?\d| ?[^\w\s]|\s+"


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# The special tokens of Qwen2.5-VL in the Hub's order. They come after the learned vocabulary, as there.
SPECIAL_TOKENS = ("<|endoftext|>", *read_json(CHECKPOINT / "tokenizer_config.json")["additional_special_tokens"])


def write_tiny_model(folder, texts=(), seed=0, *, vocabulary=900, min_pixels=56 * 56, max_pixels=84 * 84, **sizes):
    """Writes a random model with its tokenizer, template and settings; returns its parameter count.

    `texts` are what the tokenizer's merges are learned from (prompts and responses). Without any, tokenizer, template,
    preprocessor and generation settings are those that the folder holds; ValueError if it holds none. `min_pixels` and
    `max_pixels` are an image's area after scaling, `sizes` those of `model_config`."""
    folder, texts = Path(folder), list(texts)
    folder.mkdir(parents=True, exist_ok=True)
    if texts:
        write_tokenizer(folder, texts, vocabulary)
        write_settings(folder, min_pixels, max_pixels)
    elif not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder}: no tokenizer.json in it, and no texts to learn a tokenizer from")
    write_json(folder / "config.json", model_config(token_ids(folder), **sizes))
    return write_weights(folder, seed)


def write_tokenizer(folder, texts, vocabulary):
    """A byte-level BPE of at most `vocabulary` entries learned from `texts`, then the special tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, show_progress=False, special_tokens=[],
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(line, normalized=False) for line in fixed_lines(texts)])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    # Its class is the generic one: Qwen2Tokenizer would rebuild Qwen's own way of cutting text over ours.
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(CHECKPOINT / name, folder / name)


def fixed_lines(texts):
    """The lines that stand in at least a quarter of the texts, the task's fixed wording: each becomes one token, for a
    model that knows no language reads nothing in their words, and the prompts get three times shorter."""
    count = Counter(line for text in texts for line in set(text.splitlines()))
    return sorted(line for line in count if 4 * count[line] >= len(texts) and len(line.split()) > 1)


def write_settings(folder, min_pixels, max_pixels):
    """The preprocessor's and the generation settings, as in the Hub's folders but for the images' area."""
    write_json(folder / "preprocessor_config.json", read_json(CHECKPOINT / "preprocessor_config.json") | {
        "min_pixels": min_pixels, "max_pixels": max_pixels})
    write_json(folder / "generation_config.json", settings_with_ids("generation_config.json", token_ids(folder)))


def settings_with_ids(name, tokens):
    """A file of `checkpoint/` with ids in the places of special tokens."""
    text = (CHECKPOINT / name).read_text(encoding="utf-8")
    for token in SPECIAL_TOKENS:
        text = text.replace(json.dumps(token), str(tokens[token]))
    return json.loads(text)


def token_ids(folder):
    """{special token: id} of a folder's tokenizer, and under "" the number of ids."""
    content = read_json(folder / "tokenizer.json")
    ids = {token["content"]: token["id"] for token in content["added_tokens"]}
    ids[""] = 1 + max(*ids.values(), *content["model"]["vocab"].values())
    return ids


def model_config(tokens, *, hidden=128, layers=4, heads=4, key_value_heads=2, intermediate=320, vision_hidden=64,
                 vision_depth=2, tied=False, initial_std=0.05):
    """The flat `config.json` of the Hub's Qwen2.5-VL with small numbers; tokens: what `token_ids` gives.

    The rotary sections divide half a head among time, height and width about as 16 : 24 : 24. The last vision
    block attends over the whole image, the others within windows of 112 pixels."""
    half_head = hidden // heads // 2
    side = 3 * half_head // 8
    config = settings_with_ids("config.json", tokens)
    config["rope_scaling"]["mrope_section"] = [half_head - 2 * side, side, side]
    config["vision_config"] |= {
        "depth": vision_depth, "fullatt_block_indexes": [vision_depth - 1], "hidden_size": vision_hidden,
        "intermediate_size": 2 * vision_hidden, "out_hidden_size": hidden, "initializer_range": initial_std}
    return config | {"hidden_size": hidden, "initializer_range": initial_std, "intermediate_size": intermediate,
        "max_window_layers": layers, "num_attention_heads": heads, "num_hidden_layers": layers,
        "num_key_value_heads": key_value_heads, "tie_word_embeddings": tied, "vocab_size": -(-tokens[""] // 16) * 16}


def write_weights(folder, seed):
    """Random float32 weights for the folder's `config.json`, under the Hub's names; returns their count."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig.from_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    tensors = {hub_name(name): tensor.detach().float().contiguous() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values())


def hub_name(name):
    """`model.language_model.x` is `model.x` in the Hub's layout, and `model.visual.x` is `visual.x`."""
    return name.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1)
