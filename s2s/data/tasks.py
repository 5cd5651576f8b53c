"""Generated tasks: parallel corpora made from a seed, with no download.

Decides what the pairs of a task are and which part (train, dev or test) each belongs
to. Must not know how pairs are stored, tokenised or batched.

Every target is a function of its source, and the part of a pair is a function of
its source too (a hash, independent of the seed): no test source is ever trained on,
whatever the seeds and sizes. ``make(part, n, seed)`` begins as ``make(part, m, seed)`` does.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from babel import Locale
from babel.dates import format_date
from num2words import num2words

PARTS = ("train", "dev", "test")
# Pairs in the dev part and in the test part of every task, however large the training part.
HELD_OUT_SIZE = 1000

Pair = tuple[str, str]
_T = TypeVar("_T")

# So many draws in a row without a new pair mean that there are next to none left.
_FRUITLESS = 10_000


def part_size(part: str, size: int) -> int:
    """The number of pairs in a part, when ``size`` training pairs are asked for.

    Raises:
      ValueError: the part is unknown, or the size is below 1.
    """
    if part not in PARTS:
        raise ValueError(f"part {part!r} is none of {', '.join(PARTS)}")
    if size < 1:
        raise ValueError(f"a generated task of {size} training pairs: ask for at least 1")
    return size if part == "train" else HELD_OUT_SIZE


def dates(part: str, size: int, seed: int) -> Iterator[Pair]:
    """German dates, times, numbers, prices and sentences around them, into English.

    Units and tens swap places ("dreiundzwanzig": twenty-three), hours are counted
    towards ("halb acht": 7:30), verbs stand at the end or in two pieces ("fährt ... ab"),
    times come before objects: the words have to be reordered, and some computed.

    Args:
      part: "train", "dev" or "test".
      size: pairs in the training part; dev and test have `HELD_OUT_SIZE` each.
      seed: which sample of the task's many millions of pairs.

    Yields:
      (source, target), no source twice.

    >>> source, target = next(dates("test", 20000, 2))
    >>> source
    'Emil hat am Dienstag um zehn vor eins nachts einundsechzig Äpfel verloren.'
    >>> target
    'Emil lost sixty-one apples at 12:50 am on Tuesday.'
    """
    return _distinct(lambda dice: dice.pick(_PATTERNS)(dice), part, size, seed)


def copy(part: str, size: int, seed: int) -> Iterator[Pair]:
    """Letters to themselves; arguments as for `dates`."""
    return _distinct(lambda dice: (line := _letters(dice), line), part, size, seed)


def reverse(part: str, size: int, seed: int) -> Iterator[Pair]:
    """Letters to the same letters, last first; arguments as for `dates`."""
    return _distinct(lambda dice: (line := _letters(dice), line[::-1]), part, size, seed)


TASKS: dict[str, Callable[[str, int, int], Iterator[Pair]]] = {
    "dates": dates,
    "copy": copy,
    "reverse": reverse,
}


class _Dice:
    """Random choices that stay the same over Python versions (only `random()` promises to)."""

    def __init__(self, name: str):
        self._random = random.Random(name).random

    def between(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return low + int(self._random() * (high - low + 1))

    def pick(self, choices: Sequence[_T]) -> _T:
        return choices[self.between(0, len(choices) - 1)]


def _part_of(source: str) -> str:
    digest = hashlib.blake2b(source.encode(), digest_size=8).digest()
    tenth = int.from_bytes(digest, "big") % 10
    return {0: "dev", 1: "test"}.get(tenth, "train")


def _distinct(draw: Callable[[_Dice], Pair], part: str, size: int, seed: int) -> Iterator[Pair]:
    # Arguments are checked at the call, not at the first pair.
    return _draws(draw, part, part_size(part, size), _Dice(f"{seed}/{part}"))


def _draws(draw: Callable[[_Dice], Pair], part: str, count: int, dice: _Dice) -> Iterator[Pair]:
    seen: set[str] = set()
    fruitless = 0
    while len(seen) < count:
        source, target = draw(dice)
        if source in seen or _part_of(source) != part:
            fruitless += 1
            if fruitless == _FRUITLESS:
                raise ValueError(
                    f"the task's {part} part has hardly more than {len(seen)} pairs, not {count}: "
                    "ask for a smaller task_size"
                )
            continue
        fruitless = 0
        seen.add(source)
        yield source, target


_ALPHABET = "abcdefghijklmnop"


def _letters(dice: _Dice) -> str:
    return " ".join(dice.pick(_ALPHABET) for _ in range(dice.between(4, 12)))


# ---- words of the dates task: (German, English) throughout ----

_NAMES = (
    "Anna", "Otto", "Clara", "Emil", "Frieda", "Hugo", "Ida", "Jakob", "Marie", "Paul", "Rosa", "Simon",
)  # fmt: skip
_PLURALS = (
    ("Bücher", "books"), ("Karten", "tickets"), ("Briefe", "letters"), ("Äpfel", "apples"),
    ("Bilder", "pictures"), ("Lampen", "lamps"), ("Stühle", "chairs"), ("Uhren", "watches"),
)  # fmt: skip
_ARTICLES = (
    ("Das Buch", "The book"), ("Der Hut", "The hat"), ("Die Lampe", "The lamp"), ("Der Stuhl", "The chair"),
    ("Die Uhr", "The watch"), ("Das Fahrrad", "The bicycle"), ("Der Mantel", "The coat"),
    ("Die Karte", "The ticket"),
)  # fmt: skip
_VEHICLES = (
    ("der Zug", "the train"), ("der Bus", "the bus"), ("das Schiff", "the ship"), ("die Fähre", "the ferry"),
    ("der Wagen", "the car"), ("die Straßenbahn", "the tram"),
)  # fmt: skip
_PLACES = (
    ("Das Museum", "the museum"), ("Der Laden", "the shop"), ("Die Bibliothek", "the library"),
    ("Der Garten", "the garden"), ("Das Rathaus", "the town hall"), ("Die Werkstatt", "the workshop"),
)  # fmt: skip
# Stem and prefix of a separable verb, and the English verb.
_TRIPS = (
    ("fährt", "ab", "leaves"), ("fährt", "weiter", "continues"), ("fährt", "vorbei", "passes"),
    ("kommt", "an", "arrives"), ("kommt", "zurück", "returns"),
)  # fmt: skip
# Participle, English past, English infinitive.
_DEEDS = (
    ("gekauft", "bought", "buy"), ("verkauft", "sold", "sell"), ("gezählt", "counted", "count"),
    ("gefunden", "found", "find"), ("verloren", "lost", "lose"), ("bestellt", "ordered", "order"),
)  # fmt: skip
# Minutes of times as they are said; each has a way of its own to count towards an hour or from it.
ROUND_MINUTES = (0, 10, 15, 30, 45, 50)
# The hour in which each part of the day is over.
_PARTS_OF_DAY = (
    (4, "nachts"), (10, "morgens"), (12, "vormittags"), (14, "mittags"), (18, "nachmittags"), (24, "abends"),
)  # fmt: skip
_FIRST_DAY = datetime.date(1900, 1, 1).toordinal()
_LAST_DAY = datetime.date(2049, 12, 31).toordinal()
# Looked up once: the name of a locale would be parsed for every date.
_GERMAN, _ENGLISH = Locale("de"), Locale("en")
# A Monday, to name weekdays by.
_MONDAY = datetime.date(2024, 1, 1)


@functools.cache
def _german(number: int, form: str = "cardinal") -> str:
    return num2words(number, lang="de", to=form)


@functools.cache
def _english(number: int) -> str:
    return num2words(number, lang="en").replace(",", "")


def _day(dice: _Dice) -> datetime.date:
    return datetime.date.fromordinal(dice.between(_FIRST_DAY, _LAST_DAY))


def _de(day: datetime.date, pattern: str) -> str:
    return format_date(day, pattern, locale=_GERMAN)


def _en(day: datetime.date, pattern: str) -> str:
    return format_date(day, pattern, locale=_ENGLISH)


def _weekday(dice: _Dice) -> Pair:
    day = _MONDAY + datetime.timedelta(days=dice.between(0, 6))
    return _de(day, "EEEE"), _en(day, "EEEE")


def _day_in_words(day: datetime.date, ending: str) -> str:
    """ "dritteENDING März neunzehnhundertfünfundachtzig"."""
    return f"{_german(day.day, 'ordinal')}{ending} {_de(day, 'MMMM')} {_german(day.year, 'year')}"


def _clock(dice: _Dice) -> tuple[str, int, int]:
    """A round time as people say it, with its hour (24 a day) and minute."""
    hour, minute = dice.between(0, 23), dice.pick(ROUND_MINUTES)
    this, following = (_german((hour + later - 1) % 12 + 1) for later in (0, 1))
    said = {
        0: f"{'ein' if this == 'eins' else this} Uhr",
        10: f"zehn nach {this}",
        15: f"Viertel nach {this}",
        30: f"halb {following}",
        45: f"Viertel vor {following}",
        50: f"zehn vor {following}",
    }[minute]
    part_of_day = next(name for end, name in _PARTS_OF_DAY if hour < end)
    return f"{said} {part_of_day}", hour, minute


def _twelve_hours(hour: int, minute: int) -> str:
    return f"{(hour - 1) % 12 + 1}:{minute:02d} {'am' if hour < 12 else 'pm'}"


def _said_time(dice: _Dice) -> Pair:
    said, hour, minute = _clock(dice)
    return said, _twelve_hours(hour, minute)


def _timetable_time(dice: _Dice) -> Pair:
    hour, minute = dice.between(0, 23), dice.between(0, 59)
    said = f"{'ein' if hour == 1 else _german(hour)} Uhr"
    return f"{said} {_german(minute)}" if minute else said, f"{hour:02d}:{minute:02d}"


def _some(dice: _Dice) -> Pair:
    """Two to 999 of something, more often few."""
    number = dice.between(2, dice.pick((99, 999)))
    return _german(number), _english(number)


def _price(dice: _Dice) -> tuple[int, int]:
    return dice.between(2, dice.pick((99, 999))), dice.between(2, 99)


def _capital(words: str) -> str:
    return words[0].upper() + words[1:]


# ---- patterns: a source with its target ----


def _day_to_iso(dice: _Dice) -> Pair:
    day = _day(dice)
    return f"der {_day_in_words(day, '')}", day.isoformat()


def _day_to_english(dice: _Dice) -> Pair:
    day = _day(dice)
    return _de(day, "EEEE, 'den' d. MMMM y"), _en(day, "EEEE, MMMM d, y")


def _moment_to_iso(dice: _Dice) -> Pair:
    day = _day(dice)
    said, english = _said_time(dice)
    return f"am {_de(day, 'dd.MM.y')} um {said}", f"{day.isoformat()}, {english}"


def _moment_to_english(dice: _Dice) -> Pair:
    day = _day(dice)
    hour, minute = dice.between(0, 23), dice.between(0, 59)
    said = _de(day, "EEEE, 'der' d. MMMM")
    return f"{said}, {hour}.{minute:02d} Uhr", f"{_twelve_hours(hour, minute)} on {_en(day, 'EEEE, MMMM d')}"


def _span_in_month(dice: _Dice) -> Pair:
    day = _day(dice)
    first, last = sorted((dice.between(1, 14), dice.between(15, 28)))
    source = f"vom {first}. bis zum {_german(last, 'ordinal')}n {_de(day, 'MMMM y')}"
    return source, f"{_en(day, 'MMMM')} {first} to {last}, {day.year}"


def _number(dice: _Dice) -> Pair:
    number = dice.between(1, 10 ** dice.between(3, 6) - 1)
    return _german(number), _english(number)


def _price_in_figures(dice: _Dice) -> Pair:
    euros, cents = _price(dice)
    return f"{_german(euros)} Euro {_german(cents)}", f"€{euros}.{cents:02d}"


def _price_in_words(dice: _Dice) -> Pair:
    euros, cents = _price(dice)
    return f"{euros},{cents:02d} €", f"{_english(euros)} euros and {_english(cents)} cents"


def _article_costs(dice: _Dice) -> Pair:
    (article, english), (euros, cents) = dice.pick(_ARTICLES), _price(dice)
    source = f"{article} kostet {_german(euros)} Euro {_german(cents)}."
    return source, f"{english} costs €{euros}.{cents:02d}."


def _trip(dice: _Dice) -> Pair:
    (vehicle, english), (verb, prefix, english_verb) = dice.pick(_VEHICLES), dice.pick(_TRIPS)
    day, (time, english_time) = _day(dice), _timetable_time(dice)
    source = f"{_capital(vehicle)} {verb} am {_de(day, 'd. MMMM')} um {time} {prefix}."
    return source, f"{_capital(english)} {english_verb} at {english_time} on {_en(day, 'MMMM d')}."


def _whether_trip(dice: _Dice) -> Pair:
    name, (vehicle, english), (verb, prefix, english_verb) = (
        dice.pick(_NAMES), dice.pick(_VEHICLES), dice.pick(_TRIPS),
    )  # fmt: skip
    (weekday, english_day), (time, english_time) = _weekday(dice), _timetable_time(dice)
    source = f"{name} fragt, ob {vehicle} am {weekday} um {time} {prefix}{verb}."
    return source, f"{name} asks whether {english} {english_verb} at {english_time} on {english_day}."


def _deed(dice: _Dice) -> Pair:
    name, (things, english), (deed, past, _) = dice.pick(_NAMES), dice.pick(_PLURALS), dice.pick(_DEEDS)
    (weekday, english_day), (time, english_time) = _weekday(dice), _said_time(dice)
    number = dice.between(2, 99)
    source = f"{name} hat am {weekday} um {time} {_german(number)} {things} {deed}."
    return source, f"{name} {past} {_english(number)} {english} at {english_time} on {english_day}."


def _deed_question(dice: _Dice) -> Pair:
    name, (things, english), (deed, _, infinitive) = (
        dice.pick(_NAMES), dice.pick(_PLURALS), dice.pick(_DEEDS),
    )  # fmt: skip
    (weekday, english_day), (number, english_number) = _weekday(dice), _some(dice)
    source = f"Hat {name} am {weekday} {number} {things} {deed}?"
    return source, f"Did {name} {infinitive} {english_number} {english} on {english_day}?"


def _open_hours(dice: _Dice) -> Pair:
    (place, english), day = dice.pick(_PLACES), _day(dice)
    opens, closes = dice.between(7, 12), dice.between(13, 22)
    said = _de(day, "'am' EEEE, 'dem' d. MMMM")
    source = f"{place} ist {said}, von {_german(opens)} bis {_german(closes)} Uhr geöffnet."
    return source, f"On {_en(day, 'EEEE, MMMM d')}, {english} is open from {opens}:00 to {closes}:00."


def _born(dice: _Dice) -> Pair:
    name, day = dice.pick(_NAMES), _day(dice)
    source = f"{name} wurde am {_day_in_words(day, 'n')} geboren."
    return source, f"{name} was born on {_en(day, 'MMMM d, y')}."


_PATTERNS: tuple[Callable[[_Dice], Pair], ...] = (
    _day_to_iso, _day_to_english, _moment_to_iso, _moment_to_english, _span_in_month,
    _number, _number, _price_in_figures, _price_in_words, _article_costs, _trip, _whether_trip,
    _deed, _deed_question, _open_hours, _born,
)  # fmt: skip
