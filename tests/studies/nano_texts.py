"""Eight short novels and eight modules that share no sentence: enough text for a vocabulary of a few hundred tokens."""

from __future__ import annotations

import random

_NAMES = ["Anna", "Bertram", "Clara", "Dorian", "Emily", "Frederick", "Grace", "Henry"]
_PLACES = ["harbour", "meadow", "library", "kitchen", "station", "orchard", "chapel", "market"]
_VERBS = ["carried", "remembered", "painted", "counted", "followed", "forgave", "measured", "answered"]
_THINGS = ["letters", "lanterns", "ledgers", "umbrellas", "ribbons", "horses", "clocks", "violins"]
_HOW = [
    "slowly",
    "gladly",
    "twice",
    "silently",
    "before",
    "dawn",
    "without",
    "a",
    "word",
    "after",
    "supper",
    "in",
    "the",
    "rain",
]


def _novel(seed: int) -> str:
    draw = random.Random(seed).choice
    return "\n\n".join(
        " ".join(
            f"{draw(_NAMES)} {draw(_VERBS)} the {draw(_THINGS)} at the {draw(_PLACES)} {draw(_HOW)}, and {draw(_NAMES)} "
            f"{draw(_VERBS)} {draw(_HOW)} what the {draw(_PLACES)} had lost."
            for _ in range(4)
        )
        for _ in range(12)
    )


def _module(seed: int) -> str:
    draw = random.Random(100 + seed).choice
    return "\n\n".join(
        f"def {draw(_VERBS)}_{draw(_THINGS)}_{i}({draw(_THINGS)}, {draw(_PLACES)}=None):\n"
        f'    """The {draw(_PLACES)} of {draw(_THINGS)}, {draw(_HOW)}."""\n'
        f"    for {draw(_NAMES).lower()} in {draw(_THINGS)}:\n"
        f"        {draw(_PLACES)}.{draw(_VERBS)}({draw(_NAMES).lower()}, {draw(_THINGS)}=True)\n"
        f"    return {draw(_PLACES)}\n"
        for i in range(14)
    )


PROSE = {f"novel-{i}": _novel(i) for i in range(8)}
CODE = {f"module_{i}.py": _module(i) for i in range(8)}
