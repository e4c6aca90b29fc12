"""Whole editors to compare with: their diffusers pipelines, called as their authors do, under one interface.

Every pipeline is the stock code with the guidance and steps of its documentation. Three things are decided here. The
picture is handed over at a size that the pipeline neither crops nor makes square, so that a pixel of the result is
about the same place as that pixel of the picture. Those that read Qwen2.5-VL can be given its 3-D positions
(``positions="mrope"``), which diffusers 0.42 with transformers 5.3 and later leaves out. A result that is not finite
is refused, where the pipelines would hand on black.
"""

from edit.baselines.baseline import Baseline
from edit.baselines.recipes import BASELINES, Recipe

__all__ = ["BASELINES", "Baseline", "Recipe"]
