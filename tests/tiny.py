"""A tiny random Qwen2.5-VL and prompts for it: two images, unequal lengths, more than one attention window."""

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from grpo.engine.policy import Policy
from grpo.engine.rope import rope_positions
from grpo.engine.split_group import split
from grpo.group import Group, Pack, Prompt, make_packs, row_mask
from grpo.runtime.optim import backward, equal_passes, optimizer_step, packed_pass, passes

IMAGE, VIDEO, START, END_OF_IMAGE, END, PAD = 190, 191, 192, 193, 194, 195
VOCABULARY = 200


def tiny_model(seed: int = 0, scale: float = 0.2, **text) -> Qwen2_5_VLForConditionalGeneration:
    """About 100k parameters in float32, of wide enough spread that the distribution is far from uniform."""
    torch.manual_seed(seed)
    config = Qwen2_5_VLConfig(
        text_config=dict(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
            vocab_size=VOCABULARY, bos_token_id=END, eos_token_id=END, initializer_range=scale,
            rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=10000.0), **text,
        ),
        vision_config=dict(
            hidden_size=32, depth=2, num_heads=2, intermediate_size=48, out_hidden_size=32, fullatt_block_indexes=[1],
            window_size=56, initializer_range=scale,
        ),
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END_OF_IMAGE,
        initializer_range=scale,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def tiny_policy(seed: int = 0, **text) -> Policy:
    return Policy(tiny_model(seed, **text))


def tiny_prompt(seed: int, grids=((1, 4, 4), (1, 6, 10)), length: int = 7, name: str = "") -> Prompt:
    """Text, then each image with text after it; random tokens and pixels."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, IMAGE, (length,), generator=random).tolist()
    for t, h, w in grids:
        tokens += [START] + [IMAGE] * (t * h * w // 4) + [END_OF_IMAGE]
        tokens += torch.randint(0, IMAGE, (length,), generator=random).tolist()
    tokens = torch.tensor(tokens)
    grid = torch.tensor(grids) if grids else None
    patches = int(grid.prod(-1).sum()) if grids else 0
    pixels = torch.randn(patches, 3 * 2 * 14 * 14, generator=random) if grids else None
    return Prompt(tokens, rope_positions(tokens, grid, IMAGE, 2), pixels, grid, None, None, name or f"tiny/{seed}")


def tiny_groups(seed: int = 0, lengths=((5, 1, 9), (3, 4, 2))) -> list[Group]:
    """Groups with ragged completions: two images, then one, then none, in turn."""
    random = torch.Generator().manual_seed(seed)
    shapes = [((1, 4, 4), (1, 6, 10)), ((1, 8, 6),), ()]
    groups = []
    for index, group_lengths in enumerate(lengths):
        prompt = tiny_prompt(seed + index, shapes[index % 3], length=5 + 3 * index)
        completions = [torch.randint(0, IMAGE, (length,), generator=random) for length in group_lengths]
        groups.append(Group(prompt, completions))
    return groups


def plain_logp(model, group: Group, temperature: float = 1.0, ban: bool = True) -> list[torch.Tensor]:
    """The slow truth: a stock transformers forward of prompt + completion, one by one."""
    rows = []
    for completion in group.completions:
        ids = torch.cat([group.prompt.tokens, completion])[None]
        images = {}
        if group.prompt.grids is not None:
            images = dict(pixel_values=group.prompt.pixels, image_grid_thw=group.prompt.grids)
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == IMAGE).int(),
                    use_cache=False, **images)
        logits = out.logits[0, len(group.prompt) - 1 : -1].float() / temperature
        if ban:
            logits = logits.index_fill(-1, torch.tensor([IMAGE, VIDEO]), float("-inf"))
        rows.append(logits.log_softmax(-1).gather(-1, completion[:, None])[:, 0])
    return rows


def pack_of(groups: list[Group]) -> Pack:
    return Pack(groups, row_mask([length for group in groups for length in group.lengths]))


def packs(groups: list[Group], budget: int) -> list[list[Group]]:
    return [pack.groups for pack in make_packs(groups, budget)]


def update(policy, optimizer, parts: list[list[Group]], loss_of, temperature: float, limit: float, rate: float,
           budget: int = 10**9) -> float:
    """One update on packs of groups, as both trainers do it, with a loss of the test's own: `loss_of(scores)`."""
    total = torch.zeros(())
    all_packs = split([pack_of(groups) for groups in parts], budget)
    for pack, score in passes(policy, equal_passes(all_packs, policy.device), temperature):
        with packed_pass(pack):
            loss = loss_of(score()) * pack.mask.any()
            backward(loss)
        total += loss.detach()
    return optimizer_step(policy, optimizer, total, limit, rate)
