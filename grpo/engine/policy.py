"""The policy: a backbone's weights behind the verb `score`, with the idea of the design built in.

A group's prompt and images are computed once however many continuations follow. `sample`, the other verb
that needs the network, is in rollout.py and uses the same three pieces: `embed`, `trunk`, `head`. What differs between
models stands in grpo/engine/backbones/."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grpo.engine.attention import Packed
from grpo.engine.backbones import backbone
from grpo.engine.head import completion_logp
from grpo.engine.lean import make_lean
from grpo.engine.sizes import PATCHES_AT_ONCE
from grpo.group import Group, Prompt, within


@dataclass
class Scores:
    """Per completion token, groups and completions end to end: (T,) each. `logp` has a gradient, `entropy` none."""

    logp: Tensor
    entropy: Tensor
    lengths: list[int]


class Policy(nn.Module):
    """One network as policy, reference or old policy.

    `forward` is `score`, because sharding hooks onto the root's forward; see grpo/runtime/fsdp.py."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.config = model.config
        self.backbone = backbone(self.config.model_type)
        self.text_config = text = self.config.get_text_config()
        kinds = sorted(set(getattr(text, "layer_types", None) or ["full_attention"]))
        if kinds != ["full_attention"]:
            raise ValueError(f"the model's layers are {kinds}; only full_attention is supported")
        text._attn_implementation = "layout"
        make_lean(model)
        self.banned = self.backbone.banned(self.config)
        self.vocabulary = len(model.lm_head.weight)  # ids from here on are impossible too, see `empty_policy`
        self.rollout_weights, self.compute_dtype = "auto", torch.float32  # set by fsdp.shard
        self.adapter_start: dict[Tensor, Tensor] = {}  # set by lora.keep_start

    @property
    def visual(self) -> nn.Module:
        """Vision encoder and projector."""
        return self.backbone.visual(self.model)

    @property
    def language_model(self) -> nn.Module:
        return self.model.get_submodule(self.backbone.LANGUAGE_MODEL)

    @property
    def trunk_layers(self) -> nn.ModuleList:
        return self.language_model.layers

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    @property
    def vision_is_frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.visual.parameters())

    def freeze_vision(self) -> None:
        self.visual.requires_grad_(False)

    def encode_images(self, prompts: list[Prompt]) -> list[Tensor | None]:
        """Image features of each prompt, (image tokens, width): one call of the vision encoder for all images.

        Features already kept on the prompt are taken from there; images of a trained encoder never are."""
        unseen = [prompt for prompt in prompts if prompt.pixels is not None and prompt.features is None]
        if not unseen:
            return [prompt.features for prompt in prompts]
        pixels = torch.cat([prompt.pixels for prompt in unseen]).to(self.device)
        grids = torch.cat([prompt.grids for prompt in unseen]).to(self.device)
        images = iter(self.backbone.features(self.model, pixels, grids))
        seen = {id(prompt): torch.cat([next(images) for _ in prompt.grids]) for prompt in unseen}
        return [seen.get(id(prompt), prompt.features) for prompt in prompts]

    @torch.no_grad()
    def keep_image_features(self, prompts: list[Prompt]) -> None:
        """Look at every image once, for rollout, reference and all inner updates; only for a frozen encoder."""
        if not self.vision_is_frozen:
            raise ValueError("features of a vision encoder that trains cannot be kept: they change with every update")
        for some in within(PATCHES_AT_ONCE, prompts, lambda p: 0 if p.pixels is None else int(p.grids.prod(-1).sum())):
            for prompt, features in zip(some, self.encode_images(some)):
                prompt.features = features

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """(T,) token ids → (T, width) input embeddings; where images are wider than words, zeros fill up."""
        vectors = self.model.get_input_embeddings()(tokens.to(self.device))
        return F.pad(vectors, (0, self.backbone.width(self.config) - vectors.shape[-1]))

    def embed(self, prompts: list[Prompt]) -> Tensor:
        """(ΣP, width) input embeddings of the prompts end to end, image features in their image tokens' places."""
        vectors = self.embed_tokens(torch.cat([prompt.tokens for prompt in prompts]))
        return self.scatter_image_features(vectors, prompts, [len(prompt) for prompt in prompts])

    def scatter_image_features(self, vectors: Tensor, prompts: list[Prompt], lengths: list[int]) -> Tensor:
        """`vectors` with the prompts' features in their places; each prompt begins a stretch of the given length."""
        places, features, start = [], [], 0
        for prompt, seen, length in zip(prompts, self.encode_images(prompts), lengths):
            if seen is not None:
                places.append(start + (prompt.tokens == self.config.image_token_id).nonzero()[:, 0])
                features.append(seen.to(vectors))
            start += length
        return vectors.index_copy(0, torch.cat(places).to(self.device), torch.cat(features)) if places else vectors

    def trunk(self, embedded: Tensor, positions: Tensor, layout) -> Tensor:
        """(B, T, width) embeddings and (3, B, T) positions → (B, T, hidden), attention as the layout says."""
        return self.backbone.trunk(self.language_model, embedded, positions, layout)

    def forward(self, groups: list[Group], temperature: float = 1.0) -> Scores:
        """Log-probability of every completion token, in one packed pass: P + ΣC_i tokens a group.

        Token j of a completion is predicted at the place before it: the prompt's last for j = 0 (one place
        for all G), its own token j − 1 after that. A completion's last token is predicted, never read."""
        words, positions, segments, places, start = [], [], [], [], 0
        for group in groups:
            words.append(group.prompt.tokens)
            positions.append(group.prompt.positions.to(self.device))
            first, prompt_end = int(group.prompt.positions.max()) + 1, start + len(group.prompt)
            start = prompt_end
            for completion in group.completions:
                read = len(completion) - 1
                positions.append(torch.arange(first, first + read, device=self.device).expand(3, -1))
                places += [prompt_end - 1, *range(start, start + read)]
                start += read
            words += [completion[:-1] for completion in group.completions]
            segments.append((len(group.prompt), [length - 1 for length in group.lengths]))
        # one lookup: the gradient of each would be a tensor as large as the whole table
        vectors = self.scatter_image_features(self.embed_tokens(torch.cat(words)), [group.prompt for group in groups],
                                              [p + sum(c) for p, c in segments])
        hidden = self.trunk(vectors[None], torch.cat(positions, 1)[:, None], Packed(segments))[0]
        return self.scores_at(hidden, places, groups, temperature)

    def scores_at(self, hidden: Tensor, places: list[int], groups: list[Group], temperature: float) -> Scores:
        """Of all completion tokens, in order, each predicted by the (T, hidden) state at its place."""
        tokens = torch.cat([completion for group in groups for completion in group.completions])
        logp, entropy = completion_logp(
            hidden[torch.tensor(places, device=self.device)], self.model.lm_head.weight, tokens.to(self.device),
            temperature, self.banned, vocabulary=self.vocabulary)
        return Scores(logp + self.zero(), entropy, [length for group in groups for length in group.lengths])

    def zero(self) -> Tensor | float:
        """0, with a gradient of 0 for every weight of a vision encoder that trains: gradients are reduced over
        ranks, and each must have one, also without an image, and for weights that none uses (CLIP's last layer)."""
        return 0.0 if self.vision_is_frozen else 0.0 * sum(parameter.sum() for parameter in self.visual.parameters())

    def call_inside(self, function, *arguments, **keywords):
        """Run `function(policy, …)` as if it were the forward: sharding registers this name beside it."""
        return function(self, *arguments, **keywords)

    def score(self, groups: list[Group], temperature: float = 1.0) -> Scores:
        """`forward` by its name in the design."""
        return self(groups, temperature)
