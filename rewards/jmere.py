"""JMERE-R1's reward and metrics: which quintuples an answer holds, and how near they come to the gold ones.

Equations 2 to 5 of the JMERE-R1 paper. An answer is `<answer>` with one `[head, head type, tail, tail type,
relation]` a line. Whitespace around the parts is free, anything else is not: an unknown type or relation, an
empty mention, a bracket too many or text between the lines makes the whole answer unreadable."""
from rewards.assignment import heaviest_pairing
from rewards.edit_distance import edit_distance
from rewards.tags import tag_fault

WEIGHTS = {"quintuple": 1.0, "partial": 0.2, "format": 0.1}  # equation 5: 1, α, β

Quintuple = tuple[str, str, str, str, str]  # head, head type, tail, tail type, relation


def reward(completion: str, sample, *, keep_format: bool = False) -> dict[str, float]:
    """The unweighted parts r_q (0 to 1), r_p (0 to 2) and r_f (0 or 1, equation 4) of one completion.

    Wrong tags or one malformed quintuple make every part 0; keep_format leaves r_f = 1 where only the
    quintuples are at fault (the paper's sentence can be read both ways)."""
    tagged = tag_fault(completion) is None
    predicted = parse(completion, sample) if tagged else None
    if predicted is None:
        return {"quintuple": 0.0, "partial": 0.0, "format": float(tagged and keep_format)}
    gold = list(dict.fromkeys(sample.quintuples))
    return {"quintuple": quintuple_reward(predicted, gold),
            "partial": partial_reward(predicted, gold, _between_answer_tags(completion).strip()), "format": 1.0}


def quintuple_reward(predicted: list[Quintuple], gold: list[Quintuple]) -> float:
    """Equation 2: r_q = 2c / (m + n), the F1 of this one answer."""
    return 2 * len(set(predicted) & set(gold)) / (len(gold) + len(predicted))


def partial_reward(predicted: list[Quintuple], gold: list[Quintuple], text: str) -> float:
    """Equation 3: r_p = w / (5n) + 1 - ED(Ŷ, Y) / max(|Ŷ|, |Y|), with text = Ŷ as the model wrote it.

    The paper does not say which gold quintuple a predicted one is compared with: w is the most that a
    one-to-one pairing can give. Y is the answer without the reasoning. Nothing predicted: first term 0."""
    w = heaviest_pairing([[_equal_parts(g, p) for p in predicted] for g in gold])
    gold_text = answer_text(gold)
    likeness = 1 - edit_distance(text, gold_text) / max(len(text), len(gold_text))
    return (w / (5 * len(predicted)) if predicted else 0.0) + likeness


def _equal_parts(a: Quintuple, b: Quintuple) -> int:
    # Written out: a generator over zip is three times slower, and 21 × 10,000 pairs are asked for at worst.
    return (a[0] == b[0]) + (a[1] == b[1]) + (a[2] == b[2]) + (a[3] == b[3]) + (a[4] == b[4])


def fault(completion: str, sample) -> str | None:
    return tag_fault(completion) or ("a malformed quintuple" if parse(completion, sample) is None else None)


def parse(completion: str, sample) -> list[Quintuple] | None:
    """The distinct quintuples of the one `<answer>`, in order; None where it or one of them is malformed.

    The reasoning before it is not looked at, so that answers of label-only and zero-shot models are read too."""
    if (answer := _between_answer_tags(completion)) is None:
        return None
    relations = {spoken(relation): relation for relation in sample.relations}
    quintuples = {}
    for line in filter(None, map(str.strip, answer.split("\n"))):
        if (quintuple := parse_line(line, sample.types, relations)) is None:
            return None
        quintuples[quintuple] = None
    return list(quintuples)


def _between_answer_tags(completion: str) -> str | None:
    if completion.count("<answer>") != 1 or completion.count("</answer>") != 1:
        return None
    answer, closing, _ = completion.partition("<answer>")[2].partition("</answer>")
    return answer if closing else None


def parse_line(line: str, types, relations: dict[str, str]) -> Quintuple | None:
    """One `[head, head type, tail, tail type, relation]`, or None; relations: spoken → the dataset's name.

    Mentions may hold commas (`Nelson Mandela,1996`): the line is cut before its last two parts and at the one
    part in front of them that is a type. Where two could be the head's type, either may be meant: None."""
    if not (line.startswith("[") and line.endswith("]")):
        return None
    parts = line[1:-1].split(",")
    cuts = [i for i in range(1, len(parts) - 3) if parts[i].strip() in types]
    if len(cuts) != 1:
        return None
    head, tail = ",".join(parts[:cuts[0]]).strip(), ",".join(parts[cuts[0] + 1:-2]).strip()
    tail_type, relation = parts[-2].strip(), relations.get(spoken(parts[-1].strip()))
    balanced = all(mention.count("[") == mention.count("]") for mention in (head, tail))
    if not (head and tail and balanced and tail_type in types and relation):
        return None
    return head, parts[cuts[0]].strip(), tail, tail_type, relation


def answer_text(quintuples) -> str:
    """The quintuples as an answer spells them, one a line."""
    return "\n".join(f"[{', '.join(parts)}, {spoken(relation)}]" for *parts, relation in quintuples)


def spoken(relation: str) -> str:
    """A relation's name in prompts and answers: `member_of` is written `member of`."""
    return relation.replace("_", " ")


def correct(completion: str, sample) -> bool:
    """Whether exactly the gold quintuples are answered, in any order."""
    return vote_key(completion, sample) == frozenset(sample.quintuples)


def vote_key(completion: str, sample) -> frozenset[Quintuple] | None:
    """What two completions must share to be the same vote: the set of quintuples; None for an unreadable one."""
    predicted = parse(completion, sample)
    return None if predicted is None else frozenset(predicted)


def metrics(completions: list[str], samples: list) -> dict[str, float]:
    """Shares between 0 and 1 over a whole split; an unreadable answer predicts nothing.

    precision, recall, f1: micro, all five parts in their places; *_order_free: head and tail may be swapped,
    as the dataset's reference implementation counts; mner_*: entities with types; accuracy: the gold set and
    nothing else; unparsable: unreadable answers."""
    answers = [parse(completion, sample) for completion, sample in zip(completions, samples, strict=True)]
    pairs = [(answer or [], sample.quintuples) for answer, sample in zip(answers, samples)]
    total = max(len(pairs), 1)
    return {**_micro(pairs, set),  # F1 first: it decides which checkpoint is the best
        "accuracy": sum(set(predicted) == set(gold) for predicted, gold in pairs) / total,
        **_micro(pairs, _order_free, after="_order_free"), **_micro(pairs, _entities, before="mner_"),
        "unparsable": sum(answer is None for answer in answers) / total}


def _order_free(quintuples) -> set:
    return {(frozenset([(head, head_type), (tail, tail_type)]), relation)
            for head, head_type, tail, tail_type, relation in quintuples}


def _entities(quintuples) -> set[tuple[str, str]]:
    return {entity for head, head_type, tail, tail_type, _ in quintuples
            for entity in ((head, head_type), (tail, tail_type))}


def _micro(pairs: list, things, before: str = "", after: str = "") -> dict[str, float]:
    """Precision, recall and F1 over all posts; things: a post's quintuples → the set that is counted."""
    counted = [(things(predicted), things(gold)) for predicted, gold in pairs]
    right = sum(len(predicted & gold) for predicted, gold in counted)
    predicted, gold = sum(len(p) for p, _ in counted), sum(len(g) for _, g in counted)
    shares = (2 * right / max(predicted + gold, 1), right / max(predicted, 1), right / max(gold, 1))
    return {f"{before}{name}{after}": share for name, share in zip(("f1", "precision", "recall"), shares)}
