"""What is compared: ways to edit, by what conditions the editor and whose box it sees; names of what is scored."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Method:
    """A way to edit: what conditions, and whose box is drawn."""

    way: Literal["last", "norm-average", "description", "middle"] = "last"
    box: Literal["none", "proxy", "true", "wrong"] = "none"
    about: str = ""


METHODS = {
    "plain": Method(about="last layer, no box: the editor as it is"),
    "norm-average": Method("norm-average", about="normalised states averaged over layers, no box"),
    "description": Method("description", about="the VLM writes the scene out first, no box"),
    "middle": Method("middle", about="the voted layer, no box"),
    "our-box": Method(box="proxy", about="last layer, the proxy's box from the same pass"),
    "true-box": Method(box="true", about="last layer, the true box: what a perfect proxy would reach"),
    "wrong-box": Method(box="wrong", about="last layer, the box of another object: the floor, and how far boxes steer"),
    "unedited": Method(about="the picture through the autoencoder alone: the floor of what pixels can say"),
}
STANDALONE = "standalone VLM"
"""Not an editor: the VLM, asked for the box in words."""
REFERENCE = "our-box"
"""What the others are held against."""

SUCCESS, MISLOCALIZED, RIGHT_BOX, SECONDS = "success", "mislocalized", "box on the right object", "seconds"
RIGHT = "right object"
"""It changed, and nothing else did."""
SHARES = (SUCCESS, RIGHT, MISLOCALIZED, "unchanged", RIGHT_BOX)
"""Metrics whose values are 0 or 1."""
INSTRUCTION = "instruction (0–4)"
