"""One forward pass of a vision-language model over (picture, instruction), its hidden states written to a store.

``python -m extract`` reads editing samples, runs the model once over each under the editing pipeline's own prompt, and
keeps the named layers of every token after the system prompt, the instruction's attention rows, and the model's own
box. What it writes is a `store`; nothing here is needed to read one.

The way through
---------------
``config``      ``ExtractConfig``: every setting, and the presets ``pocket`` and ``paper``
``control``     the ordinary samples with one thing taken away (``--control``)
``model``       a checkpoint found, loaded, and named exactly (the store's identity)
``sources``     where shards lie: a folder here, or the hub
``rows``        their rows, walked or taken by place
``omniedit``    rows of OmniEdit's columns as samples; a bad row is set aside with its reason
``planning``    one pass over the data without the model: which samples, how many tokens each
``prompts``     the editing template (the installed diffusers' own) and the grounding one
``families``    what differs between Qwen2.5-VL, Qwen3-VL, LLaVA-1.5 and InternVL-3.5
``editors``     how the image editors handle picture and prompt, asked of the installed diffusers
``sequence``    (picture, instruction) → model inputs, positions, and the table that says what each token is
``capture``     one pass: hidden states by layer name, attention rows beside SDPA attention
``decoding``    the model asked to speak: greedy answers of a batch, each as long as it need be
``boxes``       its answer as a box of the source picture, or why it is none; ``scoring`` against true ones
``loading``     loaders: ``processes`` that make rows into model inputs
``moving``      what leaves the device, beside the next pass
``pipeline``    read → prepare → run → move → write, all at once, and what is checked on the way
``workers``     which of many processes this is; ``cluster`` spreads blocks over Dask
``estimate``    sizes and time before anything is written (``--dry-run``, ``--budget``); ``summary`` afterwards
``run``         plan → pass → store → verify
``encoder``     ``Encoder``: the same pass for a picture at hand, without a store
``ground``      boxes alone, without a store (``python -m extract.ground``)

``scenes``      pictures with exact boxes, drawn here, in OmniEdit's columns (``python -m extract.scenes``)
``review``      boxes verified by a person on a local page (``python -m extract.review``)
``local_page``  what every page for a person at this machine is served by
``pocket``      a small real Qwen2.5-VL, trained here (``python -m extract.pocket``)

>>> encoder = extract.Encoder.of(store.open(path).identity)                # doctest: +SKIP
>>> states, mask = encoder.read("picture.png", "Remove the second ball from the left.", "6", "instruction")
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from extract.encoder import Encoder

__all__ = ["Encoder"]


def __getattr__(name: str) -> Any:
    # On demand, so that the --help of every command stays instant.
    if name not in __all__:
        raise AttributeError(f"module 'extract' has no attribute {name!r}")
    return getattr(importlib.import_module("extract.encoder"), name)
