import pytest
import torch

from grpo.group import Group, pad_rows, row_mask
from grpo.objective import grpo_loss
from tiny import END, IMAGE, PAD, packs, plain_logp, tiny_groups, tiny_model, tiny_policy, tiny_prompt


def logp_of(groups, policy=None, temperature=1.0):
    return (policy or tiny_policy()).score(groups, temperature).logp


def test_a_packed_pass_equals_plain_forwards_one_by_one_in_values_and_gradients():
    policy, model = tiny_policy(), tiny_model()
    groups = tiny_groups(lengths=((5, 1, 9), (3, 4, 2), (1, 1, 7)))
    packed = policy.score(groups, 0.7).logp
    plain = torch.cat([row for group in groups for row in plain_logp(model, group, 0.7)])
    torch.testing.assert_close(packed, plain, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(len(plain))
    (packed * upstream).sum().backward()
    (plain * upstream).sum().backward()
    for (name, expected), found in zip(model.named_parameters(), policy.model.parameters()):
        scale = expected.grad.abs().max()
        assert (found.grad - expected.grad).abs().max() <= 1e-4 * scale + 1e-6, name


def test_with_the_ban_off_a_packed_pass_equals_the_plain_softmax():
    policy, groups = tiny_policy(), tiny_groups()
    policy.banned = ()
    plain = torch.cat([row for group in groups for row in plain_logp(tiny_model(), group, ban=False)])
    torch.testing.assert_close(logp_of(groups, policy), plain, rtol=1e-5, atol=1e-5)


def test_completions_of_a_group_do_not_see_each_other():
    group = tiny_groups(lengths=((5, 4, 9),))[0]
    together = logp_of([group])
    alone = torch.cat([logp_of([Group(group.prompt, [completion])]) for completion in group.completions])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_shuffling_the_pixels_changes_the_log_probabilities():
    group = tiny_groups(lengths=((5, 4, 9),))[0]
    before = logp_of([group])
    group.prompt.pixels = group.prompt.pixels[torch.randperm(len(group.prompt.pixels))]
    assert (logp_of([group]) - before).abs().max() > 1e-3


def test_the_vision_encoder_runs_once_for_every_image_however_often_it_is_used():
    policy, groups = tiny_policy(), tiny_groups(lengths=((5, 1), (3, 4), (2, 2)))
    policy.freeze_vision()
    seen = []
    policy.visual.register_forward_hook(lambda module, inputs, out: seen.append(len(inputs[0])))
    before = logp_of(groups, policy)
    seen.clear()
    policy.keep_image_features([group.prompt for group in groups])
    for _ in range(3):  # reference and two inner updates
        torch.testing.assert_close(logp_of(groups, policy), before)
    assert seen == [sum(len(g.prompt.pixels) for g in groups if g.prompt.pixels is not None)]


def test_many_images_go_through_the_vision_encoder_a_few_at_a_time(monkeypatch):
    policy, seen = tiny_policy(), []
    policy.freeze_vision()
    prompts = [tiny_prompt(i, ((1, 4, 4),)) for i in range(5)] + [tiny_prompt(9, ())]
    policy.keep_image_features(prompts)
    at_once = [prompt.features for prompt in prompts]
    for prompt in prompts:
        prompt.features = None
    monkeypatch.setattr("grpo.engine.policy.PATCHES_AT_ONCE", 32)
    policy.visual.register_forward_hook(lambda module, inputs, out: seen.append(len(inputs[0])))
    policy.keep_image_features(prompts)
    assert seen == [32, 32, 16] and prompts[-1].features is None
    for prompt, expected in zip(prompts[:-1], at_once):
        torch.testing.assert_close(prompt.features, expected)


def test_a_trained_vision_encoder_gets_gradients_and_a_frozen_one_none():
    policy = tiny_policy()
    logp_of(tiny_groups(), policy).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in policy.visual.merger.parameters())
    frozen = tiny_policy()
    frozen.freeze_vision()
    logp_of(tiny_groups(), frozen).sum().backward()
    assert all(p.grad is None for p in frozen.visual.parameters())


def test_a_pack_without_images_still_takes_part_in_the_vision_encoders_gradient():
    policy = tiny_policy()
    group = Group(tiny_prompt(0, grids=()), [torch.tensor([1, 2])])
    logp_of([group], policy).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in policy.visual.parameters())


def test_before_the_first_update_the_ratio_is_exactly_one_and_the_kl_exactly_zero():
    policy, reference, groups = tiny_policy(), tiny_policy(), tiny_groups()
    lengths = [n for group in groups for n in group.lengths]
    logp = pad_rows(logp_of(groups, policy, 0.8), lengths)
    ref_logp = pad_rows(logp_of(groups, reference, 0.8), lengths).detach()
    _, sums = grpo_loss(logp, logp.detach(), ref_logp, torch.randn(len(lengths)), row_mask(lengths), beta=0.1)
    assert sums["ratio"] == sums["tokens"] == sum(lengths)
    assert sums["kl"] == 0


def test_the_end_token_is_trained_even_where_it_is_the_pad_token_too():
    completions = [torch.tensor([1, 2, END]), torch.tensor([3, PAD])]
    lengths = [len(completion) for completion in completions]
    mask = row_mask(lengths)
    assert mask.tolist() == [[True, True, True], [True, True, False]]
    logp = logp_of([Group(tiny_prompt(0), completions)])
    rows = pad_rows(logp, lengths)
    loss, _ = grpo_loss(rows, None, None, torch.ones(2), mask)
    gradient = torch.autograd.grad(loss, rows)[0]
    assert (gradient[mask] != 0).all() and (gradient[~mask] == 0).all()


def test_gradient_checkpointing_changes_no_gradient():
    from grpo.runtime.optim import set_gradient_checkpointing

    plain, checkpointed, groups = tiny_policy(), tiny_policy(), tiny_groups()
    set_gradient_checkpointing(checkpointed, True)
    for policy in (plain, checkpointed):
        logp_of(groups, policy).sum().backward()
    for a, b in zip(plain.parameters(), checkpointed.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


def test_micro_batches_do_not_change_the_gradient():
    groups = tiny_groups(lengths=((5, 1, 9), (3, 4, 2), (6, 2, 2)))
    gradients = []
    for budget in (1, 60, 10**6):
        policy, parts = tiny_policy(), packs(groups, budget)
        for part in parts:
            logp = logp_of(part, policy)
            (logp.sum() / 34).backward()
        gradients.append([p.grad.clone() for p in policy.parameters()])
    assert len(packs(groups, 1)) == 3 and len(packs(groups, 10**6)) == 1
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_no_two_tokens_of_a_pass_are_computed_twice():
    policy, group = tiny_policy(), tiny_groups(lengths=((5, 4, 9),))[0]
    widths = []
    policy.trunk_layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: widths.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
        with_kwargs=True)
    logp_of([group], policy)
    assert widths == [len(group.prompt) + 4 + 3 + 8]  # a completion's last token is predicted, never read
    assert (group.prompt.tokens == IMAGE).any()


def test_groups_whose_prompt_and_completion_are_as_long_together_keep_masks_of_their_own():
    prompts = [tiny_prompt(0, grids=(), length=5), tiny_prompt(1, grids=(), length=8)]
    groups = [Group(prompts[0], [torch.tensor([1, 2, 3, 4, 5]), torch.tensor([6, 7])]),
              Group(prompts[1], [torch.tensor([8, 9]), torch.tensor([1, 2, 3, 4, 5])])]  # 5 + 4 read = 8 + 1 read
    torch.testing.assert_close(logp_of(groups), torch.cat([logp_of([group]) for group in groups]), rtol=1e-5, atol=1e-5)


def test_the_budget_counts_a_prompt_once_and_every_completion_by_its_own_length():
    groups = [Group(tiny_prompt(i, grids=(), length=4), [torch.arange(n) for n in (1, 6)]) for i in range(5)]
    assert groups[0].packed_tokens == 4 + 1 + 6
    assert [len(part) for part in packs(groups, 22)] == [2, 2,
                                                         1] and [len(part) for part in packs(groups, 21)] == [1] * 5
    assert [len(part) for part in packs(groups, 32)] == [2, 2, 1]  # what one pack leaves over is not the next one's


def test_rows_are_filled_with_the_value_that_is_asked_for():
    assert pad_rows(torch.tensor([1.0, 2.0, 3.0]), [1, 2]).tolist() == [[1, 0], [2, 3]]
    assert pad_rows(torch.tensor([1.0, 2.0, 3.0]), [1, 2], -5.0).tolist() == [[1, -5], [2, 3]]


def test_scores_come_in_the_groups_order_with_their_entropy_and_their_lengths():
    policy, model, groups = tiny_policy(), tiny_model(), tiny_groups(lengths=((5, 1, 9), (3, 4, 2)))
    scores = policy.score(groups, 0.7)
    assert scores.lengths == [5, 1, 9, 3, 4, 2]
    group = groups[1]
    ids = torch.cat([group.prompt.tokens, group.completions[0]])[None]
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == IMAGE).int(),
                use_cache=False, pixel_values=group.prompt.pixels, image_grid_thw=group.prompt.grids)
    logits = (out.logits[0, -4:-1] / 0.7).index_fill(-1, torch.tensor(policy.banned), -1e9)
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(scores.entropy[15:18], expected, rtol=1e-4, atol=1e-4)


def test_images_that_several_prompts_bring_at_once_stay_with_their_prompts():
    policy = tiny_policy()
    shapes = [((1, 4, 4),), ((1, 8, 6), (1, 4, 4)), (), ((1, 4, 4),)]
    prompts = [tiny_prompt(i, shape) for i, shape in enumerate(shapes)]
    for prompt, together in zip(prompts, policy.embed(prompts).split([len(prompt) for prompt in prompts])):
        torch.testing.assert_close(together, policy.embed([prompt]), rtol=1e-4, atol=1e-5)


def test_kept_and_new_images_of_one_pack_are_each_used():
    policy, groups = tiny_policy(), tiny_groups(lengths=((5, 1), (3, 4)))
    policy.freeze_vision()
    before = logp_of(groups, policy)
    for kept in (0, 1):
        groups[kept].prompt.features = None
        policy.keep_image_features([groups[kept].prompt])
        groups[1 - kept].prompt.features = None
        torch.testing.assert_close(logp_of(groups, policy), before, rtol=1e-5, atol=1e-5)


def test_kept_features_hold_no_graph_and_an_encoder_that_trains_keeps_none():
    policy, prompt = tiny_policy(), tiny_prompt(0)
    with pytest.raises(ValueError, match="cannot be kept"):
        policy.keep_image_features([prompt])
    policy.visual.merger.requires_grad_(False)  # the projector alone is fixed: the encoder still trains
    with pytest.raises(ValueError, match="cannot be kept"):
        policy.keep_image_features([prompt])
    assert prompt.features is None
    policy.freeze_vision()
    policy.keep_image_features([prompt])
    assert not prompt.features.requires_grad
