"""The plan is arithmetic: every term is held against what torch really allocates, in small."""

import json
from dataclasses import fields, replace

import pytest
import torch
from torch.distributed.tensor import DTensor

from benchmarks import plan_check
from benchmarks.shapes import PUBLISHED
from grpo.engine.backbones import MODEL_TYPES
from grpo.engine.lora import add_adapter
from grpo.engine.rollout import Rollout, Sampling
from grpo.group import Group
from grpo.plan.__main__ import GIB, Settings, advice, changed, main, moves, plan, suggestions
from grpo.plan.costs import Costs, read_shape, shape_of
from grpo.runtime.fsdp import shard, unsharded
from grpo.runtime.optim import set_gradient_checkpointing
from grpo.runtime.settings import LORA_TARGETS, as_dict, parse
from grpo.train import Settings as TrainSettings
from processes import run_processes
from test_split_group import most_kept
from tiny import IMAGE, tiny_policy, tiny_prompt
from tiny_backbones import policy_of

GROUPS, G, COMPLETION, PROMPT = 2, 3, 30, 50
SEVEN, THREE = PUBLISHED["7B"], PUBLISHED["3B"]


def small(**changes) -> Settings:
    """One CPU process, two groups that a tiny policy can really score."""
    return replace(Settings(model="m", gpus=[1], device="cpu", prompt_tokens=PROMPT, image_tokens=4, group_size=G,
                            max_completion_tokens=COMPLETION, prompts_per_rollout=GROUPS), **changes)


def tiny_pack(policy) -> list[Group]:
    prompts = [tiny_prompt(seed, ((1, 4, 4),), (PROMPT - 6) // 2) for seed in range(GROUPS)]
    policy.freeze_vision()
    policy.keep_image_features(prompts)
    return [Group(prompt, [torch.randint(0, IMAGE, (COMPLETION,)) for _ in range(G)]) for prompt in prompts]


def shape_from(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return read_shape(str(folder))


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    """7B's shape."""
    return shape_from(tmp_path_factory.mktemp("seven"), SEVEN)


# ── counts and bytes, against torch ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name,billions", [("3b", 3.755), ("7b", 8.292), ("32b", 33.45), ("72b", 73.41)])
def test_the_published_models_have_the_parameters_they_are_known_for(real_data, name, billions):
    shape = read_shape(str(real_data / "qwen2.5-vl" / f"config-{name}.json"))
    assert shape.total / 1e9 == pytest.approx(billions, abs=0.005)
    assert {"3b": 36, "7b": 28, "32b": 64, "72b": 80}[name] == shape.layers and shape.tied == (name == "3b")


def test_the_shape_on_the_meta_device_is_the_real_modules(tmp_path):
    policy = tiny_policy()
    policy.config.save_pretrained(tmp_path)
    shape = read_shape(str(tmp_path))
    assert shape == shape_of(policy.model) == read_shape(str(tmp_path / "config.json"))
    assert shape.total == sum(p.numel() for p in policy.model.parameters())
    assert shape.layer == sum(p.numel() for p in policy.trunk_layers[1].parameters())
    add_adapter(policy, 5, 64.0, "q_proj,down_proj")
    costs = Costs(shape, small(lora_rank=5, lora_targets="q_proj,down_proj"), 1)
    assert costs.trained == sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert costs.total == sum(p.numel() for p in policy.parameters())


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_a_plan_counts_every_backbone_as_the_engine_builds_it(tmp_path, name):
    policy = tiny_policy() if name == "qwen2_5_vl" else policy_of(name)
    assert type(policy.model) is policy.backbone.Network
    policy.config.save_pretrained(tmp_path)
    shape, count = read_shape(str(tmp_path)), lambda module: sum(p.numel() for p in module.parameters())
    assert shape == shape_of(policy.model) and (shape.total, shape.vision) == (count(policy), count(policy.visual))
    assert (shape.layers, shape.layer) == (len(policy.trunk_layers), count(policy.trunk_layers[0]))


@pytest.mark.parametrize("prompts,rows", [(2, 64), (5, 4)])
def test_the_caches_have_the_bytes_that_a_rollout_allocates(prompts, rows):
    policy = tiny_policy()
    made = [tiny_prompt(seed, ((1, 4, 4),), (PROMPT - 6) // 2) for seed in range(prompts)]
    caches = Rollout(policy, made, G, Sampling(COMPLETION, (194,), rows=rows), lambda working: working).caches
    held = sum(tensor.nbytes for cache in caches for tensor in vars(cache).values())
    assert Costs(shape_of(policy.model), small(prompts_per_rollout=prompts, rollout_rows=rows), 1).cache_bytes() == held


@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16"}, {"gradient_checkpointing": True}, {"lora_rank": 4},
                                     {"lora_rank": 4, "dtype": "bfloat16"}])
def test_the_activations_are_what_autograd_keeps(changes):
    s, policy = small(**changes), tiny_policy()
    if s.lora_rank:
        add_adapter(policy, s.lora_rank, 64.0, LORA_TARGETS)
    policy.to(torch.bfloat16 if s.dtype == "bfloat16" else torch.float32)
    pack, kept = tiny_pack(policy), {}
    set_gradient_checkpointing(policy, s.gradient_checkpointing)
    weights = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point():
            kept[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.score(pack)
    costs = Costs(shape_of(policy.model), s, 1)
    bytes_kept = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    if s.gradient_checkpointing:
        bytes_kept += costs.shared_bytes()  # arguments of the checkpointed layers, which the hooks do not see
    # an adapter's first layer has inputs without gradient, and tiny has two
    allowed = 0.06 if s.lora_rank else 0.04 if s.gradient_checkpointing else 0.01
    assert costs.kept_bytes(costs.shape.layers) + costs.tail_bytes() == pytest.approx(bytes_kept, rel=allowed)


def test_a_group_in_parts_keeps_its_prompt_and_one_part():
    """16 completions, of which four fit into a pass."""
    s, policy = small(group_size=16, prompts_per_rollout=1, tokens_per_pass=PROMPT + 4 * COMPLETION + 5), tiny_policy()
    pack, costs = tiny_pack(policy)[0], Costs(shape_of(policy.model), s, 1)
    pack.completions = [torch.randint(0, IMAGE, (COMPLETION,)) for _ in range(16)]
    assert (costs.parts, costs.passes, costs.completions) == (4, 4, 4)
    kept = costs.kept_bytes(costs.shape.layers) + costs.tail_bytes()
    found = most_kept(policy, pack, s.tokens_per_pass)
    assert found <= kept <= 1.06 * found


def compare_shards():
    policy = tiny_policy()
    costs = Costs(shape_of(policy.model), small(dtype="bfloat16"), 2)
    policy.freeze_vision()
    shard(policy, torch.bfloat16, torch.device("cpu"))
    local = sum(parameter.to_local().nbytes for parameter in policy.parameters())
    assert local == costs.weights()
    with unsharded(policy):
        assert not any(isinstance(parameter, DTensor) for parameter in policy.parameters())
        assert sum(parameter.nbytes for parameter in policy.parameters()) == costs.gathered(whole=True)


def test_shards_and_gathered_weights_have_the_bytes_planned():
    run_processes(compare_shards, 2)


@pytest.mark.heavy
@pytest.mark.parametrize("name,ranks", [("plain", 1), ("group in parts", 1), ("checkpointing", 2)])
def test_the_planned_peak_is_the_measured_one_within_10_percent(tmp_path_factory, name, ranks):
    models = tmp_path_factory.getbasetemp() / "planned"
    measured = plan_check.measure_apart(models, name, ranks)
    assert measured > 300e6
    planned = plan_check.planned(models, plan_check.CASES[name], ranks)
    assert planned.peak == pytest.approx(measured, rel=plan_check.TOLERANCE)


# ── what people have ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("config,gpus,changes,gib", [
    (THREE, 1, {"lora_rank": 64}, 16.0),  # of a card's 24
    (SEVEN, 1, {"lora_rank": 64}, 29.0), (SEVEN, 8, {}, 29.8),
])
def test_the_published_models_train_on_the_cards_that_people_have(tmp_path, config, gpus, changes, gib):
    """Prompts of 1,500 tokens, completions of 1,024, 16 × 8."""
    s = Settings("m", gradient_checkpointing=True, **changes)
    assert (s.prompt_tokens, s.max_completion_tokens, s.prompts_per_rollout, s.group_size) == (1500, 1024, 16, 8)
    assert gib / 2 < plan(shape_from(tmp_path, config), s, gpus).peak / GIB <= gib


def test_a_group_of_64_needs_the_activations_of_a_group_of_8(seven):
    for checkpointing in (False, True):
        s = settings("m", gradient_checkpointing=checkpointing, tokens_per_pass=1500 + 4 * 1024)
        few, many = (plan(seven, replace(s, group_size=size), 8).phases for size in (8, 64))
        for phase in ("reference", "passes"):
            assert many[phase] == few[phase]
        whole = plan(seven, replace(s, tokens_per_pass=10**6, group_size=64), 8).phases["passes"]
        assert whole["activations"] > (3 if checkpointing else 5) * many["passes"]["activations"]


# ── plans ────────────────────────────────────────────────────────────────────────────────────────────────────────


def settings(model, **changes):
    """Without rollout_weights=auto, which chooses another plan for every number of GPUs."""
    return Settings(model=model, **{"rollout_weights": "whole", **changes})


def test_auto_gathers_whole_weights_where_that_fits(seven):
    s = settings("m", rollout_weights="auto", gradient_checkpointing=True)
    assert plan(seven, s, 8).phases == plan(seven, settings("m", gradient_checkpointing=True), 8).phases
    tight = settings("m", rollout_weights="auto", gradient_checkpointing=True, gpu_memory=20.0)
    assert plan(seven, tight, 64).phases["decode"]["gathered"] < 5e9


def test_all_of_7b_does_not_train_on_one_gpu_and_the_plan_says_what_would_make_it(seven):
    s = settings("m")
    one = plan(seven, s, 1)
    assert not one.fits and one.peak_phase == "passes"
    assert one.phases["step"]["weights"] == 4 * (seven.total - seven.vision) + 2 * seven.vision  # 30 GiB alone
    assert one.phases["step"]["optimizer"] == 8 * (seven.total - seven.vision)
    assert one.phases["decode"]["gathered"] == 2 * (seven.total - seven.vision)  # what is frozen is there in bfloat16
    assert plan(seven, s, 8).phases["decode"]["gathered"] == 2 * seven.total
    assert one.phases["loading"]["gathered"] == 0
    lines = advice(seven, s, one)
    assert lines[0].startswith("1 GPU: ") and "passes" in lines[0] and len(lines) > 1


def test_logits_of_the_longest_guesses_are_planned_on_a_gpu_and_a_part_of_them_on_a_cpu(seven):
    s, rows = settings("m", rollout_rows=8), 8
    on_gpu = plan(seven, s, 1).phases["decode"]["head"]
    assert on_gpu == rows * 16 * seven.vocabulary * (2 + 4)  # as the product gives them, and in float32
    on_cpu = plan(seven, replace(s, device="cpu", dtype="float32"), 1).phases["decode"]["head"]
    assert on_cpu == 34 * seven.vocabulary * 4  # 20 MB


@pytest.mark.parametrize("gpus,gib", [(1, 80.0), (2, 80.0), (8, 40.0)])
def test_a_suggestion_really_makes_it_fit_and_each_of_its_changes_is_needed(seven, gpus, gib):
    s = settings("m", gpu_memory=gib)
    assert not plan(seven, s, gpus).fits
    found = suggestions(seven, s, gpus)
    assert found and found == sorted(found, key=lambda new: new.cost())
    for new in found:
        assert changed(seven, s, gpus, new.changes).fits
        for left_out in new.changes:
            assert not changed(seven, s, gpus, [change for change in new.changes if change != left_out]).fits


def test_more_gpus_never_need_more_memory_each(seven):
    for changes in ({}, {"rollout_weights": "layers", "gradient_checkpointing": True}, {"lora_rank": 8}):
        s = settings("m", **changes)
        first = 1 + bool(s.lora_rank)  # one GPU keeps a frozen base as it is; two gather it from each other
        plans = [plan(seven, s, gpus) for gpus in (first, 2, 3, 4, 8, 16, 32, 64)]
        for fewer, more in zip(plans, plans[1:]):
            for phase in fewer.phases:
                assert sum(more.phases[phase].values()) <= sum(fewer.phases[phase].values()), (more.gpus, phase)


def test_every_move_lowers_the_memory_of_a_phase_and_raises_none(seven):
    s = settings("m")
    before = plan(seven, s, 8).phases
    for move in moves(s, 8):
        after = changed(seven, s, 8, [move]).phases
        lower = [sum(after[phase].values()) - sum(before[phase].values()) for phase in before]
        # one group a pass and 16 rows: half of that changes nothing
        assert min(lower) < 0 or move[0] in ("tokens_per_pass", "rollout_rows"), move
        # a group in parts keeps its prompt's keys: 36 MB of the reference's phase, where the update's saves 8 GB
        assert max(lower) <= 1e-2 * sum(before["loading"].values()) or move[0] == "lora_rank", move


def test_an_adapter_cuts_optimizer_gradients_and_reference(seven):
    full, adapter = (plan(seven, settings("m", lora_rank=rank), 4).phases["step"] for rank in (0, 64))
    assert adapter["optimizer"] < full["optimizer"] / 20 and adapter["gradients"] < full["gradients"] / 20
    assert adapter["reference"] == 0 < full["reference"]


def test_offloading_moves_bytes_to_the_host_and_back_for_the_step(seven):
    s = settings("m", offload_optimizer=True, offload_reference=True)
    here, there = plan(seven, settings("m"), 4), plan(seven, s, 4)
    assert there.phases["passes"]["optimizer"] == 0
    assert there.phases["step"]["optimizer"] == 8 * seven.table / 4  # one parameter's at a time, the largest counts
    assert there.host["waiting"] == here.phases["step"]["optimizer"] + here.phases["step"]["reference"] > 0


def test_layer_by_layer_a_rollout_needs_less_memory_and_waits_for_the_network(seven):
    whole_ones, layers = (plan(seven, settings("m", rollout_weights=how), 8) for how in ("whole", "layers"))
    assert layers.phases["decode"]["gathered"] < whole_ones.phases["decode"]["gathered"] / 3
    assert layers.seconds["rollout"] > 2 * whole_ones.seconds["rollout"] and layers.bound == "network"
    auto = plan(seven, settings("m", rollout_weights="auto", gpu_memory=20, gradient_checkpointing=True), 64)
    assert auto.phases["decode"]["gathered"] == layers.phases["decode"]["gathered"]


def test_shards_within_a_machine_hold_more_and_wait_less(seven):
    everywhere, near = (plan(seven, settings("m", shard_size=size, network=5.0), 32) for size in (0, 8))
    assert near.phases["step"]["weights"] == 4 * everywhere.phases["step"]["weights"]
    assert sum(near.seconds.values()) < sum(everywhere.seconds.values()) / 2
    far = plan(seven, settings("m", shard_size=8, network=0.5), 32)  # gradients are summed over the replicas
    assert far.seconds["update"] > 2 * near.seconds["update"] and far.seconds["rollout"] == near.seconds["rollout"]


def test_half_the_speed_takes_twice_the_time(seven):
    rates = ("tflops", "bandwidth", "link", "network", "host_link")
    s = settings("m", offload_optimizer=True)
    slow = replace(s, **{name: getattr(s, name) / 2 for name in rates})
    assert sum(plan(seven, slow, 8).seconds.values()) == pytest.approx(2 * sum(plan(seven, s, 8).seconds.values()))


# ── the program ──────────────────────────────────────────────────────────────────────────────────────────────────


def run_main(monkeypatch, capsys, *words) -> str:
    monkeypatch.setattr("sys.argv", ["plan", *map(str, words)])
    main()
    return capsys.readouterr().out


def test_the_program_says_what_fits_and_writes_the_numbers(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text(json.dumps(SEVEN))
    text = run_main(monkeypatch, capsys, "--model", tmp_path, "--gpus", 8, 1, "--json", tmp_path / "plan.json")
    assert "8.292 billion parameters, 7.616 billion of them train" in text
    assert "--gradient_checkpointing True" in text and "passes" in text
    written = json.loads((tmp_path / "plan.json").read_text())
    assert [one["gpus"] for one in written["plans"]] == [1, 8]
    assert written["plans"][0]["peak"] == max(sum(phase.values()) for phase in written["plans"][0]["phases"].values())


def test_measured_rates_take_the_places_of_assumed_ones_but_not_of_given_ones(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text(json.dumps(SEVEN))
    measured = {"device": "a card", "rates": {"tflops": 989.0 / 2, "bandwidth": 3350 / 2}}
    (tmp_path / "rates.json").write_text(json.dumps(measured))
    seconds = {}
    for name, words in {"assumed": [], "measured": ["--rates", tmp_path / "rates.json"],
                        "given": ["--rates", tmp_path / "rates.json", "--tflops", 98900]}.items():
        said = run_main(monkeypatch, capsys, "--model", tmp_path, "--gpus", 1, "--json", tmp_path / "plan.json", *words)
        seconds[name] = json.loads((tmp_path / "plan.json").read_text())["plans"][0]["seconds"]
        assert (f"at the rates measured in {tmp_path / 'rates.json'}" in said) == (name != "assumed")
    for phase, assumed in seconds["assumed"].items():
        assert seconds["measured"][phase] == pytest.approx(2 * assumed)
        assert seconds["given"][phase] < seconds["measured"][phase]


@pytest.mark.parametrize("content,expected", [
    ("[1]", "found [1]; expected what ./launch.sh check --rates writes"),
    ('{"rates": {"tflops": "fast"}}', "found {'tflops': 'fast'}"),
    ('{"rates": {"speed": 1}}', "found {'speed': 1}"), ("{", "rates.json"),
    ('{"rates": {"tflops": 0}}', "--tflops is 0.0; it must be above 0")])
def test_rates_that_are_none_are_refused_with_the_files_name(tmp_path, monkeypatch, content, expected):
    (tmp_path / "config.json").write_text(json.dumps(SEVEN))
    (tmp_path / "rates.json").write_text(content)
    monkeypatch.setattr("sys.argv", ["plan", "--model", str(tmp_path), "--rates", str(tmp_path / "rates.json")])
    with pytest.raises(ValueError) as error:
        main()
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_every_setting_of_the_plan_that_is_no_machines_is_one_of_the_training(seven):
    """What is suggested can be typed."""
    ours = {f.name for f in fields(Settings)}
    assert {name for name, _ in moves(settings("m"), 1)} - {"gpus"} <= set(as_dict(TrainSettings()))
    shared = {"shard_size", "rollout_weights", "tokens_per_pass", "rollout_rows", "lora_targets", "updates"}
    assert shared <= ours & set(as_dict(TrainSettings()))


def test_loading_needs_host_memory_for_a_tensor_and_the_frozen_half_of_their_bytes(
    tmp_path, monkeypatch, capsys, seven
):
    (tmp_path / "config.json").write_text(json.dumps(SEVEN))
    said = run_main(monkeypatch, capsys, "--model", tmp_path, "--gpus", 8)
    assert "host memory of a machine: 2 GiB while it loads, 0 for what waits there, 85 more while a checkpoint" in said
    costs = Costs(seven, settings("m"), 8)
    assert costs.weights() == (4 * (seven.total - seven.vision)
                               + 2 * seven.vision) / 8 and costs.reference() == 2 * seven.total / 8


@pytest.mark.parametrize("words,expected", [
    (["--gpus", "0"], "--gpus is 0; expected numbers from 1"),
    (["--tokens_per_pass", "1000"], "--tokens_per_pass is 1000; a completion may have --max_completion_tokens 1024"),
    (["--dtype", "float16"], "--dtype: invalid choice: 'float16'"),
    (["--gpu", "8"], "no setting --gpu; did you mean gpus?"),
    (["--tflops", "-1"], "--tflops is -1.0; it must be above 0"),
    (["--efficiency", "nan"], "--efficiency is nan"),
    (["--prompt_tokens", "500"], "--image_tokens is 1000; it must be below --prompt_tokens 500"),
    (["--shard_size", "3", "--gpus", "8"], "--shard_size is 3; 8 GPUs are no multiple of it"),
    (["--group_size", "0"], "--group_size is 0; it must be at least 1"),
    (["--spare", "80"], "--spare is 80.0; it must be below --gpu_memory 80.0"),
    (["--lora_targets", "q_porj", "--lora_rank", "8"], "--lora_targets: no matrix 'q_porj'"),
])
def test_settings_that_cannot_be_planned_end_in_one_line(tmp_path, monkeypatch, words, expected):
    (tmp_path / "config.json").write_text(json.dumps(SEVEN))
    monkeypatch.setattr("sys.argv", ["plan", "--model", str(tmp_path), *words])
    with pytest.raises(ValueError) as error:
        main()
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content,expected", [
    ("{", "not JSON"), ("[]", "found \\[\\]; expected a checkpoint's config.json"),
    ('{"model_type": "gpt2"}', "config.json has model_type 'gpt2'; expected one of"),
])
def test_a_config_that_is_none_is_refused_by_its_name(tmp_path, content, expected):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=expected) as error:
        read_shape(str(path))
    assert str(path) in str(error.value)


def test_every_setting_has_a_help_text_and_the_trainers_names_keep_their_types():
    theirs = as_dict(TrainSettings())
    for f in fields(Settings):
        assert f.metadata.get("help"), f.name
        if f.name in theirs and f.name != "model":
            assert f.default == theirs[f.name] and type(f.default) is type(theirs[f.name]), f.name
    assert parse(Settings, ["--model", "m", "--gpus", "2", "4"]).gpus == [2, 4]
