"""Routes ``python -m edit.pocket``."""

from edit.pocket.build import build
from edit.pocket.vae import train_vae
from store.commandline import route

if __name__ == "__main__":
    route(
        "python -m edit.pocket",
        "The pocket editor: a real, small Qwen-Image-Edit, trained here.",
        {"vae": train_vae, "build": build},
    )
