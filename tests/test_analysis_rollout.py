"""Rollout: attention multiplied up the blocks, checked against whole matrices in a loop."""

import numpy as np
import pytest

from analysis.maps.rollout import can_roll, rollout


def whole_matrices(image_lqt, text_lqx, slots):
    """R = Π (0.5·A + 0.5·I) over all tokens (image, then text), rows without attention of their own are those of I."""
    layers, _, n_image = image_lqt.shape
    n = n_image + text_lqx.shape[2]
    rolled, found = np.eye(n), []
    for layer in range(layers):
        mixed = np.eye(n)
        for q, slot in enumerate(slots):
            row = np.concatenate([image_lqt[layer, q], text_lqx[layer, q]])
            mixed[n_image + slot] = 0.5 * row + 0.5 * np.eye(n)[n_image + slot]
        rolled = mixed @ rolled
        found.append([rolled[n_image + slot, :n_image] for slot in slots])
    return np.array(found)


@pytest.fixture
def rows():
    """Causal rows of two samples: 4 image tokens; 6 text tokens with 5 queries, and 4 with 3 after one of template."""
    rng = np.random.default_rng(0)
    image, text = np.zeros((2, 3, 5, 4), np.float32), np.zeros((2, 3, 5, 6), np.float32)
    slots = np.array([[1, 2, 3, 4, 5], [1, 2, 3, -1, -1]])
    for s in range(2):
        for layer in range(3):
            for q, slot in enumerate(slots[s]):
                if slot >= 0:
                    row = rng.dirichlet(np.ones(4 + slot + 1))
                    image[s, layer, q], text[s, layer, q, : slot + 1] = row[:4], row[4:]
    return image, text, slots


def test_it_is_the_product_of_whole_matrices(rows):
    rolled = rollout(*rows)
    for s, count in enumerate((5, 3)):
        wanted = whole_matrices(rows[0][s, :, :count], rows[1][s, :, :count], rows[2][s, :count])
        np.testing.assert_allclose(rolled[s, :, :count], wanted, atol=1e-6)


def test_queries_that_a_sample_does_not_have_get_nothing(rows):
    assert (rollout(*rows)[1, :, 3:] == 0).all()


def test_one_block_is_half_of_its_rows(rows):
    image, text, slots = rows
    np.testing.assert_allclose(rollout(image[:, :1], text[:, :1], slots)[:, 0], image[:, 0] / 2)


def test_what_an_early_word_saw_reaches_a_late_one_that_looks_at_it():
    image, text = np.zeros((1, 2, 2, 3), np.float32), np.zeros((1, 2, 2, 2), np.float32)
    image[0, 0, 0, 1] = 1  # the first word looks at the second image token at block 0
    text[0, 1, 1, 0] = 1  # the second word looks at the first word at block 1
    rolled = rollout(image, text, np.array([[0, 1]]))
    np.testing.assert_allclose(rolled[0, 1, 1], [0, 0.25, 0])


@pytest.mark.parametrize(
    ("layers", "can"), [(("0", "1", "2"), True), (("0",), True), (("15", "16"), False), (("0", "2"), False)]
)
def test_it_needs_consecutive_blocks_from_the_first(layers, can):
    assert can_roll(layers) is can
