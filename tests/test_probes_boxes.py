"""Box arithmetic and the loss, against plain NumPy."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probes import boxes
from probes.config import ProbeConfig
from probes.learn import learning_rate

coordinate = st.floats(0, 1, width=32)


@st.composite
def box(draw):
    """Corners of a box of at least a hundredth of the image each way."""
    ends = [sorted((draw(coordinate), draw(coordinate))) for _ in range(2)]
    (x1, x2), (y1, y2) = [(low, max(high, low + 0.01)) for low, high in ends]
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
    config = ProbeConfig("unused", lr=2.0, steps=301, warm_up=100)
    rates = [learning_rate(step, config) for step in range(config.steps)]
    assert rates[0] == pytest.approx(0.02)
    assert rates[99] == rates[100] == pytest.approx(2.0)
    assert rates[200] == pytest.approx(2.0 * 0.65)  # half way down
    assert rates[-1] == pytest.approx(0.6)
    assert all(a >= b for a, b in pairwise(rates[100:]))
