"""A model in this process: batches answer as rows alone do, and a generation with it comes to its end."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from tests.tiny import lean_process, tiny_base

from dylora_moe.bases import load_base
from dylora_moe.config import GenerateConfig
from dylora_moe.data.example import Message
from dylora_moe.generate.asking import Hooks
from dylora_moe.generate.clients import Failure, Reply, Request
from dylora_moe.generate.clients.local import LocalClient
from dylora_moe.generate.run import generate

__all__ = ["lean_process", "tiny_base"]


def request(text: str, **changes: float) -> Request:
    turns = (Message(role="system", content="Answer."), Message(role="user", content=text))
    return Request(messages=turns, **{"max_tokens": 6, "temperature": 0.0, "top_p": 1.0, "seed": 3, **changes})  # type: ignore[arg-type]


def ask(base: Path, requests: list[Request], batch_size: int) -> list[Reply]:
    client = LocalClient(load_base(str(base), dtype=torch.float32), batch_size=batch_size)

    async def run() -> list[Reply]:
        replies = await asyncio.gather(*map(client.complete, requests))
        await client.close()
        return list(replies)

    return asyncio.run(run())


def test_a_batch_answers_as_its_rows_do_alone(tiny_base: Path) -> None:
    requests = [request(f"Say {'word ' * number}.", max_tokens=4 + number % 2) for number in range(7)]
    alone = [ask(tiny_base, [each], 1)[0] for each in requests]
    assert ask(tiny_base, requests, 3) == alone
    assert len({reply.text for reply in alone}) > 1
    assert all((reply.tokens_out or 0) <= 5 and reply.tokens_in for reply in alone)


def test_what_the_model_has_no_room_for_is_a_failure_of_that_row(tiny_base: Path) -> None:
    with pytest.raises(Failure, match="too long for the model") as failure:
        ask(tiny_base, [request("word " * 400)], 2)
    assert failure.value.is_final and failure.value.said.endswith("more than its 256")


def test_a_generation_in_this_process(recipe: Callable[..., GenerateConfig], tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    levels = {
        "one": {"rows": 5, "max_tokens": 4, "temperature": 0.7},
        "two": {"rows": 4, "max_tokens": 5, "temperature": 0},
    }
    (folder / "pack.yaml").write_text(yaml.safe_dump({"levels": levels}), encoding="utf-8")
    for name, text in (
        ("instructions", "Level {{ level }}."),
        ("question", "{{ question }}"),
        ("again", "{{ question }} {{ reasons }}"),
    ):
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    config = recipe(prompts=str(folder), levels=None, generator=str(tiny_base), keep="all", max_regenerations=1)
    result = generate(config, Hooks())
    assert result["rows"]["planned"] == 9 == result["rows"]["passed"] + result["rows"]["set_aside"]
    assert result["tokens_in"] > 9 and result["failures"] == {}
    assert result["rows"]["train"] + result["rows"]["validation"] == 9
