"""Write the embedded example: a small dataset, a scripted expert's responses, and a tiny untrained model.

    python -m data.toy --task more --output DIR --seed 0

writes DIR/MORE or DIR/JMERE in the dataset's own layout, DIR/expert.jsonl, and DIR/model, a random Qwen2.5-VL of a
million parameters with its tokenizer. With --task text it writes DIR/TEXT, puzzles in JSONL for a pretrained model."""

import argparse
from pathlib import Path

from data import jmere, more
from data.toy import posts, world
from data.toy.model import write_tiny_model
from data.toy.puzzles import write_puzzles

WORLDS = {"more": (more, world.write_world, "MORE"), "jmere": (jmere, posts.write_world, "JMERE")}


def at_least_1(word: str) -> int:
    if (number := int(word)) < 1:
        raise argparse.ArgumentTypeError(f"{number}; at least 1 expected")
    return number


def main(words=None) -> None:
    parser = argparse.ArgumentParser("python -m data.toy", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    parser.add_argument("--output", type=Path, required=True, help="folder to write into; made where it is missing")
    parser.add_argument("--task", choices=[*sorted(WORLDS), "text"], default="more",
                        help="whose layout and answers (default: more)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the scenes and of the model (default: 0)")
    for split, count in (("train", 4800), ("valid", 200), ("test", 800)):
        parser.add_argument(f"--{split}", type=at_least_1, default=count, help=f"{split} samples (default: {count})")
    s = parser.parse_args(words)
    sizes, counts = {"train": s.train, "valid": s.valid, "test": s.test}, f"{s.train} + {s.valid} + {s.test}"
    try:
        if s.task == "text":
            write_puzzles(s.output / "TEXT", s.seed, **sizes)
            return print(f"{s.output}: TEXT/ ({counts} questions)")
        task, write_world, name = WORLDS[s.task]
        expert = write_world(s.output, s.seed, **sizes)
    except (OSError, ValueError) as error:  # a file in the folder's place, a full disk; more puzzles than there are
        parser.error(str(error))
    texts = [task.build_prompt(sample, reasoning=reasoning)[1]
             for sample in task.load(s.output / name, "train")[:600] for reasoning in (True, False)]
    texts += [line["response"] for line in expert if " " not in line["id"]][:1200]
    parameters = write_tiny_model(s.output / "model", texts, s.seed)
    print(f"{s.output}: {name}/ ({counts} samples), expert.jsonl, model/ ({parameters:,} parameters)")


if __name__ == "__main__":
    main()
