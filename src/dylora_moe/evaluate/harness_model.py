"""A finished run as the model `dylora` of lm-evaluation-harness: questions in text -> likelihoods and answers.

Importing this needs the extra `harness`; `dylora_moe.evaluate.harness` does it where it is wanted. Under sequence
granularity the router decides from a question alone, so every pass says where the question ends.
"""
# pyright: reportMissingImports=false

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import Collator, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from torch import Tensor
from tqdm import tqdm

from dylora_moe.data.batching import pad_left, pad_token_id
from dylora_moe.data.templates import end_token_id
from dylora_moe.errors import ConfigError, DataError
from dylora_moe.evaluate.load import Speaker, TrainedRun, load_run
from dylora_moe.tuner.head import read_head

ARGUMENTS = ("run", "expert", "base", "batch_size", "max_length")
MAX_NEW_TOKENS = 256  # of an answer whose task does not say; the harness's own number
_CHUNK_ELEMENTS = 2**24  # of logits made at a time: 64 MiB in float32

Scored = tuple[float, bool]
"""Log-likelihood of a continuation in nats, and whether it is what greedy generation would say."""


@dataclass(slots=True, kw_only=True)
class _Pass:
    """One row of a batch: continuations of one context that differ in their last token alone."""

    context: tuple[int, ...]
    shared: tuple[int, ...]
    lasts: list[tuple[int, int]] = field(default_factory=list)
    """Place in the requests, and the last token."""


@register_model("dylora")
class HarnessModel(TemplateLM):
    """The model of a run, routed, with one expert forced, or its base alone.

    A text without a question (`loglikelihood_rolling`) is routed by its first `prefix_tokens` tokens, as everywhere
    else; those themselves are scored with the routing of what stands before them, so that nothing is scored by an
    expert that was chosen by looking at it.

    Args:
        trained: The run, loaded.
        speaker: Who answers; None for the mixture.
        batch_size: Rows in one pass.
        max_length: The most tokens of a row; longer ones lose their beginning. None for what the base takes.

    Raises:
        TunerError: There is no such expert.
    """

    def __init__(
        self,
        trained: TrainedRun,
        *,
        speaker: Speaker | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        self._trained, self._speaker = trained, speaker or Speaker()
        self._model = trained.model.eval()
        self._head = read_head(self._model.lm)
        self._device, self.batch_size = self._model.device, batch_size
        self.tokenizer = trained.tokenizer
        self.max_length: int = max_length or self._model.config.get_text_config().max_position_embeddings
        bos = self.tokenizer.bos_token_id
        self._start: list[int] = [bos] if isinstance(bos, int) and self._ids("x", special=True)[:1] == [bos] else []
        with self._speaking():  # says at once that there is no such expert
            pass

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> "HarnessModel":
        """As the harness calls it with `--model_args run=FOLDER,expert=NAME`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> "HarnessModel":
        """Load a run by the harness's arguments; its device is that of the run, whatever the harness asks for.

        Raises:
            ConfigError: Arguments that this model does not have, that contradict each other, or no run.
            RunError: No run folder, or a run that is not finished.
        """
        given = {"batch_size": (additional_config or {}).get("batch_size")} | dict(arg_dict)
        if given.pop("trust_remote_code", False):
            raise ConfigError("code from a repository is never run here. Leave trust_remote_code out.")
        unknown = sorted(set(given) - set(ARGUMENTS))
        if unknown or not given.get("run"):
            raise ConfigError(
                f"the model dylora takes the arguments {', '.join(ARGUMENTS)}, and needs run, got "
                f"{', '.join(map(str, arg_dict)) or 'none'}. Give run=FOLDER, the folder that `dylora train` made."
            )
        expert, base_alone = given.get("expert"), bool(given.get("base"))
        if expert is not None and base_alone:
            raise ConfigError("expert and base exclude each other. Leave one out.")
        trained = load_run(Path(str(given["run"])), progress=logging.getLogger(__name__).info)
        limits = {name: _count(name, given[name]) for name in ("batch_size", "max_length") if given.get(name)}
        return cls(
            trained,
            speaker=Speaker.chosen(expert=None if expert is None else str(expert), base_alone=base_alone),
            batch_size=limits.get("batch_size", trained.config.eval_batch_size),
            max_length=limits.get("max_length"),
        )

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        eos = self.tokenizer.eos_token_id
        return eos if isinstance(eos, int) else end_token_id(self.tokenizer)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        bos = self.tokenizer.bos_token_id
        return bos if isinstance(bos, int) else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """Base and template, by which the harness tells stored requests apart."""
        template = hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()[:16]
        return f"{self.tokenizer.name_or_path.replace('/', '__')}__{template}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids, after BOS where the base was trained so and the text does not begin with it."""
        ids = self._ids(string)
        begins = add_special_tokens is False or ids[: len(self._start)] == self._start
        return ids if begins else self._start + ids

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        return cast(list[int], self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the run was trained on it; contexts then hold all special tokens already."""
        self._start = []
        return cast(
            str,
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            ),
        )

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, cut into windows where they are longer than the model reads."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [part for pair in pairs for part in self._causal_parts(*make_disjoint_window(pair))]
            windows += [(None, *part) for part in parts]
            owners += [owner] * len(parts)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += score
        return totals

    def _causal_parts(self, context: list[int], text: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """A text without a question -> the tokens that route it, scored before they do, and the rest."""
        routing = self._model.routing_config
        missing = routing.prefix_tokens - len(context) if routing.granularity == "sequence" else 0
        if missing > 0:
            yield context, text[:missing]
            context, text = context + text[:missing], text[missing:]
        if text:
            yield context, text

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Scored]:
        passes: dict[tuple[tuple[int, ...], ...], _Pass] = {}
        for place, (_, context, continuation) in enumerate(requests):
            if not 1 <= len(continuation) <= self.max_length:
                raise DataError(
                    f"a continuation must have 1 to max_length={self.max_length} tokens, got {len(continuation)}."
                )
            key = (tuple(context) or (self.prefix_token_id,), tuple(continuation[:-1]))
            # The context is part of the key: the same tokens with another border are routed by another question.
            row = passes.setdefault(key, _Pass(context=key[0], shared=key[1]))
            row.lasts.append((place, continuation[-1]))
        ordered = sorted(passes.values(), key=lambda row: -len(row.context) - len(row.shared))
        found: dict[int, Scored] = {}
        with self._speaking(), tqdm(total=len(requests), desc="Likelihoods", disable=disable_tqdm) as bar:
            for start in range(0, len(ordered), self.batch_size):
                batch = ordered[start : start + self.batch_size]
                for row, states in zip(batch, self._states(batch), strict=True):
                    found |= self._score(row, states)
                    bar.update(len(row.lasts))
        return [found[place] for place in range(len(requests))]

    def _states(self, batch: Sequence[_Pass]) -> Iterator[Tensor]:
        """Of each row, the hidden states that predict its continuation, (tokens, features)."""
        rows = [(row.context + row.shared)[-self.max_length :] for row in batch]
        prompts = [len(ids) - len(row.shared) for ids, row in zip(rows, batch, strict=True)]
        longest = max(map(len, rows))
        pad = pad_token_id(self.tokenizer)
        ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows], device=self._device)
        places = torch.arange(longest, device=self._device)
        hidden = self._model(
            hidden_only=True,
            input_ids=ids,
            attention_mask=(places < torch.tensor([[len(row)] for row in rows], device=self._device)).long(),
            prompt_mask=places < torch.tensor([[prompt] for prompt in prompts], device=self._device),
        )
        for states, ids_of_row, prompt in zip(hidden, rows, prompts, strict=True):
            yield states[prompt - 1 : len(ids_of_row)]

    def _score(self, row: _Pass, states: Tensor) -> dict[int, Scored]:
        """Place in the requests -> likelihood, of the continuations of one row."""
        rows = max(1, _CHUNK_ELEMENTS // self._head.weight.shape[0])
        shared = torch.tensor(row.shared, device=self._device, dtype=torch.int64)
        total, greedy = 0.0, True
        before = states[:-1].to(self._head.weight.dtype)
        for chunk, wanted in zip(before.split(rows), shared.split(rows), strict=True):
            likely = self._head.logits(chunk).log_softmax(-1)
            total += float(likely.gather(1, wanted[:, None]).double().sum())
            greedy &= bool((likely.argmax(-1) == wanted).all())
        final = self._head.logits(states[-1:].to(self._head.weight.dtype)).log_softmax(-1)[0]
        best, likelihoods = int(final.argmax()), final[[last for _, last in row.lasts]].tolist()
        pairs = zip(row.lasts, likelihoods, strict=True)
        return {place: (total + likelihood, greedy and best == last) for (place, last), likelihood in pairs}

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers to contexts, greedy or sampled as each request says, up to its stop texts or an end token."""
        questions: list[Any] = [request.args for request in requests]
        ordered: Any = Collator(  # its type says that a batch is one request
            questions,
            sort_fn=lambda args: (-len(self.tok_encode(args[0])), args[0]),
            group_by="gen_kwargs",
            group_fn=lambda args: args[1],
        )
        answers: list[str] = []
        with self._speaking(), tqdm(total=len(requests), desc="Answers", disable=disable_tqdm) as bar:
            for batch in ordered.get_batched(n=self.batch_size):
                answers += self._answer([context for context, _ in batch], batch[0][1])
                bar.update(len(batch))
        return ordered.get_original(answers)

    def _answer(self, contexts: Sequence[str], wishes: dict[str, Any]) -> list[str]:
        settings = cast(dict[str, Any], normalize_gen_kwargs(wishes, MAX_NEW_TOKENS))
        stops, new_tokens = [stop for stop in settings.pop("until") if stop], settings.pop("max_gen_toks")
        room = self.max_length - new_tokens
        if new_tokens < 1 or room < 1:
            raise DataError(
                f"an answer must have 1 to {self.max_length - 1} tokens, as the model reads {self.max_length}, got "
                f"{new_tokens}. Lower max_gen_toks of the task."
            )
        if not settings["do_sample"]:
            settings.pop("temperature", None)
        pad, ends = pad_token_id(self.tokenizer), self._end_ids(stops)
        rows = [(self.tok_encode(context) or [self.prefix_token_id])[-room:] for context in contexts]
        ids, mask = pad_left(rows, pad, self._device)
        output = self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            eos_token_id=ends,
            pad_token_id=pad,
            stopping_criteria=stop_sequences_criteria(cast(Any, self.tokenizer), stops, ids.shape[1], len(rows)),
            **settings,
        )
        answers = []
        for row in output[:, ids.shape[1] :].tolist():
            length = next((place for place, token in enumerate(row) if token in ends), len(row))
            text = cast(str, self.tokenizer.decode(row[:length], skip_special_tokens=True))
            answers.append(postprocess_generated_text(text, stops, None))
        return answers

    def _end_ids(self, stops: Sequence[str]) -> list[int]:
        """The ends of texts and of answers, and stop texts that are special tokens, which decoding would leave out."""
        special = [self.tokenizer.convert_tokens_to_ids(stop) for stop in stops if self._is_special(stop)]
        return sorted({self.eot_token_id, end_token_id(self.tokenizer), *cast(list[int], special)})

    def _is_special(self, text: str) -> bool:
        return any(token.special and token.content == text for token in self.tokenizer.added_tokens_decoder.values())

    def _speaking(self) -> Any:
        return self._trained.speaking(self._speaker)


def _count(name: str, value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}.")
    return number
