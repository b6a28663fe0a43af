"""What one step of Stage 2 costs each process, in bytes by phase, from a network's shape and the settings alone.

Nothing is measured and nothing fitted: every term is a tensor that the code allocates, and says which. Counted are
the tensors of a run under way, from its second update on, all completions as long as their limit, all prompts as long
as `prompt_tokens`, the vision encoder frozen. Not counted are the CUDA context, communication buffers and the
allocator's gaps. `s` is grpo.plan's Settings, whose names are grpo.train's.

Activations are counted as elements per packed token times the compute dtype's bytes, named where they are float32."""

from dataclasses import dataclass
from math import ceil
from pathlib import Path

from data.read import read_object
from grpo.engine.backbones import check_model_type
from grpo.engine.files import model_file
from grpo.engine.sizes import (GPU_TILE, KEPT, LOGITS, PACKED, PATCHES_AT_ONCE, PREFILL_TOKENS, TILE, WIDTHS,
    target_names)

PHASES = ("loading", "vision", "prefill", "decode", "reference", "passes", "step")
COMPONENTS = ("weights", "gathered", "gradients", "optimizer", "reference", "caches", "activations", "head")
MASTER = 4  # bytes of a float32 number: masters, gradients and each of Adam's two moments


@dataclass(frozen=True)
class Shape:
    """A network in numbers: parameters are counted, widths are in elements."""

    total: int  # parameters, a tied head counted once
    vision: int  # of them in encoder and projector
    layer: int  # of one decoder layer
    layers: int
    table: int  # of the token embedding, and of the head
    tied: bool
    vocabulary: int
    hidden: int
    intermediate: int
    heads: int
    queries: int
    keys: int
    vision_hidden: int
    vision_intermediate: int
    patches: int  # that become one token
    patch_values: int
    matrices: tuple[tuple[str, int], ...]  # of the language model: name, inputs + outputs

    @property
    def root(self) -> int:
        """What is sharded as one unit besides the layers: embedding, vision encoder, norm, head."""
        return self.total - self.layers * self.layer

    @property
    def tables(self) -> int:
        """Embedding and head, which a tied network has once."""
        return self.table if self.tied else 2 * self.table


def read_shape(model: str) -> Shape:
    """The shape of a checkpoint folder, a config.json by itself, or a hub name. No weight is made or read."""
    content = read_object(model if Path(model).is_file() else model_file(model, "config.json"),
                          "a checkpoint's config.json")
    check_model_type(content.get("model_type"), model)
    import torch  # here, so that --help and refusals need none; the engine is not needed at all
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    network = AutoModelForImageTextToText if "vision_config" in content else AutoModelForCausalLM
    with torch.device("meta"):
        return shape_of(network.from_config(CONFIG_MAPPING[content["model_type"]].from_dict(content)))


def shape_of(network) -> Shape:
    """Counted on transformers' network itself, which may lie on the meta device."""
    text, vision = network.config.get_text_config(), getattr(network.config, "vision_config", None)  # None: text alone
    count = lambda module: sum(parameter.numel() for parameter in module.parameters())
    language, head = network.get_decoder(), network.lm_head.weight
    tied = network.get_input_embeddings().weight is head
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    linear = [(name.split(".")[-1], module.in_features + module.out_features)
              for name, module in language.named_modules() if hasattr(module, "in_features")]
    return Shape(total=count(network), vision=count(network) - count(language) - (0 if tied else head.numel()),
        layer=count(language.layers[0]), layers=len(language.layers), table=head.numel(), tied=tied,
        vocabulary=len(head), hidden=text.hidden_size, intermediate=text.intermediate_size,
        heads=text.num_attention_heads, queries=size * text.num_attention_heads, keys=size * text.num_key_value_heads,
        vision_hidden=getattr(vision, "hidden_size", 0), vision_intermediate=getattr(vision, "intermediate_size", 0),
        patches=getattr(vision, "spatial_merge_size", 1) ** 2,
        patch_values=3 * getattr(vision, "temporal_patch_size", 1) * getattr(vision, "patch_size", 0) ** 2,
        matrices=tuple(linear))


class Costs:
    """One process's part of a step: counts first, bytes and seconds from them."""

    def __init__(self, shape: Shape, s, gpus: int):
        self.shape, self.s, self.gpus = shape, s, gpus
        self.on_gpu = s.device == "gpu"
        self.width = 4 if s.dtype == "float32" or (s.dtype == "auto" and not self.on_gpu) else 2
        self.sharded = gpus > 1 or self.width == 2  # as in fsdp.shard
        self.shards = min(s.shard_size or gpus, gpus)
        self.wanted, known = target_names(s.lora_targets) if s.lora_rank else [], {name for name, _ in shape.matrices}
        if unknown := [name for name in self.wanted if name not in known]:
            raise ValueError(f"--lora_targets: no matrix {unknown[0]!r} in the language model; "
                             f"it has {', '.join(sorted(known))}")
        self.adapted = [size for name, size in shape.matrices if name in self.wanted]
        self.adapter = s.lora_rank * sum(self.adapted)
        self.trained = self.adapter if s.lora_rank else shape.total - shape.vision
        self.total, self.layer = shape.total + self.adapter, shape.layer + self.adapter // shape.layers
        self.prompts = ceil(s.prompts_per_rollout / gpus)
        self.rows = min(s.rollout_rows, self.prompts * s.group_size)
        self.slots = min(self.rows, self.prompts)
        whole = s.prompt_tokens + s.group_size * s.max_completion_tokens
        self.groups = max(1, min(self.prompts, s.tokens_per_pass // whole))  # of one pass
        behind = max(1, min(s.group_size, (s.tokens_per_pass - s.prompt_tokens) // s.max_completion_tokens))
        self.parts, self.completions = ceil(s.group_size / behind), self.groups * behind  # of a group; of one pass
        self.passes = ceil(self.prompts / self.groups) * self.parts
        # read in one pass: a completion's last one is not; a prompt in parts has a pass of its own, whose graph waits
        self.tokens = self.groups * s.prompt_tokens + self.completions * (s.max_completion_tokens - 1)
        self.scored = self.completions * s.max_completion_tokens
        written = self.tokens - self.groups * s.prompt_tokens
        self.widest = self.tokens if self.parts == 1 else max(s.prompt_tokens, written)  # that layers see at once

    def weights(self) -> float:
        """Float32 masters of what trains; what is frozen in the compute type."""
        return (MASTER * self.trained + self.width * (self.total - self.trained)) / self.shards

    def optimizer(self) -> float:
        """Adam's two moments, wherever they wait."""
        return 2 * MASTER * self.trained / self.shards

    def visiting(self) -> float:
        """Both moments of the largest parameter that trains."""
        largest = self.s.lora_rank * self.shape.intermediate if self.s.lora_rank else self.shape.table
        return 2 * MASTER * largest / self.shards

    def reference(self) -> float:
        """The frozen copy's shard, wherever it waits; an adapter needs none, nor a KL of weight 0."""
        return 0.0 if self.s.lora_rank or not self.s.beta else self.width * self.shape.total / self.shards

    def gathered(self, whole: bool, layers: int = 2) -> float:
        """Compute-dtype copies: of all, or of root, a layer and the next one; in one process of what trains."""
        if not self.sharded:
            return 0.0
        every, layer = self.total, self.layer
        if self.gpus == 1:
            every, layer = self.trained, self.adapter / self.shape.layers if self.s.lora_rank else self.layer
        return self.width * (every if whole else every - (self.shape.layers - layers) * layer)

    def resident(self, step: bool = False) -> dict[str, float]:
        """Between the phases, or in an optimizer's `step`, where moments that wait in host memory visit one by one."""
        s, images = self.s, self.prompts * self.s.image_tokens
        features = images * self.shape.hidden * self.width  # kept from the rollout to the last update
        pixels = 0 if self.on_gpu else images * self.shape.patches * self.shape.patch_values * 4
        return {"weights": self.weights(), "activations": features + pixels,
            "optimizer": self.visiting() * step if s.offload_optimizer and self.on_gpu else self.optimizer(),
            "reference": 0.0 if s.offload_reference and self.on_gpu else self.reference()}

    def host(self) -> dict[str, float]:
        """A process's in its machine's memory: while it loads; what waits there; a checkpoint's copy of its shard."""
        waiting = self.optimizer() * self.s.offload_optimizer + self.reference() * self.s.offload_reference
        copied = 1 if self.s.offload_optimizer else 3  # weights, and two moments that are not there already
        return {"loading": MASTER * self.shape.table / self.shards, "waiting": waiting,  # one tensor's rows at a time
                "checkpoint": copied * MASTER * self.trained / self.shards}

    def forward_bytes(self, tokens: int) -> float:
        """The widest moment of a pass without gradient: embedding, residual, normed input, and what a block makes."""
        x, wide = self.shape, 4 / self.width  # the norm computes in float32
        mlp = 2 * x.intermediate  # gate, in whose place the product is made, and up
        attention = 2 * x.keys + 4 * x.queries  # rope's terms, later the outputs and their two copies
        return tokens * self.width * (3 * x.hidden + max(mlp, attention, 3 * wide * x.hidden))

    def vision_bytes(self) -> float:
        """Pixels once more end to end, then the widest moment of a block; its rope computes in float32."""
        x, wide = self.shape, 4 / self.width
        one = self.s.image_tokens * x.patches  # prompt's
        patches = min(max(PATCHES_AT_ONCE, one), self.prompts * one)
        rope = (3 + (4 if self.width == 2 else 0) + 4 * wide) * x.vision_hidden
        block = 2 * x.vision_hidden + max(3 * x.vision_intermediate, rope)
        return patches * (x.patch_values * 4 + self.width * block)

    def layer_bytes(self, tokens: int) -> float:
        """What autograd keeps of one decoder layer in one packed pass."""
        x, s, width = self.shape, self.s, self.width
        both_keys = self.completions * (s.prompt_tokens + s.max_completion_tokens - 1)  # [prompt, own] of each
        keys, queries = 2 * both_keys * x.keys, 3 * x.queries
        if self.on_gpu and width == 4:  # there keys are repeated for every query head, the prompt's too
            keys = 2 * (both_keys + self.groups * s.prompt_tokens) * x.queries
        elif self.on_gpu:  # attention in two calls: the prompts' keys once more; no output is put together
            keys, queries = 2 * self.groups * s.prompt_tokens * x.keys, 2 * x.queries
        product = any(name == "down_proj" for name in self.wanted)  # kept for an adapter's gradient alone, see lean.py
        kept = tokens * (queries + 2 * x.keys + (2 + product) * x.intermediate) + keys
        kept += tokens * s.lora_rank * len(self.adapted) / x.layers
        softmax = tokens * x.heads * 4
        return width * kept + softmax + 2 * self.norm_bytes(tokens)

    def norm_bytes(self, tokens: int) -> float:
        """RMSNorm: its input and its output."""
        return tokens * 2 * self.shape.hidden * self.width

    def backward_bytes(self) -> float:
        """Of an MLP's backward: the product made again, its gradient, up's, gate's, the residual's and the input's."""
        return self.widest * self.width * (4 * self.shape.intermediate + 2 * self.shape.hidden)

    def kept_bytes(self, layers: int) -> float:
        """What autograd keeps of the first `layers` layers between forward and backward."""
        inputs = self.tokens * self.shape.hidden * self.width
        return layers * (inputs if self.s.gradient_checkpointing else self.layer_bytes(self.tokens))

    def shared_bytes(self) -> float:
        """What all layers share: rope's cosines and sines, a continuation's mask."""
        s, x = self.s, self.shape
        mask = (s.max_completion_tokens - 1) * (s.prompt_tokens + s.max_completion_tokens - 1)
        return self.width * (mask + 2 * self.tokens * x.queries / x.heads)

    def chain_bytes(self, learns: bool) -> float:
        """A prompt's keys and values beside its graph, where a group is scored in parts: float32 leaves, which are cast
        again for each, and their gradients."""
        copies = 4 + self.width if self.width == 2 else 0
        kept = 0 if learns and not self.s.gradient_checkpointing else self.width
        numbers = 2 * self.shape.layers * self.shape.keys * self.groups * self.s.prompt_tokens
        return numbers * (copies + kept + 4 * learns) if self.parts > 1 else 0.0

    def tail_bytes(self) -> float:
        """What it keeps besides layers: that, of the last norm all but its output, of its output the scored places."""
        scored = (self.scored - self.tokens) * self.shape.hidden * self.width
        return self.shared_bytes() + self.norm_bytes(self.tokens) + scored

    def cache_bytes(self) -> float:
        """As decode.allocate: prompts of the live groups, continuations of the live rows."""
        places = self.slots * self.s.prompt_tokens + self.rows * self.s.max_completion_tokens
        return 2 * self.shape.layers * self.shape.keys * places * self.width

    def tile(self) -> int:
        """Logits that are there at once."""
        tokens, rows = GPU_TILE if self.on_gpu else TILE
        return min(tokens, self.scored) * min(rows, self.shape.vocabulary)

    def kept_logits(self) -> float:
        """What waits for the backward, which makes only the others again."""
        return min(KEPT, 4 * self.scored * self.shape.vocabulary)

    def head_backward(self) -> float:
        """Float32 sums of the gradients of hidden states and weight, a tile of logits and of their gradient."""
        x, cast = self.shape, 0 if self.width == 4 else self.width
        sums = self.scored * x.hidden * (4 + 4 + cast) + self.tile() * (4 + cast) + self.kept_logits()
        if not self.s.lora_rank:  # the weight trains; its sum is cast at the end
            sums += x.table * (4 + cast)
        return sums

    def memory(self) -> dict[str, dict[str, float]]:
        """Bytes of each phase by component. A phase with several moments is shown at its worst."""
        whole, layered = self.gathered(self.s.rollout_weights == "whole"), self.gathered(False)
        x, rest, cast = self.shape, self.resident(), self.width * (self.width < 4)
        prefilled = min(self.slots, max(1, PREFILL_TOKENS // self.s.prompt_tokens)) * self.s.prompt_tokens
        own_keys = 2 * x.layers * x.keys * prefilled * self.width  # before they are written into the caches
        arriving = self.width * self.layer * (1 + (not self.on_gpu)) * (self.gpus > 1 and whole > layered)
        packs = not self.on_gpu and self.width == 4 and self.s.rollout_weights != "layers"
        copies = 4 * packs * (x.table + x.layers * x.layer * (4 * x.layers * x.layer <= PACKED))  # packed.py's
        fed = self.rows * (1 + WIDTHS[-1] * self.on_gpu)  # tokens of a decode step, the longest guesses among them
        drawn = fed if self.on_gpu else max(1, LOGITS // x.vocabulary)  # of them at once
        scores = fed * x.heads * max(self.s.prompt_tokens, self.s.max_completion_tokens) * (8 + cast)
        phases = {"loading": {part: rest[part] for part in ("weights", "reference")},  # read into their places
            "vision": add(rest, gathered=self.gathered(False, 0), activations=self.vision_bytes()),  # it is the root's
            "prefill": max(add(rest, gathered=whole + arriving), add(
                rest, gathered=whole + copies, caches=self.cache_bytes() + own_keys,
                activations=self.forward_bytes(prefilled)), key=total),
            "decode": add(rest, gathered=whole + copies, caches=self.cache_bytes(), activations=scores,
                          head=drawn * x.vocabulary * (4 + cast)),
            "reference": self.reference_pass(layered), "passes": max(self.moments(layered), key=total),
            "step": add(self.resident(step=True), gradients=MASTER * self.trained / self.shards)}
        return {name: {part: phase.get(part, 0.0) for part in COMPONENTS} for name, phase in phases.items()}

    def reference_pass(self, layered: float) -> dict[str, float]:
        if not self.s.beta:
            return self.resident()
        hidden = (self.tokens + self.scored) * self.shape.hidden * self.width
        if self.gpus == 1 and not self.s.lora_rank:  # a frozen copy is used as it is, unless it comes from the host
            layered = self.width * (self.shape.root + 2 * self.shape.layer) * (self.s.offload_reference and self.on_gpu)
        rest = add(self.resident(), gathered=layered, caches=self.chain_bytes(False))
        return max(add(rest, activations=self.forward_bytes(self.widest)),
                   add(rest, activations=hidden, head=2 * 4 * self.tile()), key=total)

    def moments(self, layered: float) -> list[dict[str, float]]:
        """Of a packed pass: the head, forth and back; the backward of the last layer, the next, the first; the end."""
        x, full = self.shape, not self.s.lora_rank
        every = MASTER * self.trained / self.shards
        before = every if self.passes > 1 else 0.0  # earlier passes' gradients
        head = x.table * self.width * full  # the head's gradient: sharded only at the root's turn, which is last
        trained_layer = self.layer if full else self.adapter / x.layers
        if self.sharded:  # unsharded gradients in compute dtype, and in float32 those that are summed over processes
            layer, root = trained_layer * self.width, x.tables * (self.width + MASTER) * full
        else:  # one matrix of a later pass; a table of a later pass, or a tied one's two gradients
            layer = MASTER * x.hidden * x.intermediate * bool(before) * full
            root = MASTER * x.table * (x.tied or bool(before)) * full
        almost = max(before, every - MASTER * x.table * full / self.shards)  # the embedding's comes last
        kept, tail, last = self.kept_bytes(x.layers), self.tail_bytes(), x.layers - 1
        work = self.layer_bytes(self.widest) * self.s.gradient_checkpointing + self.backward_bytes()
        rest = add(self.resident(), gathered=layered, caches=self.chain_bytes(True))
        hidden = self.tokens * x.hidden * self.width  # the trunk's output, still named while the head works

        def backward(done: int) -> dict[str, float]:
            """Of a layer when so many behind it are through; the next one is fetched, the last one's are summed."""
            grown = almost if done == last else max(before, done * trained_layer * MASTER / self.shards)
            summed = trained_layer * MASTER * self.sharded * bool(done)
            return add(rest, gathered=self.gathered(False, 1 + (done < last)) - layered,
                       activations=self.kept_bytes(x.layers - done) + tail * (not done) + work,
                       gradients=grown + head * (self.sharded or done < last) + layer + summed)

        return [add(rest, gradients=before, activations=kept + tail + hidden, head=2 * 4 * self.tile()
            + self.kept_logits()), add(rest, gradients=before, activations=kept + tail, head=self.head_backward()),
            *map(backward, sorted({0, min(1, last), last})), add(rest, gradients=every + root)]


def add(phase: dict[str, float], **more: float) -> dict[str, float]:
    return {**phase, **{name: phase.get(name, 0.0) + value for name, value in more.items()}}


def total(phase: dict[str, float]) -> float:
    return sum(phase.values())
