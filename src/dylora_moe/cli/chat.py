"""`dylora chat RUN`, for a person at a terminal or with lines from a pipe; with `--prompt` one question."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from dylora_moe.cli.chat_show import Show
from dylora_moe.cli.quiet import quiet_libraries
from dylora_moe.cli.show import consoles, printable
from dylora_moe.errors import DataError

if TYPE_CHECKING:
    from dylora_moe.evaluate.load import Speaker, Trained


@click.command("chat")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--prompt", help="Ask this alone; without it a conversation begins.")
@click.option("--system", help="A system message before it.")
@click.option("--expert", help="Force this expert instead of routing.")
@click.option("--base", "base_alone", is_flag=True, help="Ask the base alone, without experts.")
@click.option("--max-new-tokens", default=256, show_default=True, type=click.IntRange(1), help="Longest answer.")
@click.option("--json", "as_json", is_flag=True, help="With --prompt: print prompt, answer and routing as JSON.")
def command(
    run: Path,
    prompt: str | None,
    system: str | None,
    expert: str | None,
    base_alone: bool,
    max_new_tokens: int,
    as_json: bool,
) -> None:
    """Talk with RUN, or ask it one question; answers are the most likely ones, token by token.

    RUN is a run, a model folder, or a hub id.
    """
    if expert and base_alone:
        raise click.UsageError("--expert and --base exclude each other.")
    if as_json and prompt is None:
        raise click.UsageError("--json needs --prompt.")
    prompt, system = _utf8(prompt), _utf8(system)
    quiet_libraries()
    from dylora_moe.evaluate.load import Speaker, load_trained

    asides = consoles(as_json=True)  # the answers alone go to standard output
    trained = load_trained(run, progress=asides.print)
    speaker = Speaker.chosen(expert=expert, base_alone=base_alone)
    if prompt is None:
        _talk(trained, speaker, asides, system=system, max_new_tokens=max_new_tokens)
    else:
        _ask(trained, speaker, asides, prompt, system=system, max_new_tokens=max_new_tokens, as_json=as_json)


def _utf8(text: str | None) -> str | None:
    """Bytes of a command line that are no UTF-8 come as halves of characters, which no tokenizer takes."""
    return None if text is None else text.encode("utf-8", "replace").decode("utf-8")


def _talk(trained: "Trained", speaker: "Speaker", asides: Console, *, system: str | None, max_new_tokens: int) -> None:
    from dylora_moe.cli.chat_loop import Loop
    from dylora_moe.serve.engine import Engine
    from dylora_moe.serve.talk import Talk

    experts = trained.model.expert_names
    if speaker.expert is not None:
        trained.model.index_of(speaker.expert)
    engine = Engine(trained.model, trained.tokenizer)
    try:
        show = Show(consoles(as_json=False), asides, experts)
        show.tell(f"{trained.name} with the experts {', '.join(experts)}. /help tells what can be typed.")
        Loop(Talk(engine, max_tokens=max_new_tokens, system=system), show, experts, speaker).run()
    finally:
        engine.close(drain=False)


def _ask(
    trained: "Trained",
    speaker: "Speaker",
    console: Console,
    prompt: str,
    *,
    system: str | None,
    max_new_tokens: int,
    as_json: bool,
) -> None:
    from dylora_moe.data.example import Message
    from dylora_moe.data.templates import end_token_id, render_prompt
    from dylora_moe.evaluate.generate import generate_answers

    messages = [Message(role="system", content=system)] if system else []
    messages.append(Message(role="user", content=prompt))
    end = end_token_id(trained.tokenizer)
    try:
        render_prompt(messages, trained.tokenizer)
    except Exception as error:  # templates raise jinja2's errors, or Python's own from their expressions
        raise DataError(f"the question must be such as the run's template takes: {error}.") from error
    with trained.speaking(speaker):
        (answer,) = generate_answers(
            trained.model,
            trained.tokenizer,
            [messages],
            max_new_tokens=max_new_tokens,
            end_token_ids=[end],
        )
    if as_json:
        click.echo(json.dumps(asdict(answer), ensure_ascii=False))
        return
    click.echo(printable(answer.text) if sys.stdout.isatty() else answer.text)
    if answer.routing:
        shares = sorted(answer.routing.items(), key=lambda item: -item[1])
        spoken = ", ".join(f"{name} {share:.0%}" for name, share in shares if share >= 0.005)
        spoken = spoken or "the base, as the prompt is like none of the known skills'"
        console.print(f"[dim]spoken by {spoken}[/]", highlight=False)
    if not answer.stopped:
        console.print(f"[dim]cut at --max-new-tokens {max_new_tokens}[/]", highlight=False)
