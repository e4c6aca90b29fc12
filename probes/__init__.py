"""Where does a VLM keep an object's place? Small proxies are trained on its stored states to say the box.

A *proxy* is a Q-Former whose cross-attention reads hidden states of a store and nothing else; how well it finds the
edited object says what the states know of its place [ABP §4.4]. One command trains one proxy per layer, one on the
prompt tokens of the middle layers together, and the floors that any claim must beat::

    python -m probes train --store STORE --out runs/probes          # --preset paper for the paper's sizes
    python -m probes evaluate --out runs/probes                     # the table again, and the verdict

The map
-------
``config``    every setting, with the presets ``pocket`` and ``paper``
``specs``     which proxies a run trains: layers, mid-layer prompt tokens, trained floors
``floors``    floors without training: mean box, centre box
``data``      scenes with a true box, and their states, from the store
``qformer``   the proxy itself, P of them stacked in one module; cross-attention a[h, q, l, i] on request
``boxes``     IoU, GIoU, distances, containment, and the loss
``learn``     the training of one stack
``train``     the command: stacks in turn, error curves, scores, results on disk, resuming
``trained``   one trained proxy on disk; ``load``
``intervals`` bootstrap over images
``evaluate``  the command: table and verdict

What a run leaves
-----------------
``results.parquet``      tidy: probe, role, layer, tokens, seed, step, metric, value, low, high, n. The metrics
                         ``error`` (the loss) and ``one_minus_iou`` follow the watched test images along the
                         steps; all others are of the whole test split at the end
``predictions.parquet``  one row per probe, seed and test image: box in [0, 1], IoU …
``probes.json``          settings, store identity, samples, versions, command
``proxies/NAME-seedK/``  weights (safetensors) and how they were made (JSON)

In Python::

    proxy = probes.load("runs/probes/proxies/mid-prompt-seed0")
    states, mask = store.open(path).read(samples, proxy.spec.layers, proxy.spec.tokens)
    boxes, attention = proxy.predict_states(states, mask, attention=True)
"""

from typing import Any

__all__ = ["TrainedProxy", "load"]


def __getattr__(name: str) -> Any:
    # On demand, so that --help does not wait for torch.
    if name not in __all__:
        raise AttributeError(f"module 'probes' has no attribute {name!r}")
    from probes import trained

    return getattr(trained, name)
