"""Stacked probes: stacking changes nothing, one softmax over all keys, padding is not there; the four kinds."""

import math

import pytest
import torch
from torch.nn import functional

from probes import boxes, learn
from probes.config import Recipe
from probes.qformer import QFormer
from probes.stacked import View, stack, take
from probes.targets import decode_box

RECIPE = Recipe("unused", width=16, heads=2, depth=2, queries=4)
SIZES = RECIPE.sizes("qformer")
KINDS = tuple(learn.KINDS)


def some_view(g=2, l=1, b=5, t=7, w=12, dtype=torch.float64):  # noqa: E741
    """States of g groups with padding, and true boxes."""
    generator = torch.Generator().manual_seed(0)
    open_bt = torch.arange(t) < torch.randint(2, t + 1, (b, 1), generator=generator)
    corners_b4 = torch.rand(b, 2, 2, generator=generator, dtype=dtype).sort(1).values.flatten(1)
    states = torch.randn(g, l, b, t, w, generator=generator, dtype=dtype)
    closed = torch.zeros(b, t).masked_fill_(~open_bt, -math.inf)
    return View(functional.layer_norm(states, (w,)), closed.expand(g, l, -1, -1)), corners_b4


def part(view, group):
    """What one group of a view reads."""
    return View(view.states_glbtw[group : group + 1], view.closed_glbt[group : group + 1])


def made(kind, seeds, layers, width=12):
    return learn.make(kind, RECIPE.sizes(kind), seeds, layers, width, 4).double()


def trained(model, view, true_b4, steps=6):
    """The model after some steps of Adam on the loss that turns on GIoU half way."""
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(steps):
        adam.zero_grad()
        boxes.loss(decode_box(model(view)), true_b4, step, l1_steps=steps // 2).mean(1).sum().backward()
        adam.step()
    return model


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_probes_trained_in_a_stack_become_what_they_become_alone(kind, layers):
    # In double precision: Adam turns the rounding of a gradient that should be zero into a step.
    view, true_b4 = some_view(l=layers)
    seeds = [0, 1, 2, 0, 1, 2]  # two groups of three
    together = trained(made(kind, seeds, layers), view, true_b4)
    for p, seed in enumerate(seeds):
        alone = trained(made(kind, [seed], layers), part(view, p // 3), true_b4).state_dict()
        for name, value in take(together, p).items():
            torch.testing.assert_close(value, alone[name], atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_taken_from_a_stack_and_stacked_again_is_the_same(kind):
    model = made(kind, [0, 1, 2], 2)
    for name, value in stack([take(model, p) for p in range(3)]).items():
        assert torch.equal(value, model.state_dict()[name])


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_in_the_padding_does_not_matter(kind):
    view, _ = some_view(l=2)
    model = made(kind, [0, 1], 2)
    spoiled = torch.where(view.closed_glbt[..., None] == 0, view.states_glbtw, 1e4)
    torch.testing.assert_close(model(view), model(View(spoiled, view.closed_glbt)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_tokens_does_not_matter(kind):
    view, _ = some_view(l=2)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    model = made(kind, [0, 1], 2)
    torch.testing.assert_close(model(view), model(View(view.states_glbtw[..., order, :], view.closed_glbt[..., order])))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_learned(kind, layers):
    view, true_b4 = some_view(l=layers)
    model = made(kind, [0, 1], layers)
    boxes.loss(decode_box(model(view)), true_b4, 500, 100).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 1e-12, name


@pytest.mark.parametrize("layers", [1, 3])
def test_its_gradients_are_those_that_numerical_differences_give(layers):
    view, _ = some_view(g=1, l=layers, b=2, t=3, w=4)
    model = learn.make("qformer", dict(width=4, heads=2, depth=1, queries=2), [0], layers, 4, 4).double()
    names = [name for name, _ in model.named_parameters()]

    def output(*values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (view,))

    values = tuple(parameter.detach().clone().requires_grad_() for parameter in model.parameters())
    assert torch.autograd.gradcheck(output, values, atol=1e-6)


def test_one_softmax_runs_over_all_layers_and_tokens_and_gives_padding_nothing():
    view, _ = some_view(l=3)
    _, a_pbhqlt = made("qformer", [0, 1], 3)(view, attention=True)
    assert a_pbhqlt.shape == (2, 5, SIZES["depth"] * SIZES["heads"], SIZES["queries"], 3, 7)
    torch.testing.assert_close(a_pbhqlt.sum((-1, -2)), torch.ones(a_pbhqlt.shape[:-2], dtype=torch.float64))
    padding_bt = view.closed_glbt[0, 0] != 0
    assert (a_pbhqlt.permute(1, 5, 0, 2, 3, 4)[padding_bt] == 0).all()
    assert a_pbhqlt.sum(-1).std(-1).max() > 0  # a layer's share is free, not one part in three


def test_the_norm_of_a_layer_is_its_own():
    # A gain and a bias per VLM layer are what a LayerNorm of its own would be: states scaled and shifted by hand.
    view, _ = some_view(g=1, l=2)
    model, plain = (made("qformer", [0], 2) for _ in range(2))
    gain, bias = (
        torch.randn(1, 2, 12, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (1, 2)
    )
    model.norms.gain.data, model.norms.bias.data = gain, bias
    scaled = view.states_glbtw * gain[0, :, None, None] + bias[0, :, None, None]
    torch.testing.assert_close(model(view), plain(View(scaled, view.closed_glbt)))


def test_probes_of_one_seed_start_alike_and_of_another_do_not():
    same, other = QFormer([0, 0], 1, 12, 4, **SIZES), QFormer([1], 1, 12, 4, **SIZES)
    assert torch.equal(same.queries[0], same.queries[1])
    assert not torch.equal(same.queries[:1], other.queries)
    assert same.queries.std().item() == pytest.approx(0.02, rel=0.3)


def test_products_in_bfloat16_give_nearly_the_same_boxes():
    view, _ = some_view(dtype=torch.float32)
    model = made("qformer", [0, 1], 1).float()
    exact = decode_box(model(view))
    with torch.autocast("cpu", torch.bfloat16):
        rough = decode_box(model(View(view.states_glbtw.bfloat16(), view.closed_glbt)))
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0.02, rtol=0.02)


def test_jobs_are_stacked_by_shape_and_no_stack_is_larger_than_asked():
    from probes.learn import Job, stacks_of
    from probes.specs import Spec

    jobs = [Job(Spec(f"layer-{n}", "layer", (str(n),)), seed) for n in range(5) for seed in range(3)]
    jobs += [Job(Spec("mid", "prompt", ("1", "2"), "text"), seed) for seed in range(3)]
    jobs += [Job(Spec("permuted-1", "control", ("1",), labels="permuted"), seed) for seed in range(3)]
    for most in (1, 2, 4, 7, 100):
        stacks = stacks_of(jobs, most)
        assert sorted(job.name for one in stacks for job in one) == sorted(job.name for job in jobs)
        for one in stacks:
            groups = [
                [job for job in one if job.spec.layers == layers]
                for layers in dict.fromkeys(j.spec.layers for j in one)
            ]
            assert len(one) <= most
            assert len({job.shape for job in one}) == 1
            assert len({len(group) for group in groups}) == 1
            assert [job for group in groups for job in group] == one
