"""Judges of an edited picture: three questions, each answered from 0 to 4, by a model or by a person.

``questions``  what is asked, what an answer has to look like, what it means and what it cost
``judge``      ``Judge``, what every judge can do; many pictures judged, with progress, as a table
``cache``      answers on the disk: what was asked once is not asked again
``endpoint``   a model behind an endpoint (see `edit.endpoints`), and what it would cost
``local``      a vision-language model on this machine
``human``      a person: which pair is when, the answers so far; ``human_page`` serves it, ``page/`` is what is seen
``agreement``  how far two judges agree
``command``    ``python -m edit judge``
"""
