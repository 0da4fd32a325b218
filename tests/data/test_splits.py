"""Two sides that share no prompt and lose no row."""

import hypothesis
from hypothesis import given, settings
from hypothesis import strategies as st

from dylora_moe.data.example import Example, Message, instruction_example
from dylora_moe.data.splits import split_by_prompt


def sides(examples, fraction, seed):
    return [side.tolist() for side in split_by_prompt(examples, fraction=fraction, seed=seed)]


@given(
    prompts=st.lists(st.integers(0, 12), min_size=2, max_size=60).filter(lambda items: len(set(items)) > 1),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 3),
)
@hypothesis.example(prompts=[0, 1, 1, 0, 1], fraction=0.01, seed=0)  # no prompt has as few rows as are wanted
@settings(max_examples=200, deadline=None)
def test_a_split_shares_no_prompt_and_loses_no_row(prompts, fraction, seed):
    examples = [
        instruction_example(f"p{prompt}", f"a{index}", domain="d", source="s") for index, prompt in enumerate(prompts)
    ]
    train, validation = sides(examples, fraction, seed)
    assert train and validation
    assert not {examples[place].prompt for place in train} & {examples[place].prompt for place in validation}
    assert sorted(train + validation) == list(range(len(examples)))
    assert train == sorted(train) and validation == sorted(validation)
    backwards = sides(examples[::-1], fraction, seed)
    assert [{len(examples) - 1 - place for place in side} for side in backwards] == [set(train), set(validation)]


def test_branches_of_one_conversation_stay_together():
    """Each answer is learned, so a beginning on one side would be known on the other."""
    examples = []
    for number in range(40):
        turns = [("user", f"u{number}"), ("assistant", "a"), ("user", f"more {number}"), ("assistant", "b")]
        for length in (2, 4):
            messages = tuple(Message(role=role, content=content) for role, content in turns[:length])
            examples.append(Example(messages=messages, domain="d", source="s"))
    train, validation = split_by_prompt(examples, fraction=0.2, seed=0)
    assert len(validation) == 16
    assert not {examples[place].messages[0] for place in train} & {examples[place].messages[0] for place in validation}


def test_a_split_of_distinct_prompts_has_the_fraction():
    examples = [instruction_example(f"p{n}", "a", domain="d", source="s") for n in range(1000)]
    train, validation = split_by_prompt(examples, fraction=0.1, seed=0)
    assert (len(train), len(validation)) == (900, 100)
