"""The recovered box steers an editor: overlay, LoRA on the diffusion transformer, two-stage inference, scores.

``overlay``      one rendering of a box on a picture, for training and inference alike
``editor``       diffusers' Qwen-Image-Edit pipeline at a working size of choice; ``frames`` makes its autoencoder quick
``conditions``   what conditions it: the last layer, an average of layers, a described scene, a middle layer
``stages``       one pass of the VLM gives the conditioning and, by the proxy, the box
``run``          ``python -m edit run``: a picture, a folder, a data set

``pairs``        pictures before and after, of a store's samples; ``cache`` their latents, encoded once
``states``       conditioning states from a store, in the order of the sequence
``train``        ``python -m edit train``: LoRA that obeys a drawn box (or every weight of a small editor);
                 ``ahead`` reads its batches while a GPU is at work, ``checkpoints`` is what it goes on from

``scores``       outside the box, aligned, by an exact judge of scenes; the table with its tests
``judges``       models and people who grade an edited picture
``endpoints``    models behind an OpenAI-compatible or Gemini endpoint: judges and the recipe's writer ask them
``evaluate``     ``python -m edit evaluate``: every conditioning and box on the same held-out scenes
``methods``      what is compared; ``report`` the page of it all (``python -m edit report``)
``gap``          ``python -m edit gap``: where the VLM says it is, against where the editor edits
``config``       the settings of every job, which are its ``--help``
``baselines``    whole editors by their own diffusers pipelines
``recipe``       ``python -m edit recipe``: the paper's data set, made anew
``pocket``       the pocket editor (``python -m edit.pocket``)
"""
