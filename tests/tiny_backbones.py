"""Tiny random networks of every other backbone than tiny.py's, some as folders too, behind the prompts of tiny.py."""

import json

import torch
from safetensors.torch import save_file
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from data.toy.model import token_ids, write_settings, write_tokenizer
from grpo.engine.backbones import backbone
from grpo.engine.policy import Policy
from grpo.group import Group, Prompt
from tiny import IMAGE, VIDEO, VOCABULARY, tiny_prompt

# ── networks ─────────────────────────────────────────────────────────────────────────────────────────────────────

TEXT = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
            vocab_size=VOCABULARY, initializer_range=0.2)


def llava_config(**more) -> LlavaConfig:
    return LlavaConfig(
        text_config=dict(model_type="llama", **{**TEXT, **more.pop("text", {})}),
        vision_config=dict(model_type="clip_vision_model", hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                           num_attention_heads=2, image_size=56, patch_size=14, initializer_range=0.2),
        **{"image_token_index": IMAGE, **more})


def qwen3_config(**more) -> Qwen3VLConfig:
    return Qwen3VLConfig(
        text_config=dict(**TEXT, head_dim=12, rope_parameters=dict(
            rope_type="default", mrope_section=[2, 2, 2], mrope_interleaved=True, rope_theta=10000.0)),
        vision_config=dict(hidden_size=32, depth=3, num_heads=2, intermediate_size=48, out_hidden_size=32,
                           patch_size=14, deepstack_visual_indexes=[0, 1], num_position_embeddings=64,
                           initializer_range=0.2),
        image_token_id=IMAGE, video_token_id=VIDEO, **more)


TEXT_ONLY = ["llama", "qwen2", "qwen3"]


def text_network(name: str, **more):
    """Llama's head is tied, as SmolLM2's and the small Qwens'."""
    network = backbone(name).Network
    return network(network.config_class(**{**TEXT, "tie_word_embeddings": name == "llama", **more})).eval()


def tiny_network(name: str, seed: int = 0):
    torch.manual_seed(seed)
    if name in TEXT_ONLY:
        return text_network(name)
    if name == "llava":
        return LlavaForConditionalGeneration(llava_config()).eval()
    return Qwen3VLForConditionalGeneration(qwen3_config()).eval()


def prompt_of(name: str, seed: int, images: int = 2, length: int = 6) -> Prompt:
    """As tiny.tiny_prompt; LLaVA's images are 4 × 4 patches of one token each, and its positions one axis."""
    if name in TEXT_ONLY:
        return tiny_prompt(seed, (), 3 * length)
    if name != "llava":
        return tiny_prompt(seed, ((1, 4, 4), (1, 6, 10))[:images], length)
    random = torch.Generator().manual_seed(seed)
    words = lambda: torch.randint(0, IMAGE, (length,), generator=random).tolist()
    tokens = torch.tensor(words() + sum(([IMAGE] * 16 + words() for _ in range(images)), []))
    pixels = torch.randn(images, 3, 56, 56, generator=random) if images else None
    grids = torch.tensor([[1, 4, 4]] * images) if images else None
    return Prompt(tokens, torch.arange(len(tokens)).expand(3, -1), pixels, grids, id=f"tiny/{seed}")


def groups_of(name: str, lengths=((5, 1, 9), (3, 4, 2), (2, 6))) -> list[Group]:
    random = torch.Generator().manual_seed(3)
    return [Group(prompt_of(name, index, images=(2, 1, 0)[index % 3], length=5 + 2 * index),
                  [torch.randint(0, IMAGE, (length,), generator=random) for length in row])
            for index, row in enumerate(lengths)]


def policy_of(name: str) -> Policy:
    return Policy(tiny_network(name))


def plain_logp(name: str, network, group: Group, temperature: float = 1.0) -> list[torch.Tensor]:
    """The slow truth: a stock forward of prompt + completion, one by one."""
    rows = []
    for completion in group.completions:
        ids = torch.cat([group.prompt.tokens, completion])[None]
        given = {} if group.prompt.pixels is None else {"pixel_values": group.prompt.pixels}
        if name not in ("llava", *TEXT_ONLY):
            given["mm_token_type_ids"] = (ids == IMAGE).int()
            if given.get("pixel_values") is not None:
                given["image_grid_thw"] = group.prompt.grids
        out = network(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **given)
        logits = out.logits[0, len(group.prompt) - 1 : -1].float() / temperature
        impossible = {"llava": [IMAGE], "qwen3_vl": [IMAGE, VIDEO]}.get(name, [])
        logits = logits.index_fill(-1, torch.tensor(impossible, dtype=torch.long), float("-inf"))
        rows.append(logits.log_softmax(-1).gather(-1, completion[:, None])[:, 0])
    return rows


# ── a LLaVA folder as on the hub ─────────────────────────────────────────────────────────────────────────────────

TEMPLATE = (  # one turn of LLaVA-1.5's
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}")


def write_llava(folder, texts):
    """Random weights under the hub's names, a tokenizer with <s>, </s> and <image>, the processor's own numbers."""
    folder.mkdir(parents=True)
    write_tokenizer(folder, texts, 400)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        for old, new in (("<|image_pad|>", "<image>"), ("<|im_end|>", "</s>"), ("<|im_start|>", "<s>"),
                         ("<|endoftext|>", "<pad>")):
            text = text.replace(old, new)
        (folder / name).write_text(text)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokenizer["post_processor"] = {  # a text begins with <s>
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                                                 {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [ids["<s>"]], "tokens": ["<s>"]}}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<s>", "unk_token": "<pad>"}))
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "CLIPImageProcessor", "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711], "size": {"shortest_edge": 56}, "do_center_crop": True}))
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.1, "top_p": 0.5, "do_sample": True}))
    config = llava_config(image_token_index=ids["<image>"], text=dict(vocab_size=1 + max(ids.values()), **{
        "bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"], "pad_token_id": ids["<pad>"]}))
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)
    torch.manual_seed(0)
    weights = {hub_name(name): tensor.contiguous()
               for name, tensor in LlavaForConditionalGeneration(config).state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def hub_name(name: str) -> str:
    """llava-hf's checkpoints: language_model.model.…, language_model.lm_head, vision_tower.vision_model.…"""
    name = name.replace("model.language_model.", "language_model.model.").replace("lm_head.", "language_model.lm_head.")
    name = name.replace("model.multi_modal_projector.", "multi_modal_projector.")
    name = name.replace("model.vision_tower.", "vision_tower.")
    if name.startswith("vision_tower.") and "vision_model" not in name:
        name = name.replace("vision_tower.", "vision_tower.vision_model.")
    return name


# ── folders as on the hub of a text-only model and of Qwen3-VL ───────────────────────────────────────────────────


def write_text_model(folder, texts, name="llama", vocabulary=400, **more):
    """Random weights, a tokenizer and a template whose turns are strings, as SmolLM2's and Qwen2.5's are."""
    folder.mkdir(parents=True)
    write_tokenizer(folder, texts, vocabulary)
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
        "'<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    ids = token_ids(folder)
    torch.manual_seed(0)
    network = text_network(name, **{"vocab_size": ids[""] + 16, "bos_token_id": ids["<|im_start|>"],
                                    "eos_token_id": ids["<|im_end|>"], **more})
    network.save_pretrained(folder)
    return folder


def write_qwen3_vl(folder, texts):
    folder.mkdir(parents=True)
    write_tokenizer(folder, texts, 400)
    write_settings(folder, 64 * 64, 96 * 96)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
                 "processor_class": "Qwen3VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    ids = token_ids(folder)
    config = qwen3_config().to_dict()
    config |= {"image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
               "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"]}
    config["vision_config"] |= {"patch_size": 16, "num_position_embeddings": 36}
    config["text_config"] |= {"vocab_size": ids[""] + 16, "bos_token_id": None, "eos_token_id": ids["<|im_end|>"]}
    torch.manual_seed(0)
    Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_dict(config)).save_pretrained(folder)
    return folder
