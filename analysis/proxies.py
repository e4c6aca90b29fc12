"""The proxies whose attention a store holds, found again where they were trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analysis.study import Study
from probes.trained import MAKING, TrainedProbe, load
from store.errors import Refusal


def proxy_of(attributes: Mapping[str, Any], probes: Path, device: str = "cpu") -> TrainedProbe:
    """The proxy whose attention a derived array is, from where it was trained, or else from the run in ``probes``.

    ``attributes`` are those that `python -m probes attend` gave the array.

    Raises
    ------
    Refusal
        When it is in neither place, or another one has its name there.
    """
    name = f"{attributes['spec']['name']}-seed{attributes['seed']}"
    for run in dict.fromkeys((Path(attributes["run"]), Path(probes))):
        if (run / "proxies" / name / MAKING).exists():
            probe = load(run / "proxies" / name, device)
            if probe.hash == attributes["proxy"]:
                return probe
    raise Refusal(
        f"the proxy {name} ({attributes['proxy'][:8]}) whose attention is in the store is neither in "
        f"{attributes['run']} nor in {probes}: give --probes, the folder of the run that trained it"
    )


def proxies_of(study: Study, probes: Path) -> list[TrainedProbe]:
    """The proxies of all seeds whose attention the store holds; of other seeds than the main one, those that are found.

    Raises
    ------
    Refusal
        When the main one is not found.
    """
    derived = study.opened.derived
    found = []
    for one in study.chosen.seeds:
        try:
            found.append(proxy_of(derived[one.name].attrs, probes))
        except Refusal:
            if one == study.chosen.main:
                raise
    return found
