"""The numbers this project answers for, as one table of ratios: ``python -m bench`` from the repository's root.

Every row is measured in one run beside a baseline that has a name, in turns, and holds the median of the repeats'
ratios with the smallest and the largest. What was measured, on which machine and at which commit is appended as data
to ``history/<date>-<machine>.json``; a rerun on the same day is one more entry of the list in that file.

``config``      what a run is asked to do, and how large its inputs are
``measure``     taking turns; a row
``pocket``      the pocket model over drawn scenes, which most rows are about
``capture``     one pass that keeps states and attention rows / the decoder alone
``extraction``  the loop of ``python -m extract`` / the model's forward, and where the rest goes
``storing``     codecs, size, writing, shuffled and cold batches, verification, opening / plain files and memory maps
``rivals``      other formats, pipelines and codecs that ``storing`` is measured beside
``sweeping``    a sweep of probes / one after the other, and the VLM run again for every batch; its reading and memory
``training``    training steps of a sweep, timed
``reference``   the proxy in plain PyTorch over a memory map, which ``sweeping`` and ``paper`` compare with
``paper``       the same at the paper's sizes, in a run of its own: ``--paper``
``analysing``   one pass over the attention mass of a whole study / reading it, in a run of its own: ``--analysis``
``machine``     what the run was on, and whether it had it for itself
``report``      the table and the history
``run``         all of it
"""
