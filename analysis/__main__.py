"""Routes ``python -m analysis COMMAND``."""

from analysis.config import CurvesConfig
from store.commandline import route


def curves(config: CurvesConfig) -> None:
    """Draw localization error against training steps, and the final IoU, of every layer's proxy and the floors."""
    from analysis.curves import draw

    for path in draw(config):
        print(path)


if __name__ == "__main__":
    about = "Figures and numbers from a store and the proxies trained on it."
    route("python -m analysis", about, {"curves": curves})
