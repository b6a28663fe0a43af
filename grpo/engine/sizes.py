"""Sizes that the planner counts with too. No torch here."""

TILE = (1024, 1024)  # logits at once: tokens, vocabulary rows; 4 MB of float32
GPU_TILE = (2048, 32_768)  # there a tile has to be large enough to keep the device busy
KEPT = 1 << 30  # bytes of logits that may wait for the backward: 1,700 tokens of a 152k vocabulary
LOGITS = 5 << 20  # drawn from at once: 20 MB; from 32 on every step would ask the system for new memory
WIDTHS = (0, 3, 15)  # guessed tokens a row where the shapes of a decode step are static
PACKED = 2 << 30  # bytes of weights that a rollout on a CPU may copy, see packed.py
PATCHES_AT_ONCE = 65_536  # through the vision encoder: about a dozen images of the default limit
PREFILL_TOKENS = 32_768  # of one packed pass over prompts; changes memory use only


def target_names(targets: str) -> list[str]:
    """"q_proj, k_proj" → their names: the matrices that an adapter is put beside."""
    return [name.strip() for name in targets.split(",") if name.strip()]
