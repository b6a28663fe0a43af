"""Which of an expert's candidates become training data: JMERE-R1's re-prediction and rule-based score filters.

An expert is asked three kinds of question, each a `Request` under an id of its own, so that whatever answers them
(a file, an endpoint that has to be paid) keeps them apart and none is asked twice:

    train/5, train/5#2, …     the candidates of a sample
    train/5#2 repredict       what follows from the second candidate's reasoning
    train/5#2 score           how good that reasoning is, from 0 to 1

Every filter takes candidates and returns (kept, fallen)."""
import random
import re
from collections.abc import Callable
from typing import NamedTuple

SCORE = re.compile(r"<score>\s*(0(?:\.\d+)?|1(?:\.0+)?)\s*</score>")


class Request(NamedTuple):
    """One question; `prompt()` is (images, text), made only if it is really asked."""
    id: str
    prompt: Callable[[], tuple[list, str]]


Ask = Callable[[list[Request]], dict[str, str]]  # response by request id, where there is one


class Candidate(NamedTuple):
    """One response for a sample; response is None where the expert gave none."""
    id: str
    sample: object
    response: str | None = None
    score: float = 0.0


Fallen = tuple[Candidate, str]  # it does not become training data, for this reason


def candidates_of(samples: list, count: int, prompt_of: Callable, ask: Ask) -> list[Candidate]:
    """`count` responses a sample. The first has the sample's id: to ask for more later pays for the new ones only."""
    empty = [Candidate(sample.id if number == 1 else f"{sample.id}#{number}", sample)
             for sample in samples for number in range(1, count + 1)]
    responses = ask([Request(one.id, lambda one=one: prompt_of(one.sample)) for one in empty])
    return [one._replace(response=responses.get(one.id)) for one in empty]


def filter_responses(task, candidates: list[Candidate]) -> tuple[list[Candidate], list[Fallen]]:
    """Structure intact and answer the gold one (MORE-R1, section 3.2); a task may mend small slips before."""
    mend = getattr(task.data, "normalise_response", lambda text, _: text.strip())
    mended = [one._replace(response=one.response and mend(one.response, one.sample)) for one in candidates]
    return divide(mended, lambda one: reason_to_drop(task, one.sample, one.response))


def reason_to_drop(task, sample, response: str | None) -> str | None:
    """Why a response is no training data, or None. A task's `fault` says more than a format reward of 0."""
    if response is None:
        return "no response"
    if hasattr(task.rewards, "fault"):
        fault = task.rewards.fault(response, sample)
    else:
        fault = "broken structure" if task.rewards.reward(response, sample).get("format", 1) < 1 else None
    return fault if fault or task.rewards.correct(response, sample) else "answer is not the gold one"


def repredict_filter(task, candidates: list[Candidate], ask: Ask) -> tuple[list[Candidate], list[Fallen]]:
    """Keeps the candidates from whose reasoning the expert, shown image and text again, finds the gold answer."""
    replies = ask_about(task, candidates, "repredict", task.data.repredict_prompt, ask)
    right = lambda one: task.rewards.correct(replies[one.id], one.sample)
    return divide(candidates, lambda one: "no re-prediction" if one.id not in replies else
                  None if right(one) else "re-prediction is not the gold answer")


def score_filter(task, candidates: list[Candidate], ask: Ask, threshold: float) -> tuple[list[Candidate], list[Fallen]]:
    """Keeps the candidates that the expert, by the task's fixed rules, gives at least the threshold."""
    replies = ask_about(task, candidates, "score", task.data.score_prompt, ask)
    scores = {name: read_score(reply) for name, reply in replies.items()}

    kept, fallen = divide(candidates, lambda one: "no score" if one.id not in scores else
                          "score cannot be read" if scores[one.id] is None else
                          f"score below {threshold:g}" if scores[one.id] < threshold else None)
    return [one._replace(score=scores[one.id]) for one in kept], fallen


def ask_about(task, candidates: list[Candidate], what: str, words: Callable, ask: Ask) -> dict[str, str]:
    """Replies by candidate id. The expert sees the sample's images and `words(sample, response)`."""
    requests = [Request(f"{one.id} {what}",
                        lambda one=one: (task.data.build_prompt(one.sample)[0], words(one.sample, one.response)))
                for one in candidates]
    replies = ask(requests)
    return {one.id: replies[request.id] for one, request in zip(candidates, requests) if request.id in replies}


def read_score(reply: str) -> float | None:
    """The number from 0 to 1 in the reply's one <score>…</score>."""
    found = SCORE.findall(reply)
    return float(found[0]) if len(found) == 1 and reply.count("<score>") == 1 else None


def best_of_each(candidates: list[Candidate], seed: int) -> list[Candidate]:
    """One candidate a sample, in the samples' order: the best score; among equals one by lot."""
    by_sample: dict[str, list[Candidate]] = {}
    for one in candidates:
        by_sample.setdefault(one.sample.id, []).append(one)
    best = {name: max(one.score for one in several) for name, several in by_sample.items()}
    return [random.Random(f"{seed}/{name}").choice([one for one in several if one.score == best[name]])
            for name, several in by_sample.items()]


def divide(candidates: list[Candidate], reason: Callable) -> tuple[list[Candidate], list[Fallen]]:
    """(kept, fallen) by the reason to drop, None where there is none."""
    judged = [(one, reason(one)) for one in candidates]
    return [one for one, why in judged if not why], [(one, why) for one, why in judged if why]
