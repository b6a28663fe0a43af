"""`encode`: pictures and text → prompt (token ids, 3-axis rope positions, pixels).

Only a tokenizer and an image processor are needed. The checkpoint's processor class would drag torchvision in
for videos, so the two are loaded by themselves and the picture's run of image tokens is written out here.
"""

import json
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import cached_file

from grpo.group import Prompt
from grpo.rope import rope_positions

IMAGE_TOKEN = "<|image_pad|>"
MIN_SIDE = 28  # one merged patch; a smaller picture is enlarged


class Encoder:
    """Tokenizer, image processor and chat template of a checkpoint.

    model: folder or hub name. max_pixels bounds each picture's area: 28 × 28 pixels become one token.
    """

    def __init__(self, model: str, max_pixels: int | None = None):
        self.tokenizer = load_tokenizer(model)
        self.images = load_image_processor(model, max_pixels)
        self.image_token = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if self.image_token is None or self.tokenizer.convert_ids_to_tokens(self.image_token) != IMAGE_TOKEN:
            raise ValueError(f"{model}: the tokenizer has no {IMAGE_TOKEN} token; is this a Qwen2.5-VL checkpoint?")
        if not self.tokenizer.chat_template:
            raise ValueError(f"{model}: no chat template (chat_template.jinja or tokenizer_config.json); expected Qwen's")
        # The turn ends with <|im_end|>; <|endoftext|> ends a text altogether. Both end a completion.
        ends = (self.tokenizer.eos_token_id, self.tokenizer.convert_tokens_to_ids("<|endoftext|>"))
        self.end_tokens = tuple(dict.fromkeys(end for end in ends if end is not None))

    def encode(self, pictures: list[Image.Image], text: str, sample: object = None, id: str = "") -> Prompt:
        """One user turn, pictures first. Raises ValueError, naming the sample, if the text itself holds image tokens."""
        content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": text}]
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        tokens = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        if tokens.count(self.image_token) != len(pictures):
            raise ValueError(
                f"{id or 'prompt'}: {tokens.count(self.image_token)} {IMAGE_TOKEN} tokens for {len(pictures)} pictures; "
                f"the sample's own text may not hold one"
            )
        pixels, grids = self.look_at(pictures, id)
        merge = self.images.merge_size
        runs = iter([] if grids is None else (grids.prod(-1) // merge**2).tolist())
        expanded = [t for token in tokens for t in ([token] * next(runs) if token == self.image_token else [token])]
        tokens = torch.tensor(expanded)
        return Prompt(tokens, rope_positions(tokens, grids, self.image_token, merge), pixels, grids, None, sample, id)

    def look_at(self, pictures: list[Image.Image], id: str = "") -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Pictures → (patches, values) pixels and (pictures, 3) grids."""
        if not pictures:
            return None, None
        try:
            out = self.images([at_least(picture, MIN_SIDE) for picture in pictures], return_tensors="pt")
        except ValueError as error:  # the processor's own, e.g. more elongated than 200:1
            raise ValueError(f"{id or 'picture'}: {error}") from None
        return out["pixel_values"], out["image_grid_thw"]

    def completion(self, text: str) -> torch.Tensor:
        """A given response as a completion: its tokens and the end token, which is trained like any other."""
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"] + [self.end_tokens[0]])

    def decode(self, completion: torch.Tensor) -> str:
        """A completion's text without its end token; any other special token stays visible to the reward."""
        ids = completion.tolist()
        if ids and ids[-1] in self.end_tokens:
            ids = ids[:-1]
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def at_least(picture: Image.Image, side: int) -> Image.Image:
    """Enlarged, in proportion, until both sides have `side` pixels."""
    scale = side / min(picture.size)
    if scale <= 1:
        return picture
    return picture.resize([max(side, round(length * scale)) for length in picture.size], Image.Resampling.BICUBIC)


def model_file(model: str, name: str) -> Path:
    """Path of one small file of a checkpoint, local or from the hub; ValueError with the expected name if absent."""
    if Path(model).is_dir():
        path = Path(model) / name
        if not path.is_file():
            raise ValueError(f"{path}: missing; a checkpoint needs config.json, tokenizer and {name}")
        return path
    try:
        return Path(cached_file(model, name))
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{model}: {name}: neither a folder nor a model on the hub that can be reached ({reason})") from None


def read_json(model: str, name: str) -> dict:
    """A checkpoint's JSON file; ValueError with its path if it holds anything else."""
    path = model_file(model, name)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def load_tokenizer(model: str):
    model_file(model, "tokenizer_config.json")
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"{model}: the tokenizer cannot be loaded: {str(error).splitlines()[0]}") from None


def load_image_processor(model: str, max_pixels: int | None) -> Qwen2VLImageProcessorPil:
    """The processor class itself, from the numbers in preprocessor_config.json: the Auto class needs torchvision
    on some versions. A limit below the checkpoint's smallest picture lowers that too."""
    settings = read_json(model, "preprocessor_config.json")
    size = settings.get("size") or {}
    smallest = settings.get("min_pixels") or size.get("shortest_edge") or 4 * MIN_SIDE**2
    largest = max_pixels or settings.get("max_pixels") or size.get("longest_edge") or 12_845_056
    if largest < MIN_SIDE**2:
        raise ValueError(f"max_pixels is {largest}; one token of a picture is already {MIN_SIDE} × {MIN_SIDE} = {MIN_SIDE**2}")
    keep = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": min(smallest, largest), "longest_edge": largest},
        **{name: settings[name] for name in keep if name in settings},
    )
