"""Settings of the data: which, how much of it, in which mixture, and what of it is learned."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PositiveFloat

from dylora_moe.config.advice import Advice


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSpec:
    """One entry of `datasets` where a name or a path alone does not say enough.

    Attributes:
        name: A name in the registry; it gives the defaults of all that follows.
        path: A file or folder to read instead of downloading.
        domain: The skill that the examples belong to; default: the name, or the stem of the path.
        format: A known row format; default: the registry's, or found by the columns.
        num_examples: How many training examples: made (synthetic, default 300) or drawn (default all).
        licence: SPDX identifier; default: the registry's, or unknown.
        on_bad_row: `stop` with an error that names the rows, or `skip` and count them.
        columns: Field of the format -> column of the data, where they differ: {prompt: question, answer: reply}.
        keep_all: Use all rows of a registry entry, also those that its filter leaves out.
        part: Use one of several random parts of the training rows that share none: `2/3` for the second of three. A
            built-in set makes `num_examples` in all, of which this is a part; of others they are drawn from the part.
    """

    name: str | None = None
    path: str | None = None
    domain: str | None = None
    format: str | None = None
    num_examples: int | None = None
    licence: str | None = None
    on_bad_row: Literal["stop", "skip"] = "stop"
    columns: Mapping[str, str] | None = None
    keep_all: bool = False
    part: str | None = None


DATASET_KEYS = tuple(field.name for field in fields(DatasetSpec))


class DataSettings(BaseModel, use_attribute_docstrings=True):
    """What is trained on."""

    datasets: Annotated[
        tuple[str | dict[str, Any], ...],
        Advice(
            values="a list of at least one name, path or mapping",
            note="Each data set is a domain with a validation loss of its own. `dylora data list` shows the names, "
            "docs/datasets.md the keys of a mapping.",
        ),
    ] = Field(default=("requests", "stripe", "flask"), min_length=1)
    """Data sets: registry names, paths, or mappings (name, path, domain, format, num_examples). As a flag: a,b,c."""

    data_registry: Annotated[
        str | dict[str, dict[str, Any]] | None,
        Advice(
            values="a YAML file, or entries by name", note="Adds to the names that there are, and may replace them."
        ),
    ] = None
    """Own data sets to name in datasets: a YAML file of entries (docs/datasets.md), or the entries themselves."""

    validation_split: Annotated[
        float,
        Advice(
            unit="share of the prompts",
            low=0.1,
            high=0.2,
            more="surer validation losses, fewer rows to learn from",
            less="more rows to learn from, validation losses that chance moves",
            note="Split by prompt, so that no prompt is on both sides.",
        ),
    ] = Field(default=0.1, gt=0, lt=1)
    """Share of the prompts of each data set that is kept for validation where it has no official split."""

    training_subset: Annotated[
        float | None,
        Advice(
            unit="percent",
            more="better learning, longer epochs",
            less="quicker trials, sooner overfitting",
            note="10 is enough for a quick test.",
        ),
    ] = Field(default=None, gt=0, le=100)
    """Percent of the training rows to use; all when not given."""

    eval_subset: Annotated[
        float | None,
        Advice(
            unit="percent",
            more="surer validation losses, slower evaluation",
            less="faster evaluation, losses that chance moves",
            note="20 is enough for a quick test.",
        ),
    ] = Field(default=None, gt=0, le=100)
    """Percent of the validation rows to use; all when not given."""

    interleaved_sampling: Annotated[
        bool, Advice(note="For two domains only. Excludes domain_weights and sampling_temperature.")
    ] = False
    """Draw from two domains in turn, half and half, the smaller one repeated until every row of the larger came."""

    domain_weights: Annotated[
        dict[str, PositiveFloat] | None,
        Advice(
            values="names of domains with numbers above 0",
            note="Excludes interleaved_sampling and sampling_temperature.",
        ),
    ] = Field(default=None, min_length=1)
    """Share of an epoch's rows for each domain, by name; only the ratios matter. As a flag: code=2,maths=1."""

    sampling_temperature: Annotated[
        float,
        Advice(
            low=1,
            high=5,
            more="more even domains, rows of small ones repeated more often",
            less="domains in proportion to their rows",
            note="Excludes interleaved_sampling and domain_weights. Not that of the router, nor of generated text.",
        ),
    ] = Field(default=1.0, ge=1)
    """T in shares of n^(1/T) for a domain of n rows: 1 draws rows as they are, 2 to 5 help small domains."""

    max_length: Annotated[
        int,
        Advice(
            unit="tokens",
            low=128,
            high=2048,
            more="more memory and time for each row",
            less="more rows too long, see overlong",
            note="Take the least that the data need: `dylora data inspect` shows the lengths.",
        ),
    ] = Field(default=1024, ge=8)
    """Longest row in tokens, prompt and answer together."""

    overlong: Annotated[
        Literal["error", "drop", "truncate", "split"],
        Advice(note="A row that was cut never learns its end; drop loses the row, split keeps all of it."),
    ] = "error"
    """What becomes of rows longer than max_length: an error that names the length that fits, nothing (they are left
    out), their beginning, or several rows."""

    learn: Annotated[
        Literal["answers", "last_answer", "all"],
        Advice(note="last_answer where a data set gives each turn of a conversation as a row of its own."),
    ] = "answers"
    """Which tokens are learned: every answer of a conversation, its last answer, or all of its text but the first 16
    tokens, which decide its expert."""

    chat_template: Annotated[
        str | None,
        Advice(
            values="plain or a file", note="Saved with the model, since what was trained with must be used afterwards."
        ),
    ] = None
    """Template of conversations: plain for ours, or a file; not given: the base's own, or ours where it has none."""

    packing: Annotated[
        bool,
        Advice(note="Pays on a GPU and with rows of very different lengths; on a CPU batches of like rows are faster."),
    ] = False
    """Lay several rows side by side in one of up to max_length tokens, without seeing each other; batch_size counts
    the latter. Otherwise rows of like length share a batch."""
