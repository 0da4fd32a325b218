"""Rows that are a text and its label, and rows that are a sentence in two languages."""

from collections.abc import Mapping

from dylora_moe.data.formats.fields import Conversation, Row, first_field, list_field, text_field, turns
from dylora_moe.data.languages import language_columns, language_name
from dylora_moe.errors import DataError


def read_classification(row: Row, where: str) -> tuple[Conversation, ...]:
    """`sentence` (or `text`), `label`; optional `labels`, the list that the label is one of.

    The label is the answer. It may be a place in the list, from 0, as `datasets` stores it.
    """
    text = text_field(row, first_field(row, "sentence", "text"), where, meaning="what to label").strip()
    labels = [str(name) for name in list_field(row, "labels", where, of="names")] if row.get("labels") else []
    answer = _label(row, labels, where)
    choice = f"Labels: {', '.join(labels)}\n\n" if labels else ""
    return (turns(f"Which label fits the text? Answer with the label alone.\n\n{choice}Text: {text}", answer),)


def _label(row: Row, labels: list[str], where: str) -> str:
    value = row.get("label")
    number = int(value) if isinstance(value, str) and value.isdecimal() and value not in labels else value
    if isinstance(number, int) and not isinstance(number, bool):
        if not 0 <= number < len(labels):
            raise DataError(
                f"{where}: field 'label' (the answer) must be a name, or a place in a label list, from 0; got {value} "
                f"with {len(labels)} labels. Put the names as a list into labels.json beside the file."
            )
        return labels[number]
    name = text_field(row, "label", where, meaning="the answer")
    if labels and name not in labels:
        raise DataError(
            f"{where}: field 'label' (the answer) must be one of {', '.join(labels)}, got {name!r}. "
            "Mend the row or the label list."
        )
    return name


def translation_of(row: Row) -> Row:
    """What holds the sentences: the row itself, or its `translation` where that is an object."""
    inner = row.get("translation")
    return inner if isinstance(inner, Mapping) else row


def read_translation(row: Row, where: str) -> tuple[Conversation, ...]:
    """Two columns named after languages, such as `english` and `italian`, or `eng` and `ita`.

    The answer is the one that is not English; of two others, the second.
    """
    held = translation_of(row)
    columns = language_columns(held)
    if len(columns) != 2:
        raise DataError(
            f"{where}: a row must have two columns named after languages, such as english and italian, got "
            f"{', '.join(map(str, held))}. Map them: columns: {{english: ..., italian: ...}}"
        )
    target = next(code for code in reversed(columns) if code != "en")
    source = next(code for code in columns if code != target)
    sentence = text_field(held, columns[source], where, meaning=f"the {language_name(source)} sentence").strip()
    answer = text_field(held, columns[target], where, meaning=f"the {language_name(target)} sentence").strip()
    return (turns(f"Translate into {language_name(target)}: {sentence}", answer),)
