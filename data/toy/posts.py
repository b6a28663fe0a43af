"""The embedded example in JMERE's layout: posts about two people, whose image decides what holds between whom.

docs/miniature.md has the rules. Who is named first stands on the left. A post without any quintuple is no post of
JMERE's: it is drawn again. `python -m data.toy --task jmere --output DIR` writes it with its scripted expert."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from data.toy.scene import (CAPTIONS, CITIES, COLOURS, NEUTRAL, PEOPLE, PRIZES, SIDE, SKIES, TEAMS, WORLD, Scene, Thing,
                            clutter, paint, span, team_of, write_images, write_lines)
from rewards.jmere import answer_text

KINDS = WORLD["kinds"]["jmere"]  # how often, in percent
SHIRTS = ("red", "blue", "green", "yellow")  # few, so that they are soon told apart in an image with two people
HARD = 0.4  # share of hard posts: smaller people in odd colours, clutter, long captions
CANDIDATES = 3  # of the expert for every post
GIVES_UP = 0.75  # how often the expert does not look at the people of a hard post
FLAWED = 0.12  # how often a candidate of its is broken besides
FLAWS = ("answer", "tags", "type", "reasoning", "description")


@dataclass
class Post:
    """A scene whose first two things are the people, left and right, and what its text names."""
    scene: Scene
    names: tuple[str, str]  # left, right
    other: str  # the team, prize or city; "" in a pair
    unclear: bool  # to the expert, who has not looked


def quintuples(post):
    """All that the post says, by the rules in docs/miniature.md: left before right."""
    people, scene = post.scene.things[:2], post.scene
    if scene.kind == "pair":
        relation = "couple" if scene.umbrella else "peer" if people[0].colour == people[1].colour else ""
        return [(post.names[0], "per", post.names[1], "per", relation)] if relation else []
    kind, finding = {
        "match": ("org", lambda person: (team_of(person) == post.other) * ("leader_of" if person.hat else "member_of")),
        "award": ("misc", lambda person: (person.holds == post.other) * "awarded"),
        "home": ("loc", lambda person: (person.place == "doorway") * "place_of_residence")}[scene.kind]
    return [(name, "per", post.other, kind, relation) for name, person in zip(post.names, people)
            if (relation := finding(person))]


def draw_post(rng):
    """A random post, perhaps without a quintuple; `rng` is a `random.Random`."""
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    hard = rng.random() < HARD
    names = rng.sample(PEOPLE, 2)
    team = rng.choice(SHIRTS)
    other = {"match": COLOURS[team][3], "award": rng.choice(list(PRIZES)), "home": rng.choice(CITIES), "pair": ""}[kind]
    text = rng.choice(CAPTIONS["jmere"][kind]["hard" if hard else "easy"]).format(
        left=names[0], right=names[1], other=other)
    scene = Scene(kind, [], text, "", hard=hard, sky=rng.choice(SKIES))
    scene.things = [make_person(scene, rng, team, other) for _ in names]
    if kind == "pair":
        scene.umbrella = rng.random() < 0.4
        if rng.random() < 0.6:
            scene.things[1].colour = scene.things[0].colour
    place_people(scene, rng)
    # A prize is a thing of its own, as large as in no hand: on the side where the other person is not.
    scene.things += [Thing(PRIZES[person.holds], person.x + side * 16, person.y + 0.25 * person.size, 20)
                     for side, person in zip((-1, 1), scene.things) if person.holds]
    if hard:
        scene.decoys = clutter(rng, SHIRTS)
    return Post(scene, tuple(names), other, hard and rng.random() < GIVES_UP)


def make_person(scene, rng, team, other):
    """One person, not yet in their place: what the quintuples hang on, and what they do not."""
    person = Thing("person", 0, 0, rng.uniform(46, 54) if scene.hard else rng.uniform(54, 64))
    person.colour = rng.choice(SHIRTS)
    if scene.kind == "match":
        rival = rng.choice([name for name in SHIRTS if name != team])
        person.colour = rng.choices((team, rival, NEUTRAL), (50, 40, 10))[0]
        person.hat = rng.random() < 0.4
    elif scene.kind == "award":
        person.holds = rng.choices((other, "", *PRIZES), (40, 30, 15, 15))[0]
    elif scene.kind == "home":
        person.place = "doorway" if rng.random() < 0.5 else ""
    return person


def place_people(scene, rng):
    """One in the left half, one in the right half; a pair stands on one level, close enough for an umbrella."""
    for person, centre in zip(scene.things, (0.27, 0.73)):
        person.x = SIDE * centre + rng.uniform(-4, 4)
        person.y = SIDE / 2 + rng.uniform(-1, 1) * (SIDE - person.size) / (2 if scene.hard else 4)
    if scene.kind == "pair":
        scene.things[1].y, scene.things[1].size = scene.things[0].y, scene.things[0].size


def candidate(post, rng):
    """(response, what re-prediction finds in it, its score): one candidate of the scripted expert.

    The expert was told the answer. In most hard posts it does not look: it calls the people unclear and gives the
    right answer all the same. No filter finds fault with that (who re-predicts sees the image itself), so whoever
    imitates it learns to call hard posts unclear and to guess, which being told what is right can mend."""
    flaw = rng.choice(FLAWS) if rng.random() < FLAWED else ""
    answer = quintuples(post)
    wrong = [(post.names[1], "per", post.names[0], "per", "peer")] * (flaw == "answer")
    spoken = answer_text(answer + wrong)
    if flaw == "type":
        spoken = spoken.replace(", per,", ", person,")
    response = f"<think> {reasoning(post, flaw)} </think>\n<answer>\n{spoken}\n</answer>"
    if flaw == "tags":
        response = response.replace("</think>", "")
    reread = answer[1:] if flaw == "reasoning" else answer
    score = 0.4 if flaw == "description" else 0.8 if post.unclear else 1.0
    return response, f"<answer>\n{answer_text(reread)}\n</answer>", f"<score>{score}</score>"


def reasoning(post, flaw):
    """The three parts: what the image shows, how it goes with the text, what follows."""
    scene, (first, second) = post.scene, post.names
    left, right = ("unclear" if post.unclear else describe(scene, person) for person in scene.things[:2])
    if flaw == "reasoning":
        left, right = right, left
    image = "" if flaw == "description" else f"Image: {left}, {right}. "
    sign = {"match": TEAMS.get(post.other), "award": "prize", "home": "doorway", "pair": ""}[scene.kind]
    alignment = f"{first} {left}, {second} {right}" + (f", {post.other} {sign}" if post.other else "")
    taking_part = {quintuple[0] for quintuple in quintuples(post)}
    verdict = [f"{name} {'yes' if name in taking_part else 'no'}" for name in post.names]
    return f"{image}Alignment: {alignment}. Quintuples: {'yes' if scene.kind == 'pair' else ', '.join(verdict)}."


def describe(scene, person):
    """What of a person matters in this kind of post."""
    return {"match": person.colour + " hat" * person.hat, "award": person.holds or "nothing",
            "home": person.place or "street", "pair": "umbrella " * scene.umbrella + person.colour}[scene.kind]


def make_sample(seed, split, index):
    """(post, image, the expert's candidates) of one post; a function of its three arguments alone."""
    rng = random.Random(f"{seed}/{split}/{index}")
    while not quintuples(post := draw_post(rng)):
        pass
    image = paint(post.scene, rng)
    return post, image, [candidate(post, rng) for _ in range(CANDIDATES)]


def item_of(post, name):
    entity = lambda words, kind: {"name": words, "pos": span(words, post.scene.text), "tags": kind}
    labels = [[{"beg_ent": entity(head, head_type), "sec_ent": entity(tail, tail_type), "relation": relation}]
              for head, head_type, tail, tail_type, relation in quintuples(post)]
    return {"token": post.scene.text.split(), "img_id": name, "label_list": labels}


def write_world(folder, seed=0, train=2400, valid=200, test=800):
    """Writes `folder`/JMERE and `folder`/expert.jsonl; returns the expert's lines, {"id", "response"} each."""
    folder = Path(folder)
    jmere, drawn = folder / "JMERE", {}
    for split, count in (("train", train), ("val", valid), ("test", test)):
        drawn[split] = write_images(jmere / "images" / split, make_sample, seed, split, count)
        (jmere / f"{split}.json").write_text(json.dumps([item_of(post, name) for post, name, _ in drawn[split]]))
    expert = [{"id": f"train/{index}{f'#{number}' * (number > 1)}{asked}", "response": response}
              for index, (*_, several) in enumerate(drawn["train"]) for number, one in enumerate(several, 1)
              for asked, response in zip(("", " repredict", " score"), one)]
    write_lines(folder / "expert.jsonl", map(json.dumps, expert))
    return expert
