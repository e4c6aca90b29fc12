"""Where does a VLM keep an object's place? Small proxies are trained on its stored states to say the box.

A *proxy* is a Q-Former whose cross-attention reads hidden states of a store and nothing else; how well it finds the
edited object says what the states know of its place [ABP §4.4]. One command trains one proxy per layer, one on the
prompt tokens of the middle layers together, and the floors and controls that any claim must beat, all from one pass
over the store::

    python -m probes sweep --store STORE --out runs/probes          # --preset paper for the paper's sizes
    python -m probes train --store STORE --out runs/probes --layers 6   # one probe, as the sweep trains it
    python -m probes evaluate --out runs/probes                     # the table again, and the verdict

The map
-------
``config``      every setting, with the presets ``pocket`` and ``paper``
``sweep``       the commands ``sweep`` and ``train``
``specs``       which probes a run trains: layers, middle prompt tokens, floors, controls, shares, codelengths
``targets``     what they are asked: box, grid cell, a column of the store; permuted and control labels
``study``       stores, samples and answers of a run
``data``        splits, control stores, and batches of states, each read once
``wave``        probes that are trained together, from batch to batch
``learn``       the training of one stack of probes; ``stacked`` what stacking is, ``qformer`` and ``pooled`` the kinds
``checkpoint``  how far a wave is, for a run that was stopped
``trained``     one trained probe on disk; ``load``
``provenance``  what made a run and its probes
``floors``      floors without training: mean box, centre box, most frequent class
``shifts``      probes answer for other stores
``gathering``   all tables, made of what lies in the folder; ``panel``, ``statistics``, ``tables``, ``comparisons``
``evaluate``    the command: table and ``verdict``

What a run leaves
-----------------
``results.parquet``      tidy: what the probe is, seed, data, stratum, step, metric, value, low, high, n, seeds
``comparisons.parquet``  paired comparisons of probes on the same images, corrected for their number
``predictions.parquet``  one row per probe, seed, data set and sample
``about.parquet``        one row per probe
``sweep.json``           settings, store identity, samples, versions, command
``proxies/NAME-seedK/``  weights (safetensors), how they were made (JSON), curve and predictions

In Python::

    proxy = probes.load("runs/probes/proxies/mid-prompt-seed0")
    states, mask = store.open(path).read(samples, proxy.spec.layers, proxy.spec.tokens)
    boxes, attention = proxy.predict_states(states, mask, attention=True)
"""

from typing import Any

__all__ = ["TrainedProbe", "load"]


def __getattr__(name: str) -> Any:
    # On demand, so that --help does not wait for torch.
    if name not in __all__:
        raise AttributeError(f"module 'probes' has no attribute {name!r}")
    from probes import trained

    return getattr(trained, name)
