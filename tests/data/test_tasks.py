"""Generated tasks: deterministic, disjoint parts, targets that are functions of their sources."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from s2s.data import tasks
from s2s.data.tasks import HELD_OUT_SIZE, PARTS, TASKS

each_task = pytest.mark.parametrize("task", TASKS)


def head(task: str, part: str, count: int, seed: int = 1, size: int = 20000) -> list[tuple[str, str]]:
    return list(itertools.islice(TASKS[task](part, size, seed), count))


@each_task
def test_the_same_arguments_give_the_same_pairs(task):
    assert head(task, "train", 300) == head(task, "train", 300)


@each_task
def test_another_seed_gives_other_pairs(task):
    assert head(task, "test", 50, seed=1) != head(task, "test", 50, seed=2)


@each_task
def test_a_smaller_training_part_is_the_beginning_of_a_larger_one(task):
    assert list(TASKS[task]("train", 100, 1)) == head(task, "train", 100, size=5000)


@each_task
@pytest.mark.parametrize("size", [1, 700])
def test_held_out_parts_have_their_own_size(task, size):
    assert len(list(TASKS[task]("train", size, 1))) == size == tasks.part_size("train", size)
    for part in ("dev", "test"):
        assert len(list(TASKS[task](part, size, 1))) == HELD_OUT_SIZE == tasks.part_size(part, size)


@each_task
def test_no_source_is_in_two_parts_or_twice_in_one_even_over_seeds(task):
    sources = {part: [head(task, part, 1000, seed) for seed in (1, 2)] for part in PARTS}
    for samples in sources.values():
        for sample in samples:
            assert len({source for source, _ in sample}) == len(sample)
    sets = [{source for sample in sources[part] for source, _ in sample} for part in PARTS]
    for left, right in itertools.combinations(sets, 2):
        assert not left & right


@each_task
def test_pairs_are_single_clean_lines(task):
    for source, target in head(task, "train", 2000):
        for text in (source, target):
            assert text == " ".join(text.split()) and text


def test_a_dates_target_is_a_function_of_its_source():
    targets: dict[str, str] = {}
    for seed, part in itertools.product((1, 2, 3), PARTS):
        for source, target in head("dates", part, 4000, seed):
            assert targets.setdefault(source, target) == target, source
    # The samples meet: otherwise the loop above compares nothing.
    assert len(targets) < 3 * 4000 + 6 * HELD_OUT_SIZE


def test_dates_are_no_copying():
    pairs = head("dates", "train", 3000)
    copied = sum(target in source for source, target in pairs)
    assert copied == 0
    assert len(tasks._PATTERNS) >= 12


def test_dates_are_short():
    for source, target in head("dates", "train", 5000):
        assert len(source.split()) <= 18 and len(target.split()) <= 14, source


def test_every_dates_pattern_has_far_more_sources_than_a_training_part_takes():
    for index, pattern in enumerate(tasks._PATTERNS):
        dice = tasks._Dice(f"space/{index}")
        repeats = Counter(pattern(dice)[0] for _ in range(2000))
        # Two draws in 2,000 meet n^2 / 2N times: 10 % is 10,000 equally likely sources.
        assert 2000 - len(repeats) < 200, pattern.__name__


@pytest.mark.parametrize(
    ("hour", "minute", "said"),
    [
        (7, 30, "halb acht morgens"),
        (14, 45, "Viertel vor drei nachmittags"),
        (0, 30, "halb eins nachts"),
        (12, 0, "zwölf Uhr mittags"),
        (13, 0, "ein Uhr mittags"),
        (12, 45, "Viertel vor eins mittags"),
        (23, 50, "zehn vor zwölf abends"),
        (11, 10, "zehn nach elf vormittags"),
        (3, 15, "Viertel nach drei nachts"),
        (20, 10, "zehn nach acht abends"),
    ],
)
def test_times_are_said_as_people_say_them(hour, minute, said):
    class Fixed(tasks._Dice):
        def __init__(self):
            self.values = [hour, tasks.ROUND_MINUTES.index(minute)]

        def between(self, low, high):
            return self.values.pop(0)

    assert tasks._clock(Fixed()) == (said, hour, minute)


@pytest.mark.parametrize(
    ("hour", "text"), [(0, "12:05 am"), (11, "11:05 am"), (12, "12:05 pm"), (23, "11:05 pm")]
)
def test_twelve_hours_a_half_day(hour, text):
    assert tasks._twelve_hours(hour, 5) == text


def test_all_times_of_a_day_are_said_differently():
    class Fixed(tasks._Dice):
        def __init__(self, hour, place):
            self.values = [hour, place]

        def between(self, low, high):
            return self.values.pop(0)

    places = range(len(tasks.ROUND_MINUTES))
    said = {tasks._clock(Fixed(hour, place))[0] for hour in range(24) for place in places}
    assert len(said) == 24 * len(places)


def test_reverse_reverses_and_copy_copies():
    for (source, target), (same, copied) in zip(
        head("reverse", "train", 200), head("copy", "train", 200), strict=True
    ):
        assert target.split() == source.split()[::-1]
        assert copied == same == source


def test_known_pairs_stay_as_they_are():
    """Prepared corpora and published results depend on them: a change here needs a changelog line."""
    assert head("dates", "test", 2, seed=6) == [
        ("der siebzehnte März neunzehnhundertsiebenunddreißig", "1937-03-17"),
        (
            "Hat Emil am Samstag sechsundsechzig Äpfel verloren?",
            "Did Emil lose sixty-six apples on Saturday?",
        ),
    ]


def test_refusals():
    with pytest.raises(ValueError, match="'valid' is none of train, dev, test"):
        TASKS["dates"]("valid", 10, 1)
    with pytest.raises(ValueError, match="at least 1"):
        TASKS["copy"]("train", 0, 1)


def test_an_exhausted_task_says_so():
    few = tasks._distinct(lambda dice: (dice.pick("abcdefgh"), "x"), "train", 100, 1)
    with pytest.raises(ValueError, match="smaller task_size"):
        list(few)
