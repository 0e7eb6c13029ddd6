"""The people of a clip: numbers and identities over crossings, gaps, cuts and thousands of frames."""

import pickle

import numpy as np
import pytest

from fields.people import FLASH, People, Shots, colors_of, likeness, look_of, thumbnail, unlike

NOISE = 0.06  # per component: a reading is about a third away from its person's mean


class Actor:
    """A person of a synthetic clip: a look, and a place for each frame."""

    def __init__(self, seed, place, side=60.0):
        self.draw = np.random.default_rng(seed)
        self.look = self.draw.normal(0, 0.5, 32)
        self.place, self.side = place, side

    def seen(self, frame):
        x, y = self.place(frame)
        box = np.array([x, y, self.side * (1 + 0.02 * np.sin(frame / 5))])
        return box, (self.look + self.draw.normal(0, NOISE, 32)).astype(np.float32)


def play(frames, cast, present, shots=None, people=None):
    """Numbers that each actor got: {actor: [number of each frame]}; faces come in an order that says nothing."""
    people, order = people or People(), np.random.default_rng(0)
    numbers = {name: [] for name in cast}
    for frame in frames:
        here = [name for name in cast if present(name, frame)]
        here = [here[k] for k in order.permutation(len(here))]
        seen = [cast[name].seen(frame) for name in here]
        found = people.add(
            np.array([s[0] for s in seen]).reshape(-1, 3), [s[1] for s in seen], frame, shots[frame] if shots else 0
        )
        assert len(set(found)) == len(found), "two faces of a frame are two people"
        for name, number in zip(here, found):
            numbers[name].append(number)
    return {name: sorted(set(n)) for name, n in numbers.items()}, people


def still(x, y=100.0):
    return lambda frame: (x + 2 * np.sin(frame / 3), y)


def test_three_thousand_frames_and_three_gaps():
    """Gaps of 15, 40 and 200 frames, and the 1000th and 2000th frame, change nobody's number."""
    cast = {"a": Actor(1, still(100)), "b": Actor(2, still(300))}
    gaps = {"a": [(400, 415), (990, 1030), (1500, 1700)], "b": [(410, 425), (1980, 2020), (2500, 2700)]}

    def present(name, frame):
        return not any(low <= frame < high for low, high in gaps[name])

    numbers, _ = play(range(3000), cast, present)
    assert sorted(numbers.values()) == [[0], [1]]


@pytest.mark.parametrize("missing", [(), (30,), (28, 29, 30, 31, 32)])
def test_two_people_cross(missing):
    """They pass through each other; where they meet, the one behind may be lost for some frames."""
    cast = {"a": Actor(1, lambda f: (50 + 5.0 * f, 100)), "b": Actor(2, lambda f: (350 - 5.0 * f, 102))}
    numbers, _ = play(range(60), cast, lambda name, frame: name == "a" or frame not in missing)
    assert numbers["a"] != numbers["b"] and all(len(n) == 1 for n in numbers.values())


def test_three_people_and_a_size_that_changes_order():
    cast = {k: Actor(k, still(100 + 120 * k), side=50 + 10 * k) for k in range(3)}
    numbers, _ = play(range(100), cast, lambda name, frame: True)
    assert sorted(numbers.values()) == [[0], [1], [2]]


def test_a_cut_and_back():
    """Two people at the same place in two shots are two; in the third shot the first is again the first."""
    cast = {"a": Actor(1, still(150)), "b": Actor(2, still(152))}
    shots = [0] * 30 + [1] * 30 + [2] * 30
    numbers, _ = play(range(90), cast, lambda name, frame: (name == "b") == (shots[frame] == 1), shots)
    assert numbers == {"a": [0], "b": [1]}


@pytest.mark.parametrize("gap", [2, 10, 40])
def test_another_person_at_the_same_place(gap):
    cast = {"a": Actor(1, still(150)), "b": Actor(2, still(150))}
    numbers, _ = play(range(100), cast, lambda name, frame: frame < 40 if name == "a" else frame >= 40 + gap)
    assert numbers == {"a": [0], "b": [1]}


def test_memory_does_not_grow():
    """What is remembered after 10,000 frames is as large as after 1,000."""
    cast = {"a": Actor(1, still(100)), "b": Actor(2, still(300))}
    sizes, people, shots, blank = (
        [],
        People(),
        Shots(),
        np.random.default_rng(0).integers(0, 255, (24, 32), dtype=np.uint8),
    )
    for first, last in ((0, 1000), (1000, 10_000)):
        shots.add([blank] * 10)
        play(range(first, last), cast, lambda name, frame: True, people=people)
        sizes.append(len(pickle.dumps((people, shots))))
    assert sizes[1] <= sizes[0] + 16, sizes


def scene(seed, width=400):
    import cv2

    patches = np.random.default_rng(seed).integers(0, 255, (9, 25, 3), dtype=np.uint8)
    return cv2.resize(patches, (width, 144), interpolation=cv2.INTER_CUBIC)


def view(image, x=0):
    return image[:, x : x + 192]


def noisy(image, seed):
    return (image + np.random.default_rng(seed).normal(0, 6, image.shape)).clip(0, 255).astype(np.uint8)


SEQUENCES = {
    "one shot": ([view(scene(1))] * 20, []),
    "a pan": ([view(scene(1), 8 * k) for k in range(25)], []),
    "a flash": ([view(scene(1))] * 9 + [np.full((144, 192, 3), 250, np.uint8)] * 2 + [view(scene(1))] * 9, []),
    "a hand before the lens": ([view(scene(1))] * 9 + [view(scene(5))] * 3 + [view(scene(1))] * 9, []),
    "a fade and back": ([(view(scene(1)) * abs(1 - k / 10)).astype(np.uint8) for k in range(21)], []),
    "a cut": ([view(scene(1))] * 10 + [view(scene(2))] * 10, [10]),
    "two cuts and back": ([view(scene(1))] * 10 + [view(scene(2))] * 10 + [view(scene(1))] * 10, [10, 20]),
    "a fade to another": (
        [(view(scene(1)) * (1 - k / 10)).astype(np.uint8) for k in range(11)]
        + [(view(scene(2)) * (k / 10)).astype(np.uint8) for k in range(11)],
        [12],
    ),
}


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("piece", [100, 7])
def test_shots(name, piece):
    """Cuts are found, pans, flashes and fades are none, also where the frames come in pieces."""
    pictures, cuts = SEQUENCES[name]
    thumbs = [thumbnail(noisy(p, k)) for k, p in enumerate(pictures)]
    shots, found = Shots(), []
    for k in range(0, len(thumbs), piece):
        found += shots.add(thumbs[k : k + piece], thumbs[k + piece : k + piece + FLASH])
    changes = [k for k in range(1, len(found)) if found[k] != found[k - 1]]
    assert len(changes) == len(cuts) and all(abs(a - b) <= 2 for a, b in zip(changes, cuts)), changes


def test_looks():
    image = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    bright, dim = (look_of(colors_of(i), np.zeros(300)) for i in (image, (image * 0.6).astype(np.uint8)))
    assert unlike(bright, dim) < 0.1
    assert unlike(bright, look_of(colors_of(image), np.eye(300)[0] * 3)) > 1
    assert likeness(np.zeros((24, 32), np.uint8), np.zeros((24, 32), np.uint8)) == 0
