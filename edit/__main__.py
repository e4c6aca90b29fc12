"""Routes ``python -m edit``; each job's code is imported when it is asked for, so that ``--help`` stays instant."""

from edit.config import EvaluateConfig, GapConfig, ReportConfig, RunConfig, TrainConfig
from edit.judges.config import JudgeConfig
from edit.recipe.config import RecipeConfig
from store.commandline import route


def train(config: TrainConfig) -> None:
    """`edit.train.train`"""
    from edit.train import train

    train(config)


def run(config: RunConfig) -> int:
    """`edit.run.run`"""
    from edit.run import run

    return run(config)


def evaluate(config: EvaluateConfig) -> int:
    """`edit.evaluate.evaluate`"""
    from edit.evaluate import evaluate

    return evaluate(config)


def report(config: ReportConfig) -> None:
    """`edit.report.command.report`"""
    from edit.report.command import report

    report(config)


def gap(config: GapConfig) -> int:
    """`edit.gap.gap`"""
    from edit.gap import gap

    return gap(config)


def judge(config: JudgeConfig) -> int | None:
    """`edit.judges.command.judge`"""
    from edit.judges.command import judge

    return judge(config)


def recipe(config: RecipeConfig) -> int | None:
    """`edit.recipe.run.recipe`"""
    from edit.recipe.run import recipe

    return recipe(config)


if __name__ == "__main__":
    route(
        "python -m edit",
        "The recovered box steers an editor: LoRA, two-stage inference, scores.",
        {
            "train": train,
            "run": run,
            "evaluate": evaluate,
            "report": report,
            "gap": gap,
            "judge": judge,
            "recipe": recipe,
        },
    )
