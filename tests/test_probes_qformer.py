"""The proxy: stacking changes nothing, one softmax over all keys, padding is not there."""

import pytest
import torch

from probes import boxes
from probes.qformer import QFormer, stack, take

SIZES = dict(width=16, heads=2, depth=2, queries=4)


def some_states(p=3, b=5, layers=1, t=7, w=12):
    """States, masks with padding, and true boxes."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(t) < torch.randint(2, t + 1, (p, b, 1), generator=generator)
    corners = torch.rand(b, 2, 2, generator=generator).sort(1).values.flatten(1)
    return torch.randn(p, b, layers, t, w, generator=generator), mask, corners


def trained(model, states, mask, true, steps=6):
    """The model after some steps of Adam on the loss that turns on GIoU half way."""
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(steps):
        adam.zero_grad()
        boxes.loss(model(states, mask), true, step, l1_steps=steps // 2).mean(1).sum().backward()
        adam.step()
    return model


@pytest.mark.parametrize("layers", [1, 3])
def test_proxies_trained_in_a_stack_become_what_they_become_alone(layers):
    # In double precision: Adam turns the rounding of a gradient that should be zero (a key bias) into a step.
    states, mask, true = (part if part.dtype == torch.bool else part.double() for part in some_states(layers=layers))
    together = trained(QFormer(3, layers, 12, **SIZES, seed=1).double(), states, mask, true)
    for p in range(3):
        alone = QFormer(1, layers, 12, **SIZES, seed=1).double()
        alone = trained(alone, states[p : p + 1], mask[p : p + 1], true).state_dict()
        for name, value in take(together, p).items():
            torch.testing.assert_close(value, alone[name], atol=1e-8, rtol=1e-8)


def test_what_is_taken_from_a_stack_and_stacked_again_is_the_same():
    model = QFormer(3, 2, 12, **SIZES, seed=1)
    for name, value in stack([take(model, p) for p in range(3)]).items():
        assert torch.equal(value, model.state_dict()[name])


def test_one_softmax_runs_over_all_layers_and_tokens_and_gives_padding_nothing():
    states, mask, _ = some_states(layers=3)
    _, a_pbhqlt = QFormer(3, 3, 12, **SIZES, seed=0)(states, mask, attention=True)
    assert a_pbhqlt.shape == (3, 5, SIZES["depth"] * SIZES["heads"], SIZES["queries"], 3, 7)
    torch.testing.assert_close(a_pbhqlt.sum((-1, -2)), torch.ones(a_pbhqlt.shape[:-2]))
    assert (a_pbhqlt.permute(0, 1, 5, 2, 3, 4)[~mask] == 0).all()
    assert a_pbhqlt.sum(-1).std(-1).max() > 0  # a layer's share is free, not one part in three


def test_what_stands_in_the_padding_does_not_matter():
    states, mask, _ = some_states()
    model = QFormer(3, 1, 12, **SIZES, seed=0)
    spoiled = torch.where(mask[:, :, None, :, None], states, 1e4)
    torch.testing.assert_close(model(states, mask), model(spoiled, mask))


def test_the_order_of_the_tokens_does_not_matter():
    states, mask, _ = some_states()
    order = torch.randperm(states.shape[3], generator=torch.Generator().manual_seed(0))
    model = QFormer(3, 1, 12, **SIZES, seed=0)
    torch.testing.assert_close(model(states, mask), model(states[:, :, :, order], mask[..., order]))


def test_the_norm_of_its_own_hides_a_layers_scale():
    states, mask, _ = some_states(layers=2)
    model = QFormer(3, 2, 12, **SIZES, seed=0)
    grown = states * torch.tensor([1.0, 50.0])[:, None, None]
    torch.testing.assert_close(model(states, mask), model(grown, mask), atol=1e-4, rtol=1e-4)


def test_every_parameter_is_learned():
    states, mask, true = some_states(layers=2)
    model = QFormer(3, 2, 12, **SIZES, seed=0)
    boxes.loss(model(states, mask), true, 500, 100).mean().backward()
    still = [name for name, parameter in model.named_parameters() if parameter.grad.abs().max() < 1e-9]
    assert [name for name in still if not name.endswith("key.bias")] == []  # a softmax does not see its keys' bias


def test_proxies_of_one_seed_start_alike_and_of_another_do_not():
    same, other = QFormer(2, 1, 12, **SIZES, seed=0), QFormer(1, 1, 12, **SIZES, seed=1)
    assert torch.equal(same.queries[0], same.queries[1])
    assert not torch.equal(same.queries[:1], other.queries)
    assert same.queries.std().item() == pytest.approx(0.02, rel=0.3)
