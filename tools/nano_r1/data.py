"""The training data: items of eight tasks in hundreds of wordings, drawn from a seeded generator.

Two things are kept from training: one item in 16 (task and operands, by hash), and one wording in 10 (frame
and phrase, or story, or remark, by hash). The held-out set is drawn from them, in known and unseen wordings.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nano_r1 import talk, wordings
from nano_r1.traces import add_trace, compare_trace, multiply_trace, reverse_trace, sort_trace, subtract_trace

TASKS = ("add", "subtract", "multiply", "compare", "reverse", "sort", "story", "talk")
TASK_WEIGHTS = (12, 14, 14, 17, 15, 18, 10, 10)
JAPANESE_SHARE = 0.2
ITEM_BUCKETS, WORDING_BUCKETS = 16, 10
WORDING_SALT = 175  # keeps the plainest wordings ("hello", "what is {a} + {b}") in training


@dataclass(frozen=True)
class Example:
    """One question with the thought and the answer expected of the model.

    `operands` and `wording` identify the item and the way it is asked; `result` is what stands in the box
    (the whole answer where there is no box); `size` is the count of digits or items to group scores by.
    """

    task: str
    language: str
    operands: str
    wording: str
    prompt: str
    thought: str
    answer: str
    result: str
    size: int


@dataclass(frozen=True)
class _Problem:
    task: str
    operands: tuple[str, ...]
    thought: str
    result: str
    size: int


_STORIES_OF_ONE_WORDING = {
    story
    for stories, parts in (
        (wordings.STORIES, wordings.STORY_PARTS),
        (wordings.JA_STORIES, wordings.JA_STORY_PARTS),
    )
    for alternatives in stories.values()
    for story in alternatives
    if not any("{" + part + "}" in story for part in parts)
}


def _bucket(key: str, num_buckets: int) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") % num_buckets


def is_held_out_item(example: Example) -> bool:
    """Whether the item is kept from training; small talk has no item but its wording."""
    if example.task == "talk":
        return is_held_out_wording(example)
    return _bucket(f"{example.task}|{example.operands}", ITEM_BUCKETS) == 0


def is_held_out_wording(example: Example) -> bool:
    """Whether the wording is kept from training. No story is that has but one: what it asks would be shown in
    no form at all."""
    if example.task == "story" and example.wording in _STORIES_OF_ONE_WORDING:
        return False
    return _bucket(f"{WORDING_SALT}|{example.task}|{example.wording}", WORDING_BUCKETS) == 0


def _boxed_answer(result: str, language: str) -> str:
    return f"答えは\\boxed{{{result}}}です。" if language == "ja" else f"The answer is \\boxed{{{result}}}."


def _number(rng: random.Random, num_digits: int) -> int:
    return rng.randrange(0 if num_digits == 1 else 10 ** (num_digits - 1), 10**num_digits)


def _operand_pair(rng: random.Random, max_digits: int) -> tuple[int, int]:
    """Two numbers, of equal length as often as not; the lengths lean to the long ones, which are harder."""
    longest = rng.choices(range(1, max_digits + 1), weights=range(2, max_digits + 2))[0]
    other = longest if rng.random() < 0.5 else rng.randint(1, longest)
    pair = [_number(rng, longest), _number(rng, other)]
    rng.shuffle(pair)
    return pair[0], pair[1]


def _add_problem(rng: random.Random, max_digits: int = 6) -> _Problem:
    a, b = _operand_pair(rng, max_digits)
    return _Problem("add", (str(a), str(b)), add_trace(a, b), str(a + b), max(len(str(a)), len(str(b))))


def _subtract_problem(rng: random.Random, max_digits: int = 6) -> _Problem:
    b, a = sorted(_operand_pair(rng, max_digits))
    if rng.random() < 0.15:  # near neighbours: long borrows and leading zeros
        b = max(0, a - _number(rng, rng.randint(1, 2)))
    return _Problem("subtract", (str(a), str(b)), subtract_trace(a, b), str(a - b), len(str(a)))


def _multiply_problem(rng: random.Random, max_digits: int = 5) -> _Problem:
    num_digits = rng.choices(range(1, max_digits + 1), weights=range(2, max_digits + 2))[0]
    a, b = _number(rng, num_digits), rng.randrange(0, 10) if rng.random() < 0.2 else rng.randrange(2, 10)
    return _Problem("multiply", (str(a), str(b)), multiply_trace(a, b), str(a * b), num_digits)


def _decimal(rng: random.Random) -> str:
    whole = str(_number(rng, rng.choice((1, 1, 1, 2, 2, 3, 4))))
    depth = rng.choice((0, 1, 1, 2, 2, 3))
    return whole + ("." + "".join(rng.choice("0123456789") for _ in range(depth)) if depth else "")


def _near_decimal(rng: random.Random, number: str) -> str:
    """A number that shares the first digits of `number`, so that the comparison has to go deep."""
    whole, _, fraction = number.partition(".")
    depth = rng.choice((1, 1, 2, 2, 3))
    kept = fraction[: rng.randint(0, len(fraction))][:depth]
    return whole + "." + kept + "".join(rng.choice("0123456789") for _ in range(depth - len(kept)))


def _compare_problem(rng: random.Random, wanted: str) -> _Problem:
    first = _decimal(rng)
    kind = rng.random()
    if kind < 0.45:
        second = _near_decimal(rng, first)
    elif kind < 0.5:
        second = first if rng.random() < 0.5 else first + ("0" if "." in first else ".0")
    else:
        second = _decimal(rng)
    if rng.random() < 0.5:
        first, second = second, first
    thought, result = compare_trace(first, second, wanted)
    return _Problem("compare", (first, second, wanted), thought, result, max(len(first), len(second)))


def _list_items(rng: random.Random, language: str) -> list[str]:
    num_items = rng.choice((2, 3, 3, 4, 4, 5, 5))
    kind = rng.random()
    if language == "ja" and kind < 0.4:
        return rng.sample(wordings.JA_WORDS, num_items)
    if kind < 0.35:
        return [str(_number(rng, rng.choice((1, 1, 2, 2, 3)))) for _ in range(num_items)]
    if kind < 0.5:
        upper = rng.random() < 0.3
        letters = rng.sample("abcdefghijklmnopqrstuvwxyz", num_items)
        return [letter.upper() if upper else letter for letter in letters]
    if kind < 0.65:
        return [
            "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 4))) for _ in range(num_items)
        ]
    return rng.sample(wordings.WORDS, num_items)


def _reverse_problem(rng: random.Random, language: str) -> _Problem:
    items = _list_items(rng, language)
    return _Problem("reverse", tuple(items), reverse_trace(items), ", ".join(reversed(items)), len(items))


def _sort_problem(rng: random.Random, direction: str) -> _Problem:
    num_items, limit = rng.choice((2, 3, 3, 4, 4, 5, 5)), rng.choice((10, 100, 100))
    numbers = rng.sample(range(limit), num_items)
    down = direction == "down"
    result = ", ".join(str(number) for number in sorted(numbers, reverse=down))
    return _Problem("sort", (direction, *map(str, numbers)), sort_trace(numbers, down), result, num_items)


def _write_list(rng: random.Random, items: Sequence[str], language: str) -> str:
    separator = rng.choice(
        (", ", ", ", ", ", ",", " ", "、") if language == "ja" else (", ", ", ", ", ", ",", " ", "; ")
    )
    text = separator.join(items)
    if rng.random() < 0.15:
        text = f"[{text}]"
    return text


def _restyle(rng: random.Random, text: str, shout: bool) -> str:
    """Capitals and spaces as people write them; `shout` allows all capitals, never where items are words."""
    style = rng.random()
    if style < 0.35:
        text = text[:1].upper() + text[1:]
    elif style < 0.42 and shout:
        text = text.upper()
    if rng.random() < 0.03:
        text = " " + text
    return text


def _dress(rng: random.Random, core: str, language: str, shout: bool) -> str:
    openings = wordings.JA_OPENINGS if language == "ja" else wordings.OPENINGS
    closings = wordings.JA_CLOSINGS if language == "ja" else wordings.CLOSINGS
    text = rng.choice(openings) + core + rng.choice(closings)
    return text if language == "ja" else _restyle(rng, text, shout)  # Japanese may begin with a list item


_PHRASES = {
    ("add", "en"): (wordings.ADD_NOUNS, wordings.ADD_VERBS),
    ("add", "ja"): (wordings.ADD_JA_NOUNS, wordings.ADD_JA_VERBS),
    ("subtract", "en"): (wordings.SUBTRACT_NOUNS, wordings.SUBTRACT_VERBS),
    ("subtract", "ja"): (wordings.SUBTRACT_JA_NOUNS, wordings.SUBTRACT_JA_VERBS),
    ("multiply", "en"): (wordings.MULTIPLY_NOUNS, wordings.MULTIPLY_VERBS),
    ("multiply", "ja"): (wordings.MULTIPLY_JA_NOUNS, wordings.MULTIPLY_JA_VERBS),
}
_FRAMES = {
    "en": (wordings.NOUN_FRAMES, wordings.VERB_FRAMES),
    "ja": (wordings.JA_NOUN_FRAMES, wordings.JA_VERB_FRAMES),
}


def _arithmetic_wording(rng: random.Random, task: str, language: str) -> str:
    kind = 0 if rng.random() < 0.7 else 1
    phrase = rng.choice(_PHRASES[task, language][kind])
    bare = kind == 0 and rng.random() < 0.2  # people often type just "12+34"
    frame = "{p}" if bare else rng.choice(_FRAMES[language][kind])
    return frame.replace("{p}", phrase).replace("{v}", phrase)


def _arithmetic_example(rng: random.Random, task: str, language: str) -> Example:
    makers = {"add": _add_problem, "subtract": _subtract_problem, "multiply": _multiply_problem}
    problem = makers[task](rng)
    wording = _arithmetic_wording(rng, task, language)
    a, b = problem.operands
    if task == "multiply" and rng.random() < 0.3:  # the single digit may come first
        a, b = b, a
    return _finish(rng, problem, language, wording, wording.replace("{a}", a).replace("{b}", b), shout=True)


def _compare_example(rng: random.Random, language: str) -> Example:
    wanted = rng.choice(("larger", "smaller"))
    problem = _compare_problem(rng, wanted)
    frames, wants = (
        (wordings.COMPARE_JA, wordings.COMPARE_JA_WANTS)
        if language == "ja"
        else (wordings.COMPARE, wordings.COMPARE_WANTS)
    )
    wording = rng.choice(frames).replace("{want}", rng.choice(wants[wanted]))
    first, second, _ = problem.operands
    core = wording.replace("{a}", first).replace("{b}", second)
    return _finish(rng, problem, language, wording, core, shout=True)


def _reverse_example(rng: random.Random, language: str) -> Example:
    problem = _reverse_problem(rng, language)
    wording = (
        rng.choice(wordings.REVERSE_JA)
        if language == "ja"
        else rng.choice(wordings.VERB_FRAMES).replace("{v}", rng.choice(wordings.REVERSE_VERBS))
    )
    core = wording.replace("{list}", _write_list(rng, problem.operands, language))
    return _finish(rng, problem, language, wording, core, shout=False)


def _sort_example(rng: random.Random, language: str) -> Example:
    direction = rng.choice(("up", "up", "down"))
    problem = _sort_problem(rng, direction)
    if language == "ja":
        frame, order = rng.choice(wordings.SORT_JA), rng.choice(wordings.SORT_JA_ORDERS[direction])
    else:
        frame = rng.choice(wordings.VERB_FRAMES).replace("{v}", rng.choice(wordings.SORT_VERBS))
        order = rng.choice(wordings.SORT_ORDERS[direction])
    wording = frame.replace("{order}", order)
    core = wording.replace("{list}", _write_list(rng, problem.operands[1:], language))
    return _finish(rng, problem, language, wording, core, shout=True)


def _story_example(rng: random.Random, language: str) -> Example:
    operation = rng.choice(("add", "subtract", "multiply"))
    if operation == "add":
        problem = _add_problem(rng, 3)
    elif operation == "subtract":
        problem = _subtract_problem(rng, 3)
    else:
        problem = _multiply_problem(rng, 3)
    japanese = language == "ja"
    story = rng.choice((wordings.JA_STORIES if japanese else wordings.STORIES)[operation])
    parts = wordings.JA_STORY_PARTS if japanese else wordings.STORY_PARTS
    for part, choices in parts.items():
        story = story.replace("{" + part + "}", rng.choice(choices))
    name, other = rng.sample(wordings.JA_NAMES if japanese else wordings.NAMES, 2)
    thing = rng.choice(wordings.JA_THINGS if japanese else wordings.THINGS)
    core = story.replace("{name}", name).replace("{other}", other).replace("{thing}", thing)
    a, b = problem.operands
    problem = _Problem("story", (operation, a, b), problem.thought, problem.result, problem.size)
    core = core.replace("{a}", a).replace("{b}", b) + rng.choice(
        ("", "？", "。") if japanese else ("", "?", "?", ".")
    )
    return _finish(rng, problem, language, story, _restyle(rng, core, shout=True), dressed=True)


def _finish(
    rng: random.Random,
    problem: _Problem,
    language: str,
    wording: str,
    core: str,
    *,
    shout: bool = False,
    dressed: bool = False,
) -> Example:
    return Example(
        task=problem.task,
        language=language,
        operands="|".join(problem.operands),
        wording=wording,
        prompt=core if dressed else _dress(rng, core, language, shout),
        thought=problem.thought,
        answer=_boxed_answer(problem.result, language),
        result=problem.result,
        size=problem.size,
    )


def _refused_remark(rng: random.Random, language: str) -> str:
    if rng.random() < 0.25:  # a product of two long numbers is beyond the trained columns
        a, b = _number(rng, rng.randint(2, 4)), _number(rng, rng.randint(2, 4))
        wording = _arithmetic_wording(rng, "multiply", language)
        return wording.replace("{a}", str(a)).replace("{b}", str(b))
    japanese = language == "ja"
    remark = rng.choice(talk.REFUSED_JA if japanese else talk.REFUSED)
    for topic, choices in (talk.REFUSED_JA_TOPICS if japanese else talk.REFUSED_TOPICS).items():
        remark = remark.replace("{" + topic + "}", rng.choice(choices))
    return remark.replace("{n}", str(rng.randint(2, 999))).replace("{m}", str(rng.randint(2, 99)))


def _talk_example(rng: random.Random, language: str) -> Example:
    kind = rng.choice(("greeting", "thanks", "who", "can", "how", "bye", *["refusal"] * 7))
    if kind == "refusal":
        remark = _refused_remark(rng, language)
        closings = ("", "。", "？") if language == "ja" else ("", "?", "?", ".")
        text = remark + rng.choice(closings)
    elif language == "ja":
        text = remark = rng.choice(talk.REMARKS[kind, "ja"]) + rng.choice(talk.JA_REMARK_CLOSINGS)
    else:
        remark = rng.choice(talk.REMARKS[kind, "en"]) + rng.choice(talk.REMARK_CLOSINGS)
        text = rng.choice(talk.REMARK_OPENINGS) + remark
    reply = talk.REPLIES[kind, language]
    prompt = _restyle(rng, text, shout=True)
    return Example("talk", language, kind, remark, prompt, reply.thought, reply.answer, reply.answer, 1)


def draw_example(rng: random.Random, task: str | None = None) -> Example:
    """Draw one example, held out or not, of `task` or of a task drawn by weight."""
    task = task or rng.choices(TASKS, weights=TASK_WEIGHTS)[0]
    language = "ja" if rng.random() < JAPANESE_SHARE else "en"
    if task in ("add", "subtract", "multiply"):
        return _arithmetic_example(rng, task, language)
    makers = {
        "compare": _compare_example,
        "reverse": _reverse_example,
        "sort": _sort_example,
        "story": _story_example,
        "talk": _talk_example,
    }
    return makers[task](rng, language)


def training_examples(rng: random.Random) -> Iterator[Example]:
    """Endless training examples: neither a held-out item nor a held-out wording."""
    while True:
        example = draw_example(rng)
        if not is_held_out_item(example) and not is_held_out_wording(example):
            yield example


def held_out_examples(task: str, unseen_wording: bool, count: int, seed: int) -> list[Example]:
    """`count` distinct held-out examples of one task, in wordings seen in training or not.

    Small talk in known wordings takes remarks that training uses; it is the one task whose items are its
    wordings, so a known remark can only be new in its capitals, opening or subject.
    """
    rng = random.Random(f"held-out|{task}|{unseen_wording}|{seed}")
    chosen: dict[tuple[str, str], Example] = {}
    prompts: set[str] = set()
    while len(chosen) < count:
        example = draw_example(rng, task)
        fresh_item = task == "talk" or is_held_out_item(example)
        key = (example.operands, example.wording)
        if fresh_item and is_held_out_wording(example) == unseen_wording and example.prompt not in prompts:
            prompts.add(example.prompt)
            chosen.setdefault(key, example)
    return list(chosen.values())
