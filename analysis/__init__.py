"""What the proxies found: figures, each beside its numbers and the command that made it.

::

    python -m analysis curves --probes runs/probes --out figures

The map
-------
``config``  settings of every command
``curves``  figure 1: localization error against training steps, and final IoU per layer
``style``   the look that all figures share, direct labels, and how a figure is saved
"""
