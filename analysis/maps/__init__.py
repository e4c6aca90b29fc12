"""Where the dominant words look at l*: the VLM's own attention rows laid on the picture, and scored.

``rows``      attention rows of samples, read from a store, with the tokens they belong to
``scores``    pointing game and energy in the box for every sample, at l*, elsewhere and at random
``rollout``   attention multiplied up the blocks
``tables``    what the scores come to: paired differences, strata, the answer in words
``pictures``  the pictures of samples
``figure``    figure 4: scores block by block, and examples
``gallery``   thumbnails for the report
``findings``  all of it for one study
"""
