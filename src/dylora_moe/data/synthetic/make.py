"""Examples of a built-in skill: a skill's name, a count and a seed go in, distinct examples come out."""

import difflib
import random
from collections.abc import Sequence

from dylora_moe.data.example import Example, instruction_example
from dylora_moe.data.synthetic import (
    flask_apps,
    flask_routes,
    requests_reading,
    requests_sending,
    stripe_billing,
    stripe_payments,
    stripe_records,
)
from dylora_moe.data.synthetic.family import Family
from dylora_moe.errors import DataError

_FAMILIES = {
    "requests": requests_reading.FAMILIES + requests_sending.FAMILIES,
    "stripe": stripe_records.FAMILIES + stripe_payments.FAMILIES + stripe_billing.FAMILIES,
    "flask": flask_routes.FAMILIES + flask_apps.FAMILIES,
}
SKILLS: tuple[str, ...] = tuple(_FAMILIES)
# The templates and all that is made of them are this project's own text, given away.
LICENCE = "CC0-1.0"


def families(skill: str) -> tuple[Family, ...]:
    """Return the task families of a skill.

    Raises:
        DataError: There is no skill of this name.
    """
    if skill not in _FAMILIES:
        nearest = difflib.get_close_matches(skill.lower(), SKILLS, n=1, cutoff=0.0)[0]
        raise DataError(f"The skill must be one of {', '.join(SKILLS)}, got {skill!r}. Did you mean {nearest!r}?")
    return _FAMILIES[skill]


def make_examples(skill: str, *, num_examples: int, seed: int) -> list[Example]:
    """Make `num_examples` examples with pairwise distinct answers, spread evenly over the families.

    The same arguments always give the same list, in an order that mixes the families.

    Raises:
        DataError: There is no skill of this name, or it can't give that many distinct answers.
    """
    members = families(skill)
    rng = random.Random(f"{skill}/{seed}")
    counts = _spread(num_examples, [family.num_answers for family in members], skill)
    examples: list[Example] = []
    for family, count in zip(members, counts, strict=True):
        for index in rng.sample(range(family.num_answers), count):
            draft = family.draft(index, rng.randrange(len(family.phrasings)))
            examples.append(
                instruction_example(
                    draft.instruction,
                    draft.answer,
                    domain=skill,
                    source=f"synthetic:{skill}",
                    licence=LICENCE,
                )
            )
    rng.shuffle(examples)
    return examples


def _spread(num_examples: int, limits: Sequence[int], skill: str) -> list[int]:
    """Share a count as evenly as the limits allow: small families first, each its part of what is left."""
    if not 0 <= num_examples <= sum(limits):
        raise DataError(
            f"num_examples must be between 0 and {sum(limits)} for skill {skill!r}, got {num_examples}. "
            f"Ask for at most {sum(limits)}; beyond that answers would repeat."
        )
    counts = [0] * len(limits)
    left = num_examples
    for place, which in enumerate(sorted(range(len(limits)), key=limits.__getitem__)):
        counts[which] = min(limits[which], left // (len(limits) - place))
        left -= counts[which]
    return counts
