"""What part of speech each word of an instruction is: nouns, adjectives, positions …

Parts of speech are told by TextBlob's pattern tagger, a lexicon with rules after Brill (1992) that comes with the
package. A position is no part of speech ("left" may be verb, noun or adjective), so its words are a closed list, which
goes before the tagger.
"""

import re
from functools import lru_cache

import polars as pl

from store.tokens import PUNCTUATION

_POSITIONS = """
    left leftmost right rightmost top topmost uppermost upper bottom bottommost lowermost lower above
    below under underneath over beside next near nearest close closest far farthest furthest front back
    behind between middle center centre central corner corners edge side row column inside outside first
    second third fourth fifth sixth seventh eighth ninth tenth last end north south east west foreground
    background
"""
POSITIONS = frozenset(_POSITIONS.split())
"""Words that say where, ordinals included: they count along a direction."""

TAGS = ("position", "noun", "adjective", "verb", "function", "template", "image")
"""All tags: function is any other word (articles, prepositions, pronouns …), template any text token of no word."""

_BY_PREFIX = {"NN": "noun", "JJ": "adjective", "VB": "verb", "MD": "verb"}


@lru_cache(maxsize=65_536)
def tags_of(instruction: str) -> tuple[str, ...]:
    """One tag for every word of an instruction, words as white space parts them."""
    from textblob.en.taggers import PatternTagger

    words = [word.strip(PUNCTUATION) for word in instruction.split()]
    if not words:
        return ()
    # Words stay one each: what the tagger would split, or a word of punctuation alone, gets a stand-in.
    plain = [word if word.isalnum() else re.sub(r"[\W_]+", "", word) or "a" for word in words]
    told = PatternTagger().tag(" ".join(plain), tokenize=False)
    return tuple(
        "position" if word.lower() in POSITIONS else _BY_PREFIX.get(tag[:2], "function")
        for word, (_, tag) in zip(words, told, strict=True)
    )


def tagged(tokens: pl.DataFrame, instructions: pl.Series) -> pl.DataFrame:
    """A token table (columns ``sample``, ``kind``, ``word_index``) with the column ``tag``, one of `TAGS`.

    ``instructions`` are those of all samples, by row of the samples table.
    """
    samples = tokens["sample"].unique().to_list()
    lists = {sample: tags_of(instructions[sample]) for sample in samples}
    rows = pl.DataFrame(
        {"sample": list(lists), "tag": [list(tags) for tags in lists.values()]},
        schema={"sample": tokens["sample"].dtype, "tag": pl.List(pl.String)},
    )
    rows = rows.with_columns(word_index=pl.int_ranges(pl.col("tag").list.len(), dtype=tokens["word_index"].dtype))
    rows = rows.explode("tag", "word_index")
    found = tokens.join(rows, on=["sample", "word_index"], how="left", maintain_order="left")
    wordless = pl.when(pl.col("kind") == "image").then(pl.lit("image")).otherwise(pl.lit("template"))
    return found.with_columns(pl.col("tag").fill_null(wordless))
