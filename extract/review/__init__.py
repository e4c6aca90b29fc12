"""Boxes verified by a person: a local page that shows picture, instruction and box, and a file of verdicts.

``config``     ``ReviewConfig``: every setting
``pictures``   the picture of a sample, found in the data by its id
``verdicts``   the file of verdicts: its lines, its lock, reading it and putting it to use
``desk``       what lies before the person: samples, boxes, progress; what makes a verdict
``agreement``  how well the model's box agrees with the final one
``server``     what the page is served, and the command
``page/``      the page

``python -m extract.review --store STORE --data DATA``
"""
