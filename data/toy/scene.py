"""Small scenes in which the image decides how the boxed object and the text's entity are related: docs/miniature.md.

The label follows from image, box, text and entity; text and entity alone never decide it. Most are `none`. About a
third of the scenes are hard: small, off-centre, cluttered, with longer captions."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw

SIDE = 112  # pixels of an image's side
WORLD = json.loads(Path(__file__).with_name("world.json").read_text(encoding="utf-8"))
# CAPTIONS: by the dataset's layout, the kind and whether the scene is easy or hard; the names' places are {in braces}
PEOPLE, CITIES, WALLS, SKIES, CAPTIONS = map(WORLD.get, ("people", "cities", "walls", "skies", "captions"))
LABELS = tuple(WORLD["labels"])  # in the order of their ids
KINDS = WORLD["kinds"]["more"]  # kind: how often, in percent
HARD = 0.35  # share of hard scenes
COLOURS = WORLD["colours"]  # colour: [red, green, blue, its team]
TEAMS = {values[3]: colour for colour, values in COLOURS.items()}
NEUTRAL = "grey"  # nobody's colour
RGB = {colour: values[:3] for colour, values in COLOURS.items()} | WORLD["paints"]
PRIZES = WORLD["prizes"]  # and what of a thing each is
# What is painted, from back to front: a colour ("own": the shirt's or logo's) and the forms of that colour, whose
# corners are x and y from the centre, in shares of the size. A wall is behind a logo, a doorway around a person.
FIGURES = WORLD["figures"]


@dataclass
class Thing:
    """Something in the image; `x`, `y` is its centre and `size` its height, in pixels."""
    what: str  # person, logo, building, ball or cup
    x: float
    y: float
    size: float
    colour: str = NEUTRAL  # of a shirt or a logo
    hat: bool = False
    holds: str = ""  # one of PRIZES or nothing
    place: str = ""  # a person's can be "doorway", a logo's "wall"

    @property
    def width(self):
        return self.size * {"person": 0.8, "building": 1.1}.get(self.what, 1.0)

    @property
    def box(self):
        """(cx, cy, w, h) as shares of the image's side, as MORE stores boxes."""
        return tuple(round(value / SIDE, 4) for value in (self.x, self.y, self.width, self.size))


@dataclass
class Scene:
    """All facts of a sample: what is drawn (`things[0]` is the boxed object), the caption and its entity."""
    kind: str
    things: list
    text: str
    entity: str
    umbrella: bool = False  # over the first two things
    hard: bool = False
    sky: tuple = tuple(SKIES[0])
    decoys: list = field(default_factory=list)

    @property
    def object(self):
        return self.things[0]


def teams_in(scene):
    return [word for word in scene.text.split() if word in TEAMS]


def team_of(thing):
    """Whose colour the thing has; "nobody" for grey."""
    return COLOURS[thing.colour][3] if thing.colour in COLOURS else "nobody"


def relation(scene):
    """The scene's label, by the rules in docs/miniature.md."""
    thing, team, teams = scene.object, team_of(scene.object), teams_in(scene)
    if thing.what != ("logo" if scene.kind == "site" else "person"):
        return "none"
    same_shirt = any(other.colour == thing.colour for other in scene.things[1:])
    return {"site": "/org/loc/locate_at" if team in teams and thing.place == "wall" else "none",
        "match": "none" if team not in teams else "/per/org/opposed_to" if team != scene.entity
                 else "/per/org/leader_of" if thing.hat else "/per/org/member_of",
        "award": "/per/misc/awarded" if thing.holds == scene.entity else "none",
        "home": "/per/loc/place_of_residence" if thing.place == "doorway" else "none",
        "pair": "/per/per/couple" if scene.umbrella else "/per/per/peer" if same_shirt else "none"}[scene.kind]


def pick_colour(rng, *without):
    return rng.choice([name for name in COLOURS if name not in without])


def make_scene(rng):
    """A random scene; `rng` is a `random.Random`, and the scene a function of its state."""
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    hard = rng.random() < HARD
    scene = Scene(kind, [], "", "", hard=hard, sky=rng.choice(SKIES))
    names = {"p": rng.choice(PEOPLE), "c": rng.choice(CITIES), "m": rng.choice(list(PRIZES))}
    names["q"] = rng.choice([name for name in PEOPLE if name != names["p"]])
    first = pick_colour(rng)
    second = pick_colour(rng, first)
    names["a"], names["b"] = COLOURS[first][3], COLOURS[second][3]
    scene.text = rng.choice(CAPTIONS["more"][kind]["hard" if hard else "easy"]).format(**names)
    scene.entity = {"match": names[rng.choice("ab")], "award": names["m"], "site": names["c"], "home": names["c"],
                    "pair": names[rng.choice("pq")]}[kind]
    own, other = (first, second) if scene.entity == names["a"] else (second, first)
    scene.things = [make_object(scene, rng, own, other)]
    add_company(scene, rng, own, other)
    arrange(scene, rng)
    if hard:
        scene.decoys = clutter(rng, list(COLOURS))
    return scene


def clutter(rng, colours):
    return [Thing("decoy", rng.uniform(4, SIDE - 4), rng.uniform(4, SIDE - 4), 2 * rng.uniform(3, 6),
                  rng.choice(colours)) for _ in range(rng.randint(2, 5))]


def make_object(scene, rng, own, other):
    """The boxed thing, not yet in its place; `own` is the entity's colour and `other` the other team's."""
    size = rng.uniform(28, 38) if scene.hard else rng.uniform(42, 56)
    thing = Thing("person", 0, 0, size)
    if rng.random() < 0.12:  # a bystander of another type, whatever the caption says
        thing.what = rng.choice(("ball", "cup", "building"))
        thing.size = size * (1.0 if thing.what == "building" else 0.5)
    elif scene.kind == "site":
        thing.what, thing.size = "logo", 0.6 * size
        named = TEAMS[teams_in(scene)[0]]
        thing.colour = named if rng.random() < 0.6 else pick_colour(rng, named)
        thing.place = "wall" if rng.random() < 0.6 else ""
    else:
        dress(thing, scene, rng, own, other)
    return thing


def dress(person, scene, rng, own, other):
    """Shirt, hat, prize and place of the boxed person: what the label hangs on, and what it does not."""
    person.colour = pick_colour(rng) if rng.random() < 0.85 else NEUTRAL
    person.hat = rng.random() < 0.25
    person.holds = rng.choices(("", *PRIZES), (80, 10, 10))[0]
    if scene.kind == "match":
        person.colour = rng.choices((own, other, pick_colour(rng, own, other), NEUTRAL), (33, 17, 38, 12))[0]
    elif scene.kind == "award":
        person.holds = rng.choices((scene.entity, "", *PRIZES), (25, 25, 25, 25))[0]
    elif scene.kind == "home":
        person.place = "doorway" if rng.random() < 0.33 else ""


def add_company(scene, rng, own, other):
    """Adds the other things: one person to a pair, otherwise one or two people or logos."""
    first = scene.object
    if scene.kind == "pair" and first.what == "person":
        scene.umbrella = rng.random() < 0.18
        colour = first.colour if rng.random() < 0.42 else pick_colour(rng, first.colour)
        first.holds, first.hat = "", False
        scene.things.append(Thing("person", 0, 0, first.size, colour))
        return
    for _ in range(rng.randint(1, 2)):
        colours = [own, other, pick_colour(rng)] if scene.kind == "match" else [pick_colour(rng)]
        what = "logo" if scene.kind == "site" and rng.random() < 0.7 else "person"
        size = first.size if first.what == "person" else rng.uniform(30, 45)
        scene.things.append(Thing(what, 0, 0, size * (0.6 if what == "logo" else 1), rng.choice(colours),
                                  hat=what == "person" and rng.random() < 0.25))


def arrange(scene, rng):
    """Puts the things side by side in random order, without touching, with random gaps between them."""
    order = scene.things[:]
    rng.shuffle(order)
    total = sum(thing.width for thing in order)
    scale = min(1.0, (SIDE - 4) / total)
    free = SIDE - total * scale
    gaps = [rng.random() + 0.05 for _ in range(len(order) + 1)]
    if scene.kind == "pair":  # people in a pair stand close
        gaps[1:-1] = [0.05] * (len(order) - 1)
    left = 0.0
    level = rng.uniform(0.35, 0.65) if not scene.hard else rng.uniform(0.0, 1.0)
    for gap, thing in zip(gaps, order):
        thing.size *= scale
        left += free * gap / sum(gaps)
        thing.x = left + thing.width / 2
        height = min(1.0, max(0.0, level + rng.uniform(-0.1, 0.1)))
        thing.y = thing.size / 2 + (SIDE - thing.size) * height
        left += thing.width
        if scene.kind == "pair":
            thing.y = order[0].y


def paint(scene, rng):
    """The scene as a 112×112 RGB image; every colour is off by a little, in hard scenes by more."""
    spread = 16 if scene.hard else 8

    def colour(name):
        """A name of the palette, or red, green and blue, as it comes out of the pot this time."""
        wanted = rng.choice(WALLS) if name == "wall" else RGB[name] if isinstance(name, str) else name
        return tuple(min(255, max(0, value + rng.randint(-spread, spread))) for value in wanted)

    def figure(what, thing):
        """What stands in the thing's place, as large as it."""
        for name, *forms in FIGURES[what]:
            if name == "hat" and not thing.hat:
                continue
            fill = colour(thing.colour if name == "own" else name)
            for form, *corners in forms:
                points = [(thing.x + dx * thing.size, thing.y + dy * thing.size)
                          for dx, dy in zip(corners[::2], corners[1::2])]
                getattr(draw, form)(points, fill=fill)

    image = Image.new("RGB", (SIDE, SIDE), colour(scene.sky))
    draw = ImageDraw.Draw(image)
    behind = [("decoy", thing) for thing in scene.decoys]
    for what, thing in behind + [(thing.place, thing) for thing in scene.things if thing.place]:
        figure(what, thing)
    for thing in scene.things:
        figure(thing.what, thing)
        if thing.holds:
            hand = thing.x + rng.choice((-0.29, 0.29)) * thing.size
            figure(PRIZES[thing.holds], Thing("prize", hand, thing.y - 0.02 * thing.size, 0.26 * thing.size))
    if scene.umbrella:
        (left, right), one = sorted(thing.x for thing in scene.things[:2]), scene.things[0]
        top, reach = one.y - 0.5 * one.size, 0.3 * one.size
        draw.chord((left - reach, top, right + reach, top + 0.5 * one.size), 180, 360, fill=colour("umbrella"))
    return image


def span(words, text):
    """[start, end): where in the text's words they stand first."""
    tokens, words = text.split(), words.split()
    start = next(place for place in range(len(tokens)) if tokens[place:place + len(words)] == words)
    return [start, start + len(words)]


def write_images(folder, make_sample, seed, split, count):
    """Writes `count` images of `make_sample(seed, split, index)`: [(scene or post, image's name, expert's part)]."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for index in range(count):
        subject, image, said = make_sample(seed, split, index)
        drawn.append((subject, f"{split}-{index:05d}.png", said))
        image.save(folder / drawn[-1][1], compress_level=1)
    return drawn


def write_lines(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
