"""What the states say without the model and without proxies: four questions, one read of the disk, a finding each."""

import polars as pl

import store
from analysis.config import StatesConfig
from analysis.finding import Drawn, Finding
from analysis.states import figure as states_figure
from analysis.states import lens, norms, position, similarity
from analysis.states.read import Answers, Chosen, choose, read

ONE_PICTURE = "One sample a picture is read, so that images, samples and rows are the same; intervals are over images."


def states(config: StatesConfig) -> list[Finding]:
    """Answer the four questions and draw their figures into ``config.out``.

    Returns
    -------
    list of Finding
        ``norms``, ``similarity``, ``position`` and, unless it is left out, ``lens``; not saved yet.

    Raises
    ------
    Refusal
        The split has too few samples, a store lacks them, states are not finite, or the checkpoint is another.
    """
    opened = store.open(config.store)
    control = None if config.random_weights is None else store.open(config.random_weights)
    head = None if config.no_lens else lens.Head.of(opened.identity, config.checkpoint)
    chosen = choose(opened, control, config)
    found = {"store": read(opened, chosen, chosen.rows, head, config.seed)}
    if control is not None:
        places = {name: n for n, name in enumerate(control.samples["sample_id"])}
        rows = {row: places[opened.samples["sample_id"][row]] for row in chosen.all.tolist()}
        found["random-weights"] = read(control, chosen, rows, head, config.seed)
    parts = [of_norms, of_similarity, of_position, *([] if head is None else [of_lens])]
    return [part(found, chosen, config) for part in parts]


def tagged(tables: dict[str, list[pl.DataFrame]]) -> pl.DataFrame:
    """Tables of several stores as one, the store's role in ``source``."""
    return pl.concat(
        [one.select(pl.lit(source).alias("source"), pl.all()) for source, parts in tables.items() for one in parts]
    )


def making(config: StatesConfig, chosen: Chosen) -> dict:
    """How the figures were made."""
    return {
        "store": str(config.store),
        "random_weights": config.random_weights,
        "split": config.split,
        "seed": config.seed,
        "samples": len(chosen.read),
    }


def of_norms(found: dict[str, Answers], chosen: Chosen, config: StatesConfig) -> Finding:
    """Norms, massive dimensions and register tokens."""
    table = tagged({source: answers.norms for source, answers in found.items()})
    massive = tagged({source: answers.massive for source, answers in found.items()})
    own = {name: part.filter(source="store") for name, part in (("norms", table), ("massive", massive))}
    floor = table.filter(source="random-weights") if "random-weights" in found else None
    caption = states_figure.norms(table, config.out, making(config, chosen))
    return Finding(
        "norms",
        "How long are states, and in how few dimensions does their length sit?",
        norms.answer(own["norms"], own["massive"], floor),
        (Drawn(states_figure.NORMS, caption),),
        {"layers": table, "massive": massive},
        (ONE_PICTURE, "Medians and 99th percentiles have Woodruff intervals."),
    )


def of_similarity(found: dict[str, Answers], chosen: Chosen, config: StatesConfig) -> Finding:
    """CKA between layers."""
    pairs = pl.concat([similarity.table(answers.grams, config.seed, source) for source, answers in found.items()])
    caption = states_figure.cka(pairs, config.out, making(config, chosen))
    return Finding(
        "similarity",
        "Which layers hold the same states, and where do they turn?",
        similarity.answer(pairs),
        (Drawn(states_figure.CKA, caption),),
        {"pairs": pairs},
        (
            ONE_PICTURE,
            "Intervals are jackknifes over minibatches of images.",
            "Linear CKA is led by the directions of largest variance: massive dimensions can hide all others.",
        ),
    )


def of_position(found: dict[str, Answers], chosen: Chosen, config: StatesConfig) -> Finding:
    """Where tokens say that they are."""
    absent = found["store"].absent
    told = [one for answers in found.values() for one in answers.position]
    question = "From which layer can a linear classifier read a patch's place, and the edited object's, off the states?"
    if not told:
        return Finding("position", question, position.answer(pl.DataFrame(), absent))
    table = tagged({source: answers.position for source, answers in found.items()})
    caption = states_figure.places(table, config.out, making(config, chosen))
    return Finding(
        "position",
        question,
        position.answer(table, absent),
        (Drawn(states_figure.POSITION, caption),),
        {"accuracy": table},
        (
            ONE_PICTURE,
            "The best layer is named by the images that it is reported on.",
            "What a linear classifier reads need not be used by the model.",
            "Words such as leftmost tell much of the object's cell by themselves: the embeddings are that floor.",
        ),
    )


def of_lens(found: dict[str, Answers], chosen: Chosen, config: StatesConfig) -> Finding:
    """Which word each layer would say next."""
    question = "Which word would each layer say next, read by the model's own head?"
    own = found["store"]
    if own.heard is None:
        return Finding("lens", question, "Not asked: the store names no token after another of an instruction.")
    images_n = own.spoken["sample"].rank("dense").to_numpy().astype("int64")
    tables = {source: [answers.heard.table(images_n)] for source, answers in found.items() if answers.heard is not None}
    tables["unigram"] = [lens.unigram(own.heard.next_n, own.frequent, images_n)]
    table = tagged(tables)
    shown = own.spoken.filter(pl.col("sample").is_in(own.spoken["sample"].unique(maintain_order=True)[:2].implode()))
    readings = own.heard.readings(shown.select("sample", "position", "text"))
    caption = states_figure.lens(table, readings, config.out, making(config, chosen))
    return Finding(
        "lens",
        question,
        lens.answer(table),
        (Drawn(states_figure.LENS, caption),),
        {"layers": table, "readings": readings},
        (
            ONE_PICTURE,
            "The head was trained on the last layer: what another layer knows in another basis, the lens does not see.",
            "States of random weights are read by the trained norm and head, too.",
        ),
    )
