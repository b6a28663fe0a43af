"""A checkpoint's weights, read tensor by tensor into the place where they will live.

A network begins as shapes that take no memory. What trains is decided on the shapes, and they are sharded; then `fill`
gives each parameter its own rows on its own device and copies these rows alone from the files, which are mapped and
never held. Folders are in the Hub's layout: safetensors in one file or several with an index; nothing is unpickled."""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from grpo.engine.backbones import backbone
from grpo.engine.encode import load_tokenizer, vocabulary_size
from grpo.engine.files import model_file, read_json
from grpo.engine.policy import Policy

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# Beginnings of names in files → in today's transformers. The first new name that the network has is the tensor's.
RENAMED = (("model.", "model.language_model."), ("visual.", "model.visual."),  # Qwen2.5-VL on the Hub
    ("language_model.lm_head.", "lm_head."), ("language_model.model.", "model.language_model."),  # LLaVA there
    ("vision_tower.", "model.vision_tower."), ("multi_modal_projector.", "model.multi_modal_projector."),
    ("vision_tower.vision_model.", "model.vision_tower."), ("model.vision_tower.vision_model.", "model.vision_tower."))
COMPUTED = re.compile(r"(inv_freq|position_ids)$")  # buffers that old files hold and a network makes by itself


def network_name(name: str, known) -> str | None:
    """What the network calls a tensor of a file; None if it has none such."""
    names = [name, *(new + name[len(old) :] for old, new in RENAMED if name.startswith(old))]
    return next((one for one in names if one in known), None)


def find(model: str, name: str) -> Path | None:
    try:
        return model_file(model, name)
    except ValueError:
        return None


def weight_files(model: str) -> list[Path]:
    """The safetensors of a folder or hub name, in the order of their names; ValueError if there are none."""
    if single := find(model, SINGLE):
        return [single]
    if find(model, INDEX):
        if not (places := read_json(model, INDEX).get("weight_map")):
            raise ValueError(f"{find(model, INDEX)}: no weight_map; expected which file holds which tensor")
        return [model_file(model, name) for name in sorted(set(places.values()))]
    for name in PICKLED:
        if path := find(model, name):
            raise ValueError(f"{path}: a pickle, which may run code when it is read; where you trust it, convert it: "
                             "python -c \"from transformers import AutoModelForImageTextToText as M; "
                             f"M.from_pretrained({model!r}).save_pretrained('NEW')\"")
    return [model_file(model, SINGLE)]  # which says what a checkpoint needs


def open_weights(path: Path):
    """A safetensors file whose header is whole; ValueError with its name if it is not."""
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({str(error).splitlines()[0]})") from None


class Checkpoint:
    """The tensors of a checkpoint's files; only headers are read until rows are asked for.

    files  {file's path: {tensor's name in it: its lazily read rows}}
    names  {the network's name: the file's}, once it is known to fit a network"""

    def __init__(self, model: str):
        self.model, self.names = model, {}
        self.files = {path: {name: file.get_slice(name) for name in file.keys()}
                      for path in weight_files(model) for file in [open_weights(path)]}
        self.slices = {name: rows for file in self.files.values() for name, rows in file.items()}

    def fit(self, network: nn.Module) -> "Checkpoint":
        """Gives `names`. ValueError where the files are not those of the network that config.json makes."""
        wanted = {name: tensor for name, tensor in network.state_dict(keep_vars=True).items()
                  if not name.endswith((".lora_A", ".lora_B"))}
        self.names = match(self.slices, wanted, self.model)
        return self


def match(slices: dict, wanted: dict[str, Tensor], where: str) -> dict[str, str]:
    """Name of each tensor of a network → name of its rows in a file. ValueError, behind `where`, names a tensor which
    is missing, too many or of another shape."""
    names, extra = {}, []
    for name in slices:
        own = network_name(name, wanted)
        if own and own not in names:
            names[own] = name
        elif not COMPUTED.search(name):
            extra.append(name)
    there = {id(wanted[own]) for own in names}  # a tied head is there by its other name
    if missing := [own for own, tensor in wanted.items() if id(tensor) not in there]:
        raise ValueError(f"{where}: {len(missing)} tensors are missing from the weights, {missing[0]} first")
    if extra:
        raise ValueError(f"{where}: {len(extra)} tensors in the weights have no place in the model, {extra[0]} first")
    for own, name in names.items():
        found, made = slices[name].get_shape(), list(wanted[own].shape)
        if found != made:
            raise ValueError(f"{where}: {name} has the shape {found} in the weights; the model's is {made}")
    return names


@torch.no_grad()
def copy_rows(slices: dict, names: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """This rank's rows of those tensors that have some in the files, cast to the tensors' type."""
    for own, name in names.items():
        if own in tensors:
            start, stop = rows_of(tensors[own])
            if start < stop:
                local(tensors[own]).copy_(slices[name][start:stop])


class WithoutMemory(TorchFunctionMode):
    """What is made inside to be filled later takes no memory; what is computed (rope's frequencies) is real."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.empty:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


def empty_policy(model: str, vocabulary: int | None = None) -> Policy:
    """Folder or hub name → the policy's shapes, float32, on the meta device; its buffers are real.

    Ids from `vocabulary` on, the checkpoint's tokenizer's unless an encoder has counted it, can be neither sampled nor
    scored: they decode to nothing, and a head's rows for them were never trained."""
    content = read_json(model, "config.json")
    network_class = backbone(content.get("model_type"), model).Network
    with WithoutMemory():
        network = network_class(network_class.config_class.from_dict(content)).eval()
    replace_parameters(network, lambda parameter: parameter.to("meta", torch.float32))
    policy = Policy(network)
    policy.vocabulary = min(policy.vocabulary, vocabulary or vocabulary_size(load_tokenizer(model)))
    return policy


def replace_parameters(network: nn.Module, make) -> None:
    """`make(parameter)` in each parameter's place; one that stands in two places, a tied head, stays one."""
    made = {}
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    made[parameter] = nn.Parameter(make(parameter.detach()), parameter.requires_grad)
                module._parameters[name] = made[parameter]


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_of(parameter: Tensor) -> tuple[int, int]:
    """[start, stop) of the first dimension that this rank holds; FSDP2 cuts it as torch.chunk does."""
    if not isinstance(parameter, DTensor):
        return 0, len(parameter)
    mesh = parameter.device_mesh  # its last dimension shards, one before it copies
    size = -(-len(parameter) // mesh.size(mesh.ndim - 1))
    start = min(mesh.get_local_rank(mesh.ndim - 1) * size, len(parameter))
    return start, start + len(local(parameter))


def fill(policy: Policy, checkpoint: Checkpoint, device: torch.device, host: bool = False) -> Policy:
    """Memory on `device` for what is on the meta device, and this rank's rows of every tensor, cast to their type.
    host: parameters wait in host memory, see `fsdp.shard`; buffers do not."""
    checkpoint.fit(policy.model)
    replace_parameters(policy, lambda parameter: torch.empty_like(parameter, device="cpu" if host else device))
    for module in policy.modules():
        module._buffers |= {name: buffer.to(device) for name, buffer in module._buffers.items() if buffer is not None}
    copy_rows(checkpoint.slices, checkpoint.names,
              dict([*policy.model.named_parameters(), *policy.model.named_buffers()]))
    return policy


def load_policy(model: str, dtype: torch.dtype = torch.float32, vocabulary: int | None = None) -> Policy:
    """Folder or hub name → policy with all weights in `dtype`, whatever the file holds, in host memory."""
    policy = empty_policy(model, vocabulary)
    replace_parameters(policy, lambda parameter: parameter.to(dtype))
    return fill(policy, Checkpoint(model), torch.device("cpu"))
