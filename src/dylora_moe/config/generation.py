"""Settings of making data with a second model: what is asked, of whom, how often, and what must hold of an answer."""

from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dylora_moe.config.advice import Advice
from dylora_moe.config.data import DATASET_KEYS

KEEP_ANSWERS = "keep_answers"
"""Key of a `questions` entry beside those of a data set: whether what people answered is kept, too."""
QUESTION_KEYS = (*DATASET_KEYS, KEEP_ANSWERS)


def _is_address(url: str) -> bool:
    if not url.isprintable() or any(char.isspace() for char in url):
        return False
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets or a port that are none
        return False


class QuestionSettings(BaseModel, use_attribute_docstrings=True):
    """What is asked, and at which level."""

    questions: Annotated[
        tuple[str | dict[str, Any], ...],
        Advice(
            values="a list of at least one name, path or mapping",
            note="As in datasets; keep_answers: true in a mapping keeps what people answered, beside what is "
            "generated. Of plain text each row is a question.",
        ),
    ] = Field(default=(), min_length=0)
    """Where questions come from: registry names, paths or mappings (those of datasets, and keep_answers)."""

    max_question_chars: Annotated[
        int, Advice(unit="characters", note="All turns of a conversation together; longer ones are left out, counted.")
    ] = Field(default=4000, ge=1)
    """Longest question."""

    prompts: Annotated[
        str,
        Advice(
            values="italian_teacher or a folder",
            note="`dylora generate --write-prompts FOLDER` writes a folder to begin with.",
        ),
    ] = "italian_teacher"
    """Prompt pack: levels with personas and sampling, and the texts of what is sent."""

    levels: Annotated[
        dict[str, int] | None,
        Advice(values="names of levels of the pack with whole numbers", note="As a flag: A1=40,B2=20."),
    ] = None
    """Rows of each level; those of the pack when not given."""

    total: Annotated[int | None, Advice(unit="rows", note="Keeps the proportions of levels.")] = Field(
        default=None, ge=1
    )
    """Rows in all; as many as levels says when not given."""


class GeneratorSettings(BaseModel, use_attribute_docstrings=True):
    """Who answers."""

    generator: Annotated[
        str, Advice(note="With endpoints, as the servers call it; without, as base_model: it runs in this process.")
    ] = "pypi:smollm2"
    """The model that writes answers."""

    endpoints: Annotated[
        tuple[str, ...],
        Advice(values="a list of addresses such as http://localhost:8000/v1", note="As a flag: a,b,c."),
    ] = ()
    """Servers with OpenAI's chat interface, all with the same model; none to run it in this process."""

    api_key_variable: Annotated[
        str, Advice(values="the name of an environment variable", note="The key itself is in no file.")
    ] = Field(default="OPENAI_API_KEY", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Environment variable with the key of the servers."""

    for_base: Annotated[str | None, Advice(note="A recipe names it so that generator and base cannot be one kind.")] = (
        None
    )
    """The base that will learn from what is written; one of the generator's family is refused."""

    allow_same_family: bool = False
    """Take a generator of the family of for_base all the same."""

    in_flight: Annotated[
        int,
        Advice(
            unit="requests",
            high=256,
            more="a busier server, up to what it can take",
            less="a server that waits",
            note="Over all endpoints together.",
        ),
    ] = Field(default=64, ge=1)
    """Requests at a time to endpoints."""

    requests_per_minute: Annotated[float | None, Advice(unit="requests a minute")] = Field(default=None, gt=0)
    """Most requests a minute to endpoints; no limit when not given."""

    timeout: Annotated[float, Advice(unit="seconds")] = Field(default=120.0, gt=0)
    """Longest wait for one answer of an endpoint."""

    max_tries: Annotated[int, Advice(unit="requests", note="A server that is down altogether does not count.")] = Field(
        default=6, ge=1
    )
    """Failed requests in a row after which a row is set aside."""

    patience: Annotated[float, Advice(unit="seconds", note="Meanwhile one request at a time asks again.")] = Field(
        default=900.0, ge=0
    )
    """How long endpoints may be down before the run stops; the same command goes on."""

    generation_batch_size: Annotated[int, Advice(unit="rows", high=64)] = Field(default=8, ge=1)
    """Answers written at a time by a model in this process."""

    input_price: Annotated[float, Advice(unit="a million tokens")] = Field(default=0.0, ge=0)
    """Price of tokens that an endpoint reads, in any currency."""

    output_price: Annotated[float, Advice(unit="a million tokens")] = Field(default=0.0, ge=0)
    """Price of tokens that it writes."""


class KeepSettings(BaseModel, use_attribute_docstrings=True):
    """What is kept of what was written."""

    levelled_text: Annotated[
        str | None,
        Advice(
            values="a data file with columns text and level",
            note="Five texts of twelve words and more for each level at least; hundreds make a surer scale. Needs "
            "wordfreq (the extra `levels`).",
        ),
    ] = None
    """Texts whose levels are known, from which bands are learned that say the level of an answer; not given: levels are
    not checked."""

    word_levels: Annotated[
        str | None,
        Advice(values="a data file with columns word and level", note="Only with levelled_text."),
    ] = None
    """Words whose levels are known, which tell the level of an answer beside what else is counted in it."""

    level_tolerance: Annotated[int, Advice(unit="levels", note="Only with levelled_text or a judge.")] = Field(
        default=1, ge=0
    )
    """How many levels an answer may be off what was asked for; one of fewer than twelve words is not judged."""

    judge: Annotated[
        str | None,
        Advice(
            note="With judge_endpoints, as the servers call it; without, as base_model: it runs in this process. "
            "Answers that are more than level_tolerance levels off are asked for anew; those it names no level of stay."
        ),
    ] = None
    """A model that is asked for the level of every answer that passed; not given: none is asked."""

    judge_endpoints: Annotated[
        tuple[str, ...], Advice(values="a list of addresses such as http://localhost:8001/v1", note="As a flag: a,b,c.")
    ] = ()
    """Servers of the judge, with the same key; none to run it in this process."""

    max_regenerations: Annotated[int, Advice(unit="answers", note="Each is asked for with the reason.")] = Field(
        default=2, ge=0
    )
    """New answers for a row whose answer does not pass, before it is set aside."""

    keep: Annotated[
        Literal["pass", "all"], Advice(note="all keeps rows that did not pass, marked with the reasons.")
    ] = "pass"
    """Which rows the data hold: those that passed, or all that have an answer."""

    validation_split: Annotated[float, Advice(unit="share of the questions")] = Field(default=0.1, gt=0, lt=1)
    """Share of the questions whose rows are kept for validation."""

    output_dir: Path = Path("runs")
    """Folder in which run folders are made."""

    run_name: Annotated[
        str,
        Advice(
            values="letters, digits, dots, hyphens and underscores, beginning with a letter or a digit",
            note="A recipe without one has its file's name. The same name continues the run.",
        ),
    ] = Field(default="generated", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder in output_dir."""

    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the plan, of sampling and of the split."""


class GenerateConfig(KeepSettings, GeneratorSettings, QuestionSettings):
    """A complete generation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("endpoints", "judge_endpoints")
    @classmethod
    def _check_endpoints(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for url in value:
            if "@" in url:
                raise ValueError(
                    "must be addresses without a name or a password, which would stand in files and logs; a key is "
                    "read from the environment variable that api_key_variable names"
                )
            if not _is_address(url):
                raise ValueError(f"must be addresses such as http://localhost:8000/v1, got {url!r}")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> "GenerateConfig":
        if not self.questions:
            raise ValueError("questions must be given, got none. Give a list of data sets, such as [cima].")
        if self.levels is not None and (
            not self.levels or min(self.levels.values()) < 0 or not any(self.levels.values())
        ):
            raise ValueError(f"levels must have rows, and none fewer than 0, got {self.levels}.")
        if self.judge_endpoints and self.judge is None:
            raise ValueError("judge_endpoints needs judge, the name of the model that they have, got none.")
        if self.word_levels is not None and self.levelled_text is None:
            raise ValueError(
                "word_levels needs levelled_text, from which bands are learned, got none. docs/generate.md says how to "
                "make one from a list of words."
            )
        return self

    @property
    def run_dir(self) -> Path:
        """Folder of this run."""
        return self.output_dir / self.run_name
