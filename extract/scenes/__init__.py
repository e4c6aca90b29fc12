"""Procedural scenes in the schema of OmniEdit-Filtered: the data that needs no download, with exact boxes and masks.

``shapes``    outlines, colours, textures
``layout``    where objects stand and how they can be counted
``language``  position phrases, instructions with paraphrases, descriptions
``scene``     one scene from (seed, index, difficulty): picture before and after, boxes, masks
``shards``    rows of OmniEdit's columns, written as parquet

``python -m extract.scenes --out DIR --samples N --seed S --difficulty {easy,medium,hard,named}``
"""

from extract.scenes.scene import DIFFICULTIES, OBJECT_TASKS, TASKS, Scene, draw_scene

__all__ = ["DIFFICULTIES", "OBJECT_TASKS", "TASKS", "Scene", "draw_scene"]
