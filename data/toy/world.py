"""The MORE-like world on disk: `write_world(DIR)` writes drawn scenes in MORE's own layout as `DIR/MORE`, and as
`DIR/expert.jsonl` a scripted expert's six-step response to every training sample."""

import json
import random
from pathlib import Path

from data.toy.scene import LABELS, PEOPLE, TEAMS, make_scene, paint, relation, span, team_of, write_images, write_lines

GIVES_UP = 0.8  # how often the expert calls a hard scene's object unclear
FLAWED = 0.1  # how often its answer is broken besides
FLAWS = ("label", "missing", "order", "slash", "after")
TYPES = {"person": "per", "logo": "org", "building": "loc", "ball": "misc", "cup": "misc"}
ENTITY_TYPES = {"match": "org", "award": "misc", "site": "loc", "home": "loc", "pair": "per"}


def expert_response(scene, rng):
    """The scripted expert's six steps: it mostly gives up on hard scenes, and one answer in ten is broken.

    Giving up says `none`, which is often right, and then the filter keeps it: who imitates what is left gives up on
    hard scenes too, though it could see. Imitation cannot mend that; trying both and being told which is right can."""
    unclear = scene.hard and rng.random() < GIVES_UP
    label = "none" if unclear else relation(scene)
    flaw = rng.choice(FLAWS) if rng.random() < FLAWED else ""
    if flaw == "label":
        label = rng.choice([name for name in LABELS if name != label])
    numbered = [f"Step {number}: {text}." for number, text in enumerate(steps(scene, label, unclear), start=1)]
    if flaw == "missing":
        del numbered[rng.randrange(6)]
    if flaw == "order":
        place = rng.randrange(5)
        numbered[place], numbered[place + 1] = numbered[place + 1], numbered[place]
    answer = label.lstrip("/") if flaw == "slash" else label
    after = " That is my answer." * (flaw == "after")
    return f"<think> {' '.join(numbered)} </think> <answer>{answer}</answer>{after}"


def steps(scene, label, unclear):
    """The six steps' texts, leading to `label`; an unclear object is misc and stays unrelated."""
    types = ("misc" if unclear else TYPES[scene.object.what], ENTITY_TYPES[scene.kind])
    candidates = [name for name in LABELS[1:] if name.startswith("/{}/{}/".format(*types))] + ["none"]
    seen, found = ("something unclear", "it is absent") if unclear else (describe(scene), match(scene))
    beside = sorted(scene.things[1:], key=lambda thing: thing.x)  # from left to right
    names = ", ".join(f"{name} {part}" for name, part in roles(scene).items())
    return [f"by {' '.join(thing.colour for thing in beside)}, {seen}", f"text has {names}", found,
            " and ".join(types), ", ".join(candidates), f"so {label}"]


def describe(scene):
    """Step 1, what the object is and what of it matters for this kind of scene."""
    thing = scene.object
    if thing.what == "logo":
        return f"a {thing.colour} logo {'on a wall' if thing.place else 'in the air'}"
    if thing.what != "person":
        return f"a {thing.what}"
    detail = {"match": "a hat" if thing.hat else "no hat", "award": f"a {thing.holds}" if thing.holds else "no prize",
        "site": "no logo", "home": "a door" if thing.place else "no door",
        "pair": "an umbrella" if scene.umbrella else "no umbrella"}[scene.kind]
    return f"a person in {thing.colour}, {detail}"


def roles(scene):
    """{name in the text: its part}, the entity first."""
    part = "rival" if scene.kind == "match" else "other"
    names = [word for word in scene.text.split() if word in TEAMS or word in PEOPLE]
    return {scene.entity: "entity"} | {name: part for name in names if name != scene.entity}


def match(scene):
    """Step 3, which thing of the text the object is. It repeats a name of step 2 where it belongs to one."""
    thing, parts, team, absent = scene.object, roles(scene), team_of(scene.object), "it is absent"
    if thing.what not in ("person", "logo"):
        return absent
    other = scene.things[1].colour
    return {"pair": f"{other} and {thing.colour}, {'same' if other == thing.colour else 'different'}",
        "award": f"it has {thing.holds} {parts.get(thing.holds, 'absent')}" if thing.holds else absent,
        "home": "it is somebody"}.get(scene.kind, f"{thing.colour} is {team} {parts.get(team, 'absent')}")


def make_sample(seed, split, index):
    """(scene, image, expert's response) of one sample; a function of its three arguments alone."""
    rng = random.Random(f"{seed}/{split}/{index}")
    scene = make_scene(rng)
    image = paint(scene, rng)
    return scene, image, expert_response(scene, rng)


def line_of(scene, name):
    """One line of MORE's annotation files: `h` is the entity, `t` the object."""
    return {"token": scene.text.split(), "h": {"name": scene.entity, "pos": span(scene.entity, scene.text)},
            "t": {"name": "[OBJ0]", "pos": list(scene.object.box)}, "img_id": name, "relation": relation(scene)}


def write_world(folder, seed=0, train=2400, valid=200, test=800):
    """Writes `folder`/MORE and `folder`/expert.jsonl; returns the expert's lines, {"id", "response"} each."""
    folder = Path(folder)
    more, drawn = folder / "MORE", {}
    (more / "txt").mkdir(parents=True, exist_ok=True)
    (more / "rel2id.json").write_text(json.dumps(dict(zip(LABELS, range(len(LABELS))))), encoding="utf-8")
    for split, count in (("train", train), ("valid", valid), ("test", test)):
        drawn[split] = write_images(more / "img_org" / split, make_sample, seed, split, count)
        write_lines(more / "txt" / f"{split}.txt", [line_of(scene, name) for scene, name, _ in drawn[split]])
    expert = [{"id": f"train/{index}", "response": response} for index, (*_, response) in enumerate(drawn["train"])]
    write_lines(folder / "expert.jsonl", map(json.dumps, expert))
    return expert
