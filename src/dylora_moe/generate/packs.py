"""Prompt packs: a folder of texts that a user edits. Levels with persona and sampling, and what is asked.

`pack.yaml` has the levels; `instructions.txt` is the system message, the same for all rows of a level, so that a server
reads it once; `question.txt` and `again.txt` the user's, the latter where an answer did not pass. Two may be missing:
`row.txt`, what the rows of the data have as a system message, and `judge.txt`, how a model is asked for the level of an
answer. They are Jinja templates in a sandbox, and questions and answers are only ever their values.
"""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import yaml
from jinja2 import DictLoader, StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dylora_moe.data.example import Message
from dylora_moe.errors import ConfigError

PACKS = ("italian_teacher",)
_TEXTS = ("instructions", "question", "again")
_ROW, _JUDGE = "row", "judge"
# As long as questions are at most, by default, so that a text that cuts them short is found.
_PROBE, _ANSWER = " ".join(f"Question {number}?" for number in range(280)), "Answer 42."
_ENVIRONMENT = ImmutableSandboxedEnvironment(
    loader=DictLoader({}), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


class Level(BaseModel):
    """How answers of one level are asked for. Other keys of the file are values for the templates.

    Attributes:
        rows: To make where a recipe does not say it; their proportions count where it gives a total.
        max_tokens: Longest answer.
        temperature: Of sampling, 0 for the likeliest token each time.
        top_p: Share of the probability to draw from.
    """

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    rows: Annotated[int, Field(ge=0)]
    max_tokens: Annotated[int, Field(ge=1)]
    temperature: Annotated[float, Field(ge=0, le=2)]
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95

    @property
    def values(self) -> dict[str, object]:
        """What the file says for the templates."""
        return dict(self.model_extra or {})


class PackFile(BaseModel):
    """What `pack.yaml` holds.

    Attributes:
        answers_in: ISO 639-1 code of the language that answers must be in; None where any will do.
        levels: By name, the easiest first. One is enough.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    answers_in: Annotated[str, Field(pattern=r"^[a-z]{2}$")] | None = None
    levels: Annotated[dict[str, Level], Field(min_length=1)]


class Pack:
    """Levels, and messages for a question.

    Raises:
        ConfigError: A text asks for a value that no level has, or leaves the question out.
    """

    def __init__(self, name: str, file: PackFile, texts: Mapping[str, str]) -> None:
        self.name, self.answers_in, self.levels = name, file.answers_in, file.levels
        self.version = sha256(repr((file, sorted(texts.items()))).encode()).hexdigest()[:12]
        self._texts: dict[str, Template] = {}
        for part, text in texts.items():
            try:
                self._texts[part] = _ENVIRONMENT.from_string(text)
            except TemplateError as error:
                raise ConfigError(f"prompt pack {name}: {part}.txt must be a Jinja template: {error}.") from error
        probe = (Message(role="user", content=_PROBE),)
        for level in self.levels:
            for part, reasons in (("question", ""), ("again", "?")):
                if _PROBE not in self.messages(level, probe, reasons=reasons)[-1].content:
                    raise ConfigError(f"prompt pack {name}: {part}.txt must hold the question: {{{{ question }}}}.")
            self.row(level)
        if _JUDGE in texts and _ANSWER not in self.judge(probe, _ANSWER)[0].content:
            raise ConfigError(f"prompt pack {name}: {_JUDGE}.txt must hold the answer: {{{{ answer }}}}.")

    def messages(self, level: str, question: Sequence[Message], *, reasons: str = "") -> tuple[Message, ...]:
        """What is sent: the instructions of the level, then the conversation, its last turn as the pack words it.

        Args:
            level: One of `levels`.
            question: Turns, the user's last; they go in as they are, nothing in them is a template.
            reasons: Why earlier answers did not pass, in sentences; empty for the first.
        """
        *before, last = question
        given = {**self.levels[level].values, "level": level}
        asked = {**given, "question": last.content, "reasons": reasons}
        instructions = Message(role="system", content=self._render("instructions", given))
        return (
            instructions,
            *before,
            Message(role="user", content=self._render("again" if reasons else "question", asked)),
        )

    def apart(self, one: str, other: str) -> int:
        """How many levels lie from one to the other; 0 for the same."""
        names = list(self.levels)
        return abs(names.index(one) - names.index(other))

    def row(self, level: str) -> tuple[Message, ...]:
        """What stands before the conversation in the data; nothing where the pack has no text for it."""
        given = {**self.levels[level].values, "level": level}
        return (Message(role="system", content=self._render(_ROW, given)),) if _ROW in self._texts else ()

    def judge(self, question: Sequence[Message], answer: str) -> tuple[Message, ...]:
        """What is sent to ask for the level of an answer.

        Raises:
            ConfigError: The pack has no text for it.
        """
        if _JUDGE not in self._texts:
            raise ConfigError(
                f"judge needs a text that asks it: write {_JUDGE}.txt with {{{{ answer }}}} and {{{{ levels }}}} into "
                f"the prompt pack {self.name}."
            )
        values = {"question": question[-1].content, "answer": answer, "levels": list(self.levels)}
        return (Message(role="user", content=self._render(_JUDGE, values)),)

    def _render(self, part: str, values: Mapping[str, object]) -> str:
        try:
            return self._texts[part].render(values).strip()
        except Exception as error:  # jinja2's, or Python's own from an expression
            raise ConfigError(
                f"prompt pack {self.name}: {part}.txt must ask for what pack.yaml gives each level ({error})."
            ) from error


def load_pack(name: str) -> Pack:
    """A built-in pack by its name, or a folder like one.

    Raises:
        ConfigError: There is no such pack, a file is missing, or one cannot be read.
    """
    folder = files("dylora_moe.generate") / "packs" / name if name in PACKS else Path(name).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"prompts must be one of {', '.join(PACKS)}, or a folder of pack.yaml, instructions.txt, question.txt and "
            f"again.txt, got {name!r}. `dylora generate --write-prompts FOLDER` writes one to begin with."
        )
    texts = {}
    optional = [part for part in (_ROW, _JUDGE) if (folder / f"{part}.txt").is_file()]
    for file in ("pack.yaml", *(f"{part}.txt" for part in (*_TEXTS, *optional))):
        try:
            texts[file] = (folder / file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"prompt pack {name} must have a readable {file}: {error}.") from error
    try:
        values = yaml.safe_load(texts.pop("pack.yaml"))
        found = PackFile.model_validate(values)
    except yaml.YAMLError as error:
        raise ConfigError(f"prompt pack {name}: pack.yaml is not valid YAML: {error}") from error
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise ConfigError(f"prompt pack {name}: pack.yaml must have levels with rows and sampling: {told}.") from error
    return Pack(name, found, {file.removesuffix(".txt"): text for file, text in texts.items()})


def write_pack(name: str, folder: Path) -> None:
    """Copy a built-in pack into a new folder, to be edited.

    Raises:
        ConfigError: There is no such pack, or something is in the folder.
    """
    if name not in PACKS:
        raise ConfigError(f"a prompt pack to write must be one of {', '.join(PACKS)}, got {name!r}.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"a folder to write prompts into must be new or empty, and {folder} is not.")
    folder.mkdir(parents=True, exist_ok=True)
    for file in (files("dylora_moe.generate") / "packs" / name).iterdir():
        (folder / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
