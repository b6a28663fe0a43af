"""`encode`: images and text → prompt (token ids, 3-axis rope positions, pixels).

Only a tokenizer and an image processor are needed. The checkpoint's processor class would drag torchvision in
for videos, so the two are loaded by themselves and the image's run of image tokens is written out here.
What differs between models stands in grpo/engine/backbones/.

Content is text: a post or a response that spells a special token (`<|im_end|>`) gets the tokens of its letters, for
only the chat template may end a turn or place an image. Text without one is tokenised as `apply_chat_template` does."""

import re

import torch
from PIL import Image
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoTokenizer

from grpo.engine.backbones import backbone
from grpo.engine.files import hub_options, model_file, read_json
from grpo.group import Prompt

DATE = "26 Jul 2024"  # Llama 3's template would write today's into every prompt: no run could be repeated tomorrow


class Encoder:
    """Tokenizer, image processor and chat template of a checkpoint.

    model: folder or hub name. max_pixels bounds each image's area: 28 × 28 pixels become one token."""

    def __init__(self, model: str, max_pixels: int | None = None):
        self.model_type = read_json(model, "config.json").get("model_type")
        self.backbone = backbone(self.model_type, model)
        self.tokenizer = load_tokenizer(model)
        self.sees = self.backbone.IMAGE_TOKEN is not None
        self.text_alone = f"a model of type {self.model_type} reads text alone"
        self.image_processor = self.backbone.load_image_processor(model, max_pixels) if self.sees else None
        self.image_token = self.token_id(self.backbone.IMAGE_TOKEN)
        if self.sees and self.image_token is None:
            raise ValueError(f"{model}: the tokenizer has no {self.backbone.IMAGE_TOKEN} token; its config.json's "
                             f"model_type {self.model_type} expects one")
        if not self.tokenizer.chat_template:
            raise ValueError(f"{model}: no chat template; expected chat_template.jinja, chat_template.json or one in "
                             f"tokenizer_config.json")
        ends = (self.tokenizer.eos_token_id, *map(self.token_id, self.backbone.END_TOKENS))
        self.end_tokens = tuple(dict.fromkeys(end for end in ends if end is not None))
        self.vocabulary = vocabulary_size(self.tokenizer)
        if self.sees:  # a checkpoint may have forgotten to say that its image token is special
            image_token = AddedToken(self.backbone.IMAGE_TOKEN, special=True, normalized=False)
            self.tokenizer.add_tokens([image_token], special_tokens=True)
        self.special = {token.content: id for id, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        longest_first = sorted(map(re.escape, self.special), key=len, reverse=True)
        self.special_pattern = re.compile(f"({'|'.join(longest_first)})")
        _, tag, rest = self.render([], "").rpartition("<think>")  # which the template may have opened already
        self.prefilled = "" if rest.strip() else tag + rest

    def token_id(self, token: str | None) -> int | None:
        """None for what is no token of its own, where the tokenizer would answer with the unknown one's id."""
        return self.tokenizer.get_vocab().get(token)

    def encode(self, images: list[Image.Image], text: str, sample: object = None, id: str = "") -> Prompt:
        """One user turn, images first, behind the sample's `system`. ValueError, by id, if it cannot be encoded."""
        name, texts = id or "prompt", (text, getattr(sample, "system", "") or "")
        if images and not self.sees:
            raise ValueError(f"{name}: has {len(images)} images; {self.text_alone}")
        if any("\ud800" <= character <= "\udfff" for character in "".join(texts)):  # JSON can spell it
            raise ValueError(f"{name}: its text holds half of a surrogate pair, which is no character")
        stand_ins = self.stand_ins("".join(texts))
        rendered = self.render(images, *(self.special_pattern.sub(lambda found: stand_ins[found[0]], t) for t in texts))
        tokens = self.tokenize_rendered(rendered, {mark: token for token, mark in stand_ins.items()})
        if tokens.count(self.image_token) != len(images):
            raise ValueError(f"{name}: the chat template writes {tokens.count(self.image_token)} "
                             f"{self.backbone.IMAGE_TOKEN} tokens for {len(images)} images")
        pixels, grids = self.preprocess(images, name)
        runs = iter([] if grids is None else self.backbone.image_token_counts(self.image_processor, grids))
        expanded = [t for token in tokens for t in ([token] * next(runs) if token == self.image_token else [token])]
        tokens = torch.tensor(expanded)
        positions = self.backbone.positions(self.image_processor, tokens, grids, self.image_token)
        return Prompt(tokens, positions, pixels, grids, None, sample, id)

    def render(self, images: list, text: str, system: str = "") -> str:
        def turn(role: str, images: list, text: str) -> dict:
            parts = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
            return {"role": role, "content": parts if self.sees else text}  # text-only models' templates want a string

        turns = [turn("system", [], system)] * bool(system) + [turn("user", images, text)]
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, date_string=DATE)

    def stand_ins(self, text: str) -> dict[str, str]:
        """{special token in the text: a private character that the text does not have}.

        The template is given these characters: whatever special token it then writes is its own."""
        unused = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in text)
        return {token: next(unused) for token in dict.fromkeys(self.special_pattern.findall(text))}

    def tokenize_rendered(self, rendered: str, hidden: dict[str, str]) -> list[int]:
        """hidden: stand-in → the special token whose letters it stands for."""
        # a text that begins with a token of its own (Llama's <s>) does so, unless the template has written it already
        begin = self.tokenizer.bos_token
        begins = bool(begin) and not rendered.startswith(begin)
        if not hidden:
            return self.tokenizer(rendered, add_special_tokens=begins, split_special_tokens=False)["input_ids"]
        tokens = self.tokenizer("", add_special_tokens=begins)["input_ids"]
        for i, part in enumerate(self.special_pattern.split(rendered)):  # text and the template's tokens in turn
            tokens += [self.special[part]] if i % 2 else self.tokenize_text("".join(hidden.get(c, c) for c in part))
        return tokens

    def tokenize_text(self, text: str) -> list[int]:
        """Letters alone, whatever they spell."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def seen_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of an image as the model sees it; ValueError if it cannot see an image so shaped, or any."""
        if not self.sees:
            raise ValueError(f"has images; {self.text_alone}")
        return self.backbone.seen_size(self.image_processor, width, height)

    def preprocess(self, images: list[Image.Image], name: str = "image") -> tuple[Tensor | None, Tensor | None]:
        """Images → pixels, in the backbone's own shape, and (images, 3) grids."""
        if not images:
            return None, None
        try:
            return self.backbone.preprocess(self.image_processor, images)
        except ValueError as error:  # the processor's own, e.g. more elongated than 200:1
            raise ValueError(f"{name}: {error}") from None

    def completion(self, text: str) -> Tensor:
        """A given response as a completion: its tokens and the end token, which is trained like any other.

        Where the template has opened <think> already the response goes on behind it; one without thoughts closes it."""
        if self.prefilled:
            thinks = text.lstrip().startswith("<think>")
            text = text.lstrip().removeprefix("<think>").lstrip() if thinks else f"</think>\n\n{text}"
        return torch.tensor(self.tokenize_text(text) + [self.end_tokens[0]])

    def decode(self, completion: Tensor) -> str:
        """The response: what the template has prefilled of it and the completion's text without its end token.

        Any other special token stays visible to the reward."""
        ids = completion.tolist()
        ids = ids[:-1] if ids and ids[-1] in self.end_tokens else ids
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return self.prefilled + text


def vocabulary_size(tokenizer) -> int:
    """Ids from here on stand for nothing: embedding and head often have more rows, to a round number."""
    return 1 + max(tokenizer.get_vocab().values())


def load_tokenizer(model: str):
    model_file(model, "tokenizer_config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, **hub_options(model))
    except (OSError, ValueError) as error:
        raise ValueError(f"{model}: the tokenizer cannot be loaded: {str(error).splitlines()[0]}") from None
    if not tokenizer.chat_template:  # older checkpoints keep the processor's, in a file of its own
        try:
            tokenizer.chat_template = read_json(model, "chat_template.json").get("chat_template")
        except ValueError:
            pass
    return tokenizer
