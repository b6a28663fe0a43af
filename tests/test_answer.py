"""Prompts are encoded once, every sample is answered in order, and nothing is kept that need not be."""

from types import SimpleNamespace

from grpo.engine.rollout import Sampling, sample
from grpo.runtime.answer import Prompts, answer
from tiny import END, tiny_policy, tiny_prompt

SAMPLING = Sampling(max_tokens=6, end_tokens=(END, *range(20)), temperature=0.8, rows=4, seed="3")


class Encoder:
    """Tiny prompts instead of images and text; a text is its tokens."""

    def __init__(self):
        self.encoded = []

    def encode(self, images, text, sample, id):
        self.encoded.append((text, id))
        prompt = tiny_prompt(sample.seed, ((1, 4, 4),) if sample.seed % 2 else (), name=id)
        prompt.sample = sample
        return prompt

    def decode(self, completion):
        return str(completion.tolist())


def task():
    return SimpleNamespace(
        data=SimpleNamespace(build_prompt=lambda sample, reasoning: ([], f"{sample.id} {reasoning}"))
    )


def samples(count):
    return [SimpleNamespace(id=f"test/{i}", seed=i) for i in range(count)]


def test_every_sample_is_answered_in_order_and_whole_groups_come_back():
    for frozen in (False, True):
        policy = tiny_policy()
        if frozen:
            policy.freeze_vision()
        seven, prompts_of = samples(7), Prompts(Encoder(), task(), cache_bytes=10**9)
        texts = answer(policy, prompts_of, seven, SAMPLING, group_size=3)  # 5 prompts, then 2
        groups = sample(policy, [tiny_prompt(s.seed, ((1, 4, 4),) if s.seed % 2 else (), name=s.id) for s in seven], 3,
                        SAMPLING)
        assert texts == [[str(completion.tolist()) for completion in group.completions] for group in groups]
        assert len(prompts_of.kept) == 7 and all(prompt.features is None for prompt in prompts_of.kept.values())


def test_a_prompt_is_encoded_once_while_the_cache_has_room_and_again_after():
    encoder, pair = Encoder(), samples(4)[1::2]  # two with an image
    size = tiny_prompt(1, ((1, 4, 4),)).pixels.nbytes
    prompts_of = Prompts(encoder, task(), reasoning=False, cache_bytes=size * 1.5)
    first = [prompts_of(sample) for sample in pair]
    again = [prompts_of(sample) for sample in pair]
    assert first[0] is again[0] and first[1] is not again[1]
    assert encoder.encoded == [("test/1 False", "test/1")] + [("test/3 False", "test/3")] * 2
    exact = Prompts(Encoder(), task(), cache_bytes=size)
    assert exact(pair[0]) is exact(pair[0])


def test_two_samples_of_one_id_do_not_share_a_prompt():
    prompts_of, (one, two) = Prompts(Encoder(), task(), cache_bytes=10**9), samples(2)
    two.id = one.id  # ids of another split may begin anew
    assert prompts_of(one) is not prompts_of(two) and prompts_of(one) is prompts_of(one)


def test_kept_features_take_the_pixels_place_and_a_image_is_seen_once_in_a_run():
    policy, three, seen = tiny_policy(), samples(6)[1::2], []
    policy.freeze_vision()
    policy.visual.register_forward_pre_hook(lambda *a: seen.append(1))
    prompts_of = Prompts(Encoder(), task(), cache_bytes=10**9, keep_features=True)
    first = answer(policy, prompts_of, three, SAMPLING)
    again = answer(policy, prompts_of, three, SAMPLING)
    assert first == again == answer(policy, Prompts(Encoder(), task()), three, SAMPLING)
    assert len(seen) == 2  # the last line's uncached one is the second
    kept = prompts_of.kept.values()
    assert len(kept) == 3 and all(prompt.pixels is None and prompt.features is not None for prompt in kept)
    assert prompts_of.room == 10**9 - sum(prompt.features.nbytes for prompt in kept)


def test_features_without_room_are_forgotten_and_the_pixels_stay_with_the_prompt():
    policy, three = tiny_policy(), samples(6)[1::2]
    policy.freeze_vision()
    prompts_of = Prompts(Encoder(), task(), cache_bytes=100, keep_features=True)
    prompts = [prompts_of(sample) for sample in three]
    policy.keep_image_features(prompts)
    prompts_of.release_features(prompts)
    assert not prompts_of.kept and prompts_of.room == 100
    assert all(prompt.pixels is not None and prompt.features is None for prompt in prompts)
