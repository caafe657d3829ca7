# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The keys that a run may not change once it has a checkpoint, and the differences of two configurations."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_selfdistill.config.key_list import keys, method_keys, sections
from megatron_selfdistill.config.methods import settings_of
from megatron_selfdistill.config.schema.field_checks import Part
from megatron_selfdistill.config.schema.method_config import FOUND, MethodSettings, Needs
from megatron_selfdistill.config.schema.whole_config import Config

BOUND, FIXED, JUDGE, FREE = "bound", "fixed", "judge", "free"

PARTS = [part for part in sections().values() if issubclass(part, Part)]
"""The classes of all sections that are no settings of a method."""
RULES: dict[str, str] = {
    **dict.fromkeys(("run_dir", "num_steps", "dry_run", "method.refresh_every"), FREE),
    # Bound if the run trains on verdicts, otherwise free.
    **dict.fromkeys(("evaluation.verifier", "evaluation.confidence"), JUDGE),
    **{name: FREE for part in PARTS for name in part.free},
    **{name: FIXED for part in PARTS for name in part.fixed},
}
"""Key, section or item of a free-form key -> rule.  The longest name that leads to a key decides.

All other keys are BOUND: the key decides what is learned, and a run resumes with another value only with
checkpoint.resume=force.
"""
KEPT = ("optimizer.lr_warmup_steps",)
"""Keys of which null means, for a run that resumes, the value of its checkpoint."""


@dataclass(frozen=True)
class KeyDifference:
    """One key that has different values in a checkpoint and in the present configuration."""

    key: str
    stored: Any
    now: Any
    rule: str
    """BOUND, FIXED or FREE."""

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.stored)} in the checkpoint, now {_shown(self.now)}"


def stored_values(config: Config) -> dict[str, Any]:
    """Return the form of a configuration in a checkpoint: its nested values, as JSON has them."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return values


def differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[KeyDifference]:
    """Return the keys with different values in two configurations, which have the form of `stored_values`.

    A key that ``stored`` lacks had its present default: the program that stored it did not know the key yet.  A key of
    `KEPT` that is null now has its stored value.  A key that this program no longer knows is not compared.
    """
    before, after = (dict(_items(values)) for values in (stored, now))
    free = _without_effect(before, after)
    found = []
    before |= {key: None for key in KEPT if after.get(key) is None}
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            found.append(KeyDifference(key, before.get(key), after.get(key), _rule(key, free)))
    return found


def rule_of(key: str) -> str:
    """Return the rule of a key, or of an item of a free-form key."""
    parts = key.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((RULES[name] for name in names if name in RULES), BOUND)


def _rule(key: str, free: Collection[str]) -> str:
    """Return the rule of a key in a run in which the keys and sections ``free`` do not decide what is learned."""
    rule = rule_of(key)
    if key in free or key.partition(".")[0] in free:
        return FREE
    return BOUND if rule == JUDGE else rule


def _without_effect(*configurations: Mapping[str, Any]) -> list[str]:
    """Return the bound keys and sections that decide nothing in all ``configurations``, each key -> value."""
    frees = [pair for part in PARTS for pair in part.frees.items()]
    found = [freed for key, freed in frees if all(values.get(key) for values in configurations)]
    needs = [_needs(values) for values in configurations]
    binds = [pair for part in PARTS for pair in part.binds.items()]
    bound = {what for key, what in binds if any(values[key] != keys()[key].default for values in configurations)}
    # Otherwise verdicts are only reported.
    if JUDGE not in bound and not any(need.rewards or need.hint == FOUND for need in needs):
        found += [key for key, rule in RULES.items() if rule == JUDGE]
    if "target" not in bound and all(need.teacher_prompt is None for need in needs):
        found.append("target")
    return found


def _needs(values: Mapping[str, Any]) -> Needs:
    return settings_of({key.partition(".")[2]: v for key, v in values.items() if key.startswith("method.")}).needs


def refusal(found: Sequence[KeyDifference], where: str) -> str | None:
    """Return the message that refuses to resume the checkpoint ``where`` with the differences ``found``.

    The message names each key with both values, and checkpoint.resume=force where that helps.  It is None if all keys
    are free.
    """
    bound = [difference for difference in found if difference.rule != FREE]
    if not bound:
        return None
    listed = "; ".join(map(str, bound))
    fixed = [difference.key for difference in bound if difference.rule == FIXED]
    advice = "set them back or choose another run_dir"
    if fixed:
        advice += f" ({', '.join(fixed)} cannot change within a run; a new run may start with checkpoint.load={where})"
    else:
        advice += (
            ", or continue from the stored weights, optimizer and teacher with the present configuration: "
            "checkpoint.resume=force"
        )
    return f"{where} was trained with another configuration: {listed}: {advice}"


def _items(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    name = str(values.get("method", {}).get("name", MethodSettings.name))
    for key, (default, *_) in {**keys(), **method_keys(name)}.items():
        value: Any = values
        for part in key.split("."):
            value = value.get(part, _MISSING) if isinstance(value, Mapping) else _MISSING
        if value is _MISSING:
            value = list(default) if isinstance(default, tuple) else default
        if isinstance(default, dict):
            yield from ((f"{key}.{name}", item) for name, item in (value or {}).items())
        else:
            yield key, value


_MISSING = object()


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
