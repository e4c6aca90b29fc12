"""The pair the other way round: the uniform picture is the source, the odd one the target."""

from PIL import Image

from edit.recipe.stages import Given, Made, Work
from extract.omniedit import BadSample

UNCHANGED = "the harmonizer changed nothing"


class Reversal:
    """The stage that turns the pair around."""

    def describe(self) -> dict:
        """It has no settings."""
        return {}

    def load(self) -> Work:
        """See the class."""
        return reverse


def reverse(given: Given) -> Made:
    """Pictures ``source`` and ``target`` of one size (raises `BadSample` where nothing distinguishes them)."""
    source, target = given.picture("harmonized"), given.picture("drawn")
    if target.size != source.size:
        target = target.resize(source.size, Image.Resampling.LANCZOS)
    if source.tobytes() == target.tobytes():
        raise BadSample(UNCHANGED)
    return Made({"width": source.width, "height": source.height}, {"source": source, "target": target})
