"""One scene: objects with exact boxes and masks, a wish, its paraphrases, the picture before and after."""

from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from extract.scenes import language, layout, shapes
from extract.scenes.language import Wish

DIFFICULTIES = ("easy", "medium", "hard", "named")
TASKS = ("swap", "removal", "addition", "attribute_modification", "env", "style")
OBJECT_TASKS = ("swap", "removal", "attribute_modification")
ASPECTS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16))
SHORT_SIDES = (196, 224, 256, 320)
MAX_GROWTH = 1.25  # objects grown by this much hide at most a third of a neighbour (tested)


@dataclass(frozen=True)
class Thing:
    """One object: what it is and where; ``x, y, size`` in pixels of the source picture."""

    kind: str
    colour: str
    texture: str
    x: float
    y: float
    size: float
    tint: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Scene:
    """A picture to be drawn, and what its instruction is about.

    ``things`` are in drawing order, later ones in front; ``arrangement`` keeps the ranks they are counted by.
    """

    seed: tuple[int, int]
    difficulty: str
    width: int
    height: int
    background: str
    backdrop: int
    shadow: bool
    things: tuple[Thing, ...]
    arrangement: layout.Arrangement
    wish: Wish
    extra: Thing | None = None
    reference: str = ""
    instructions: list[str] = field(default_factory=list)

    def referable(self) -> list[int]:
        """Objects that at least one phrase singles out by position."""
        return [i for i in range(len(self.things)) if language.by_position(self.arrangement, i, "thing")]


def _count_range(difficulty: str) -> tuple[int, int]:
    return {"easy": (3, 5), "medium": (3, 9), "hard": (4, 9), "named": (3, 9)}[difficulty]


def _things(rng: np.random.Generator, difficulty: str, arrangement: layout.Arrangement, background: str) -> tuple:
    """Kinds, colours and textures for each place: one kind in hard scenes, mixed in others."""
    count = len(arrangement.centres)
    paint = np.array(language.BACKGROUNDS[background], float)
    visible = [c for c, rgb in shapes.COLOURS.items() if np.abs(np.array(rgb) - paint).sum() > 130]
    colours = [visible[i] for i in rng.integers(len(visible), size=count)]
    kinds = [shapes.KINDS[i] for i in rng.integers(len(shapes.KINDS), size=count)]
    textures = [shapes.TEXTURES[i] for i in rng.integers(len(shapes.TEXTURES), size=count)]
    if difficulty == "hard" or (difficulty == "medium" and rng.random() < 0.4):
        kinds = kinds[:1] * count
    if difficulty == "hard":
        # One colour and texture as well: only the place tells the objects apart, as in the paper's own set.
        colours, textures = colours[:1] * count, textures[:1] * count
    if difficulty == "easy":
        textures = ["plain"] * count
    return tuple(
        Thing(kind, colour, texture, float(x), float(y), float(size), tuple(rng.normal(0, 6, 3).tolist()))
        for kind, colour, texture, (x, y), size in zip(
            kinds, colours, textures, arrangement.centres, arrangement.sizes, strict=True
        )
    )


def _reference(rng: np.random.Generator, difficulty: str, things: tuple, arrangement, target: int) -> str | None:
    """A phrase for ``target`` alone: by position (hard), by attribute (named), else by position, attribute or both."""
    thing = things[target]
    by_position = [] if difficulty == "named" else language.by_position(arrangement, target, thing.kind)
    if difficulty == "hard":
        return by_position[rng.integers(len(by_position))] if by_position else None
    alike = [t for t in things if (t.colour, t.kind) == (thing.colour, thing.kind)]
    choices = []
    if len(alike) == 1:
        choices += [f"the {thing.colour} {thing.kind}"]
        if sum(t.kind == thing.kind for t in things) == 1:
            choices += [f"the {thing.kind}"]
        if by_position:
            # Position and attribute together: the colour is redundant, as people often speak.
            phrases = language.by_position(arrangement, target, f"{thing.colour} {thing.kind}")
            choices += [p for p in phrases if p.startswith("the") and "from" not in p and "row" not in p][:1]
    if by_position:
        neutral = language.by_position(arrangement, target, "object")
        choices += [neutral[rng.integers(len(neutral))]]
    return choices[rng.integers(len(choices))] if choices else None


def _other(rng: np.random.Generator, names: tuple[str, ...], taken: str) -> str:
    rest = [name for name in names if name != taken]
    return rest[rng.integers(len(rest))]


def make_wish(rng: np.random.Generator, task: str, thing: Thing | None, target: int | None) -> Wish:
    """A random wish of this task about ``thing`` (None for tasks about the whole picture)."""
    if task == "swap":
        return Wish(
            task, target, _other(rng, shapes.KINDS, thing.kind), _other(rng, tuple(shapes.COLOURS), thing.colour)
        )
    if task == "attribute_modification":
        if rng.random() < 0.25:
            return Wish(task, target, texture=_other(rng, shapes.TEXTURES[1:], thing.texture))
        return Wish(task, target, colour=_other(rng, tuple(shapes.COLOURS), thing.colour))
    return Wish(task, target)


def _free_place(rng: np.random.Generator, scene: Scene) -> Thing | None:
    """An object for an empty part of the picture, or None where there is no room."""
    extent = np.array([scene.width, scene.height], float)
    size = float(np.mean([t.size for t in scene.things]))
    low = size / 2 + layout.MARGIN * min(extent)
    points = rng.uniform(low, extent - low, (60, 2))
    centres = np.array([(t.x, t.y) for t in scene.things])
    gaps = np.linalg.norm(points[:, None] - centres, axis=-1).min(1)
    best = int(gaps.argmax())
    if gaps[best] < 1.1 * size:
        return None
    colour, kind = _other(rng, tuple(shapes.COLOURS), scene.background), shapes.KINDS[rng.integers(len(shapes.KINDS))]
    return Thing(kind, colour, "plain", float(points[best, 0]), float(points[best, 1]), size)


def ask(rng: np.random.Generator, scene: Scene, task: str, target: int | None) -> Scene | None:
    """The same picture with a wish of ``task`` about ``target``; None where no phrase singles the target out."""
    if task in OBJECT_TASKS:
        reference = _reference(rng, scene.difficulty, scene.things, scene.arrangement, target)
        if reference is None:
            return None
        wish = make_wish(rng, task, scene.things[target], target)
        return replace(
            scene, wish=wish, extra=None, reference=reference, instructions=language.instructions(rng, wish, reference)
        )
    if task == "addition":
        extra = _free_place(rng, scene)
        if extra is None:
            return None
        side = language.region(extra.x / scene.width, extra.y / scene.height)
        wish = Wish(task, None, extra.kind, extra.colour, side=side)
    elif task == "env":
        extra, wish = None, Wish(task, None, background=_other(rng, tuple(language.BACKGROUNDS), scene.background))
    else:
        extra, wish = None, Wish(task, None, style=language.STYLES[rng.integers(len(language.STYLES))])
    return replace(scene, wish=wish, extra=extra, reference="", instructions=language.instructions(rng, wish, ""))


def draw_scene(seed: int, index: int, difficulty: str = "hard", aspect: tuple[int, int] | None = None) -> Scene:
    """Scene ``index`` of the endless set that ``seed`` and ``difficulty`` name; the same arguments, the same scene.

    Parameters
    ----------
    seed, index : int
        Name the scene; each scene has a random stream of its own, so any subset can be drawn in any order.
    difficulty : str
        ``easy``: 3–5 objects of mixed kinds; ``medium``: 3–9, one kind or mixed, some occlusion, every task;
        ``hard``: 4–9 alike, the target told by position alone [ABP §4.1]; ``named``: 3–9 mixed, the target told by
        what it is alone.
    aspect : tuple of int, optional
        Width to height; drawn at random where not given.
    """
    rng = np.random.default_rng([seed, index, DIFFICULTIES.index(difficulty)])
    while True:
        across, down = aspect or ASPECTS[rng.integers(len(ASPECTS))]
        unit = SHORT_SIDES[rng.integers(len(SHORT_SIDES))] / min(across, down)
        width, height = round(across * unit), round(down * unit)
        low, high = _count_range(difficulty)
        count = int(rng.integers(low, high + 1))
        kinds_of_layout = [name for name in layout.LAYOUTS if layout.fits(name, count, width, height)]
        growth = rng.uniform(1.0, MAX_GROWTH) if difficulty == "medium" and rng.random() < 0.4 else 1.0
        chosen = kinds_of_layout[rng.integers(len(kinds_of_layout))]
        arrangement = layout.arrange(rng, chosen, count, width, height, growth)
        background = tuple(language.BACKGROUNDS)[rng.integers(len(language.BACKGROUNDS))]
        scene = Scene(
            seed=(seed, index),
            difficulty=difficulty,
            width=width,
            height=height,
            background=background,
            backdrop=int(rng.integers(4)),
            shadow=bool(rng.random() < 0.5),
            things=_things(rng, difficulty, arrangement, background),
            arrangement=arrangement,
            wish=Wish("removal", 0),
        )
        tasks = OBJECT_TASKS if difficulty in ("hard", "named") else TASKS
        task = tasks[rng.integers(len(tasks))]
        referable = scene.referable() if difficulty == "hard" else list(range(len(scene.things)))
        if not referable:
            continue
        asked = ask(rng, scene, task, int(referable[rng.integers(len(referable))]))
        if asked is not None:
            return asked


def _canvas(scene: Scene, background: str) -> np.ndarray:
    """The backdrop, float32 (height, width, 3): plain, gradient, noise or tiles in the background's colour."""
    paint = np.array(language.BACKGROUNDS[background], np.float32)
    y, x = np.mgrid[: scene.height, : scene.width].astype(np.float32)
    rng = np.random.default_rng([*scene.seed, 1])
    if scene.backdrop == 1:
        shade = 14 * (y / scene.height - 0.5) + 10 * (x / scene.width - 0.5)
    elif scene.backdrop == 2:
        shade = rng.normal(0, 6, (scene.height, scene.width)).astype(np.float32)
    elif scene.backdrop == 3:
        tile = scene.height / 7
        shade = 5.0 * (((x // tile) + (y // tile)) % 2)
    else:
        shade = np.zeros_like(x)
    return np.clip(paint + shade[..., None], 0, 255)


def paint(scene: Scene, things: tuple[Thing, ...], background: str) -> tuple[np.ndarray, np.ndarray]:
    """Draw ``things`` in order.

    Returns
    -------
    picture : numpy.ndarray
        uint8 (height, width, 3).
    owner : numpy.ndarray
        int16 (height, width): index of the frontmost object that covers at least half of the pixel, -1 for none.
    """
    canvas = _canvas(scene, background)
    owner = np.full(canvas.shape[:2], -1, np.int16)
    for index, thing in enumerate(things):
        left, top = int(np.floor(thing.x)), int(np.floor(thing.y))
        alpha = shapes.silhouette(thing.kind, thing.size, (thing.x - left, thing.y - top))
        side = len(alpha)
        colour = np.clip(np.array(shapes.COLOURS[thing.colour], np.float32) + np.float32(thing.tint), 0, 255)
        surface = shapes.fill(thing.texture, colour, side, period=max(thing.size / 3.2, 5.0))
        if scene.shadow:
            offset = max(2, round(0.06 * thing.size))
            _blend(canvas, np.zeros(3, np.float32), 0.3 * alpha, left - side // 2 + offset, top - side // 2 + offset)
        covered = _blend(canvas, surface, alpha, left - side // 2, top - side // 2)
        rows, columns, part = covered
        owner[rows, columns][part >= 0.5] = index
    return np.rint(canvas).astype(np.uint8), owner


def _blend(canvas: np.ndarray, surface: np.ndarray, alpha: np.ndarray, left: int, top: int):
    """Lay ``surface`` over ``canvas`` in place, cut at the border; the place and the alpha that was used."""
    height, width = canvas.shape[:2]
    x1, y1, x2, y2 = max(left, 0), max(top, 0), min(left + alpha.shape[1], width), min(top + alpha.shape[0], height)
    inner = np.s_[y1 - top : y2 - top, x1 - left : x2 - left]
    part = alpha[inner]
    over = surface[inner] if surface.ndim == 3 else surface
    place = np.s_[y1:y2, x1:x2]
    canvas[place] += part[..., None] * (over - canvas[place])
    return place[0], place[1], part


def bounding_box(mask: np.ndarray) -> list[int]:
    """The tight box of a boolean mask (height, width) as x1, y1, x2, y2 in pixel edges (x2, y2 exclusive)."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def masks_of(owner: np.ndarray, count: int) -> list[np.ndarray]:
    """The visible mask of every object, boolean (height, width)."""
    return [owner == index for index in range(count)]


def edited_things(scene: Scene) -> tuple[tuple[Thing, ...], str]:
    """The objects and the background after the wish came true (style is a filter on the picture instead)."""
    things, wish = list(scene.things), scene.wish
    if wish.task == "removal":
        del things[wish.target]
    elif wish.task in ("swap", "attribute_modification"):
        new = {name: value for name in ("kind", "colour", "texture") if (value := getattr(wish, name))}
        things[wish.target] = replace(things[wish.target], **new)
    elif wish.task == "addition":
        things.append(scene.extra)
    return tuple(things), wish.background or scene.background


def restyle(picture: Image.Image, style: str) -> Image.Image:
    """The whole picture in one of `language.STYLES`."""
    if style == "a negative":
        return ImageOps.invert(picture)
    if style == "a sepia photograph":
        return ImageOps.colorize(ImageOps.grayscale(picture), (46, 28, 12), (250, 236, 208))
    if style == "pixel art":
        small = picture.reduce(8)
        return small.resize(picture.size, Image.Resampling.NEAREST)
    return ImageOps.invert(ImageOps.autocontrast(ImageOps.grayscale(picture).filter(ImageFilter.FIND_EDGES))).convert(
        "RGB"
    )
