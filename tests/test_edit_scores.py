"""LPIPS and L2 outside a box, and the editor's own shift and zoom undone, on drawn scenes."""

import math
import re
import warnings

import cv2
import lpips
import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from torchvision.models import alexnet

from edit.scores import alignment
from edit.scores.alignment import NotFound, aligned, estimate
from edit.scores.outside import GREY, MEND, Perception, Place, outside
from extract.scenes import OBJECT_TASKS, draw_scene
from extract.scenes.scene import bounding_box, edited_things, masks_of, paint
from store.errors import Refusal

SEED = 70_001


def drawn(index, difficulty="hard"):
    """Source, target and box of a scene about an object."""
    while True:
        scene = draw_scene(SEED, index, difficulty)
        if scene.wish.task in OBJECT_TASKS:
            break
        index += 1000
    before, owner = paint(scene, scene.things, scene.background)
    after, _ = paint(scene, *edited_things(scene))
    box = bounding_box(masks_of(owner, len(scene.things))[scene.wish.target])
    return Image.fromarray(before), Image.fromarray(after), box


def moved(picture, shift, zoom):
    """The picture as an editor would give it: scaled about its middle, then shifted (right, down), in pixels."""
    values = np.asarray(picture)
    height, width = values.shape[:2]
    middle, zoom = (np.array([width, height]) - 1) / 2, np.asarray(zoom) * np.ones(2)
    warp = np.column_stack([np.diag(zoom), np.asarray(shift) + middle - zoom * middle])
    made = cv2.warpAffine(values, warp, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    return Image.fromarray(made)


def random_picture(width=96, height=80, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def perception():
    return Perception()


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    """AlexNet's weights as torchvision names them; drawn, since the real ones are a download."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("trunk") / "alexnet.safetensors"
    weights = alexnet(weights=None).state_dict()
    save_file({name: value for name, value in weights.items() if name.startswith("features.")}, path)
    return path


def test_l2_is_the_mean_square_over_the_pixels_outside(perception):
    a, b, box = random_picture(), random_picture(seed=1), (10, 20.5, 40.2, 60)
    total, count = 0.0, 0
    for y in range(a.height):
        for x in range(a.width):
            if not (10 <= x < 41 and 20 <= y < 60):  # a pixel that the box touches lies within
                total += sum(((p - q) / 255) ** 2 for p, q in zip(a.getpixel((x, y)), b.getpixel((x, y)), strict=True))
                count += 1
    found = outside(a, b, box, perception)
    assert found.pixels == count
    assert found.l2 == pytest.approx(total / count / 3, rel=1e-6)


def test_filled_is_plain_lpips_of_both_pictures_with_a_grey_box(trunk):
    a, b, box = random_picture(), random_picture(seed=1), (10, 20, 40, 60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision in an old way
        plain = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    weights = load_file(trunk)
    slices = [plain.net.slice1, plain.net.slice2, plain.net.slice3, plain.net.slice4, plain.net.slice5]
    for part in slices:
        for name, layer in part.named_children():
            if isinstance(layer, torch.nn.Conv2d):
                layer.weight.data, layer.bias.data = (weights[f"features.{name}.{one}"] for one in ("weight", "bias"))
    given = []
    for picture in (a, b):
        values = np.array(picture)
        values[20:60, 10:40] = GREY
        given.append(torch.from_numpy(values).permute(2, 0, 1)[None] / 255 * 2 - 1)
    with torch.no_grad():
        expected = float(plain(*given))
        plain.spatial = True
        whole = [torch.from_numpy(np.array(one)).permute(2, 0, 1)[None] / 255 * 2 - 1 for one in (a, b)]
        map_hw = plain(*whole)[0, 0].numpy()
    outside_hw = np.ones((80, 96), bool)
    outside_hw[20:60, 10:40] = False
    found = outside(a, b, box, Perception(trunk))
    assert found.lpips_filled == pytest.approx(expected, rel=1e-4)
    assert found.lpips_map == pytest.approx(float(map_hw[outside_hw].mean()), rel=1e-4)
    assert found.lpips == "LPIPS (AlexNet)"


def test_what_changes_within_the_box_counts_neither_for_l2_nor_for_filled(perception):
    source, target, box = drawn(1)
    values = np.array(source)
    x1, y1, x2, y2 = box
    values[y1:y2, x1:x2] = 255 - values[y1:y2, x1:x2]
    found = outside(source, Image.fromarray(values), box, perception)
    assert found.l2 == found.lpips_filled == 0
    assert found.lpips_map > 0  # it feels the other side of the box's edge
    assert outside(source, source, box, perception).lpips_map == 0
    assert outside(source, target.filter(ImageFilter.GaussianBlur(2)), box, perception).lpips_filled > 0


def test_a_random_trunk_says_so_and_is_always_the_same_one(perception):
    a, b, box = random_picture(), random_picture(seed=1), (10, 20, 40, 60)
    state = torch.random.get_rng_state()
    other = Perception()
    assert torch.equal(state, torch.random.get_rng_state())
    found = outside(a, b, box, perception)
    assert found == outside(a, b, box, other)
    assert found.lpips == "LPIPS (random trunk)"
    assert found.lpips_map > 0


def test_a_trunk_that_lacks_a_weight_or_is_no_safetensors_file_is_refused_with_the_recipe(trunk, tmp_path):
    weights = load_file(trunk)
    lacking = tmp_path / "lacking.safetensors"
    save_file({name: value for name, value in weights.items() if name != "features.6.bias"}, lacking)
    with pytest.raises(Refusal, match=r"features\.6\.bias.*torchvision\.models\.alexnet\(weights='DEFAULT'\)"):
        Perception(lacking)
    save_file(weights | {"features.0.weight": torch.zeros(64, 3, 3, 3)}, lacking)
    with pytest.raises(Refusal, match=r"features\.0\.weight.*\[64, 3, 3, 3\], not \[64, 3, 11, 11\]"):
        Perception(lacking)
    pickled = tmp_path / "alexnet.pth"
    torch.save(weights, pickled)
    for path in (pickled, tmp_path / "none.safetensors"):
        with pytest.raises(Refusal, match="cannot be read as safetensors"):
            Perception(path)


@pytest.mark.slow
def test_the_recipe_writes_a_file_that_loads(tmp_path, monkeypatch):
    code = MEND.split('"')[1].replace("'DEFAULT'", "None")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert Perception("alexnet.safetensors").name == "LPIPS (AlexNet)"


@pytest.mark.parametrize(
    ("source", "edited", "box", "word"),
    [
        (random_picture(), random_picture(), (0, 0, 96, 80), "covers the whole picture"),
        (random_picture(), random_picture(), (-5, -5, 500, 500), "covers the whole picture"),
        (random_picture(), random_picture(95), (1, 1, 9, 9), "95×80"),
        (random_picture().convert("RGBA"), random_picture(), (1, 1, 9, 9), "RGBA"),
        (random_picture(31, 80), random_picture(31, 80), (1, 1, 9, 9), "31×80"),
        (random_picture(), random_picture(), (9, 1, 1, 9), "x1 < x2"),
        (random_picture(), random_picture(), (math.nan, 1, 1, 9), "x1 < x2"),
        (random_picture(), random_picture(), (200, 1, 300, 9), "outside the picture"),
    ],
)
def test_what_cannot_be_measured_is_refused(perception, source, edited, box, word):
    with pytest.raises(Refusal, match=word):
        outside(source, edited, box, perception)


def test_a_picture_of_32_pixels_can_be_measured(perception):
    found = outside(random_picture(32, 32), random_picture(32, 32, 1), (4, 4, 20, 20), perception)
    assert found.lpips_filled > 0 and math.isfinite(found.lpips_map)


@pytest.mark.parametrize("index", range(12))
def test_a_shift_and_a_zoom_are_recovered_whatever_changed_in_the_box(index):
    source, target, box = drawn(index, ("easy", "medium", "hard")[index % 3])
    rng = np.random.default_rng(index)
    shift, zoom = rng.uniform(-6, 6, 2), 1 + rng.uniform(-0.03, 0.03, 2)
    edited = np.asarray(moved(target, shift, zoom)) + rng.normal(0, 3, (source.height, source.width, 3))
    place = Place(source, box)
    warp = estimate(place, np.clip(edited, 0, 255).astype(np.uint8))
    np.testing.assert_allclose(alignment.shift_of(warp, source.size), shift, atol=0.3)
    np.testing.assert_allclose(np.diag(warp[:, :2]), zoom, atol=0.005)


@pytest.mark.parametrize("index", range(4))
def test_undoing_brings_the_scores_back_to_those_of_the_edit_itself(perception, index):
    source, target, box = drawn(index)
    still = aligned(source, target, box, perception)
    found = aligned(source, moved(target, (3.4, -2.2), 1.015), box, perception)
    assert found.kept_raw is None
    assert found.raw == outside(source, moved(target, (3.4, -2.2), 1.015), box, perception)
    assert found.corrected.l2 < 0.1 * found.raw.l2 + still.raw.l2
    assert found.corrected.lpips_map < found.raw.lpips_map
    assert found.corrected.pixels < found.raw.pixels  # what came from outside the frame is not counted
    np.testing.assert_allclose(found.shift, (3.4, -2.2), atol=0.3)
    np.testing.assert_allclose(found.zoom, 1.015, atol=0.005)


@pytest.mark.parametrize("index", range(4))
def test_a_picture_that_stands_still_is_left_as_it_is_even_blurred_and_noisy(perception, index):
    source, target, box = drawn(index)
    noise = np.random.default_rng(index).normal(0, 6, (source.height, source.width, 3))
    noisy = Image.fromarray(np.clip(np.asarray(target) + noise, 0, 255).astype(np.uint8))
    for edited in (target, noisy, target.filter(ImageFilter.GaussianBlur(1.5))):
        found = aligned(source, edited, box, perception)
        assert found.kept_raw is not None
        assert found.corrected == found.raw
        np.testing.assert_allclose(found.shift, 0, atol=0.3)
        np.testing.assert_allclose(found.zoom, 1, atol=0.005)


def test_pixels_from_beyond_the_frame_are_not_known():
    values = np.full((40, 60, 3), 9, np.uint8)
    _, known = alignment.undo(np.array([[1, 0, 7.0], [0, 1, -3.0]]), values)
    # Source column x shows the edited picture's column x + 7, row y its row y − 3.
    assert not known[:, 53:].any() and not known[:3].any()
    assert known[5:, :51].all()


@pytest.mark.parametrize(
    ("edited", "reason"),
    [
        (Image.new("RGB", (96, 80), "grey"), "converge"),
        (random_picture(seed=3), "converge|artefact|turned|help|still"),
        (random_picture().rotate(8), "turned|converge"),
    ],
)
def test_where_no_shift_can_be_found_the_raw_scores_stay_and_the_reason_is_said(perception, edited, reason):
    found = aligned(random_picture(), edited, (30, 30, 50, 50), perception)
    assert found.corrected == found.raw
    assert re.search(reason, found.kept_raw)


def test_a_bare_picture_and_a_box_that_leaves_a_rim_have_nothing_to_find_a_shift_by():
    bare = Image.new("RGB", (96, 80), "grey")
    with pytest.raises(NotFound, match="nothing outside the box stands out"):
        estimate(Place(bare, (30, 30, 50, 50)), np.asarray(bare))
    with pytest.raises(NotFound, match="too little"):
        estimate(Place(random_picture(), (1, 1, 95, 79)), np.asarray(random_picture()))
