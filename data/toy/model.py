"""A tiny random Qwen2.5-VL and its tokenizer, written as an ordinary Hugging Face folder.

Nothing downstream knows that the model is tiny: it is a path for `--model` like any other, in the flat layout
of the Hub's Qwen2.5-VL checkpoints (`config.json` without a text part of its own, tensors `model.layers.*`,
`visual.*`, `lm_head.weight`), so the same loader and exporter serve both."""

import json
import shutil
from collections import Counter
from pathlib import Path

# The special tokens of Qwen2.5-VL in the Hub's order. They come after the learned vocabulary, as there.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
# What the tokenizer cuts text into before merging: a tag; "1:" as one piece; a word or a whole relation
# label, with the space before it; punctuation; white space. A label is then one token of a small vocabulary.
PIECES = r" ?</?\w+>| ?\d+:| ?/?[A-Za-z][\w/]*| ?\d| ?[^\w\s]|\s+"
# Qwen's turns in their shortest form: no system turn, images where the message has them.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
COPIED_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json",
                "generation_config.json", "vocab.json", "merges.txt")


def write_tiny_model(folder, texts=(), seed=0, *, tokenizer_folder=None, vocabulary=900, hidden=128, layers=4,
                     heads=4, key_value_heads=2, intermediate=320, vision_hidden=64, vision_depth=2,
                     tied=False, initial_std=0.05, min_pixels=56 * 56, max_pixels=84 * 84):
    """Writes a random model with its tokenizer, template and settings; returns its parameter count.

    `texts` are what the tokenizer's merges are learned from (prompts and responses). With `tokenizer_folder`
    that folder's tokenizer, template, preprocessor and generation settings are copied instead, and the size
    of the embedding follows its vocabulary. `min_pixels` and `max_pixels` are an image's area after scaling.
    Raises FileNotFoundError where `tokenizer_folder` has no tokenizer and ValueError without any text."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer_folder is None:
        write_tokenizer(folder, texts, vocabulary)
        write_settings(folder, min_pixels, max_pixels)
    else:
        copy_tokenizer(Path(tokenizer_folder), folder)
    config = model_config(token_ids(folder), hidden, layers, heads, key_value_heads, intermediate, vision_hidden,
                          vision_depth, tied, initial_std)
    write_json(folder / "config.json", config)
    return write_weights(folder, seed)


def write_tokenizer(folder, texts, vocabulary):
    """A byte-level BPE of at most `vocabulary` entries learned from `texts`, then the special tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    if not (texts := list(texts)):
        raise ValueError("write_tiny_model: no texts to learn a tokenizer from and no tokenizer_folder given")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, show_progress=False, special_tokens=[],
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(line, normalized=False) for line in fixed_lines(texts)])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        # The generic class: Qwen2Tokenizer would rebuild Qwen's own way of cutting text over ours.
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "unk_token": None, "model_max_length": 32768,
        "clean_up_tokenization_spaces": False, "additional_special_tokens": list(SPECIAL_TOKENS[1:])})
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def fixed_lines(texts):
    """The lines that stand in at least a quarter of the texts: the task's fixed wording.

    Each becomes one token. A model that knows no language reads nothing in their words, and the prompts get
    three times shorter."""
    count = Counter(line for text in texts for line in set(text.splitlines()))
    return sorted(line for line in count if 4 * count[line] >= len(texts) and len(line.split()) > 1)


def write_settings(folder, min_pixels, max_pixels):
    """The preprocessor's and the generation settings, as in the Hub's folders but for the images' area."""
    write_json(folder / "preprocessor_config.json", {
        "min_pixels": min_pixels, "max_pixels": max_pixels, "patch_size": 14, "temporal_patch_size": 2,
        "merge_size": 2, "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711], "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor"})
    tokens = token_ids(folder)
    # Nothing of this may reach a rollout: it stands here so that the demo would show it if it did.
    write_json(folder / "generation_config.json", {"pad_token_id": tokens["<|endoftext|>"], "do_sample": True,
        "eos_token_id": [tokens["<|im_end|>"], tokens["<|endoftext|>"]],
        "repetition_penalty": 1.05, "temperature": 0.1, "top_p": 0.001, "top_k": 1})


def copy_tokenizer(source, folder):
    """Copies the files that stand beside the weights in a Hub folder."""
    if not (source / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{source}: no tokenizer.json, expected a folder with a Qwen2.5-VL tokenizer")
    for name in COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def token_ids(folder):
    """{special token: id} of a folder's tokenizer, and under "" the number of ids."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in content["added_tokens"]}
    if missing := [token for token in SPECIAL_TOKENS if token not in ids]:
        raise ValueError(f"{folder / 'tokenizer.json'}: no token {missing[0]}, expected a Qwen2.5-VL tokenizer")
    ids[""] = 1 + max(*ids.values(), *content["model"]["vocab"].values())
    return ids


def model_config(tokens, hidden, layers, heads, key_value_heads, intermediate, vision_hidden, vision_depth, tied,
                 initial_std):
    """The flat `config.json` of the Hub's Qwen2.5-VL with small numbers.

    The rotary sections divide half a head among time, height and width about as 16 : 24 : 24. The last vision
    block attends over the whole image, the others within windows of 112 pixels."""
    half_head = hidden // heads // 2
    side = 3 * half_head // 8
    return {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0, "bos_token_id": tokens["<|endoftext|>"], "eos_token_id": tokens["<|im_end|>"],
        "vision_start_token_id": tokens["<|vision_start|>"], "vision_end_token_id": tokens["<|vision_end|>"],
        "vision_token_id": tokens["<|vision_pad|>"], "image_token_id": tokens["<|image_pad|>"],
        "video_token_id": tokens["<|video_pad|>"], "hidden_act": "silu", "hidden_size": hidden,
        "initializer_range": initial_std, "intermediate_size": intermediate, "max_position_embeddings": 32768,
        "max_window_layers": layers, "num_attention_heads": heads, "num_hidden_layers": layers,
        "num_key_value_heads": key_value_heads, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
        "sliding_window": 32768, "tie_word_embeddings": tied, "torch_dtype": "float32", "use_cache": True,
        "use_sliding_window": False, "vocab_size": -(-tokens[""] // 16) * 16,
        "rope_scaling": {"type": "mrope", "mrope_section": [half_head - 2 * side, side, side]}, "vision_config": {
            "depth": vision_depth, "hidden_act": "silu", "hidden_size": vision_hidden,
            "intermediate_size": 2 * vision_hidden, "num_heads": 4, "in_chans": 3, "out_hidden_size": hidden,
            "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112,
            "fullatt_block_indexes": [vision_depth - 1], "tokens_per_second": 2, "temporal_patch_size": 2,
            "initializer_range": initial_std}}


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


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
