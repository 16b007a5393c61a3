"""The thoughts the model learns to write: every step reads only what stands close by or under a unique key.

A number is first copied with a letter before each digit that names its column (a = units, b = tens, …), so
that "the tens digit of the second number" is a look-up of a key, no count from the right. Each column
then takes one line, which carries the result so far. List items get circled numbers as keys in the same way.
"""

from collections.abc import Sequence

COLUMNS = "abcdefgh"
DECIMALS = "pqrs"
CIRCLED = "①②③④⑤⑥"


def tag_columns(number: str) -> str:
    """Write the column's letter before each digit: "482" becomes "c4b8a2"; decimals get p, q, r, s."""
    whole, _, fraction = number.partition(".")
    tagged = "".join(COLUMNS[len(whole) - 1 - i] + digit for i, digit in enumerate(whole))
    if fraction:
        tagged += "." + "".join(DECIMALS[i] + digit for i, digit in enumerate(fraction))
    return tagged


def _column_digit(number: int, column: int) -> int:
    return int(str(number).rjust(column + 1, "0")[-1 - column])


def add_trace(first: int, second: int) -> str:
    """Column addition from the units, until both numbers and the carry are used up."""
    lines = [f"{tag_columns(str(first))}+{tag_columns(str(second))}"]
    width = max(len(str(first)), len(str(second)))
    carry, result, column = 0, "", 0
    while column < width or carry:
        x, y = _column_digit(first, column), _column_digit(second, column)
        total = x + y + carry
        result = f"{total % 10}{result}"
        lines.append(f"{COLUMNS[column]}: {x}+{y}+{carry}={total} → {result} carry {total // 10}")
        carry, column = total // 10, column + 1
    return "\n".join(lines)


def subtract_trace(first: int, second: int) -> str:
    """Column subtraction from the units; `first` must not be smaller than `second`."""
    if first < second:
        raise ValueError(f"{first} - {second} is negative")
    lines = [f"{tag_columns(str(first))}-{tag_columns(str(second))}"]
    borrow, result = 0, ""
    for column in range(len(str(first))):
        x, y = _column_digit(first, column), _column_digit(second, column)
        difference = x - y - borrow
        result = f"{difference % 10}{result}"
        lines.append(
            f"{COLUMNS[column]}: {x}-{y}-{borrow}={difference} → {result} borrow {int(difference < 0)}"
        )
        borrow = int(difference < 0)
    return "\n".join(lines)


def multiply_trace(number: int, digit: int) -> str:
    """Column multiplication of `number` by a single `digit`, until the carry is used up."""
    lines = [f"{tag_columns(str(number))}*{digit}"]
    width = len(str(number))
    carry, result, column = 0, "", 0
    while column < width or carry:
        x = _column_digit(number, column)
        total = x * digit + carry
        result = f"{total % 10}{result}"
        lines.append(
            f"{COLUMNS[column]}: {x}*{digit}={x * digit}+{carry}={total} → {result} carry {total // 10}"
        )
        carry, column = total // 10, column + 1
    return "\n".join(lines)


def _comparison_columns(first: str, second: str) -> list[tuple[str, str, str]]:
    """The columns (letter, digit of first, digit of second) of two decimals from the highest down."""
    (whole_1, _, part_1), (whole_2, _, part_2) = first.partition("."), second.partition(".")
    width = max(len(whole_1), len(whole_2))
    depth = max(len(part_1), len(part_2))
    letters = COLUMNS[:width][::-1] + DECIMALS[:depth]
    digits_1 = whole_1.rjust(width, "0") + part_1.ljust(depth, "0")
    digits_2 = whole_2.rjust(width, "0") + part_2.ljust(depth, "0")
    return list(zip(letters, digits_1, digits_2, strict=True))


def compare_trace(first: str, second: str, wanted: str) -> tuple[str, str]:
    """What is wanted, the numbers by column, then the columns from the highest to the first difference.

    `wanted` is "larger" or "smaller". Returns the thought and the answer: one of the two numbers as it was
    written, or "equal".
    """
    lines = [wanted, f"{tag_columns(first)} ? {tag_columns(second)}"]
    sign = "="
    for letter, x, y in _comparison_columns(first, second):
        sign = _relation(x, y)
        lines.append(f"{letter}: {x} {y} {sign}")
        if sign != "=":
            break
    if sign == "=":
        return "\n".join([*lines, "equal"]), "equal"
    takes_first = (sign == ">") == (wanted == "larger")
    lines.append("first" if takes_first else "second")
    return "\n".join(lines), first if takes_first else second


def _relation(x: str, y: str) -> str:
    return "=" if x == y else ">" if x > y else "<"


def reverse_trace(items: Sequence[str]) -> str:
    """The items under circled numbers, then the same pairs from the last to the first."""
    pairs = [CIRCLED[i] + item for i, item in enumerate(items)]
    return "".join(pairs) + "\n" + "".join(reversed(pairs))


def sort_trace(numbers: Sequence[int], descending: bool) -> str:
    """Selection sort of distinct numbers below 100, two digits each, after the direction ("up" or "down").

    A line holds what is left, a scan of it, and the sorted part. The scan names each next number, its
    relation to the best so far, and the best of both: "12 07 30 → 12,07>07,30<07 | 07", then
    "12 30 → 12,30<12 | 07 12", and so on.
    """
    if len(set(numbers)) != len(numbers) or not all(0 <= number < 100 for number in numbers):
        raise ValueError(f"need distinct numbers from 0 to 99, not {list(numbers)}")
    left = [f"{number:02d}" for number in numbers]
    done: list[str] = []
    lines = ["down" if descending else "up"]
    while left:
        best = left[0]
        scan = best
        for number in left[1:]:
            sign = _relation(best, number)
            best = number if (sign == ">") != descending else best
            scan += f",{number}{sign}{best}"
        done.append(best)
        lines.append(f"{' '.join(left)} → {scan} | {' '.join(done)}")
        left.remove(best)
    return "\n".join(lines)
