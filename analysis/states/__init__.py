"""What a store's states say by themselves, without a proxy: four questions on one read of the disk.

``read``        the read, shared by all
``norms``       lengths of states, massive dimensions, register tokens
``similarity``  CKA between layers
``position``    a linear decoder of places
``lens``        the logit lens: the decoder's norm and head on every layer
``figure``      figure 7 of each
``findings``    the answers
"""
