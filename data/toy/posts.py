"""The embedded example in JMERE's layout: posts about two people, whose image decides what holds between whom.

| kind  | the text names                | a quintuple for each person who …                                     |
|-------|-------------------------------|------------------------------------------------------------------------|
| match | two people, a team            | wears the team's shirt: member_of, with a hat on: leader_of            |
| award | two people, a prize           | has that very prize beside them: awarded                               |
| home  | two people, a city            | stands in a doorway: place_of_residence                                |
| pair  | two people                    | (one of both) under one umbrella: couple; in equal shirts: peer        |

Who is named first stands on the left. A post without any quintuple is no post of JMERE's: it is drawn again.
`python -m data.toy.world --task jmere --output DIR` writes it with its scripted expert."""

import json
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data.toy.scene import CITIES, COLOURS, NEUTRAL, PEOPLE, PRIZES, SIDE, SKIES, Scene, Thing, paint, write_images
from rewards.jmere import answer_text

KINDS = {"match": 46, "award": 20, "home": 20, "pair": 14}  # how often, in percent
SHIRTS = ("red", "blue", "green", "yellow")  # few, so that they are soon told apart in an image with two people
HARD = 0.4  # share of hard posts: smaller people in odd colours, clutter, long captions
CANDIDATES = 3  # of the expert for every post
GIVES_UP = 0.75  # how often the expert does not look at the people of a hard post
FLAWED = 0.12  # how often a candidate of its is broken besides
FLAWS = ("answer", "tags", "type", "reasoning", "description")
SHORT_CAPTIONS = {"match": ("{p} and {q} at the {a} game", "{p} meets {q} and {a}"),
    "award": ("{p} and {q} and the {m}", "{p} with {q} , the {m} too"),
    "home": ("{p} and {q} in {c}", "{p} shows {q} around {c}"), "pair": ("{p} with {q}", "{p} and {q} at the gala")}
LONG_CAPTIONS = {
    "match": ("what a late night for {p} and {q} as {a} play in the rain",
              "fans sing as {p} and {q} come to see {a} again"),
    "award": ("what a night for {p} and for {q} at the {m} show", "fans sing as {p} and {q} see the {m} in the rain"),
    "home": ("what a late night for {p} and {q} in the rain of {c}", "fans sing as {p} and {q} come to {c} again"),
    "pair": ("what a late night for {p} and {q} at the final", "fans sing as {p} and {q} come in the rain")}


@dataclass
class Post:
    """A scene whose first two things are the people, left and right, and what its text names."""
    scene: Scene
    names: tuple[str, str]  # left, right
    other: str  # the team, prize or city; "" in a pair
    unclear: bool  # to the expert, who has not looked


def quintuples(post):
    """All that the post says, by the rules of the table above: left before right."""
    (left, right), scene = post.scene.things[:2], post.scene
    if scene.kind == "pair":
        relation = "couple" if scene.umbrella else "peer" if left.colour == right.colour else ""
        return [(post.names[0], "per", post.names[1], "per", relation)] if relation else []
    found = zip(post.names, (finding(post, left), finding(post, right)))
    kind = {"match": "org", "award": "misc", "home": "loc"}[scene.kind]
    return [(name, "per", post.other, kind, relation) for name, relation in found if relation]


def finding(post, person):
    """The relation of one person to what else the text names, or ""."""
    if post.scene.kind == "match":
        own = COLOURS.get(person.colour, ("",))[-1] == post.other
        return ("leader_of" if person.hat else "member_of") if own else ""
    if post.scene.kind == "award":
        return "awarded" if person.holds == post.other else ""
    return "place_of_residence" if person.place == "doorway" else ""


def make_post(rng):
    """A random post with at least one quintuple; `rng` is a `random.Random`."""
    while not quintuples(post := draw_post(rng)):
        pass
    return post


def draw_post(rng):
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    hard = rng.random() < HARD
    names = rng.sample(PEOPLE, 2)
    team = rng.choice(SHIRTS)
    other = {"match": COLOURS[team][3], "award": rng.choice(PRIZES), "home": rng.choice(CITIES), "pair": ""}[kind]
    caption = rng.choice((LONG_CAPTIONS if hard else SHORT_CAPTIONS)[kind])
    text = caption.format(p=names[0], q=names[1], a=other, m=other, c=other)
    scene = Scene(kind, [], text, "", hard=hard, sky=rng.choice(SKIES))
    scene.things = [make_person(scene, rng, team, other) for _ in names]
    if kind == "pair":
        scene.umbrella = rng.random() < 0.4
        if rng.random() < 0.6:
            scene.things[1].colour = scene.things[0].colour
    place_people(scene, rng)
    scene.things += [prize_beside(person) for person in scene.things if person.holds]
    if hard:
        scene.decoys = [(rng.uniform(4, SIDE - 4), rng.uniform(4, SIDE - 4), rng.uniform(3, 6), rng.choice(SHIRTS))
                        for _ in range(rng.randint(2, 5))]
    return Post(scene, tuple(names), other, hard and rng.random() < GIVES_UP)


def make_person(scene, rng, team, other):
    """One person, not yet in their place: what the quintuples hang on, and what they do not."""
    person = Thing("person", 0, 0, rng.uniform(46, 54) if scene.hard else rng.uniform(54, 64))
    person.colour = rng.choice(SHIRTS)
    if scene.kind == "match":
        other_team = rng.choice([name for name in SHIRTS if name != team])
        person.colour = rng.choices((team, other_team, NEUTRAL), (50, 40, 10))[0]
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
        scene.things[1].y = scene.things[0].y
        scene.things[1].size = scene.things[0].size


def prize_beside(person):
    """A person's prize as a thing of its own, as large as in no hand: on the side where the other person is not."""
    side = -1 if person.x < SIDE / 2 else 1
    what = {"gold cup": "cup", "match ball": "ball"}[person.holds]
    return Thing(what, person.x + side * 16, person.y + 0.25 * person.size, 20)


def candidate(post, rng):
    """(response, what re-prediction finds in it, its score): one candidate of the scripted expert.

    The expert was told the answer. In most hard posts it does not look: it calls the people unclear and gives the
    right answer all the same. No filter finds fault with that (who re-predicts sees the image itself), so whoever
    imitates it learns to call hard posts unclear and to guess. Imitation cannot mend that; trying both ways and being
    told which answers are right can: a look that is put into words decides what follows."""
    flaw = rng.choice(FLAWS) if rng.random() < FLAWED else ""
    answer, thought = quintuples(post), reasoning(post, rng, flaw)
    wrong = [(post.names[1], "per", post.names[0], "per", "peer")] * (flaw == "answer")
    spoken = answer_text(answer + wrong)
    if flaw == "type":
        spoken = spoken.replace(", per,", ", person,")
    response = f"<think> {thought} </think>\n<answer>\n{spoken}\n</answer>"
    if flaw == "tags":
        response = response.replace("</think>", "")
    reread = [(name, kind, *rest) for name, kind, *rest in answer[1:]] if flaw == "reasoning" else answer
    score = 0.4 if flaw == "description" else 0.8 if post.unclear else 1.0
    return response, f"<answer>\n{answer_text(reread)}\n</answer>", f"<score>{score}</score>"


def reasoning(post, rng, flaw):
    """The three parts: what the image shows, how it goes with the text, what follows."""
    left, right = (describe(post, person) for person in post.scene.things[:2])
    if post.unclear:
        left = right = "unclear"
    if flaw == "reasoning":
        left, right = right, left
    first, second = post.names
    image = "" if flaw == "description" else f"Image: {left}, {right}. "
    alignment = f"{first} {left}, {second} {right}" + (f", {post.other} {sign(post)}" if post.other else "")
    return f"{image}Alignment: {alignment}. Quintuples: {verdict(post)}."


def describe(post, person):
    """What of a person matters in this kind of post."""
    return {"match": person.colour + (" hat" if person.hat else ""), "award": person.holds or "nothing",
            "home": person.place or "street",
            "pair": ("umbrella " if post.scene.umbrella else "") + person.colour}[post.scene.kind]


def sign(post):
    """By what one knows in the image what the text names besides the people."""
    colour = next((name for name, values in COLOURS.items() if values[3] == post.other), "")
    return {"match": colour, "award": "prize", "home": "doorway"}[post.scene.kind]


def verdict(post):
    """For each person, yes or no."""
    if post.scene.kind == "pair":
        return "yes" if quintuples(post) else "no"
    taking_part = {quintuple[0] for quintuple in quintuples(post)}
    return ", ".join(f"{name} {'yes' if name in taking_part else 'no'}" for name in post.names)


def make_sample(seed, split, index):
    """(post, image, the expert's candidates) of one post; a function of its three arguments alone."""
    rng = random.Random(f"{seed}/{split}/{index}")
    post = make_post(rng)
    image = paint(post.scene, rng)
    return post, image, [candidate(post, rng) for _ in range(CANDIDATES)]


def item_of(post, name):
    """One item of JMERE's lists, for the image `name`."""
    tokens = post.scene.text.split()

    def entity(words, kind):
        parts = words.split()
        start = next(i for i in range(len(tokens)) if tokens[i:i + len(parts)] == parts)
        return {"name": words, "pos": [start, start + len(parts)], "tags": kind}

    labels = [[{"beg_ent": entity(head, head_type), "sec_ent": entity(tail, tail_type), "relation": relation}]
              for head, head_type, tail, tail_type, relation in quintuples(post)]
    return {"token": tokens, "img_id": name, "label_list": labels}


def write_world(folder, seed=0, train=2400, valid=200, test=800):
    """Writes `folder`/JMERE and `folder`/expert.jsonl; returns the expert's lines, {"id", "response"} each."""
    folder, counts = Path(folder), {"train": train, "val": valid, "test": test}
    candidates, _, _ = (write_split(folder / "JMERE", seed, split, count) for split, count in counts.items())
    expert = [{"id": name, "response": response} for index, several in enumerate(candidates)
              for number, one in enumerate(several, 1)
              for name, response in zip(request_names(f"train/{index}", number), one)]
    (folder / "expert.jsonl").write_text("".join(json.dumps(line) + "\n" for line in expert), encoding="utf-8")
    return expert


def request_names(sample_id, number):
    """The ids under which sft.annotate asks for the candidate itself, its re-prediction and its score."""
    name = sample_id if number == 1 else f"{sample_id}#{number}"
    return name, f"{name} repredict", f"{name} score"


def write_split(folder, seed, split, count):
    """Writes a split's images and its list; returns the expert's candidates for each post."""
    drawn = write_images(folder / "images" / split, split, count, partial(make_sample, seed, split))
    items = [item_of(post, name) for post, name, _ in drawn]
    (folder / f"{split}.json").write_text(json.dumps(items), encoding="utf-8")
    return [several for _, _, several in drawn]
