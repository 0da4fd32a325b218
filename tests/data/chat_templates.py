"""Chat templates of every kind, with a tokenizer to put them into."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dylora_moe.data.example import instruction_example

SPECIAL = ["<bos>", "<eos>", "<pad>", "<|im_start|>", "<|im_end|>", "<eos>!"]
# As ChatML templates do, a line end follows the end token.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Phi-3's does: EOS behind the end of the last turn, which generation never gets to.
MORE_BEHIND = CHATML + "{% if not add_generation_prompt %}{{ '<eos>' }}{% endif %}"
# As Mistral's: no generation prompt, the content trimmed, EOS right after it.
BARE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[Q] ' + m['content'] + ' [A]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + '<eos>' }}{% endif %}{% endfor %}"
)
NO_END = "{% for m in messages %}{{ '\n' + m['role'] + ': ' }}{{ m['content'] }}{% endfor %}\n"


def make_tokenizer(template=None, *, puts_bos=False, eos="<eos>"):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    lines = ["def f(x):\n    return x", "Write a function that returns one.", "Answer the question"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet)
    core.train_from_iterator(lines, trainer)
    if puts_bos:
        core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token=eos,
        pad_token="<pad>",
        additional_special_tokens=SPECIAL[3:],
        chat_template=template,
    )


def example(answer="return 1", prompt="Write one."):
    return instruction_example(prompt, answer, domain="d", source="rows.jsonl")
