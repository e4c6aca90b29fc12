"""The exact judge of scenes, on drawn ones: what was done is known, and is told through blur, noise and JPEG."""

import io
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from edit.scores.scene_judge import SceneJudge
from extract.scenes import OBJECT_TASKS, draw_scene
from extract.scenes.scene import edited_things, make_wish, paint
from extract.scenes.shards import row_of
from store.errors import Refusal

SEED = 70_003


def scenes(count, difficulty="hard", tasks=OBJECT_TASKS):
    found, index = [], 0
    while len(found) < count:
        scene = draw_scene(SEED, index, difficulty)
        index += 1
        if scene.wish.task in tasks:
            found.append(scene)
    return found


def picture(scene, things=None, background=None):
    painted, _ = paint(scene, scene.things if things is None else things, background or scene.background)
    return Image.fromarray(painted)


def target_of(scene):
    return picture(scene, *edited_things(scene))


def wrong(scene):
    """The same wish carried out on another object, and which."""
    other = (scene.wish.target + 1 + scene.seed[1] % (len(scene.things) - 1)) % len(scene.things)
    return target_of(replace(scene, wish=replace(scene.wish, target=other))), other


def small(image):
    """At the area of 128 × 128 and back, as a small editor works."""
    share = (128 * 128 / (image.width * image.height)) ** 0.5
    size = tuple(max(16, round(side * share / 16) * 16) for side in image.size)
    return image.resize(size, Image.Resampling.LANCZOS).resize(image.size, Image.Resampling.LANCZOS)


def noisy(image):
    noise = np.random.default_rng(0).normal(0, 6, (image.height, image.width, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def jpeg(image):
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=40)
    return Image.open(stream).convert("RGB")


def blurred(image):
    return image.filter(ImageFilter.GaussianBlur(1.5))


def shifted(image):
    return Image.fromarray(np.roll(np.asarray(image), (1, 2), (0, 1)))


WORN = {
    "as it is": lambda image: image,
    "blur": blurred,
    "noise": noisy,
    "small": small,
    "jpeg": jpeg,
    "shift": shifted,
}
WORN["all"] = lambda image: noisy(jpeg(small(image)))


def outcomes(drawn, ways_of):
    """How often each outcome came of the target, the source, and the wish on another object."""
    found = {"target": Counter(), "source": Counter(), "wrong": Counter()}
    for number, scene in enumerate(drawn):
        judge = SceneJudge.of_row(row_of(scene))
        elsewhere, other = wrong(scene)
        for way in ways_of(number):
            found["target"][judge(way(target_of(scene))).outcome] += 1
            found["source"][judge(way(picture(scene))).outcome] += 1
            verdict = judge(way(elsewhere))
            found["wrong"][verdict.outcome if verdict.changed == (other,) else f"{verdict.changed}, not {other}"] += 1
    return found


def assert_right(found, least=0.99):
    for name, outcome in (("target", "success"), ("source", "unchanged"), ("wrong", "mislocalized")):
        counts = found[name]
        assert counts[outcome] >= least * counts.total(), (name, counts)


def test_hard_scenes_each_worn_in_one_way_are_judged_rightly():
    ways = list(WORN.values())
    assert_right(outcomes(scenes(70), lambda number: [ways[number % len(ways)]]))


@pytest.mark.slow
@pytest.mark.parametrize("way", WORN)
@pytest.mark.parametrize("difficulty", ["hard", "medium", "easy"])
def test_two_hundred_scenes_are_judged_rightly_however_worn(way, difficulty):
    # Outside hard scenes another object may nearly be what was asked for already, and then does not change.
    assert_right(outcomes(scenes(200, difficulty), lambda _: [WORN[way]]), 0.99 if difficulty == "hard" else 0.9)


def test_the_three_questions_follow_from_what_changed():
    scene = next(one for one in scenes(20) if one.wish.task == "attribute_modification" and len(one.things) >= 5)
    judge, others = SceneJudge.of_row(row_of(scene)), len(scene.things) - 1
    told = judge(target_of(scene))
    assert (told.instruction, told.accuracy, told.leakage) == (4, 4, 4) and told.success and told.progress > 0.9
    told = judge(picture(scene))
    assert (told.instruction, told.accuracy, told.leakage) == (0, 0, 4) and told.changed == () and not told.success
    elsewhere, other = wrong(scene)
    told = judge(elsewhere)
    assert (told.instruction, told.accuracy) == (0, 0) and told.mislocalized
    assert told.changed == (other,) and told.leakage == 4 - int(np.ceil(4 / (others + 1)))
    new = {name: value for name in ("colour", "texture") if (value := getattr(scene.wish, name))}
    told = judge(picture(scene, tuple(replace(thing, **new) for thing in scene.things)))
    assert told.outcome == "leaked" and not told.success and not told.mislocalized
    assert set(told.changed) == set(range(len(scene.things))) - {scene.wish.target}
    assert (told.instruction, told.accuracy) == (4, int(np.ceil(4 / (others + 1))))
    assert told.leakage == 4 - int(np.ceil(4 * others / (others + 1)))


def test_both_the_right_object_and_another_is_leaked():
    counts = Counter()
    for scene in scenes(15):
        _, other = wrong(scene)
        if scene.wish.task == "removal":
            both = tuple(t for i, t in enumerate(scene.things) if i not in (scene.wish.target, other))
        else:
            once, _ = edited_things(scene)
            both, _ = edited_things(replace(scene, things=once, wish=replace(scene.wish, target=other)))
        verdict = SceneJudge.of_row(row_of(scene))(small(picture(scene, both)))
        counts[verdict.outcome, verdict.instruction, verdict.accuracy] += 1
    assert counts["leaked", 4, 2] >= 14, counts


def test_another_change_of_the_right_object_is_no_success():
    rng, counts = np.random.default_rng(0), Counter()
    for scene in scenes(20):
        thing, target = scene.things[scene.wish.target], scene.wish.target
        task = OBJECT_TASKS[(OBJECT_TASKS.index(scene.wish.task) + 1) % 3]
        other = target_of(replace(scene, wish=make_wish(rng, task, thing, target)))
        verdict = SceneJudge.of_row(row_of(scene))(other)
        counts[verdict.outcome] += 1
        if verdict.outcome == "otherwise":
            assert verdict.instruction in (1, 2, 3) and verdict.accuracy in (2, 4)
    # Some wishes look alike: white on white is nearly removed.
    assert counts["otherwise"] >= 18, counts


def test_the_right_colour_on_the_wrong_kind_is_no_success():
    swaps = scenes(12, tasks=("swap",))
    done = [SceneJudge.of_row(row_of(one))(target_of(replace(one, wish=replace(one.wish, kind=None)))) for one in swaps]
    assert sum(verdict.outcome == "otherwise" for verdict in done) >= 11
    assert np.mean([verdict.progress for verdict in done]) > 0.3


def test_an_object_that_appears_on_the_background_is_seen():
    seen = 0
    for scene in scenes(25, "hard"):
        centres = np.array([(thing.x, thing.y) for thing in scene.things])
        size = float(np.mean([thing.size for thing in scene.things]))
        y, x = np.mgrid[size / 2 + 4 : scene.height - size / 2 - 4 : 8, size / 2 + 4 : scene.width - size / 2 - 4 : 8]
        points = np.stack([x.ravel(), y.ravel()], 1)
        gaps = np.linalg.norm(points[:, None] - centres, axis=-1).min(1)
        if gaps.max() < 1.4 * size:
            continue
        left, top = points[gaps.argmax()]
        new = replace(scene.things[0], x=float(left), y=float(top), size=size)
        judge = SceneJudge.of_row(row_of(scene))
        told = judge(small(picture(scene, (*scene.things, new))))
        assert told.stray and told.mislocalized and told.changed == ()
        told = judge(picture(scene, (*edited_things(scene)[0], new)))
        assert told.stray and told.outcome == "leaked"
        seen += 1
    assert seen >= 5


def test_an_addition_is_judged_at_its_place():
    for scene in scenes(12, "medium", ("addition",)):
        judge = SceneJudge.of_row(row_of(scene))
        assert judge.subject is None
        assert judge(small(target_of(scene))).success
        assert judge(small(picture(scene))).outcome == "unchanged"
        gone = judge(picture(scene, scene.things[1:]))
        assert gone.mislocalized and gone.changed == (0,)


def test_a_picture_of_another_size_is_judged_too():
    scene = scenes(1)[0]
    judge = SceneJudge.of_row(row_of(scene))
    large = target_of(scene).resize((2 * scene.width, 2 * scene.height), Image.Resampling.BICUBIC)
    assert judge(large).success


def test_a_weak_autoencoder_is_forgiven_what_it_does_to_any_picture():
    def weak(image):
        tiny = image.resize((max(1, image.width // 7), max(1, image.height // 7)), Image.Resampling.BOX)
        faded = tiny.resize(image.size, Image.Resampling.BILINEAR)
        return Image.blend(faded, Image.new("RGB", image.size, "grey"), 0.25)

    without, given = Counter(), Counter()
    for scene in scenes(8, tasks=("removal", "swap")):
        row = row_of(scene)
        for counts, judge in ((without, SceneJudge.of_row(row)), (given, SceneJudge.of_row(row, weak))):
            made = (weak(target_of(scene)), weak(picture(scene)), weak(wrong(scene)[0]))
            counts.update(
                judge(one).outcome == outcome
                for one, outcome in zip(made, ("success", "unchanged", "mislocalized"), strict=True)
            )
    assert given[True] >= 23, given
    assert given[True] > without[True]


@pytest.mark.parametrize("task", ["env", "style", "harmonize"])
def test_a_task_about_the_whole_picture_is_refused(task):
    scene = scenes(1)[0]
    row = row_of(scene)
    with pytest.raises(Refusal, match=f"{task}.*removal, attribute_modification, addition"):
        SceneJudge.of_row(row | {"task": task})


def test_what_does_not_belong_together_is_refused():
    scene = scenes(1)[0]
    row = row_of(scene)
    with pytest.raises(Refusal, match=r"no object has the box \[1, 2, 3, 4\]"):
        SceneJudge.of_row(row | {"box": [1, 2, 3, 4]})
    with pytest.raises(Refusal, match="no object has the box None"):
        SceneJudge.of_row(row | {"box": None})
    with pytest.raises(Refusal, match="nothing to judge"):
        SceneJudge.of_row(row | {"edited_img": row["src_img"]})
    with pytest.raises(Refusal, match="pictures of one size"):
        SceneJudge(picture(scene), picture(scene).resize((50, 50)), row["objects"], row["box"], row["task"])
    alien = picture(scene).resize((row["width"] + 1, row["height"]))
    with pytest.raises(Refusal, match="of another scene"):
        SceneJudge(alien, alien, row["objects"], row["box"], row["task"])
    empty = [
        one | {"mask": {"size": [row["height"], row["width"]], "counts": [row["height"] * row["width"]]}}
        for one in row["objects"]
    ]
    damaged = [one | {"mask": {"size": one["mask"]["size"], "counts": [5, 5]}} for one in row["objects"]]
    with pytest.raises(Refusal, match="mask of an object is damaged"):
        SceneJudge.of_row(row | {"objects": damaged})
    with pytest.raises(Refusal, match="picture of the scene is damaged"):
        SceneJudge.of_row(row | {"src_img": {"bytes": row["src_img"]["bytes"][:300], "path": None}})
    with pytest.raises(Refusal, match="its mask is empty"):
        SceneJudge.of_row(row | {"objects": empty})
    with pytest.raises(Refusal, match="RGBA"):
        SceneJudge.of_row(row)(picture(scene).convert("RGBA"))
