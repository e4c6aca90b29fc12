"""Whether a proxy needs what it attends to: masks in the trained one, and others trained without it.

``masks``      which keys are closed, and the overlap under each mask
``masking``    what masking costs, against masks at random
``retrained``  proxies that are trained again without the layer or the tokens
``paired``     differences of the same images, with intervals, p and Holm
``words``      what it comes to, in words
``figure``     figure 8
``findings``   all of it for one study
"""
