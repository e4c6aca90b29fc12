"""Routes ``python -m analysis COMMAND``."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from analysis.config import CausesConfig, Common, CurvesConfig, MapsConfig, ReadingConfig, ReportConfig, StatesConfig
from store.commandline import route

if TYPE_CHECKING:
    from analysis.finding import Finding


def mass(config: ReadingConfig) -> None:
    """How the proxy's attention mass is spread over the layers, and each head's part in it."""
    read(config, "mass")


def heads(config: ReadingConfig) -> None:
    """Which heads of the proxy are decisive, with T chosen on one split and reported on another."""
    read(config, "decisive")


def layers(config: ReadingConfig) -> None:
    """Which layer the decisive heads vote for, how firmly, and whether seeds agree."""
    read(config, "vote")


def words(config: ReadingConfig) -> None:
    """Which tokens and words are read within l*, by part of speech."""
    read(config, "words")


def read(config: ReadingConfig, question: str) -> None:
    """Answer one question about the proxy's attention."""
    from analysis import reading
    from analysis.study import Study

    tell([getattr(reading, question)(Study(config))], config)


def maps(config: MapsConfig) -> None:
    """Where the dominant words look at l*, against chance, other layers, other words and attention rollout."""
    from analysis.maps.findings import maps
    from analysis.study import Study

    tell([maps(Study(config), config)], config)


def causes(config: CausesConfig) -> None:
    """Whether the proxy needs what it attends to."""
    from analysis.causes.findings import causes
    from analysis.study import Study

    tell([causes(Study(config), config)], config)


def states(config: StatesConfig) -> None:
    """Norms, similarity of layers, decoding of places and the logit lens, from the states alone."""
    from analysis.states.findings import states

    tell(states(config), config)


def curves(config: CurvesConfig) -> None:
    """Draw localization error against training steps, and the final IoU, of every layer's proxy and the floors."""
    from analysis.curves import draw

    for path in draw(config):
        print(path)


def report(config: ReportConfig) -> None:
    """All of it, and one page with the answers."""
    from analysis.report import report

    report(config)


def tell(findings: "Sequence[Finding]", config: Common) -> None:
    """Save findings and print their answers."""
    written = [finding.save(config.out) for finding in findings]
    if config.json:
        print(json.dumps({"findings": [finding.told(config.out) for finding in findings]}, ensure_ascii=False))
        return
    for finding, paths in zip(findings, written, strict=True):
        print(f"{finding.question}\n{finding.answer}\n")
        for caveat in finding.caveats:
            print(f"  note: {caveat}")
        for path in [*paths, *(config.out / f"{drawn.name}.png" for drawn in finding.figures)]:
            print(path)


COMMANDS = (mass, heads, layers, words, maps, causes, states, curves, report)

if __name__ == "__main__":
    about = "Answers, figures and a report from a store and the proxies trained on it."
    route("python -m analysis", about, {command.__name__: command for command in COMMANDS})
