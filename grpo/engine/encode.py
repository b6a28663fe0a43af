"""`encode`: images and text → prompt (token ids, 3-axis rope positions, pixels).

Only a tokenizer and an image processor are needed. The checkpoint's processor class would drag torchvision in
for videos, so the two are loaded by themselves and the image's run of image tokens is written out here.
What differs between models stands in grpo/engine/backbones/.
"""

import torch
from PIL import Image
from transformers import AutoTokenizer

from grpo.engine.backbones import backbone
from grpo.engine.files import model_file, read_json
from grpo.group import Prompt


class Encoder:
    """Tokenizer, image processor and chat template of a checkpoint.

    model: folder or hub name. max_pixels bounds each image's area: 28 × 28 pixels become one token.
    """

    def __init__(self, model: str, max_pixels: int | None = None):
        self.backbone = backbone(read_json(model, "config.json").get("model_type"), model)
        self.tokenizer = load_tokenizer(model)
        self.image_processor = self.backbone.load_image_processor(model, max_pixels)
        self.image_token = self.token_id(self.backbone.IMAGE_TOKEN)
        if self.image_token is None:
            raise ValueError(f"{model}: the tokenizer has no {self.backbone.IMAGE_TOKEN} token, which its config.json's "
                             f"model_type promises")
        if not self.tokenizer.chat_template:
            raise ValueError(f"{model}: no chat template; expected chat_template.jinja, chat_template.json or one in "
                             f"tokenizer_config.json")
        ends = (self.tokenizer.eos_token_id, *map(self.token_id, self.backbone.END_TOKENS))
        self.end_tokens = tuple(dict.fromkeys(end for end in ends if end is not None))

    def token_id(self, token: str) -> int | None:
        """None for what is no token of its own, where the tokenizer would answer with the unknown one's id."""
        return self.tokenizer.get_vocab().get(token)

    def encode(self, images: list[Image.Image], text: str, sample: object = None, id: str = "") -> Prompt:
        """One user turn, images first. Raises ValueError, naming the sample, if the text itself holds image tokens."""
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        # a text that begins with a token of its own (Llama's <s>) does so, unless the template has written it already
        begin = self.tokenizer.bos_token
        tokens = self.tokenizer(rendered, add_special_tokens=bool(begin) and not rendered.startswith(begin))["input_ids"]
        if tokens.count(self.image_token) != len(images):
            raise ValueError(
                f"{id or 'prompt'}: {tokens.count(self.image_token)} {self.backbone.IMAGE_TOKEN} tokens for "
                f"{len(images)} images; the sample's own text may not hold one"
            )
        pixels, grids = self.preprocess(images, id)
        runs = iter([] if grids is None else self.backbone.image_token_counts(self.image_processor, grids))
        expanded = [t for token in tokens for t in ([token] * next(runs) if token == self.image_token else [token])]
        tokens = torch.tensor(expanded)
        positions = self.backbone.positions(self.image_processor, tokens, grids, self.image_token)
        return Prompt(tokens, positions, pixels, grids, None, sample, id)

    def preprocess(self, images: list[Image.Image], id: str = "") -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Images → pixels, in the backbone's own shape, and (images, 3) grids."""
        if not images:
            return None, None
        try:
            return self.backbone.preprocess(self.image_processor, images)
        except ValueError as error:  # the processor's own, e.g. more elongated than 200:1
            raise ValueError(f"{id or 'image'}: {error}") from None

    def completion(self, text: str) -> torch.Tensor:
        """A given response as a completion: its tokens and the end token, which is trained like any other."""
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"] + [self.end_tokens[0]])

    def decode(self, completion: torch.Tensor) -> str:
        """A completion's text without its end token; any other special token stays visible to the reward."""
        ids = completion.tolist()
        if ids and ids[-1] in self.end_tokens:
            ids = ids[:-1]
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def load_tokenizer(model: str):
    model_file(model, "tokenizer_config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"{model}: the tokenizer cannot be loaded: {str(error).splitlines()[0]}") from None
    if not tokenizer.chat_template:  # older checkpoints keep the processor's, in a file of its own
        try:
            tokenizer.chat_template = read_json(model, "chat_template.json").get("chat_template")
        except ValueError:
            pass
    return tokenizer
