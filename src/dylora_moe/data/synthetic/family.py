"""A family of synthetic tasks: one kind of request and its solution, as templates over lists of words.

Every combination of words is one draft with its own answer, so a family can be counted and indexed.
"""

import math
import random
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from string import Template


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """One task: what a developer asks, the code that answers it, and the words both were filled with."""

    instruction: str
    answer: str
    parameters: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Templates (`string.Template`) of one kind of task.

    Attributes:
        name: Unique within its skill.
        choices: Placeholder -> the words it may take. A key `a|b` fills two placeholders together,
            from words of the form `x|y`.
        phrasings: Ways to ask; each names every word that the solution needs.
        solution: Python source; common indentation and outer blank lines are dropped.
    """

    name: str
    choices: Mapping[str, tuple[str, ...]]
    phrasings: tuple[str, ...]
    solution: str

    @property
    def num_answers(self) -> int:
        """How many distinct answers the family can give."""
        return math.prod(len(words) for words in self.choices.values())

    def draft(self, index: int, phrasing: int) -> Draft:
        """Fill the templates with combination `index` of the words, asked in the given phrasing."""
        parameters = self._parameters(index)
        return Draft(
            instruction=Template(self.phrasings[phrasing]).substitute(parameters),
            answer=Template(textwrap.dedent(self.solution).strip()).substitute(parameters),
            parameters=parameters,
        )

    def build(self, rng: random.Random) -> Draft:
        """Draw one draft at random."""
        return self.draft(rng.randrange(self.num_answers), rng.randrange(len(self.phrasings)))

    def _parameters(self, index: int) -> dict[str, str]:
        """Read `index` as a number whose digits, one a choice, say which word is taken."""
        parameters: dict[str, str] = {}
        for names, words in self.choices.items():
            index, digit = divmod(index, len(words))
            parameters.update(zip(names.split("|"), words[digit].split("|"), strict=True))
        return parameters
