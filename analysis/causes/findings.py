"""Whether the proxies of a study need what they attend to."""

from analysis.causes import masking
from analysis.config import CausesConfig
from analysis.finding import Finding
from analysis.proxies import proxies_of
from analysis.study import Study


def causes(study: Study, config: CausesConfig) -> Finding:
    """Whether the proxy needs what it attends to: masks, and proxies that were trained again without it."""
    voting = study.deciding(study.chosen.seeds)
    proxies = [probe for probe in proxies_of(study, config.probes) if probe.seed in {one.seed for one in voting}]
    votes = study.voted_by([one for one in voting if one.seed in {probe.seed for probe in proxies}])
    top = study.ranked_tokens(everyone=config.retrain)
    return masking.finding(study.opened, proxies, votes, top, config)
