"""One sample of your own, answered: what the model thinks and what it says.

    python -m grpo.predict --model runs/more-r1/stage_2/model --image a.jpg --box 0.4,0.5,0.2,0.3 \\
        --text "Celtics beat Heat" --entity Celtics

A task takes part by offering `sample_from` in its data half, whose parameters say which of --image, --text, --box,
--entity and --data it needs: MORE asks for all of them, JMERE for an image and a text."""

import inspect
import tempfile
from dataclasses import dataclass
from pathlib import Path

from grpo.runtime.settings import CommonSettings, read_settings, refuse_early, required, run_program, setting

PARTS = ("image", "text", "box", "entity", "data")


@dataclass
class Settings:
    """Answer one sample."""

    model: str = required("checkpoint folder or hub name of the weights", path="model")
    adapter: str = setting("", "an adapter of the model in PEFT's format", path="folder")
    task: str = setting("", "a task here (more, jmere) or a module of yours; empty: the model's, else more", top=True)
    image: str = setting("", "the image's file", top=True, path="file")
    text: str = setting("", "the text that goes with it", top=True)
    box: str = setting("", "MORE: the object, cx,cy,w,h in fractions of the image (--box=… before a minus)", top=True)
    entity: str = setting("", "MORE: the entity, as it stands in the text", top=True)
    exif_orientation: bool = setting(True, "turn a photo as its EXIF orientation says, as a phone means it to be seen; "
                                           "off: as it is stored, which is what the boxes of a dataset refer to")
    data: str = setting("", "dataset with the candidate labels; empty: the model's, as it was trained", path="data")
    reasoning: bool | None = setting(None, "ask for <think>…</think>; none: as the model was trained, else True")
    temperature: float = setting(0.0, "0 is greedy", least=0)
    seed: int = setting(0, "random seed of the sampling")
    max_completion_tokens: int = setting(1024, "longest completion, end token included", least=1)
    max_pixels: int = setting(0, "largest area of an image in pixels; 0: as in training, else 1,280 tokens", least=0)
    dtype: str = setting("auto", "what is computed in; auto: bfloat16 on a GPU that has it",
                         choices=("auto", "float32", "bfloat16"))


refuse_early(Settings, __name__)

from data.images import upright_copy
from data.read import read_object, shown
from data.task import Task, resolve_task
from grpo.engine.files import reasoning_of
from grpo.engine.rollout import Sampling, sample
from grpo.runtime.run import load_answering


def trained_with(model: str) -> dict:
    """The settings that stand beside a trained model's or adapter's folder; {} where there are none."""
    path = Path(model).parent / "settings.json"
    if not Path(model).is_dir() or not path.is_file():
        return {}
    expected = "the settings of a training run; --task and --data take their place where it is moved away"
    settings, kinds = read_object(path, expected).get("settings"), {"task": str, "data": str, "max_pixels": int}
    if not (isinstance(settings, dict) and all(isinstance(settings.get(name, kind()), kind)
                                               for name, kind in kinds.items())):
        raise ValueError(f"{path}: found {shown(settings)} for settings; expected {expected}")
    return settings


def own_sample(task: Task, name: str, given: dict[str, str], usual_data: str = "", before: dict = {}):
    """The task's sample of what was given; ValueError for what it needs and did not get, or got and cannot use.

    usual_data: --data where the task reads one and none is given; before: the training run's settings."""
    if not hasattr(task.data, "sample_from"):
        raise ValueError(f"task {name} makes no samples of one's own: {task.data.__name__} has no sample_from(image, "
                         "text, …), see docs/your-own-task.md; grpo.evaluate answers the samples of its dataset")
    parameters = inspect.signature(task.data.sample_from).parameters
    takes = f"task {name} takes {', '.join(f'--{part}' for part in parameters if part in PARTS)}"
    for part, value in given.items():
        if value and part not in parameters:
            raise ValueError(f"--{part}: {takes}")
    given = given | {"data": given["data"] or usual_data}
    for part, parameter in parameters.items():
        if parameter.default is parameter.empty and not given.get(part):
            raise ValueError(f"--{part} expected; {takes}")
    words = {name: value for name, value in before.items() if name not in PARTS} | given
    return task.data.sample_from(**{name: word for name, word in words.items() if name in parameters and word})


def complete(settings: Settings, task: Task, one) -> tuple[str, bool]:
    images, text = task.data.build_prompt(one, reasoning=settings.reasoning)
    encoder, policy = load_answering(settings.model, settings.adapter, settings.dtype, settings.max_pixels)
    sampling = Sampling(settings.max_completion_tokens, encoder.end_tokens, settings.temperature,
                        seed=f"{settings.seed}/predict")
    group, = sample(policy, [encoder.encode(images, text, one, one.id)], 1, sampling)
    return encoder.decode(group.completions[0]), group.finished[0]


def main(words: list[str] | None = None) -> None:
    settings = read_settings(Settings, words)
    before = trained_with(settings.adapter or settings.model)
    name = settings.task or before.get("task", "more")
    task = resolve_task(name)
    settings.reasoning = reasoning_of(settings.adapter or settings.model, settings.reasoning)
    given = {part: getattr(settings, part) for part in PARTS}
    usual = before.get("data", "") if before.get("task") == name else ""
    settings.max_pixels = settings.max_pixels or before.get("max_pixels", CommonSettings.max_pixels)
    with tempfile.TemporaryDirectory() as scratch:
        if given["image"] and settings.exif_orientation:
            given["image"] = upright_copy(given["image"], scratch)
        one = own_sample(task, name, given, usual if Path(usual).is_dir() else "", before)
        completion, finished = complete(settings, task, one)
    print(completion)
    if not finished:
        print(f"(cut off after --max_completion_tokens {settings.max_completion_tokens})")
    answer = task.rewards.parse(completion, one)
    answer = "\n".join(map(str, answer)) or "nothing" if isinstance(answer, list) else answer
    print(f"\nanswer: {'none that can be read' if answer is None else answer}")


if __name__ == "__main__":
    run_program(main)
