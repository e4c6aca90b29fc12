"""Routes ``python -m edit.recipe``."""

from edit.recipe.run import recipe
from store.commandline import run

if __name__ == "__main__":
    run("python -m edit.recipe", recipe)
