"""Routes ``python -m edit``."""

from edit.evaluate import evaluate
from edit.gap import gap
from edit.judges.command import judge
from edit.run import run
from edit.train import train
from store.commandline import route

if __name__ == "__main__":
    route(
        "python -m edit",
        "The recovered box steers an editor: LoRA, two-stage inference, scores.",
        {"train": train, "run": run, "evaluate": evaluate, "gap": gap, "judge": judge},
    )
