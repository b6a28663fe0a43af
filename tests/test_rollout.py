import pytest
import torch

from grpo.engine.attention import Packed
from grpo.engine.decode import Grid
from grpo.engine.draw import draw_tokens, noise
from grpo.engine.rollout import Sampling, sample
from tiny import END, IMAGE, START, VIDEO, tiny_model, tiny_policy, tiny_prompt

ENDS = (END, *range(20))  # a tenth of the vocabulary ends a completion: lengths are ragged


def prompts(count=5):
    shapes = [((1, 4, 4), (1, 6, 10)), (), ((1, 8, 6),)]
    return [tiny_prompt(i, shapes[i % 3], length=3 + 4 * i) for i in range(count)]


def sampling(**changes):
    return Sampling(**{"max_tokens": 12, "end_tokens": ENDS, "temperature": 0.8, "rows": 64, "seed": "7", **changes})


def tokens(groups):
    return [[completion.tolist() for completion in group.completions] for group in groups]


@pytest.mark.parametrize("rows", [64, 5, 1], ids=["all at once", "rows leave and enter", "one row"])
def test_the_samplers_log_probabilities_equal_scores(rows):
    policy = tiny_policy()
    groups = sample(policy, prompts(), 3, sampling(rows=rows))
    lengths = {n for group in groups for n in group.lengths}
    assert len(lengths) > 3 and max(lengths) == 12  # ragged, and some were cut
    scored = policy.score(groups, 0.8).logp
    torch.testing.assert_close(torch.cat([row for group in groups for row in group.logps]), scored, rtol=1e-5,
                               atol=2e-5)


def test_who_else_is_in_the_batch_does_not_change_a_completion():
    policy = tiny_policy()
    everyone = sample(policy, prompts(), 4, sampling())
    few_rows = sample(policy, prompts(), 4, sampling(rows=3))
    alone = [sample(policy, [prompt], 4, sampling())[0] for prompt in prompts()]
    assert tokens(everyone) == tokens(few_rows) == tokens(alone)


def test_greedy_completions_equal_transformers_generate():
    policy, model = tiny_policy(), tiny_model()
    model.generation_config.pad_token_id = END
    for group in sample(policy, prompts(3), 1, sampling(temperature=0.0, end_tokens=(END,))):
        prompt, ids = group.prompt, group.prompt.tokens[None]
        images = {} if prompt.grids is None else dict(pixel_values=prompt.pixels, image_grid_thw=prompt.grids)
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == IMAGE).int(),
                             max_new_tokens=12, do_sample=False, suppress_tokens=[IMAGE, VIDEO], eos_token_id=END,
                             **images)
        assert out[0, len(prompt):].tolist() == group.completions[0].tolist()


def test_completions_end_with_the_end_token_or_are_marked_as_cut():
    for group in sample(tiny_policy(), prompts(), 6, sampling()):
        for completion, finished in zip(group.completions, group.finished):
            assert (completion[-1].item() in ENDS) == finished
            assert finished or len(completion) == 12
            assert not any(token in ENDS for token in completion[:-1].tolist())


def test_image_tokens_cannot_be_sampled():
    policy = tiny_policy()
    with torch.no_grad():  # a head that wants nothing else
        policy.model.lm_head.weight[[IMAGE, VIDEO]] = policy.model.lm_head.weight[START] * 50
    drawn = sample(policy, prompts(2), 20, sampling(end_tokens=(END,)))
    assert not {IMAGE, VIDEO} & {token for group in drawn for c in group.completions for token in c.tolist()}


def test_a_prompt_is_prefilled_once_whatever_the_group():
    policy, prefilled = tiny_policy(), []

    def note(module, args, kwargs):
        if isinstance(kwargs["layout"], Packed):
            prefilled.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    policy.trunk_layers[0].register_forward_pre_hook(note, with_kwargs=True)
    sample(policy, prompts(2), 16, sampling(rows=4))
    assert sum(prefilled) == sum(map(len, prompts(2)))


def test_draws_follow_the_distribution_and_never_take_what_is_impossible():
    logits = torch.tensor([[0.0, float("-inf"), 1.0, 2.0, float("-inf")]]).expand(20000, -1)
    uniform = torch.rand(20000, dtype=torch.float64)
    uniform[:2] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)  # the ends of the range
    drawn, logps = draw_tokens(logits.clone(), uniform, sampling(temperature=1.0))
    shares = torch.bincount(drawn, minlength=5) / 20000
    torch.testing.assert_close(shares, logits[0].softmax(-1), rtol=0, atol=0.015)
    assert shares[1] == shares[4] == 0
    torch.testing.assert_close(logps, logits.log_softmax(-1).gather(-1, drawn[:, None])[:, 0])


def test_top_k_and_top_p_keep_the_likely_tokens_only():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).expand(500, -1)
    uniform = torch.rand(500, dtype=torch.float64)
    assert set(draw_tokens(logits.clone(), uniform, sampling(top_k=2))[0].tolist()) == {1, 3}
    assert set(draw_tokens(logits.clone(), uniform, sampling(top_p=0.7))[0].tolist()) == {1, 3}
    assert set(draw_tokens(logits.clone(), uniform, sampling(top_p=0.5))[0].tolist()) == {1}
    drawn, logps = draw_tokens(logits.clone(), uniform, sampling(top_k=2, top_p=0.9))
    torch.testing.assert_close(logps, logits.log_softmax(-1).gather(-1, drawn[:, None])[:, 0])  # the full softmax's


def test_the_likeliest_token_is_found_where_masses_are_equal_by_rounding():
    logits = torch.tensor([[0.0, 1e-8]])  # e^-1e-8 is 1 in float32
    assert draw_tokens(logits, torch.zeros(1, dtype=torch.float64), sampling(temperature=0.0))[0].tolist() == [1]


def test_training_rollouts_refuse_a_truncated_distribution():
    for changes in ({"top_p": 0.9}, {"top_k": 5}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="full softmax"):
            sampling(**changes).check_training()


def test_a_completion_limit_of_zero_is_refused():
    with pytest.raises(ValueError, match="max_tokens is 0; at least 1 expected"):
        sampling(max_tokens=0)


def test_noise_belongs_to_seed_sample_and_index():
    base = noise("0", "train/1", 0, 4)
    assert base == noise("0", "train/1", 0, 9)[:4]
    assert len({tuple(noise(*key, 4))
                for key in [("0", "train/1", 0), ("1", "train/1", 0), ("0", "train/2", 0), ("0", "train/1", 1)]}) == 4


def test_every_token_is_drawn_with_its_own_number_of_the_completions_noise():
    policy, prompt = tiny_policy(), prompts(1)[0]
    with torch.no_grad():  # every token but the banned ones is as likely as any other
        policy.model.lm_head.weight.zero_()
    logits = torch.zeros(12,
                         len(policy.model.lm_head.weight)).index_fill(-1, torch.tensor(policy.banned), float("-inf"))
    for index, completion in enumerate(sample(policy, [prompt], 3, sampling(end_tokens=()))[0].completions):
        uniform = torch.tensor(noise("7", prompt.id, index, 12), dtype=torch.float64)
        assert torch.equal(completion, draw_tokens(logits.clone(), uniform, sampling())[0])


def test_a_row_that_ends_is_replaced_at_once_while_others_wait():
    calls = []
    groups = sample(tiny_policy(), prompts(), 4, sampling(rows=4),
                    lambda written, ended, spared: calls.append((written, ended)))
    assert sum(written for written, _ in calls) == sum(n for group in groups for n in group.lengths)
    assert sum(ended for _, ended in calls) == 5 * 4
    left = 5 * 4
    for written, ended in calls:
        assert written == min(4, left)
        left -= ended


def test_nothing_to_continue_is_no_group():
    assert sample(tiny_policy(), [], 4, sampling()) == []


def test_a_rollout_builds_no_graph():
    policy, graphs = tiny_policy(), []
    policy.trunk_layers[0].register_forward_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    sample(policy, prompts(2), 2, sampling())
    assert graphs and not any(graphs)


def test_a_number_of_zero_never_draws_an_impossible_first_token():
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 1.0]])
    assert draw_tokens(logits, torch.zeros(1, dtype=torch.float64), sampling())[0].tolist() == [1]


def test_drawing_by_blocks_draws_what_one_running_sum_would():
    random = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4000, 1337, generator=random, dtype=torch.float64)
    uniform = torch.rand(4000, generator=random, dtype=torch.float64)
    expected = torch.searchsorted(logits.softmax(-1).cumsum(-1), uniform[:, None], right=True)[:, 0]
    drawn, _ = draw_tokens(logits.float(), uniform, sampling())
    assert (drawn == expected).float().mean() > 0.999  # the rest lies within a float32 rounding of a step


def test_improbable_tokens_of_a_large_vocabulary_are_told_apart():
    logits = torch.full((1, 100_001), -11.5)
    logits[0, 0] = 7.0  # all but 1e-3 of the mass; the others have 1e-8 each
    shares = logits[0].double().softmax(-1)
    drawn, _ = draw_tokens(logits.repeat(100, 1),
                           shares[0] + (torch.arange(100, dtype=torch.float64) + 1000.5) * shares[1], sampling())
    assert len(set(drawn.tolist())) > 95


@pytest.mark.parametrize("changes,expected", [
    ({"temperature": -0.1}, "temperature is -0.1"),
    ({"rows": 0}, "rows is 0"),
    ({"top_p": 0.0}, "top_p is 0.0"),
    ({"top_p": 1.1}, "top_p is 1.1"),
    ({"top_k": -1}, "top_k is -1"),
])
def test_a_sampling_that_cannot_be_is_refused(changes, expected):
    with pytest.raises(ValueError, match=expected):
        sampling(**changes)


@pytest.mark.parametrize("owner,owners",
                         [([0, 1, 2], 3), ([1, 0, 2], 3), ([2, 0, 1], 3), ([0, 0, 2, 1, 0], 3), ([0, 2], 4)])
def test_tokens_by_owner_come_back_in_their_order(owner, owners):
    grid, x = Grid(torch.tensor(owner), owners, 2, torch.device("cpu")), torch.randn(len(owner), 2, 3, 4)
    by_owner = grid.spread(x)
    assert by_owner.shape[:2] == (owners, 2) and torch.equal(grid.collect(by_owner), x)
    for token, one in enumerate(owner):
        assert torch.equal(by_owner[one, :, owner[:token].count(one)], x[token])
