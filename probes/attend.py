"""``python -m probes attend``: the cross-attention of proxies for every sample, written back into the store.

Each array is tied to its proxy by the hash, so that who analyses it knows whose eyes it is.

Shape suffixes: ``b`` sample of a batch, ``h`` head, ``q`` query, ``l`` VLM layer, ``t`` token.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import store
from probes import provenance, trained
from probes.config import AttendConfig
from probes.trained import TrainedProbe
from store.errors import Refusal

DIMS = ("sample", "head", "query", "layer", "token")
PREFIXES = {"tokens": "attention", "mass": "mass"}
"""What is kept → what the array's name begins with."""

LAST_BITS = frozenset(
    {"attention_kernel", "batch_size", "device", "libraries", "model", "queries", "revision", "threads"}
)
"""Parts of a store's identity that change no more than the last bits of its states; a model is known by its weights."""


def attend(config: AttendConfig) -> None:
    """Add the attention of each proxy to the store, whole or not at all; says so and does nothing if it is there.

    Values are float16: half a unit in the last place is 2^-11 of an attention above 6e-5, and 3e-8 below.

    Raises
    ------
    Refusal
        When a probe is no Q-Former or reads drawn tokens, the store's states are of another pass or lack its layers
        or tokens, or the name is that of another array.
    """
    device = _device(config.device)
    probes = [trained.load(folder, device) for folder in config.proxy]
    opened = store.open(config.store)
    for probe in probes:
        if probe.spec.kind != "qformer":
            raise Refusal(f"probe {probe.spec.name} is of kind {probe.spec.kind}: only a qformer has cross-attention")
        probe.refuse_drawn("attend to all tokens of a sample")
        _refuse_another_pass(opened, probe)
    for probe in probes:
        _write(config, opened, probe)


def _write(config: AttendConfig, opened: Any, probe: TrainedProbe) -> None:
    """Add one proxy's attention."""
    spec = probe.spec
    choice = opened.batches(spec.layers, spec.tokens, config.batch).choice
    counts_s = np.sum(list(choice.counts.values()), axis=0)
    samples = choice.samples[counts_s[choice.samples] > 0]
    if not samples.size:
        raise Refusal(f"no sample of {opened.place} has states of {spec.tokens} tokens at {', '.join(spec.layers)}")
    written_name = re.sub(r"[^\w.-]", "-", spec.name)  # layers of a joint probe are joined by +, no character of names
    name = config.name or f"{PREFIXES[config.keep]}-{written_name}-seed{probe.seed}-{probe.hash[:8]}"
    if name in opened.derived:
        _refuse_another_array(opened, name, probe, len(samples))
        return
    sizes = probe.making["sizes"]
    heads = [f"{block}.{head}" for block in range(sizes["depth"]) for head in range(sizes["heads"])]
    longest = int(counts_s[samples].max())
    by_token = config.keep == "tokens"
    shape = (len(heads), sizes["queries"], len(spec.layers), *([longest] if by_token else []))
    labels = {"head": heads, "layer": spec.layers}
    rounded = 0.0
    with (
        store.derive(
            config.store,
            name,
            DIMS[: 1 + len(shape)],
            (opened.plan.n_samples, *shape),
            "float16",
            coordinates=labels,
            attributes=about(probe, len(samples), by_token),
        ) as out,
        tqdm(total=len(samples), desc=name, unit="sample") as bar,
    ):
        written = 0
        for batch in opened.batches(spec.layers, spec.tokens, config.batch, samples=samples):
            values, off = _attention(probe, batch, shape)
            rounded = max(rounded, off)
            places = batch.sample.numpy()
            # Samples without states lie between those with.
            for run in np.split(np.arange(len(places)), np.flatnonzero(np.diff(places) != 1) + 1):
                _skip(out, int(places[run[0]]) - written, shape, config.batch)
                out.write(values[run])
                written = int(places[run[-1]]) + 1
            bar.update(len(places))
        _skip(out, opened.plan.n_samples - written, shape, config.batch)
    size = sum(size for size, _ in out.derived.files.values())
    print(
        f"derived/{name}: {len(samples)} samples × {shape[0]} heads × {shape[1]} queries × {shape[2]} layers"
        f"{f' × {longest} tokens' if by_token else ''}, {size / 1e6:.1f} MB; in float16 the sum over "
        f"{'layers and tokens' if by_token else 'layers'} is 1 within {rounded:.1e}"
    )


def about(probe: TrainedProbe, samples: int, by_token: bool) -> dict[str, Any]:
    """Attributes of the array: whose attention of how many samples it is, and what lies along its axes."""
    spec = probe.spec
    order = {"all": "image, then text", "image": "image", "text": "text"}.get(
        spec.tokens, f"text of kind {spec.tokens}"
    )
    told = {
        "proxy": probe.hash,
        "spec": asdict(spec),
        "seed": probe.seed,
        "run": str(probe.folder.parent.parent),
        "code": provenance.code(),
        "trained_by": probe.making.get("code"),
        "samples": samples,
        "head": "M.H: head H of proxy layer M, both from 0",
    }
    if not by_token:
        return told | {"mass": f"attention summed over the tokens that the proxy read ({order}); NaN without states"}
    return told | {
        "token": f"the tokens that the proxy read ({order}), in the order of Store.read(samples, layers, "
        f"{spec.tokens!r}); NaN past a sample's last and for samples without states",
    }


def _attention(probe: TrainedProbe, batch: Any, shape: tuple[int, ...]) -> tuple[np.ndarray, float]:
    """Attention of a batch, float16 (b, h, q, l, t), NaN where no token is; summed over t if ``shape`` has no t.

    Also how far from 1 the sums of what is kept are.
    """
    _, found_bhqlt = probe.predict_states(batch.states, batch.mask, attention=True)
    if len(shape) == 3:
        mass = found_bhqlt.sum(-1).half()
        return mass.numpy(), float((mass.float().sum(-1) - 1).abs().max())
    half = found_bhqlt.half()
    off = float((half.float().sum((-1, -2)) - 1).abs().max())
    values = np.full((len(half), *shape), np.nan, np.float16)
    values[..., : half.shape[-1]] = half.masked_fill(~batch.mask[:, None, None, None], torch.nan).numpy()
    return values, off


def _skip(out: Any, count: int, shape: tuple[int, ...], batch: int) -> None:
    """Write samples that have no attention, no more at once than a batch."""
    for start in range(0, count, batch):
        out.write(np.full((min(batch, count - start), *shape), np.nan, np.float16))


def _refuse_another_pass(opened: Any, probe: TrainedProbe) -> None:
    """Refuse states that did not come about as those that the probe was trained on, such as a control store's."""
    if opened.plan.width != probe.making["width"]:
        raise Refusal(
            f"states of {opened.place} are {opened.plan.width} wide, and probe {probe.spec.name} reads "
            f"{probe.making['width']}"
        )
    trained_on: Mapping[str, Any] = probe.making["store"]
    there, here = trained_on["identity"], dict(opened.identity)
    for key in sorted((there.keys() | here.keys()) - LAST_BITS):
        if there.get(key) != here.get(key):
            raise Refusal(
                f"states of {opened.place} are not of the pass that probe {probe.spec.name} was trained on: {key} is "
                f"{provenance.brief(here.get(key))} here and {provenance.brief(there.get(key))} there; give "
                f"{trained_on['path']} or another store of that pass"
            )


def _refuse_another_array(opened: Any, name: str, probe: TrainedProbe, samples: int) -> None:
    """Refuse a name that another array has; of the proxy's own, say that it is there, and what it lacks."""
    there = opened.derived[name].attrs
    if there.get("proxy") != probe.hash:
        whose = f"of proxy {there['proxy'][:8]}" if "proxy" in there else "no proxy's attention"
        raise Refusal(
            f"derived/{name} in {opened.place} is {whose}, not of {probe.hash[:8]}: give another --name, or "
            f"`python -m store drop {opened.place} derived/{name}` first"
        )
    print(f"derived/{name} is in {opened.place} already, of this proxy ({probe.hash[:8]})")
    if there["samples"] < samples:
        print(
            f"it has {there['samples']} of {samples} samples: `python -m store drop {opened.place} derived/{name}` "
            "and run this again for all"
        )


def _device(asked: str) -> str:
    cuda = torch.cuda.is_available()
    if asked == "cuda" and not cuda:
        raise Refusal("--device cuda: torch sees no CUDA device on this machine; --device cpu works everywhere")
    return ("cuda" if cuda else "cpu") if asked == "auto" else asked
