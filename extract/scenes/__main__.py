"""Routes ``python -m extract.scenes``."""

from extract.scenes.shards import write_scenes
from store.commandline import run

if __name__ == "__main__":
    run("python -m extract.scenes", write_scenes)
