"""Box arithmetic and the loss, against plain NumPy."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probes import boxes
from probes.config import Recipe
from probes.learn import learning_rate

coordinate = st.floats(0, 1, width=32)


@st.composite
def box(draw):
    """Corners of a box of at least a hundredth of the image each way."""
    ends = [sorted((draw(coordinate), draw(coordinate))) for _ in range(2)]
    (x1, x2), (y1, y2) = [(min(low, 0.99), max(high, min(low, 0.99) + 0.01)) for low, high in ends]
    return np.array([x1, y1, x2, y2], np.float64)


def plain(a, b):
    """IoU and GIoU by their definitions."""
    overlap = np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None))
    union = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - overlap
    hull = np.prod(np.maximum(a[2:], b[2:]) - np.minimum(a[:2], b[:2]))
    return overlap / union, overlap / union - (hull - union) / hull


@given(box(), box())
def test_iou_and_giou_are_what_their_definitions_say(a, b):
    overlap, generalised = plain(a, b)
    x, y = torch.from_numpy(a), torch.from_numpy(b)
    assert boxes.iou(x, y).item() == pytest.approx(overlap, abs=1e-9)
    assert boxes.giou(x, y).item() == pytest.approx(generalised, abs=1e-9)


@given(box(), box())
def test_giou_is_symmetric_and_never_above_iou(a, b):
    x, y = torch.from_numpy(a), torch.from_numpy(b)
    assert boxes.giou(x, y).item() == pytest.approx(boxes.giou(y, x).item())
    assert -1 <= boxes.giou(x, y).item() <= boxes.iou(x, y).item() + 1e-12 <= 1 + 2e-12


@given(box())
def test_a_box_meets_itself_wholly(a):
    x = torch.from_numpy(a)
    for measure in (boxes.iou, boxes.giou, boxes.containment):
        assert measure(x, x).item() == pytest.approx(1)
    assert boxes.loss(x, x, 500, 100).item() == pytest.approx(0, abs=1e-12)


def test_containment_asks_how_much_of_the_first_lies_in_the_second():
    small, large = torch.tensor([0.2, 0.2, 0.4, 0.4]), torch.tensor([0.0, 0.0, 0.8, 0.8])
    assert boxes.containment(small, large).item() == pytest.approx(1)
    assert boxes.containment(large, small).item() == pytest.approx(1 / 16)


def test_centre_distance_is_over_the_diagonal_of_the_image_in_pixels():
    left, right = torch.tensor([0.0, 0.0, 0.2, 0.2]), torch.tensor([0.8, 0.0, 1.0, 0.2])
    assert boxes.centre_distance(left, right).item() == pytest.approx(0.8 / 2**0.5)
    wide = boxes.centre_distance(left, right, torch.tensor([400.0, 300.0]))
    assert wide.item() == pytest.approx(0.8 * 400 / 500)


def test_centre_distance_over_the_box_is_in_square_roots_of_its_area():
    true, guess = torch.tensor([[0.0, 0.0, 0.1, 0.4]]), torch.tensor([[0.5, 0.0, 0.6, 0.4]])
    size = torch.tensor([[400.0, 100.0]])  # the box is 40 by 40 pixels, the centres 200 apart
    assert boxes.centre_distance_over_box(guess, true, size).item() == pytest.approx(200 / 40)


def test_pointing_asks_whether_the_predicted_centre_is_in_the_true_box():
    true = torch.tensor([[0.4, 0.4, 0.6, 0.6]])
    for guess, hit in (([0.0, 0.0, 1.0, 1.0], True), ([0.0, 0.0, 0.7, 0.9], False)):
        assert boxes.pointing(torch.tensor([guess]), true).item() is hit


@given(box(), st.floats(0.01, 1), st.floats(0.01, 1))
def test_chance_overlap_is_the_mean_over_all_places_of_the_box(true, width, height):
    along = []
    for side, low, high in ((width, true[0], true[2]), (height, true[1], true[3])):
        x = (np.arange(20_000) + 0.5) / 20_000 * (1 - side)
        along.append(np.clip(np.minimum(x + side, high) - np.maximum(x, low), 0, None).mean())
    size = torch.tensor([width, height], dtype=torch.float64)
    assert boxes.chance_overlap(size, torch.from_numpy(true)).item() == pytest.approx(along[0] * along[1], abs=1e-4)


def test_chance_beside_the_metrics_is_what_random_places_reach():
    rng = np.random.default_rng(0)
    true, guess = (np.array([ends]) for ends in ([0.2, 0.5, 0.45, 0.9], [0.1, 0.1, 0.5, 0.4]))
    n = 200_000
    corner = rng.uniform(0, 1, (n, 2)) * (1 - (guess[0, 2:] - guess[0, :2]))
    placed = torch.from_numpy(np.concatenate([corner, corner + guess[0, 2:] - guess[0, :2]], 1))
    truth = torch.from_numpy(true)
    told = boxes.metrics(torch.from_numpy(guess), truth, torch.ones(1, 2))
    for name, values in (
        ("truth_inside", boxes.containment(truth, placed)),
        ("inside_truth", boxes.containment(placed, truth)),
    ):
        assert told[f"{name}_chance"].item() == pytest.approx(values.mean().item(), abs=0.003)
    centres = torch.from_numpy(np.tile(rng.uniform(0, 1, (n, 2)), 2))
    assert told["pointing_chance"].item() == pytest.approx(
        boxes.pointing(centres, truth).double().mean().item(), abs=0.003
    )


@given(box(), box())
def test_every_metric_of_a_box_is_within_its_bounds(a, b):
    told = boxes.metrics(torch.from_numpy(a)[None], torch.from_numpy(b)[None], torch.tensor([[300.0, 200.0]]))
    assert tuple(told) == boxes.METRICS
    for name, value in told.items():
        low = -1 if name == "giou" else 0
        high = np.inf if name == "centre_distance_over_box" else 1
        assert low - 1e-9 <= value.item() <= high + 1e-9


@given(box())
def test_the_true_box_itself_has_the_best_of_every_metric(a):
    x = torch.from_numpy(a)[None]
    told = boxes.metrics(x, x, torch.tensor([[300.0, 200.0]]))
    for name in ("iou", "iou_at_0.5", "giou", "pointing", "truth_inside", "inside_truth"):
        assert told[name].item() == pytest.approx(1)
    for name in ("centre_distance", "centre_distance_over_box"):
        assert told[name].item() == pytest.approx(0, abs=1e-9)


def test_the_loss_is_l1_alone_and_then_six_tenths_l1_and_four_tenths_giou():
    a, b = torch.tensor([0.1, 0.1, 0.3, 0.3]), torch.tensor([0.2, 0.1, 0.6, 0.5])
    near, overlap = boxes.l1(a, b), boxes.giou(a, b)
    assert boxes.loss(a, b, step=99, l1_steps=100) == near
    assert boxes.loss(a, b, step=100, l1_steps=100) == pytest.approx(0.6 * near + 0.4 * (1 - overlap))


def test_the_gradient_pulls_boxes_together_even_when_they_are_apart():
    guess = torch.tensor([0.1, 0.1, 0.2, 0.2], requires_grad=True)
    boxes.loss(guess, torch.tensor([0.7, 0.7, 0.9, 0.9]), step=500, l1_steps=100).backward()
    assert (guess.grad < 0).all()  # downhill is towards larger coordinates


def test_the_learning_rate_rises_then_falls_along_a_cosine_to_thirty_percent():
    config = Recipe("unused", lr=2.0, steps=301, warm_up=100)
    rates = [learning_rate(step, config) for step in range(config.steps)]
    assert rates[0] == pytest.approx(0.02)
    assert rates[99] == rates[100] == pytest.approx(2.0)
    assert rates[200] == pytest.approx(2.0 * 0.65)  # half way down
    assert rates[-1] == pytest.approx(0.6)
    assert all(a >= b for a, b in pairwise(rates[100:]))
