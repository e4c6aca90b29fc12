"""The report of an evaluation, made from what it left on disk.

``command``      ``python -m edit report``; `python -m edit evaluate` ends with it
``evaluation``   what an evaluation left: scores, pictures with their boxes, verdicts of judges; checked
``findings``     the questions and their answers, with the numbers behind them
``figures``      success against damage; success by task and by number of objects
``grid``         the table: a row a method, a column a metric, each cell with its interval and its paired test
``gallery``      pictures of every method side by side, a row a scene; ``page.css`` their look
"""
