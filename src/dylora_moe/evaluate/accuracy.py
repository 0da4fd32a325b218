"""Classification skills: which skills are, and how many of their labels a model writes."""

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from dylora_moe.data.example import Example
from dylora_moe.data.tokenize import tokenize_examples
from dylora_moe.errors import DataError
from dylora_moe.evaluate.generate import generate_answers
from dylora_moe.tuner import DyLoraModel

MAX_LABELS = 30
MAX_LABEL_WORDS = 5
MAX_LABEL_CHARACTERS = 40
MIN_EXAMPLES_PER_LABEL = 4  # on average: short answers that hardly come again are answers, not labels


def labels_of(examples: Sequence[Example], more_answers: Sequence[str] = ()) -> tuple[str, ...] | None:
    """The labels of a classification skill, in alphabetic order; None where the answers are free text.

    A skill is a classification skill when every example is one question with one short answer, and the answers are
    few and come again and again. Spaces and case aside, as in `measure_accuracy`.

    Args:
        examples: Of the skill.
        more_answers: Of other examples of it: of few no labels can be told from answers that differ.
    """
    if any(sum(message.role == "user" for message in example.messages) > 1 for example in examples):
        return None
    answers = [" ".join(answer.split()) for answer in (*(example.answer for example in examples), *more_answers)]
    if any(len(answer) > MAX_LABEL_CHARACTERS or answer.count(" ") >= MAX_LABEL_WORDS for answer in answers):
        return None
    labels = {answer.casefold(): answer for answer in sorted(answers, reverse=True)}
    if not 2 <= len(labels) <= min(MAX_LABELS, len(answers) // MIN_EXAMPLES_PER_LABEL):
        return None
    return tuple(sorted(labels.values()))


def measure_accuracy(
    model: DyLoraModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_size: int,
    end_token_ids: Sequence[int],
    before_batch: Callable[[], None] = lambda: None,
) -> float:
    """Share of right answers, 0 to 1. Arguments and errors as of `right_answers`."""
    right = right_answers(
        model,
        tokenizer,
        examples,
        batch_size=batch_size,
        end_token_ids=end_token_ids,
        before_batch=before_batch,
    )
    return sum(right) / len(right)


def right_answers(
    model: DyLoraModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_size: int,
    end_token_ids: Sequence[int],
    matched: Callable[[str], str] = lambda text: text,
    before_batch: Callable[[], None] = lambda: None,
) -> list[bool]:
    """Of each example, whether the greedy answer is the example's, spaces and case aside.

    An answer may have as many tokens as the longest of these examples with its end token; one that goes on is wrong.

    Args:
        model: With its experts forced, disabled or routed, as the caller set it.
        tokenizer: Of the base, with the chat template the model was trained with.
        examples: Unseen in training.
        batch_size: Conversations answered at a time, those of like length together.
        end_token_ids: Any of these ends an answer.
        matched: The part of an answer that must be the same.
        before_batch: Called before each batch; what it raises ends the measuring.

    Raises:
        DataError: There are no examples, or the tokenizer's template cannot write them.
    """
    if not examples:
        raise DataError("an accuracy needs at least one example, got none. Hold rows out to validate on.")
    rows = tokenize_examples(examples, tokenizer).rows
    longest = max(len(row) - row.prompt_length for row in rows)  # with its end token
    ordered = sorted(range(len(rows)), key=lambda place: rows[place].prompt_length)
    right = [False] * len(rows)
    for start in range(0, len(ordered), batch_size):
        before_batch()
        places = ordered[start : start + batch_size]
        answers = generate_answers(
            model,
            tokenizer,
            [examples[place].prompt for place in places],
            max_new_tokens=longest,
            end_token_ids=end_token_ids,
        )
        for place, answer in zip(places, answers, strict=True):
            right[place] = _plain(matched(examples[place].answer)) == _plain(matched(answer.text))
    return right


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
