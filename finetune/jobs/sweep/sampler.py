"""Values of the next trial of a sweep, from the grid of all combinations or from an Optuna sampler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import product
from typing import Any

from finetune.errors import UnsupportedError
from finetune.recipe.recipe import Recipe
from finetune.recipe.sections.sweep import Choice, Integer, LogUniform, Sweep, Swept
from finetune.run.sweep_trials import Trial, Values

ATTEMPTS = 20
"""Suggestions of values that were all tried before, after which the first combination that was not is taken."""

MOST_COMBINATIONS = 100_000
"""Largest grid that is searched for a combination that was not tried."""

MAX_STARTUP_TRIALS = 10
"""Maximum number of random trials before TPE starts; a third of all trials if that is less."""


def refuse_missing_package(sweep: Sweep) -> None:
    """Check that Optuna is installed, if the sampler needs it.

    Raises:
        UnsupportedError: It is not.
    """
    if sweep.chosen_sampler != "grid" and find_spec("optuna") is None:
        raise UnsupportedError(
            "the package optuna is not installed",
            where="sweep",
            hint="pip install optuna, or ft with its extra sweep; sweep.sampler: grid needs no package",
        )


def suggest(recipe: Recipe, sweep: Sweep, trials: Sequence[Trial]) -> Values | None:
    """Values for the next trial: first the recipe's own, if they are in the search space, then the sampler's.

    The result depends on the arguments only, so a resumed sweep gets the values that it would have got.

    Args:
        recipe: The recipe with the sweep.
        sweep: Its section `sweep`.
        trials: All trials so far; none is open.

    Returns:
        The values by key; None if all combinations were tried, or a sampler suggests only values that were.
    """
    own = {swept.key: _value_at(recipe, swept.key) for swept in sweep.keys}
    if not trials and all(swept.holds(own[swept.key]) for swept in sweep.keys):
        return own
    tried = [dict(trial.values) for trial in trials]
    if sweep.combinations is not None and sweep.combinations <= len(tried):
        return None
    for attempt in range(0 if sweep.chosen_sampler == "grid" else ATTEMPTS):
        # Each attempt of each trial has a seed of its own; attempts of different trials never share one.
        values = _ask(sweep, trials, sweep.seed + len(trials) + attempt * sweep.trials)
        if values not in tried:
            return values
    return next(untried(sweep, trials), None)


def untried(sweep: Sweep, trials: Sequence[Trial]) -> Iterator[Values]:
    """The combinations of values without a trial, in the order of the grid; none of a space that is not finite."""
    if sweep.combinations is None or sweep.combinations > MOST_COMBINATIONS:
        return
    tried = [dict(trial.values) for trial in trials]
    names = [swept.key for swept in sweep.keys]
    for combination in product(*(swept.values or () for swept in sweep.keys)):
        if (values := dict(zip(names, combination, strict=True))) not in tried:
            yield values


def _ask(sweep: Sweep, trials: Sequence[Trial], seed: int) -> Values:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {swept.key: _distribution(swept) for swept in sweep.keys}
    startup_trials = min(MAX_STARTUP_TRIALS, -(-sweep.trials // 3))
    sampler = (
        optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup_trials)
        if sweep.chosen_sampler == "tpe"
        else optuna.samplers.RandomSampler(seed=seed)
    )
    study = optuna.create_study(sampler=sampler, direction="maximize" if sweep.maximizes else "minimize")
    study.add_trials(
        [
            optuna.trial.create_trial(params=dict(trial.values), distributions=distributions, value=trial.scores.mean)
            for trial in trials
            if trial.scores is not None
        ]
    )
    values: Values = study.ask(distributions).params
    return values


def _distribution(swept: Swept) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    match swept:
        case Choice():
            return CategoricalDistribution(swept.choices)
        case Integer():
            return IntDistribution(swept.low, swept.high, step=swept.step)
        case _:
            return FloatDistribution(swept.low, swept.high, log=isinstance(swept, LogUniform))


def _value_at(recipe: Recipe, key: str) -> Any:
    """A recipe's value at a dotted key; None if its kind of section has no such key."""
    found: Any = recipe.model_dump(mode="json")
    for segment in key.split("."):
        if isinstance(found, dict):
            found = found.get(segment)
        elif isinstance(found, list) and segment.isdigit() and int(segment) < len(found):
            found = found[int(segment)]
        else:
            return None
    return found
