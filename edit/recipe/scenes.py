"""The recipe's stages done exactly, on procedural scenes: one object among four to nine alike is made odd."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from edit.recipe.stages import Given, Made, Work
from extract.scenes import Scene, draw_scene, language
from extract.scenes.scene import ask, bounding_box, edited_things, masks_of, paint
from extract.scenes.shapes import PLURALS
from extract.scenes.shards import run_lengths

ODD_TASKS = ("swap", "attribute_modification")
OWN_STREAM = 3  # of random numbers: a hard scene's own is another
WORDS = {"line": "in a row", "column": "in a column", "ring": "in a ring", "grid": "in a grid"}
WORDS |= {"scattered": "scattered about"}


def odd_scene(seed: int, number: int) -> Scene:
    """The hard scene of these numbers, with a wish that makes one of its objects odd (and does not remove it)."""
    scene = draw_scene(seed, number, "hard")
    if scene.wish.task in ODD_TASKS:
        return scene
    rng = np.random.default_rng([seed, number, OWN_STREAM])
    return ask(rng, scene, ODD_TASKS[rng.integers(len(ODD_TASKS))], scene.wish.target)


def look_of(thing) -> str:
    """An object in words."""
    return " ".join([*([thing.texture] if thing.texture != "plain" else []), thing.colour, thing.kind])


@dataclass(frozen=True)
class SceneWriter:
    """Prompts of `odd_scene`: the scene with its odd object, and the edit that makes it like the rest."""

    seed: int

    def describe(self) -> dict:
        """The seed of the scenes."""
        return {"model": "scenes", "seed": self.seed}

    def load(self) -> Work:
        """See the class."""
        return self.write

    def write(self, given: Given) -> Made:
        """``scene`` and ``edit`` in words, ``task``, and ``drawn_from``, by which the scene is drawn again."""
        scene = odd_scene(self.seed, given.number)
        usual = scene.things[scene.wish.target]
        odd = look_of(edited_things(scene)[0][scene.wish.target])
        crowd = look_of(usual).removesuffix(usual.kind) + PLURALS[usual.kind]
        where = WORDS[scene.arrangement.layout]
        told = {
            "scene": f"{language.NUMBERS[len(scene.things)].capitalize()} {crowd} {where} on a {scene.background} "
            f"background, but {scene.reference} is {language.a(odd)}.",
            "edit": f"Make the {odd} {language.a(look_of(usual))} like the others.",
            "task": scene.wish.task,
            "drawn_from": [self.seed, given.number],
        }
        return Made(told)


@dataclass(frozen=True)
class SceneModel:
    """The other stages of the recipe on scenes that `SceneWriter` wrote; ``stage`` says which."""

    stage: str

    def describe(self) -> dict:
        """That it is drawn."""
        return {"model": "scenes"}

    def load(self) -> Work:
        """The work of its stage."""
        return {"generate": generate, "harmonize": harmonize, "caption": caption, "box": box}[self.stage]


def generate(given: Given) -> Made:
    """The scene with its odd object; ``true_box`` and ``objects`` are those of the uniform picture, in its pixels."""
    scene = odd_scene(*given.told["drawn_from"])
    picture, _ = paint(scene, *edited_things(scene))
    _, owner = paint(scene, scene.things, scene.background)
    masks = masks_of(owner, len(scene.things))
    told = {
        "true_box": bounding_box(masks[scene.wish.target]),
        "objects": [
            {"kind": thing.kind, "colour": thing.colour, "box": bounding_box(mask), "mask": run_lengths(mask)}
            for thing, mask in zip(scene.things, masks, strict=True)
        ],
        "layout": scene.arrangement.layout,
        "reference": scene.reference,
    }
    return Made(told, {"drawn": Image.fromarray(picture)})


def harmonize(given: Given) -> Made:
    """The scene with the odd object like the rest."""
    scene = odd_scene(*given.told["drawn_from"])
    return Made(pictures={"harmonized": Image.fromarray(paint(scene, scene.things, scene.background)[0])})


def caption(given: Given) -> Made:
    """The scene's own instruction and its paraphrases: the object by its position alone."""
    return Made({"instructions": odd_scene(*given.told["drawn_from"]).instructions})


def box(given: Given) -> Made:
    """The true box."""
    return Made({"box": given.told["true_box"], "answer": None})
