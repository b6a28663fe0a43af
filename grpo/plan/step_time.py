"""How long a step of Stage 2 takes at least: necessary operations and bytes over a GPU's rates.

A part of the step takes as long as the slowest of four things that go on at once: products, reading weights and caches,
traffic between GPUs, traffic with host memory. Launching kernels, Python and unequal completions come on top; the
vision encoder's own attention is left out."""

from dataclasses import dataclass

from grpo.plan.costs import MASTER, Costs


@dataclass
class Part:
    """Of a phase: operations, bytes read or written in GPU memory, received from other GPUs, to or from a host."""

    phase: str
    products: float = 0.0
    memory: float = 0.0
    network: float = 0.0
    host: float = 0.0


def rates(s, shards: int) -> dict[str, float]:
    """Of each resource, in operations or bytes a second. Shards that span machines go at the pace of the network."""
    between = s.link if shards <= s.gpus_per_machine else s.network
    return {"products": s.tflops * 1e12 * s.efficiency, "memory": s.bandwidth * 1e9 * s.memory_efficiency,
            "network": between * 1e9, "host": s.host_link * 1e9}


class Work:
    """One process's work; `parts` in the order of a step."""

    def __init__(self, costs: Costs):
        self.costs, x = costs, costs.shape
        self.layers, self.head = x.layers * costs.layer, x.table  # parameters that a token meets
        self.pair = 4 * x.queries * x.layers  # operations of one query against one key, all layers
        self.token_cache = 2 * x.keys * x.layers * costs.width
        self.others = (costs.shards - 1) / costs.shards  # share of a gathered tensor that comes from elsewhere
        self.everything = costs.width * costs.total * self.others if costs.sharded else 0.0  # gathered once

    def parts(self) -> list[Part]:
        update = [part for _ in range(self.costs.s.updates) for part in (self.passes(), *self.step())]
        return [*self.rollout(), self.reference(), *update]

    def rollout(self) -> list[Part]:
        c, s = self.costs, self.costs.s
        P, C, whole = s.prompt_tokens, s.max_completion_tokens, s.rollout_weights == "whole"
        weights, rows = c.width * (self.layers + self.head), c.prompts * s.group_size
        steps = C * -(-rows // c.rows)
        patches = c.prompts * s.image_tokens * c.shape.patches
        look = Part("rollout", 2 * c.shape.vision * patches, c.width * c.shape.vision)
        prefill = Part("rollout", c.prompts * (2 * self.layers * P + self.pair * P * P / 2), c.width * self.layers)
        decode = Part("rollout", rows * C * (2 * self.layers + 2 * self.head + self.pair * (P + C / 2)),
                      steps * (weights + self.token_cache * (c.slots * P + c.rows * C / 2)))
        if whole:  # once for the images, once for the completions, before anything else can be done
            return [Part("rollout", network=2 * self.everything), look, prefill, decode]
        look.network = prefill.network = self.everything
        decode.network = steps * self.everything
        return [look, prefill, decode]

    def score(self) -> tuple[float, float]:
        """Operations of a forward over all passes: of the trunk, of the head."""
        c, s = self.costs, self.costs.s
        P, G, C = s.prompt_tokens, s.group_size, s.max_completion_tokens
        pairs = c.prompts * (P * P / 2 + G * C * (P + C / 2))
        return c.prompts * (P + G * (C - 1)) * 2 * self.layers + pairs * self.pair, c.prompts * G * C * 2 * self.head

    def reference(self) -> Part:
        c, (trunk, head) = self.costs, self.score()
        if not c.s.beta:
            return Part("reference")
        return Part("reference", trunk + head, c.passes * c.width * (self.layers + self.head),
                    c.passes * self.everything, c.passes * c.reference() * c.s.offload_reference)

    def passes(self) -> Part:
        """Forward, backward to the inputs and, where weights train, to them; layers once more with checkpointing."""
        c, s, (trunk, head) = self.costs, self.costs.s, self.score()
        full, again = not s.lora_rank, s.gradient_checkpointing
        logits_again = 1 - c.kept_logits() / (4 * c.scored * c.shape.vocabulary)
        products = trunk * (2 + full + again) + head * (2 + full + logits_again)
        gather, reduce = 2 * self.everything, MASTER * c.trained * self.others  # forward and backward gather
        replicas = c.gpus / c.shards
        between = 2 * MASTER * c.trained / c.shards * (replicas - 1) / replicas  # sums over replicas
        if c.shards <= s.gpus_per_machine < c.gpus:  # these leave the machine, which the shards' own traffic does not
            between *= s.link / s.network
        return Part("update", products, c.passes * c.width * (self.layers + self.head) * 2,
                    c.passes * (gather + reduce + between) if c.sharded else 0.0)

    def step(self) -> list[Part]:
        """Adam reads weight, gradient and two moments and writes all but the gradient."""
        c = self.costs
        moved = 2 * c.optimizer() if c.s.offload_optimizer and c.on_gpu else 0.0
        return [Part("update", memory=7 * MASTER * c.trained / c.shards), Part("update", host=moved)]


def seconds(costs: Costs) -> tuple[dict[str, float], str]:
    """Of rollout, reference and update; and the resource that the step waits for longest."""
    pace, phases, waits = rates(costs.s, costs.shards), dict.fromkeys(("rollout", "reference", "update"), 0.0), {}
    for part in Work(costs).parts():
        took = {name: getattr(part, name) / rate for name, rate in pace.items()}
        slowest = max(took, key=took.get)
        phases[part.phase] += took[slowest]
        waits[slowest] = waits.get(slowest, 0.0) + took[slowest]
    return phases, max(waits, key=waits.get)
