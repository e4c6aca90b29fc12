"""How people point at one object among many, and what they ask to be done with it."""

from dataclasses import dataclass

import numpy as np

from extract.scenes.layout import Arrangement
from extract.scenes.shapes import PLURALS

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")
EXTREMES = {"left": "leftmost", "right": "rightmost", "top": "topmost", "bottom": "bottommost"}
FARTHEST_COUNT = 4  # people count from the nearer end, and not far
BACKGROUNDS = {"white": (244, 244, 240), "grey": (168, 170, 172), "sand": (226, 206, 164), "sky": (170, 208, 236)}
BACKGROUNDS |= {"mint": (176, 224, 196), "rose": (238, 198, 200), "slate": (78, 88, 102), "lilac": (204, 190, 226)}
STYLES = ("a pencil sketch", "a sepia photograph", "a negative", "pixel art")


@dataclass(frozen=True)
class Wish:
    """What should change: the task, the object it is about, and what that object becomes."""

    task: str
    target: int | None
    kind: str | None = None
    colour: str | None = None
    texture: str | None = None
    background: str | None = None
    style: str | None = None
    side: str | None = None


def by_position(arrangement: Arrangement, index: int, noun: str) -> list[str]:
    """Every phrase that singles out object ``index`` by where it stands ("the second ball from the left")."""
    ranks = {way: int(rank[index]) for way, rank in arrangement.ranks.items()}
    count = len(arrangement.centres)
    if arrangement.layout == "grid":
        return _in_grid(ranks, arrangement.shape, noun)
    phrases = []
    for way, extreme in EXTREMES.items():
        rank = ranks.get(way, -1)
        if rank == 0:
            phrases += [f"the {extreme} {noun}", f"the {noun} closest to the {way} edge"]
        if 0 <= rank < FARTHEST_COUNT:
            phrases += [f"the {ORDINALS[rank]} {noun} from the {way}"]
        if rank == 1:
            phrases += [f"the {noun} next to the {extreme} one"] if arrangement.layout in ("line", "column") else []
    if arrangement.layout in ("line", "column") and count % 2 and count // 2 in ranks.values():
        phrases += [f"the middle {noun}", f"the {noun} in the middle"]
    if (rank := ranks.get("clockwise", -1)) > 0:
        back = count - rank
        phrases += [f"the {ORDINALS[rank - 1]} {noun} clockwise from the top one"] if rank <= FARTHEST_COUNT else []
        phrases += [f"the {ORDINALS[back - 1]} {noun} counterclockwise from the top one"] if back <= 3 else []
    return phrases


def _in_grid(ranks: dict[str, int], shape: tuple[int, int], noun: str) -> list[str]:
    rows, columns = shape
    row, column = ranks["top"], ranks["left"]
    row_names = (
        [f"{ORDINALS[row]} row"] + (["top row"] if row == 0 else []) + (["bottom row"] if row == rows - 1 else [])
    )
    column_names = [f"the {ORDINALS[column]} {noun} from the left"]
    if column >= columns // 2:
        column_names += [f"the {ORDINALS[columns - 1 - column]} {noun} from the right"]
    if column == 0:
        column_names += [f"the leftmost {noun}"]
    if column == columns - 1:
        column_names += [f"the rightmost {noun}"]
    phrases = [f"{c} in the {r}" for c in column_names for r in row_names]
    phrases += [f"the {noun} in row {NUMBERS[row + 1]}, column {NUMBERS[column + 1]}"]
    vertical = "top" if row == 0 else "bottom" if row == rows - 1 else None
    horizontal = "left" if column == 0 else "right" if column == columns - 1 else None
    if vertical and horizontal:
        phrases += [f"the {noun} in the {vertical} {horizontal} corner", f"the {vertical} {horizontal} {noun}"]
    return phrases


def region(x: float, y: float) -> str:
    """The ninth of the picture that a point (normalised x, y) lies in: "upper left", "centre" …"""
    vertical = ("upper", "", "lower")[min(int(3 * y), 2)]
    horizontal = ("left", "", "right")[min(int(3 * x), 2)]
    if vertical and horizontal:
        return f"{vertical} {horizontal}"
    return {"upper": "top", "lower": "bottom", "": horizontal or "centre"}[vertical]


def a(thing: str) -> str:
    """``thing`` with its indefinite article."""
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"


def _thing(wish: Wish) -> str:
    return " ".join(word for word in (wish.texture, wish.colour, wish.kind) if word)


PARAPHRASES: dict[str, tuple[str, ...]] = {
    "removal": (
        "Remove {reference}.",
        "Take away {reference}.",
        "Delete {reference} from the picture.",
        "Erase {reference} and leave the rest as it is.",
    ),
    "swap": (
        "Replace {reference} with {a_thing}.",
        "Swap {reference} for {a_thing}.",
        "Turn {reference} into {a_thing}.",
        "Put {a_thing} in place of {reference}.",
    ),
    "attribute_modification": (
        "Make {reference} {thing}.",
        "Change {reference} so that it is {thing}.",
        "I want {reference} to be {thing}.",
        "{Reference} should be {thing}.",
    ),
    "addition": (
        "Add {a_thing} at the {side} of the picture.",
        "Put {a_thing} into the free space at the {side}.",
        "Draw {a_thing} at the {side}.",
    ),
    "env": (
        "Change the background to {background}.",
        "Make the background {background}.",
        "Put everything on a {background} background.",
    ),
    "style": (
        "Turn the picture into {style}.",
        "Redraw everything as {style}.",
        "Make it look like {style}.",
    ),
}


def instructions(rng: np.random.Generator, wish: Wish, reference: str) -> list[str]:
    """Three or more paraphrases of one wish, in random order, without repetition."""
    thing = _thing(wish)
    words = {
        "reference": reference,
        "Reference": reference[:1].upper() + reference[1:],
        "thing": thing,
        "a_thing": a(thing) if thing else "",
        "side": wish.side,
        "background": wish.background,
        "style": wish.style,
    }
    texts = [pattern.format(**words) for pattern in PARAPHRASES[wish.task]]
    return [texts[i] for i in rng.permutation(len(texts))]


def description(kinds: list[str], colours: list[str], layout: str, background: str, wish: Wish, where: str) -> str:
    """What is in the picture and what should change, in two sentences: the answer to the editing prompt."""
    one_kind, one_colour = len(set(kinds)) == 1, len(set(colours)) == 1
    noun = PLURALS[kinds[0]] if one_kind else "things"
    crowd = " ".join([NUMBERS[len(kinds)], *([colours[0]] if one_colour else []), noun])
    scene = f"The picture shows {crowd} ({layout}) on a {background} background."
    thing = _thing(wish)
    if wish.task == "env":
        return f"{scene} The background becomes {wish.background}."
    if wish.task == "style":
        return f"{scene} All of it becomes {wish.style}."
    if wish.task == "addition":
        return f"{scene} A new {thing} appears at the {where}."
    subject = f"The {colours[wish.target]} {kinds[wish.target]} at the {where}"
    if wish.task == "removal":
        return f"{scene} {subject} is removed."
    return f"{scene} {subject} becomes {a(thing) if wish.task == 'swap' else thing}."
