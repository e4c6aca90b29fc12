"""The plain PyTorch proxy that the bench compares with says and learns what ``probes.qformer`` does."""

from pathlib import Path

import pytest
import torch

from probes import boxes
from probes.qformer import QFormer
from probes.stacked import View
from probes.targets import decode_box

SIZES = dict(width=16, heads=2, depth=2, queries=4)
B, T, W = 5, 16, 12


@pytest.fixture(scope="module")
def reference():
    """The module; the bench is not installed: it is run from the repository's root."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent.parent)
        import bench.reference

        yield bench.reference


def plain(found):
    """Parameters of a ``QFormer`` of one probe, or their gradients, under the names of plain PyTorch; no key bias."""
    given = {}
    for name, value in found.items():
        value, (*path, last) = value[0], name.split(".")
        if last == "queries":
            given[name] = value
        elif path == ["norms"]:
            kind = {"gain": "weight", "bias": "bias"}[last]
            given |= {f"norms.{place}.{kind}": row for place, row in enumerate(value)}
        elif path[-1] == "reading":
            kind = {"key": "key.weight", "value": "value.weight", "value_bias": "value.bias"}[last]
            given[".".join([*path[:-1], kind])] = value[0] if last == "value_bias" else value.T
        elif path[0] == "head":
            # A GELU stands between the maps there.
            given[f"head.{2 * int(path[1])}.{last}"] = value[0] if last == "bias" else value.T
        else:
            kind = {"gain": "weight", "bias": "bias", "weight": "weight"}[last]
            given[".".join([*path, kind])] = value.T if last == "weight" else value[0]
    return given


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("layers", [1, 3])
def test_plain_pytorch_gives_the_same_boxes_and_gradients(reference, layers, padded):
    generator = torch.Generator().manual_seed(layers)
    ours = QFormer([7], layers, W, 4, **SIZES)
    with torch.no_grad():
        # Gains of one and biases of zero would hide whether they are in the right place.
        for name, parameter in ours.named_parameters():
            if name.endswith(("gain", "bias")):
                parameter += torch.randn(parameter.shape, generator=generator) * 0.3
            elif name == "queries":
                parameter *= 50
    theirs = reference.Proxy(layers, W, **SIZES)
    missing = theirs.load_state_dict(plain(ours.state_dict()), strict=False)
    assert not missing.unexpected_keys
    assert all(name.endswith("key.bias") for name in missing.missing_keys)
    for block in theirs.blocks:
        torch.nn.init.zeros_(block.key.bias)
    theirs.double()

    states_bltw = torch.randn(B, layers, T, W, generator=generator) * 5 + 1
    lengths_b = torch.randint(3, T, (B,), generator=generator) if padded else torch.full((B,), T)
    real_bt = torch.arange(T) < lengths_b[:, None]
    true_b4 = torch.rand(B, 2, 2, generator=generator).sort(1).values.flatten(1)
    closed = torch.where(real_bt, 0.0, -torch.inf).expand(1, layers, B, T) if padded else None
    normed = torch.nn.functional.layer_norm(states_bltw.transpose(0, 1), (W,))
    said = decode_box(ours(View(normed[None], closed)))[0]
    expected = decode_box(theirs(states_bltw.double(), real_bt))
    torch.testing.assert_close(said.double(), expected, atol=1e-5, rtol=1e-5)

    boxes.loss(said, true_b4, 1, 0).sum().backward()
    boxes.loss(expected, true_b4.double(), 1, 0).sum().backward()
    gradients = plain({name: parameter.grad for name, parameter in ours.named_parameters()})
    for name, parameter in theirs.named_parameters():
        if name.endswith("key.bias"):  # it adds the same to all scores of a query
            assert parameter.grad.abs().max() < 1e-6
        else:
            assert parameter.grad.abs().max() > 0
            torch.testing.assert_close(
                gradients[name].double(), parameter.grad, atol=2e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
            )
