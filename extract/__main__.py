"""Routes ``python -m extract``."""

import inspect
import sys

from extract.config import ABOUT_PRESETS, ExtractConfig, choose_preset
from extract.processes import start_early
from store.commandline import finish, parse


def main() -> int:
    """Take the preset's settings, then the options, and extract."""
    preset, why = choose_preset(sys.argv[1:])
    about = (inspect.getdoc(ExtractConfig) or "") + "\n" + ABOUT_PRESETS
    config = parse(ExtractConfig, "python -m extract", about, sys.argv[1:], default=preset)
    print(why)
    start_early(config.loaders, config.limit)
    from extract.run import extract

    return extract(config)


if __name__ == "__main__":
    finish(main)
