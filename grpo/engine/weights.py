"""Weights in and out: a folder in the Hub's own layout, which stock transformers loads.

Exports are written beside their place and renamed, so that a folder that is there is whole.
"""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers.utils import logging

from grpo.engine.backbones import backbone
from grpo.engine.encode import load_tokenizer, vocabulary_size
from grpo.engine.files import TRAINING, model_file, read_json, replace_folder
from grpo.engine.policy import Policy

# What the encoder reads besides the weights: copied from the starting checkpoint, byte for byte.
ENCODER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json", "vocab.json",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "preprocessor_config.json", "processor_config.json",
    "tokenizer.model",
)


@contextmanager
def without_bars():
    """transformers' own bars for loading and saving would stand between ours."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_policy(model: str, dtype: torch.dtype = torch.float32, vocabulary: int | None = None) -> Policy:
    """Folder or hub name → policy with weights of `dtype` (masters are float32 whatever the file holds).

    Ids from `vocabulary` on, the checkpoint's tokenizer's unless an encoder has counted it, can be neither sampled nor
    scored: they decode to nothing, and a head's rows for them were never trained.
    """
    network_class = backbone(read_json(model, "config.json").get("model_type"), model).Network
    try:
        with without_bars():
            network, report = network_class.from_pretrained(model, dtype=dtype, output_loading_info=True)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{model}: the weights cannot be loaded: {str(error).splitlines()[0]}") from None
    if missing := sorted(report["missing_keys"]):  # transformers would go on with random numbers
        raise ValueError(f"{model}: {len(missing)} tensors are missing from the weights, {missing[0]} first")
    policy = Policy(network)
    policy.vocabulary = min(policy.vocabulary, vocabulary or vocabulary_size(load_tokenizer(model)))
    return policy


def export(model: torch.nn.Module, weights: dict[str, torch.Tensor], source: str, place: Path, training: dict = {}) -> None:
    """Write `weights` (whole, on CPU) as a checkpoint at `place`, with the encoder's files of `source`, and `training`,
    what the next stage is to know."""
    new = place.with_name(place.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        with without_bars():
            model.save_pretrained(new, state_dict=weights)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        raise OSError(f"{place}: the weights cannot be written ({error}); what was there before still is") from None
    for name in ENCODER_FILES:
        if Path(source).is_dir():
            if (Path(source) / name).is_file():
                shutil.copyfile(Path(source) / name, new / name)
            continue
        try:
            shutil.copyfile(model_file(source, name), new / name)
        except ValueError:
            continue  # not every checkpoint has every one of them
    (new / TRAINING).write_text(json.dumps(training) + "\n", encoding="utf-8")
    replace_folder(new, place)
