"""Which family a model is of, by its name: a model that learns from its own kind learns its habits again."""

import re
from collections.abc import Callable

from dylora_moe.errors import ConfigError

# Word in a name -> family; the first that is found counts, so what is built on another comes first.
_FAMILIES = (
    ("minerva", "Minerva"),
    ("smollm", "SmolLM"),
    ("codegemma", "Gemma"),
    ("gemma", "Gemma"),
    ("codellama", "Llama"),
    ("tinyllama", "Llama"),
    ("vicuna", "Llama"),
    ("llama", "Llama"),
    ("mixtral", "Mistral"),
    ("codestral", "Mistral"),
    ("mistral", "Mistral"),
    ("ministral", "Mistral"),
    ("magistral", "Mistral"),
    ("devstral", "Mistral"),
    ("zephyr", "Mistral"),
    ("pythia", "Pythia"),
    ("bloom", "BLOOM"),
    ("qwq", "Qwen"),
    ("qwen", "Qwen"),
    ("phi", "Phi"),
    ("deepseek", "DeepSeek"),
    ("falcon", "Falcon"),
    ("olmo", "OLMo"),
    ("granite", "Granite"),
    ("gpt-oss", "GPT"),
    ("gpt", "GPT"),
    ("claude", "Claude"),
    ("gemini", "Gemini"),
    ("command", "Command"),
    ("yi", "Yi"),
)


def family_of(name: str) -> str | None:
    """The family of a model, by the last part of its name; None for one that is not known."""
    last = name.rstrip("/").rsplit("/", maxsplit=1)[-1].lower()
    words = " ".join(re.findall(r"[a-z]+|\d+|[^a-z\d]", last))
    for word, family in _FAMILIES:
        if word in last if len(word) > 3 else re.search(rf"(?<![a-z]){re.escape(word)}(?![a-z])", words):
            return family
    return None


def check_families(
    generator: str, base: str | None, *, allowed: bool, tell: Callable[[str], None] = lambda line: None
) -> None:
    """See that the generator is of another family than the base that will be trained.

    Source: the founding documents, the second version of the teacher: a model trained on answers of its own kind learns
    its patterns, formulas and biases once more.

    Raises:
        ConfigError: It is of the same family, and that was not allowed.
    """
    if base is None or allowed:
        return
    one, other = family_of(generator), family_of(base)
    if generator == base or (one is not None and one == other):
        raise ConfigError(
            f"generator must be of another family than the base it writes for, got {generator} and {base}, both "
            f"{one or generator}. A model that learns from its own kind learns its own habits again. Take another "
            "generator, or set allow_same_family: true."
        )
    if one is None or other is None:
        unknown = " and ".join(name for name, family in ((generator, one), (base, other)) if family is None)
        tell(f"The family of {unknown} is not known by its name: see for yourself that generator and base are of two.")
