"""Small scenes in which the image decides how the boxed object and the text's entity are related.

| kind  | the text names                  | the boxed object is related to the entity when …              |
|-------|---------------------------------|---------------------------------------------------------------|
| match | two teams, one is the entity    | a person in the entity's shirt: member_of, in a hat leader_of |
|       |                                 | a person in the other team's shirt: opposed_to                |
| award | a person, a prize (the entity)  | a person who holds that very prize: awarded                   |
| site  | a team, a city (the entity)     | that team's logo, mounted on a wall: locate_at                |
| home  | a person, a city (the entity)   | a person in a doorway: place_of_residence                     |
| pair  | two people, one is the entity   | a person under one umbrella with the other: couple            |
|       |                                 | a person in the same shirt as the other: peer                 |

Everything else is `none`, which is most of it. The label follows from image, box, text and entity; text and entity
alone never decide it. About a third of the scenes are hard: small, off-centre, cluttered, with longer captions."""

from dataclasses import dataclass, field

from PIL import Image, ImageDraw

SIDE = 112  # pixels of an image's side

LABELS = ("none", "/per/org/opposed_to", "/per/org/leader_of", "/per/org/member_of", "/per/misc/awarded",
          "/org/loc/locate_at", "/per/per/peer", "/per/per/couple", "/per/loc/place_of_residence")

# colour: (red, green, blue, its team)
COLOURS = {"red": (214, 40, 40, "Falcons"), "blue": (45, 70, 205, "Sharks"), "green": (35, 140, 60, "Vipers"),
    "yellow": (240, 215, 50, "Hornets"), "purple": (125, 45, 160, "Ravens"),
    "white": (250, 250, 250, "Wolves"), "pink": (245, 140, 185, "Foxes"), "cyan": (70, 200, 215, "Whales")}
TEAMS = {values[3]: colour for colour, values in COLOURS.items()}
NEUTRAL = "grey"  # nobody's colour
RGB = {colour: values[:3] for colour, values in COLOURS.items()} | {
    NEUTRAL: (128, 128, 128), "gold": (255, 205, 0), "door": (60, 38, 30), "skin": (238, 190, 150),
    "trousers": (35, 35, 50), "ball": (20, 20, 20), "hat": (235, 0, 200), "umbrella": (120, 200, 0)}
WALLS = ((176, 92, 74), (150, 132, 112), (168, 150, 96))
SKIES = ((176, 214, 240), (200, 226, 200), (226, 220, 204), (206, 200, 226))
PEOPLE = ("Mia", "Leo", "Ada", "Tom", "Eva", "Max", "Zoe", "Ben")
PRIZES = ("gold cup", "match ball")
CITIES = ("Paris", "Oslo", "Rome", "Lima", "Cairo", "Delhi")

# kind: how often, in percent
KINDS = {"match": 58, "pair": 14, "award": 10, "site": 10, "home": 8}
HARD = 0.35  # share of hard scenes
SHORT_CAPTIONS = {"match": ("{a} beat {b}", "{a} meet {b}", "{a} and {b} draw"),
    "award": ("{p} wins the {m}", "{m} goes to {p}"), "site": ("{a} open in {c}", "{a} move to {c}"),
    "home": ("{p} comes home to {c}", "{p} on holiday in {c}"), "pair": ("{p} and {q} at the gala", "{p} with {q}")}
LONG_CAPTIONS = {"match": ("late goal lifts {a} past {b} in the final", "fans sing as {a} play {b} in the rain"),
    "award": ("what a night for {p} and the {m}", "fans sing as the {m} is given to {p}"),
    "site": ("what a day as {a} show a new hall in {c}", "fans sing as {a} come to {c} in the rain"),
    "home": ("what a day as {p} is back in {c}", "late night for {p} in the rain of {c}"),
    "pair": ("what a night for {p} and {q} at the final", "{p} is seen with {q} in the rain")}


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
    sky: tuple = SKIES[0]
    decoys: list = field(default_factory=list)  # clutter: (x, y, radius, colour)

    @property
    def object(self):
        return self.things[0]


def teams_in(scene):
    """The teams that the caption names, in its order."""
    return [word for word in scene.text.split() if word in TEAMS]


def team_of(thing):
    """Whose colour the thing has; "nobody" for grey."""
    return COLOURS[thing.colour][3] if thing.colour in COLOURS else "nobody"


def relation(scene):
    """The scene's label, by the rules of the table above."""
    thing, others, team = scene.object, scene.things[1:], team_of(scene.object)
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


def pick_colour(rng, without=()):
    return rng.choice([name for name in COLOURS if name not in without])


def make_scene(rng):
    """A random scene; `rng` is a `random.Random`, and the scene a function of its state."""
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    hard = rng.random() < HARD
    scene = Scene(kind, [], "", "", hard=hard, sky=rng.choice(SKIES))
    names = {"p": rng.choice(PEOPLE), "c": rng.choice(CITIES), "m": rng.choice(PRIZES)}
    names["q"] = rng.choice([name for name in PEOPLE if name != names["p"]])
    first = pick_colour(rng)
    second = pick_colour(rng, without=(first,))
    names["a"], names["b"] = COLOURS[first][3], COLOURS[second][3]
    scene.text = rng.choice((LONG_CAPTIONS if hard else SHORT_CAPTIONS)[kind]).format(**names)
    scene.entity = {"match": names[rng.choice("ab")], "award": names["m"], "site": names["c"], "home": names["c"],
                    "pair": names[rng.choice("pq")]}[kind]
    own, other = (first, second) if scene.entity == names["a"] else (second, first)
    scene.things = [make_object(scene, rng, own, other)]
    add_company(scene, rng, own, other)
    arrange(scene, rng)
    if hard:
        scene.decoys = [(rng.uniform(4, SIDE - 4), rng.uniform(4, SIDE - 4), rng.uniform(3, 6), pick_colour(rng))
                        for _ in range(rng.randint(2, 5))]
    return scene


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
        thing.colour = named if rng.random() < 0.6 else pick_colour(rng, without=(named,))
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
        third = pick_colour(rng, without=(own, other))
        person.colour = rng.choices((own, other, third, NEUTRAL), (33, 17, 38, 12))[0]
    elif scene.kind == "award":
        person.holds = rng.choices((scene.entity, "", *PRIZES), (25, 25, 25, 25))[0]
    elif scene.kind == "home":
        person.place = "doorway" if rng.random() < 0.33 else ""


def add_company(scene, rng, own, other):
    """Adds the other things: one person to a pair, otherwise one or two people or logos."""
    first = scene.object
    if scene.kind == "pair" and first.what == "person":
        scene.umbrella = rng.random() < 0.18
        colour = first.colour if rng.random() < 0.42 else pick_colour(rng, without=(first.colour,))
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
        height = min(1.0, max(0.0, level + rng.uniform(-0.1, 0.1)))
        thing.y = thing.size / 2 + (SIDE - thing.size) * height
        left += thing.width
    if scene.kind == "pair":
        for thing in order:
            thing.y = order[0].y


def paint(scene, rng):
    """The scene as a 112×112 RGB image; every colour is off by a little, in hard scenes by more."""
    spread = 16 if scene.hard else 8

    def colour(name):
        """A name of the palette, or red, green and blue, as it comes out of the pot this time."""
        wanted = RGB[name] if name in RGB else name
        return tuple(min(255, max(0, value + rng.randint(-spread, spread))) for value in wanted)

    image = Image.new("RGB", (SIDE, SIDE), colour(scene.sky))
    draw = ImageDraw.Draw(image)
    for x, y, radius, name in scene.decoys:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour(name))
    for thing in scene.things:
        if thing.place:
            paint_wall(draw, thing, colour, rng)
    for thing in scene.things:
        PAINTERS[thing.what](draw, thing, colour, rng)
    if scene.umbrella:
        paint_umbrella(draw, *scene.things[:2], colour)
    return image


def paint_wall(draw, thing, colour, rng):
    """The building behind a logo or around a doorway."""
    x, y, w, h, half = thing.x, thing.y, 0.8 * thing.width, 0.7 * thing.size, thing.width / 2
    draw.rectangle((x - w, y - h, x + w, y + h), fill=colour(rng.choice(WALLS)))
    if thing.place == "doorway":
        draw.rectangle((x - half, y - thing.size / 2, x + half, y + h), fill=colour("door"))


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


def paint_prize(draw, prize, x, y, size, colour):
    half = size / 2
    if prize == "match ball":
        draw.ellipse((x - half, y - half, x + half, y + half), fill=colour("ball"))
        return
    gold = colour("gold")
    corners = [(x - half, y - half), (x + half, y - half), (x + half / 3, y + half / 2), (x - half / 3, y + half / 2)]
    draw.polygon(corners, fill=gold)
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
    x, y, w, h = thing.x, thing.y, thing.width / 2, thing.size / 2
    draw.rectangle((x - w, y - 0.5 * h, x + w, y + h), fill=colour(rng.choice(WALLS)))
    draw.polygon([(x - w, y - 0.5 * h), (x, y - h), (x + w, y - 0.5 * h)], fill=colour("door"))
    for side in (-0.5, 0.5):
        draw.rectangle((x + (side - 0.15) * w, y, x + (side + 0.15) * w, y + 0.3 * h), fill=colour(SKIES[0]))


def paint_ball(draw, thing, colour, rng):
    paint_prize(draw, "match ball", thing.x, thing.y, thing.size, colour)


def paint_cup(draw, thing, colour, rng):
    paint_prize(draw, "gold cup", thing.x, thing.y, thing.size, colour)


PAINTERS = {"person": paint_person, "logo": paint_logo, "building": paint_building, "ball": paint_ball,
            "cup": paint_cup}


def write_images(folder, split, count, make_sample):
    """Writes `count` images into `folder`; returns (scene or post, image's name, the expert's part) of each.

    `make_sample(index)` is (scene or post, image, the expert's part).
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for index in range(count):
        subject, image, said = make_sample(index)
        drawn.append((subject, f"{split}-{index:05d}.png", said))
        image.save(folder / drawn[-1][1], compress_level=1)
    return drawn
