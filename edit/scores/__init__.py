"""Scores of edited pictures: what changed outside the box, whether the right thing changed, and the table of it all.

``outside``      LPIPS and L2 outside a box, LPIPS with both ways of masking
``alignment``    the editor's own shift and zoom estimated and undone: corrected scores beside the raw ones
``scene_judge``  the exact judge of drawn scenes: which objects changed, and the three questions on 0–4
``closing``      the share of the gap between the plain editor and the true box that our box closes, and why not more
``table``        mean ± SEM with intervals, paired tests with Holm's correction, Markdown

One edited picture::

    from edit.scores.alignment import aligned
    from edit.scores.outside import Perception
    from edit.scores.scene_judge import SceneJudge

    perception = Perception("alexnet.safetensors")   # or Perception(): a random trunk, no published metric
    scored = aligned(source, edited, box, perception)
    scored.raw.l2, scored.raw.lpips_filled, scored.raw.lpips_map, scored.corrected.l2, scored.shift, scored.zoom
    verdict = SceneJudge.of_row(row)(edited)         # a row of `python -m extract.scenes`
    verdict.success, verdict.mislocalized, verdict.instruction, verdict.accuracy, verdict.leakage

and many, as a long frame of ``sample``, ``method``, ``metric`` and ``value``::

    from edit.scores import table

    shares = ["success"]
    print(table.markdown(table.summary(frame, shares), table.comparisons(frame, "our box", shares)))

L2 is the mean squared difference of RGB values in 0 … 1, as in the paper (0.0070 with its box against 0.0122 without).
LPIPS is ``filled`` (the box is filled with grey in both pictures) or ``map`` (mean of the spatial map over the pixels
outside); the paper does not say which it means, and they are not comparable with each other: ``filled`` has the box's
positions, which are 0, in its mean, and ``map`` feels what changed within near the box's edge.
"""
