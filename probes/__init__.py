"""Where does a VLM keep an object's place? Small probes are trained on its stored states to say the box.

The *proxy* is a Q-Former whose cross-attention reads hidden states of a store and nothing else; how well it finds the
edited object says what the states know of its place [ABP §4.4]. One command trains a proxy per layer, one on the prompt
tokens of the middle layers together, and all that a referee would hold beside them: floors, controls, matched and
simpler probes, sample efficiency, codelengths::

    python -m probes sweep --store STORE --out runs/probes          # --preset paper for the paper's sizes
    python -m probes sweep --store STORE --out runs/linear --probe linear --parts layers
    python -m probes train --store STORE --out runs/one --layers 4 5 6 --tokens text
    python -m probes evaluate --out runs/probes                     # the table again, and the verdict
    python -m probes attend --proxy runs/probes/proxies/mid-prompt-seed0 --store STORE

The map
-------
What is asked
    ``config``       every setting of every command, with the presets ``pocket`` and ``paper``
    ``specs``        which probes a sweep trains: layers, prompt tokens, floors, controls, matched, shares, codes
    ``targets``      what a probe is to say: the box, a cell of a grid, a column of the sample table
    ``boxes``        IoU, GIoU, distances, containment, and the loss
Training
    ``data``         which samples, in which order; batches of states, each read from disk once
    ``marked``       prompt tokens that a probe is trained without
    ``stacked``      P probes of one shape in stacked tensors, each computed as if it were alone
    ``qformer``      the proxy; its cross-attention a[h, q, l, i] on request
    ``pooled``       simpler probes: linear, MLP, attention pooling
    ``learn``        schedule, loss and steps of one stack
    ``study``        stores, samples and answers of a run
    ``wave``         probes that are trained together, from batch to batch; ``sweep`` the commands
    ``checkpoint``   what a killed run goes on from; ``malloc`` keeps freed memory for the next step
    ``provenance``   what made a run and each probe, and what is on disk already
Results
    ``predictions``  one row a probe, seed, data set and sample
    ``shifts``       trained probes answer for other stores
    ``floors``       answers without training: the mean box, the centre box, the commonest class
    ``gathering``    the tables of a run, made of what its folder holds
    ``panel``        predictions as arrays of one value per metric, seed and image
    ``statistics``   intervals over seeds and images, paired tests, corrections
    ``tables``       tidy results, overall and by stratum; ``comparisons`` pairs them, claim by claim
    ``verdict``      what they say, in sentences; ``evaluate`` prints table and verdict
A probe that is trained
    ``trained``      its folder; ``load``, ``predict_states`` and ``predict``, from a picture to an answer
    ``attend``       the command: a proxy's attention for every sample, written back into the store

What a run leaves
-----------------
``results.parquet``      tidy: value, low, high and n per probe, seed (null: over all), data, stratum, step and metric
``comparisons.parquet``  probes against each other on the same images: difference, interval, p, corrected p
``predictions.parquet``  one row per probe, seed and test image: box in [0, 1], class or number, and the true one
``about.parquet``        one row per probe: role, layers, tokens, kind, target, labels, source, share, keys …
``floors.parquet``       what answers without training say; ``data/`` has the samples that were asked about
``sweep.json``           settings, store identity, samples, code, versions, command
``proxies/NAME-seedK/``  a probe each: ``probe.safetensors`` (weights), ``probe.json`` (spec, seed, all that made it,
                         sha256 of the weights), ``curve.parquet`` (errors along the steps), ``predictions.parquet``

In Python::

    proxy = probes.load("runs/probes/proxies/mid-prompt-seed0")
    x1, y1, x2, y2 = proxy.predict("picture.png", "Remove the leftmost ball.")     # pixels of the upright picture
    states, mask = store.open(path).read(samples, proxy.spec.layers, proxy.spec.tokens)
    boxes, attention = proxy.predict_states(states, mask, attention=True)          # boxes in [0, 1]

    s = store.open(path)                       # after `python -m probes attend`: (sample, head, query, layer, token)
    mass = s.derived[f"attention-mid-prompt-seed0-{proxy.hash[:8]}"].astype("float32").sum("token")
"""

from typing import Any

__all__ = ["TrainedProbe", "load"]


def __getattr__(name: str) -> Any:
    # On demand, so that --help does not wait for torch.
    if name not in __all__:
        raise AttributeError(f"module 'probes' has no attribute {name!r}")
    from probes import trained

    return getattr(trained, name)
