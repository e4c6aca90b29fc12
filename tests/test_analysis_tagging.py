"""Parts of speech of instructions: one tag a word, positions first, whatever is written."""

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.tagging import TAGS, tagged, tags_of


@pytest.mark.parametrize(
    ("instruction", "tags"),
    [
        ("Remove the leftmost ball.", "verb function position noun"),
        ("Make the second red cube blue", "verb function position adjective noun adjective"),
        ("The house from the LEFT, please", "function noun function function position noun"),
        ("Put it in the top-left corner", "verb function function function noun position"),
    ],
)
def test_words_of_instructions_are_nouns_adjectives_and_positions(instruction, tags):
    found = tags_of(instruction)
    for word, tag, expected in zip(instruction.split(), found, tags.split(), strict=True):
        assert tag == expected or word in ("please", "top-left"), (word, tag)


@given(st.text(max_size=60))
def test_every_word_of_any_text_has_exactly_one_known_tag(text):
    found = tags_of(text)
    assert len(found) == len(text.split())
    assert set(found) <= set(TAGS)


def test_tokens_take_the_tag_of_their_word_and_template_tokens_their_own():
    tokens = pl.DataFrame(
        {
            "sample": [1, 1, 1, 0, 0, 0],
            "kind": ["template", *["instruction"] * 4, "image"],
            "word_index": [None, 0, 2, 1, 1, None],
        },
        schema_overrides={"word_index": pl.Int32},
    )
    found = tagged(tokens, pl.Series(["Remove leftmost ball", "Remove the ball"]))
    assert found["tag"].to_list() == ["template", "verb", "noun", "position", "position", "image"]
    assert found["sample"].to_list() == tokens["sample"].to_list()
