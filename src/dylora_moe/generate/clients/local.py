"""A model in this process: requests that wait are answered in batches, those of like length together."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jinja2 import TemplateError
from transformers import StoppingCriteria, StoppingCriteriaList

from dylora_moe.bases import LoadedBase
from dylora_moe.data.batching import pad_left, pad_token_id
from dylora_moe.data.example import Message
from dylora_moe.data.templates import end_token_id, ensure_template, render_prompt
from dylora_moe.generate.clients.base import Failure, Reply, Request

_WHERE = "this process"
# Requests that come within this time share a batch: those of one event loop's turn, and of workers just set free.
_GATHER_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class _Waiting:
    """A request, tokenised, and where its reply goes."""

    request: Request
    ids: list[int]
    reply: "asyncio.Future[Reply]"

    @property
    def sampling(self) -> tuple[float, float, int]:
        return self.request.temperature, self.request.top_p, self.request.max_tokens


class LocalClient:
    """transformers' `generate`, sampled as the level says; which rows share a batch decides what is drawn.

    Args:
        base: The model, as it is to answer.
        batch_size: Answers at a time.

    Raises:
        DataError: Its chat template cannot write a question, or nothing ends an answer.
    """

    def __init__(self, base: LoadedBase, *, batch_size: int) -> None:
        self._base, self._batch_size = base, batch_size
        ensure_template(base.tokenizer)
        self._end = end_token_id(base.tokenizer)
        self._waiting: list[_Waiting] = []
        self._work: asyncio.Task[None] | None = None
        self._closing = threading.Event()

    async def complete(self, request: Request) -> Reply:
        """One answer, in a batch with others; see `Client`."""
        text = _render(request.messages, self._base)
        ids = self._base.tokenizer(text, add_special_tokens=False)["input_ids"]
        room = getattr(self._base.model.config.get_text_config(), "max_position_embeddings", None)
        if room is not None and len(ids) + request.max_tokens > room:
            raise Failure(
                "too long for the model",
                where=_WHERE,
                said=f"{len(ids)} tokens and {request.max_tokens} of an answer are more than its {room}",
                is_final=True,
            )
        waiting = _Waiting(request=request, ids=ids, reply=asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._serve())
        return await waiting.reply

    async def close(self) -> None:
        """End what is under way; the next request begins anew."""
        self._closing.set()
        if self._work is not None:
            await asyncio.gather(self._work, return_exceptions=True)
        self._waiting, self._work = [], None
        self._closing.clear()

    async def _serve(self) -> None:
        while self._waiting and not self._closing.is_set():
            await asyncio.sleep(_GATHER_S)
            batch = self._next()
            try:
                replies = await asyncio.to_thread(self._answer, batch)
            except Exception as error:  # whoever waits has to know, whatever it is
                for each in batch:
                    if not each.reply.done():
                        each.reply.set_exception(error)
                continue
            for each, reply in zip(batch, replies, strict=True):
                if not each.reply.done():
                    each.reply.set_result(reply)

    def _next(self) -> list[_Waiting]:
        """The longest waiting request, and those of its sampling whose length is nearest to it."""
        first = self._waiting[0]
        alike = [each for each in self._waiting if each.sampling == first.sampling]
        alike.sort(key=lambda each: (each is not first, abs(len(each.ids) - len(first.ids))))
        batch = alike[: self._batch_size]
        taken = {id(each) for each in batch}
        self._waiting = [each for each in self._waiting if id(each) not in taken]
        return batch

    @torch.no_grad()
    def _answer(self, batch: Sequence[_Waiting]) -> list[Reply]:
        model, pad = self._base.model, pad_token_id(self._base.tokenizer)
        ids, mask = pad_left([each.ids for each in batch], pad, model.device)
        temperature, top_p, max_tokens = batch[0].sampling
        torch.manual_seed(batch[0].request.seed)
        drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
        output = model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_tokens,
            eos_token_id=[self._end],
            pad_token_id=pad,
            stopping_criteria=StoppingCriteriaList([_Ended(self._closing.is_set)]),
            **drawn,
        )
        return [self._read(each, row) for each, row in zip(batch, output[:, ids.shape[1] :].tolist(), strict=True)]

    def _read(self, each: _Waiting, row: list[int]) -> Reply:
        length = row.index(self._end) if self._end in row else len(row)
        return Reply(
            text=str(self._base.tokenizer.decode(row[:length], skip_special_tokens=True)).strip(),
            is_whole=length < len(row),
            tokens_in=len(each.ids),
            tokens_out=min(length + 1, len(row)),
            where=_WHERE,
        )


class _Ended(StoppingCriteria):
    """Ends a batch where nobody waits for it any more."""

    def __init__(self, is_over: Callable[[], bool]) -> None:
        self._is_over = is_over

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.full((input_ids.shape[0],), self._is_over(), device=input_ids.device)


def _render(messages: Sequence[Message], base: LoadedBase) -> str:
    """As the model's template writes them; instructions go before the question where it takes no system message."""
    try:
        return render_prompt(messages, base.tokenizer)
    except TemplateError:
        system = "\n\n".join(turn.content for turn in messages if turn.role == "system")
        first, *others = [turn for turn in messages if turn.role != "system"]
        merged = Message(role=first.role, content=f"{system}\n\n{first.content}")
        return render_prompt([merged, *others], base.tokenizer)
