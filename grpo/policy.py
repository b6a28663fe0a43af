"""The policy: Qwen2.5-VL weights behind the verb `score`, with the idea of the design built in.

A group's prompt and pictures are computed once however many continuations follow. `sample`, the other verb
that needs the network, is in rollout.py and uses the same three pieces: `embed`, `trunk`, `head`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grpo.attention import Packed
from grpo.group import Group, Prompt, within
from grpo.head import completion_logp


PATCHES_AT_ONCE = 65_536  # through the vision encoder: about a dozen pictures of the default limit


@dataclass
class Scores:
    """Per completion token, groups and completions end to end: (T,) each. `logp` has a gradient, `entropy` none."""

    logp: Tensor
    entropy: Tensor
    lengths: list[int]


class Policy(nn.Module):
    """One network as policy, reference or old policy.

    `forward` is `score`, because sharding hooks onto the root's forward; see sharding.py.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.config = model.config
        text = self.config.text_config
        if any(kind != "full_attention" for kind in text.layer_types):
            raise ValueError(f"the model's layers are {sorted(set(text.layer_types))}; only full_attention is supported")
        text._attn_implementation = "layout"
        self.banned = (self.config.image_token_id, self.config.video_token_id)  # no completion can hold them

    @property
    def visual(self) -> nn.Module:
        return self.model.model.visual

    @property
    def trunk_layers(self) -> nn.ModuleList:
        return self.model.model.language_model.layers

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    @property
    def vision_is_frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.visual.parameters())

    def freeze_vision(self) -> None:
        """Vision encoder and projector (transformers keeps the projector inside `visual` as its merger) stay fixed."""
        self.visual.requires_grad_(False)

    def see(self, prompts: list[Prompt]) -> list[Tensor | None]:
        """Image features of each prompt, (image tokens, hidden): one call of the vision encoder for all pictures.

        Features already kept on the prompt are taken from there; pictures of a trained encoder never are.
        """
        unseen = [prompt for prompt in prompts if prompt.pixels is not None and prompt.features is None]
        if not unseen:
            return [prompt.features for prompt in prompts]
        pixels = torch.cat([prompt.pixels for prompt in unseen]).to(self.device)
        grids = torch.cat([prompt.grids for prompt in unseen]).to(self.device)
        features = self.model.model.get_image_features(pixels, grids).pooler_output  # one tensor a picture
        pictures = iter(features)
        seen = {id(prompt): torch.cat([next(pictures) for _ in prompt.grids]) for prompt in unseen}
        return [seen.get(id(prompt), prompt.features) for prompt in prompts]

    @torch.no_grad()
    def keep_features(self, prompts: list[Prompt]) -> None:
        """Look at every picture once, for rollout, reference and all inner updates; only for a frozen encoder."""
        if not self.vision_is_frozen:
            raise ValueError("features of a vision encoder that trains cannot be kept: they change with every update")
        for some in within(PATCHES_AT_ONCE, prompts, lambda p: 0 if p.pixels is None else len(p.pixels)):
            for prompt, features in zip(some, self.see(some)):
                prompt.features = features

    def embed(self, prompts: list[Prompt]) -> list[Tensor]:
        """(P, hidden) input embeddings of each prompt, its image tokens replaced by its pictures' features."""
        table = self.model.get_input_embeddings()
        embedded = []
        for prompt, features in zip(prompts, self.see(prompts)):
            vectors = table(prompt.tokens.to(self.device))
            if features is not None:
                at = (prompt.tokens == self.config.image_token_id).nonzero()[:, 0].to(self.device)
                vectors = vectors.index_copy(0, at, features.to(vectors))
            embedded.append(vectors)
        return embedded

    def trunk(self, embedded: Tensor, positions: Tensor, layout) -> Tensor:
        """(B, T, hidden) embeddings and (3, B, T) positions → (B, T, hidden), attention as the layout says."""
        return self.model.model.language_model(
            inputs_embeds=embedded,
            position_ids=positions,  # always ours: the model would keep stale offsets of its own
            attention_mask={"full_attention": None},
            use_cache=False,
            layout=layout,
        ).last_hidden_state

    def forward(self, groups: list[Group], temperature: float = 1.0) -> Scores:
        """Log-probability of every completion token, in one packed pass: P + ΣC_i tokens a group.

        Token j of a completion is predicted at the place before it: the prompt's last for j = 0 (one place
        for all G), its own token j − 1 after that. A completion's last token is predicted, never read.
        """
        table = self.model.get_input_embeddings()
        vectors, positions, segments, targets, places, start = [], [], [], [], [], 0
        for group, prompt_vectors in zip(groups, self.embed([group.prompt for group in groups])):
            vectors.append(prompt_vectors)
            positions.append(group.prompt.positions.to(self.device))
            first, prompt_end = int(group.prompt.positions.max()) + 1, start + len(group.prompt)
            start = prompt_end
            for completion in group.completions:
                read = len(completion) - 1
                positions.append(torch.arange(first, first + read, device=self.device).expand(3, -1))
                places += [prompt_end - 1, *range(start, start + read)]
                start += read
            targets += group.completions
            vectors.append(table(torch.cat([c[:-1] for c in group.completions]).to(self.device)))
            segments.append((len(group.prompt), [length - 1 for length in group.lengths]))
        hidden = self.trunk(torch.cat(vectors)[None], torch.cat(positions, 1)[:, None], Packed(segments))[0]
        logp, entropy = completion_logp(
            hidden[torch.tensor(places, device=self.device)],
            self.model.lm_head.weight,
            torch.cat(targets).to(self.device),
            temperature,
            self.banned,
        )
        if not (self.vision_is_frozen or any(group.prompt.pixels is not None for group in groups)):
            # Gradients are reduced over processes: a rank whose samples have no picture must take part too.
            logp = logp + 0.0 * sum(parameter.sum() for parameter in self.visual.parameters())
        return Scores(logp, entropy, [length for group in groups for length in group.lengths])

    def call_inside(self, function, *arguments, **keywords):
        """Run `function(policy, …)` as if it were the forward: sharding registers this name beside it."""
        return function(self, *arguments, **keywords)

    def score(self, groups: list[Group], temperature: float = 1.0) -> Scores:
        """`forward` by its name in the design."""
        return self(groups, temperature)
