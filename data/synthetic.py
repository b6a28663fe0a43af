"""A MORE-like world in which the picture decides: scenes, captions, boxes, labels and a scripted expert.

Five kinds of scene, each with its captions and its labels (object type first, as in MORE):

| kind  | caption and entity               | the boxed object is related when …                                    |
|-------|----------------------------------|-----------------------------------------------------------------------|
| match | two teams, one is the entity     | it is a person in the entity's shirt: member_of, with a hat leader_of;   |
|       |                                  | in the other team's shirt: opposed_to                                 |
| award | a gold cup or a match ball       | it is a person who holds that very prize: awarded                     |
| site  | a team and a city, the entity    | it is that team's logo and hangs on a building: locate_at             |
| home  | a person and a city, the entity  | it is a person in a doorway: place_of_residence                       |
| pair  | two people, one is the entity    | it is a person under an umbrella with somebody: couple; or somebody else   |
|       |                                  | wears the same shirt: peer                                            |

Everything else is `none`. The label is a function of the picture, the box, the text and the entity, and the
text alone never decides it. Files go out in MORE's own layout, so nothing downstream knows that it is a toy.
"""

import json
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw

SIDE = 112  # pixels of a picture's side

LABELS = ("none", "/per/org/opposed_to", "/per/org/leader_of", "/per/org/member_of", "/per/misc/awarded",
          "/org/loc/locate_at", "/per/per/peer", "/per/per/couple", "/per/loc/place_of_residence")

# colour: (red, green, blue, its team)
COLOURS = {
    "red": (214, 40, 40, "Falcons"), "blue": (45, 70, 205, "Sharks"), "green": (35, 140, 60, "Vipers"),
    "yellow": (240, 215, 50, "Hornets"), "purple": (125, 45, 160, "Ravens"), "white": (250, 250, 250, "Wolves"),
    "pink": (245, 140, 185, "Foxes"), "cyan": (70, 200, 215, "Whales"),
}
TEAMS = {values[3]: colour for colour, values in COLOURS.items()}
NEUTRAL = "grey"
RGB = {colour: values[:3] for colour, values in COLOURS.items()} | {
    NEUTRAL: (128, 128, 128), "gold": (255, 205, 0), "door": (60, 38, 30),
    "skin": (238, 190, 150), "trousers": (35, 35, 50), "ball": (20, 20, 20), "hat": (235, 0, 200), "umbrella": (120, 200, 0),
}
WALLS = ((176, 92, 74), (150, 132, 112), (168, 150, 96))
SKIES = ((176, 214, 240), (200, 226, 200), (226, 220, 204), (206, 200, 226))
PEOPLE = ("Mia", "Leo", "Ada", "Tom", "Eva", "Max", "Zoe", "Ben")
PRIZES = ("gold cup", "match ball")
CITIES = ("Paris", "Oslo", "Rome", "Lima", "Cairo", "Delhi")

SHORT_CAPTIONS = {
    "match": ("{a} beat {b}", "{a} meet {b}", "{a} and {b} draw"),
    "award": ("{p} wins the {m}", "{m} goes to {p}"),
    "site": ("{a} open in {c}", "{a} move to {c}"),
    "home": ("{p} comes home to {c}", "{p} on holiday in {c}"),
    "pair": ("{p} and {q} at the gala", "{p} with {q}"),
}
LONG_CAPTIONS = {
    "match": ("late goal lifts {a} past {b} in the final", "fans sing as {a} play {b} in the rain"),
    "award": ("what a night for {p} and the {m}", "fans sing as the {m} is given to {p}"),
    "site": ("what a day as {a} show a new hall in {c}", "fans sing as {a} come to {c} in the rain"),
    "home": ("what a day as {p} is back in {c}", "late night for {p} in the rain of {c}"),
    "pair": ("what a night for {p} and {q} at the final", "{p} is seen with {q} in the rain"),
}
GIVES_UP = 0.8  # how often the expert calls a hard scene's object unclear
KINDS = {"match": 58, "pair": 14, "award": 10, "site": 10, "home": 8}


@dataclass
class Thing:
    """Something in the picture; `x`, `y` is its centre and `size` its height, in pixels."""
    what: str  # person, logo, building, ball or cup
    x: float
    y: float
    size: float
    colour: str = NEUTRAL
    hat: bool = False
    holds: str = ""  # one of PRIZES or nothing
    place: str = ""  # person: doorway; logo: wall

    @property
    def width(self):
        return self.size * {"person": 0.8, "building": 1.1}.get(self.what, 1.0)


@dataclass
class Scene:
    """All facts of a sample: what is drawn, which thing is boxed (`things[0]`), the caption and its entity."""
    kind: str
    things: list
    text: str
    entity: str
    umbrella: bool = False
    hard: bool = False
    sky: tuple = SKIES[0]
    decoys: list = field(default_factory=list)  # clutter: (x, y, size, colour)

    @property
    def object(self):
        return self.things[0]


def teams_in(scene):
    """The teams that the caption names, in its order."""
    return [word for word in scene.text.split() if word in TEAMS]


def true_team(scene):
    """Whose colours the object wears; "nobody" for grey."""
    return COLOURS[scene.object.colour][3] if scene.object.colour in COLOURS else "nobody"


def relation(scene):
    """The label: the rules of the table above."""
    thing, others, team = scene.object, scene.things[1:], true_team(scene)
    if scene.kind == "site":
        own = thing.what == "logo" and team in teams_in(scene)
        return "/org/loc/locate_at" if own and thing.place == "wall" else "none"
    if thing.what != "person":
        return "none"
    if scene.kind == "match":
        if team not in teams_in(scene):
            return "none"
        if team != scene.entity:
            return "/per/org/opposed_to"
        return "/per/org/leader_of" if thing.hat else "/per/org/member_of"
    if scene.kind == "award":
        return "/per/misc/awarded" if thing.holds == scene.entity else "none"
    if scene.kind == "home":
        return "/per/loc/place_of_residence" if thing.place == "doorway" else "none"
    if scene.umbrella:
        return "/per/per/couple"
    return "/per/per/peer" if any(other.colour == thing.colour for other in others) else "none"


# ---- drawing lots ----

def pick_colour(rng, without=()):
    return rng.choice([name for name in COLOURS if name not in without])


def make_scene(rng):
    """A random scene of a random kind; about a third are hard: small, off-centre, cluttered, long captions."""
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    hard = rng.random() < 0.35
    scene = Scene(kind, [], "", "", hard=hard, sky=rng.choice(SKIES))
    names = {"p": rng.choice(PEOPLE), "c": rng.choice(CITIES), "m": rng.choice(PRIZES)}
    names["q"] = rng.choice([name for name in PEOPLE if name != names["p"]])
    first = pick_colour(rng)
    second = pick_colour(rng, without=(first,))
    names["a"], names["b"] = COLOURS[first][3], COLOURS[second][3]
    scene.text = rng.choice((LONG_CAPTIONS if hard else SHORT_CAPTIONS)[kind]).format(**names)
    scene.entity = {"match": names[rng.choice("ab")], "award": names["m"], "site": names["c"],
                    "home": names["c"], "pair": names[rng.choice("pq")]}[kind]
    own, other = (first, second) if scene.entity == names["a"] else (second, first)
    make_object(scene, rng, own, other)
    make_company(scene, rng, own, other)
    if hard:
        scene.decoys = [(rng.uniform(4, SIDE - 4), rng.uniform(4, SIDE - 4), rng.uniform(3, 6), pick_colour(rng))
                        for _ in range(rng.randint(2, 5))]
    return scene


def make_object(scene, rng, own, other):
    """Puts the boxed thing into the scene; `own` is the entity's colour and `other` the other team's."""
    kind = scene.kind
    size = rng.uniform(28, 38) if scene.hard else rng.uniform(42, 56)
    thing = Thing("person", 0, 0, size)
    if rng.random() < 0.12:  # a bystander of another type, whatever the caption says
        thing.what = rng.choice(("ball", "cup", "building"))
        thing.size = size * (1.0 if thing.what == "building" else 0.5)
    elif kind == "site":
        # The first team that the text names opens the hall: its colour is `other` here (the entity is the city).
        thing.what, thing.size = "logo", 0.6 * size
        team = TEAMS[teams_in(scene)[0]]
        thing.colour = team if rng.random() < 0.6 else pick_colour(rng, without=(team,))
        thing.place = "wall" if rng.random() < 0.6 else ""
    else:
        thing.colour = pick_colour(rng) if rng.random() < 0.85 else NEUTRAL
        thing.hat = rng.random() < 0.25
        thing.holds = rng.choices(("", *PRIZES), (80, 10, 10))[0]
        if kind == "match":
            third = pick_colour(rng, without=(own, other))
            thing.colour = rng.choices((own, other, third, NEUTRAL), (33, 17, 38, 12))[0]
        elif kind == "award":
            thing.holds = rng.choices((scene.entity, "", *PRIZES), (25, 25, 25, 25))[0]
        elif kind == "home":
            thing.place = "doorway" if rng.random() < 0.33 else ""
    thing.x, thing.y = SIDE / 2, SIDE / 2
    scene.things.append(thing)


def make_company(scene, rng, own, other):
    """Adds the other things and puts everything in its place, side by side without touching."""
    first = scene.object
    if scene.kind == "pair" and first.what == "person":
        scene.umbrella = rng.random() < 0.18
        same = rng.random() < 0.42
        colour = first.colour if same else pick_colour(rng, without=(first.colour,))
        first.holds, first.hat = "", False
        scene.things.append(Thing("person", 0, 0, first.size, colour))
    else:
        for _ in range(rng.randint(1, 2)):
            others = [own, other, pick_colour(rng)] if scene.kind == "match" else [pick_colour(rng)]
            what = "logo" if scene.kind == "site" and rng.random() < 0.7 else "person"
            size = first.size if first.what == "person" else rng.uniform(30, 45)
            scene.things.append(Thing(what, 0, 0, size * (0.6 if what == "logo" else 1), rng.choice(others),
                                      hat=what == "person" and rng.random() < 0.25))
    arrange(scene, rng)


def arrange(scene, rng):
    """Gives each thing a column of the picture in random order, as wide as the thing needs plus random gaps."""
    order = scene.things[:]
    rng.shuffle(order)
    total = sum(thing.width for thing in order)
    scale = min(1.0, (SIDE - 4) / total)
    for thing in order:
        thing.size *= scale
    free = SIDE - total * scale
    gaps = [rng.random() + 0.05 for _ in range(len(order) + 1)]
    if scene.kind == "pair":  # people in a pair stand close
        gaps[1:-1] = [0.05] * (len(order) - 1)
    left = 0.0
    level = rng.uniform(0.35, 0.65) if not scene.hard else rng.uniform(0.0, 1.0)
    for gap, thing in zip(gaps, order):
        left += free * gap / sum(gaps)
        thing.x = left + thing.width / 2
        thing.y = thing.size / 2 + (SIDE - thing.size) * min(1.0, max(0.0, level + rng.uniform(-0.1, 0.1)))
        left += thing.width
    if scene.kind == "pair":
        for thing in order:
            thing.y = order[0].y


# ---- painting ----

def box_of(thing):
    """(cx, cy, w, h) of a thing as shares of the picture's side."""
    return tuple(round(value / SIDE, 4) for value in (thing.x, thing.y, thing.width, thing.size))


def paint(scene, rng):
    """The scene as a 112×112 RGB picture; every colour is jittered, hard scenes more."""
    shade = 16 if scene.hard else 8
    colour = lambda name: tuple(  # noqa: E731
        min(255, max(0, value + rng.randint(-shade, shade))) for value in (RGB[name] if name in RGB else name))
    picture = Image.new("RGB", (SIDE, SIDE), colour(scene.sky))
    draw = ImageDraw.Draw(picture)
    for x, y, size, name in scene.decoys:
        draw.ellipse((x - size, y - size, x + size, y + size), fill=colour(name))
    for thing in scene.things:
        if thing.place:
            paint_wall(draw, thing, colour, rng)
    for thing in scene.things:
        PAINTERS[thing.what](draw, thing, colour, rng)
    if scene.umbrella:
        paint_umbrella(draw, *scene.things[:2], colour)
    return picture


def paint_wall(draw, thing, colour, rng):
    """The building behind a logo or around a doorway."""
    wall = colour(rng.choice(WALLS))
    wide, high = 0.8 * thing.width, 0.7 * thing.size
    draw.rectangle((thing.x - wide, thing.y - high, thing.x + wide, thing.y + high), fill=wall)
    if thing.place == "doorway":
        draw.rectangle((thing.x - thing.width / 2, thing.y - thing.size / 2, thing.x + thing.width / 2,
                        thing.y + high), fill=colour("door"))


def paint_person(draw, thing, colour, rng):
    x, y, s = thing.x, thing.y, thing.size
    draw.ellipse((x - 0.12 * s, y - 0.36 * s, x + 0.12 * s, y - 0.12 * s), fill=colour("skin"))
    if thing.hat:
        hat, brim = colour("hat"), y - 0.3 * s
        draw.rectangle((x - 0.13 * s, y - 0.5 * s, x + 0.13 * s, brim), fill=hat)
        draw.rectangle((x - 0.22 * s, brim - 0.05 * s, x + 0.22 * s, brim), fill=hat)
    draw.rectangle((x - 0.14 * s, y + 0.18 * s, x + 0.14 * s, y + 0.5 * s), fill=colour("trousers"))
    draw.rectangle((x - 0.2 * s, y - 0.12 * s, x + 0.2 * s, y + 0.2 * s), fill=colour(thing.colour))
    if thing.holds:
        side = rng.choice((-1, 1))
        paint_prize(draw, thing.holds, x + side * 0.29 * s, y - 0.02 * s, 0.26 * s, colour)


def paint_prize(draw, what, x, y, size, colour):
    half = size / 2
    if what == "match ball":
        draw.ellipse((x - half, y - half, x + half, y + half), fill=colour("ball"))
        return
    gold = colour("gold")
    draw.polygon([(x - half, y - half), (x + half, y - half), (x + half / 3, y + half / 2),
                  (x - half / 3, y + half / 2)], fill=gold)
    draw.rectangle((x - half / 4, y, x + half / 4, y + half), fill=gold)
    draw.rectangle((x - half / 1.4, y + half * 0.7, x + half / 1.4, y + half), fill=gold)


def paint_umbrella(draw, one, two, colour):
    """One umbrella over two people."""
    left, right = sorted((one.x, two.x))
    top, reach = one.y - 0.5 * one.size, 0.3 * one.size
    draw.chord((left - reach, top, right + reach, top + 0.5 * one.size), 180, 360, fill=colour("umbrella"))


def paint_logo(draw, thing, colour, rng):
    x, y, r = thing.x, thing.y, 0.4 * thing.size
    draw.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill=colour(thing.colour))


def paint_building(draw, thing, colour, rng):
    x, y, w, s = thing.x, thing.y, thing.width / 2, thing.size / 2
    draw.rectangle((x - w, y - 0.5 * s, x + w, y + s), fill=colour(rng.choice(WALLS)))
    draw.polygon([(x - w, y - 0.5 * s), (x, y - s), (x + w, y - 0.5 * s)], fill=colour("door"))
    for side in (-0.5, 0.5):
        draw.rectangle((x + side * w - 0.15 * w, y, x + side * w + 0.15 * w, y + 0.3 * s), fill=colour(SKIES[0]))


def paint_ball(draw, thing, colour, rng):
    paint_prize(draw, "match ball", thing.x, thing.y, thing.size, colour)


def paint_cup(draw, thing, colour, rng):
    paint_prize(draw, "gold cup", thing.x, thing.y, thing.size, colour)


PAINTERS = {"person": paint_person, "logo": paint_logo, "building": paint_building, "ball": paint_ball,
            "cup": paint_cup}


# ---- the scripted expert ----

ARTICLE = {"ball": "a ball", "cup": "a cup", "building": "a building"}


def seen(scene):
    """Step 1, what the expert sees of the object: only what matters for this kind of scene."""
    thing = scene.object
    if thing.what in ARTICLE:
        return ARTICLE[thing.what]
    if thing.what == "logo":
        return f"a {thing.colour} logo {'on a wall' if thing.place else 'in the air'}"
    detail = {
        "match": "a hat" if thing.hat else "no hat",
        "award": "a " + thing.holds if thing.holds else "no prize",
        "home": "a door" if thing.place else "no door",
        "pair": "an umbrella" if scene.umbrella else "no umbrella",
    }.get(scene.kind, "no logo")
    return f"a person in {thing.colour}, {detail}"


def company(scene):
    """The colours of the other people and logos, from left to right."""
    others = sorted(scene.things[1:], key=lambda thing: thing.x)
    return " ".join(thing.colour for thing in others)


def roles(scene):
    """{name in the text: what it is to the entity}, the entity first."""
    names = [word for word in scene.text.split() if word in TEAMS or word in PEOPLE]
    others = [name for name in names if name != scene.entity]
    return {scene.entity: "entity"} | {name: "rival" if scene.kind == "match" else "other" for name in others}


def topic(scene):
    """Step 2, what the text says: its names and their roles."""
    return "text has " + ", ".join(f"{name} {role}" for name, role in roles(scene).items())


def matched(scene):
    """Step 3: which thing of the text the object is."""
    thing = scene.object
    if thing.what in ARTICLE:
        return "it is absent"
    if scene.kind == "pair":
        other = scene.things[1].colour
        return f"{other} and {thing.colour}, {'same' if other == thing.colour else 'different'}"
    if scene.kind == "award":
        return f"it has {thing.holds} {roles(scene).get(thing.holds, 'absent')}" if thing.holds else "it is absent"
    if scene.kind == "home":
        return "it is somebody"
    team = true_team(scene)
    return f"{thing.colour} is {team} {roles(scene).get(team, 'absent')}"


TYPES = {"person": "per", "logo": "org", "building": "loc", "ball": "misc", "cup": "misc"}
ENTITY_TYPES = {"match": "org", "award": "misc", "site": "loc", "home": "loc", "pair": "per"}


def steps(scene, label, unclear):
    """The six steps that lead to `label`, as a list of texts; an unclear object is misc and stays unrelated."""
    types = ("misc" if unclear else TYPES[scene.object.what], ENTITY_TYPES[scene.kind])
    candidates = [name for name in LABELS[1:] if name.startswith("/{}/{}/".format(*types))] + ["none"]
    return [f"by {company(scene)}, {'something unclear' if unclear else seen(scene)}", topic(scene),
            "it is absent" if unclear else matched(scene), " and ".join(types), ", ".join(candidates), f"so {label}"]


def expert_response(scene, rng):
    """The scripted expert's answer: it mostly gives up on hard scenes, and one answer in ten is wrong or broken.

    Giving up says `none`, which is often right, and then the filter keeps it: who imitates what is left gives up on
    hard scenes too, although it could see. Imitation cannot mend that; trying both and being told which is right can.
    """
    unclear = scene.hard and rng.random() < GIVES_UP
    label = "none" if unclear else relation(scene)
    flaw = rng.choice(("label", "missing", "order", "slash", "after")) if rng.random() < 0.1 else ""
    if flaw == "label":
        label = rng.choice([name for name in LABELS if name != label])
    numbered = [f"Step {number}: {text}." for number, text in enumerate(steps(scene, label, unclear), start=1)]
    if flaw == "missing":
        del numbered[rng.randrange(6)]
    if flaw == "order":
        place = rng.randrange(5)
        numbered[place], numbered[place + 1] = numbered[place + 1], numbered[place]
    answer = label.lstrip("/") if flaw == "slash" else label
    after = " That is my answer." if flaw == "after" else ""
    return f"<think> {' '.join(numbered)} </think> <answer>{answer}</answer>{after}"


# ---- writing ----

def line_of(scene, name):
    """One line of MORE's annotation files."""
    tokens = scene.text.split()
    words = scene.entity.split()
    start = next(place for place in range(len(tokens)) if tokens[place:place + len(words)] == words)
    return {"token": tokens, "h": {"name": scene.entity, "pos": [start, start + len(words)]},
            "t": {"name": "[OBJ0]", "pos": list(box_of(scene.object))}, "img_id": name,
            "relation": relation(scene)}


def make_sample(seed, split, index):
    """(scene, picture, expert's response) of one sample; a function of its three arguments alone."""
    rng = random.Random(f"{seed}/{split}/{index}")
    scene = make_scene(rng)
    picture = paint(scene, rng)
    return scene, picture, expert_response(scene, rng)


def write_world(folder, seed=0, train=2400, valid=200, test=800):
    """Writes `folder`/MORE in the dataset's layout and `folder`/expert.jsonl; returns the expert's lines."""
    folder = Path(folder)
    more = folder / "MORE"
    (more / "txt").mkdir(parents=True, exist_ok=True)
    (more / "rel2id.json").write_text(json.dumps({name: place for place, name in enumerate(LABELS)}),
                                      encoding="utf-8")
    expert = []
    for split, count in (("train", train), ("valid", valid), ("test", test)):
        pictures = more / "img_org" / split
        pictures.mkdir(parents=True, exist_ok=True)
        lines = []
        for index in range(count):
            scene, picture, response = make_sample(seed, split, index)
            name = f"{split}-{index:05d}.png"
            picture.save(pictures / name, compress_level=1)
            lines.append(repr(line_of(scene, name)))
            if split == "train":
                expert.append({"id": f"train/{index}", "response": response})
        (more / "txt" / f"{split}.txt").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    (folder / "expert.jsonl").write_text("".join(json.dumps(line) + "\n" for line in expert), encoding="utf-8")
    return expert


@dataclass
class Settings:
    """Write the embedded example: OUTPUT/MORE, OUTPUT/expert.jsonl and the tiny model OUTPUT/model."""
    output: str = field(metadata={"help": "folder to write into; it is made where it is missing"})
    seed: int = field(default=0, metadata={"help": "seed of the scenes and of the model's weights"})
    train: int = field(default=2400, metadata={"help": "number of training samples"})
    valid: int = field(default=200, metadata={"help": "number of validation samples"})
    test: int = field(default=800, metadata={"help": "number of test samples"})

    def check(self):
        for name in ("train", "valid", "test"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; at least 1 expected")


def prompts(folder, count=600):
    """The texts of the first prompts, with and without reasoning: what the tokenizer is learned from."""
    from data import more

    samples = more.load(Path(folder) / "MORE", "train")[:count]
    return [more.build_prompt(sample, reasoning=reasoning)[1] for sample in samples for reasoning in (True, False)]


def write_example(settings):
    """Dataset, expert's responses and model; returns the model's parameter count."""
    from data.tiny_model import write_tiny_model

    settings.check()
    expert = write_world(settings.output, settings.seed, settings.train, settings.valid, settings.test)
    texts = prompts(settings.output) + [line["response"] for line in expert[:1200]]
    return write_tiny_model(Path(settings.output) / "model", texts, settings.seed)


def main(arguments=None):
    from transformers import HfArgumentParser

    parser = HfArgumentParser(Settings, prog="python -m data.synthetic", allow_abbrev=False)
    try:
        settings, = parser.parse_args_into_dataclasses(arguments)
        count = write_example(settings)
    except (ValueError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    print(f"{settings.output}: MORE/ ({settings.train} + {settings.valid} + {settings.test} samples), expert.jsonl, "
          f"model/ ({count:,} parameters)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
