"""`dylora chat RUN --prompt ...`"""

import json
from dataclasses import asdict
from pathlib import Path

import click

from dylora_moe.cli.quiet import quiet_libraries
from dylora_moe.cli.show import consoles


@click.command("chat")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="What to ask.")
@click.option("--system", help="A system message before it.")
@click.option("--expert", help="Force this expert instead of routing.")
@click.option("--base", "base_alone", is_flag=True, help="Ask the base alone, without experts.")
@click.option("--max-new-tokens", default=256, show_default=True, type=click.IntRange(1), help="Longest answer.")
@click.option("--json", "as_json", is_flag=True, help="Print prompt, answer and routing as JSON on standard output.")
def command(
    run: Path,
    prompt: str,
    system: str | None,
    expert: str | None,
    base_alone: bool,
    max_new_tokens: int,
    as_json: bool,
) -> None:
    """Ask RUN one question; the answer is the most likely one, token by token."""
    if expert and base_alone:
        raise click.UsageError("--expert and --base exclude each other.")
    quiet_libraries()
    from dylora_moe.data.example import Message
    from dylora_moe.data.templates import end_token_id
    from dylora_moe.evaluate.generate import generate_answers
    from dylora_moe.evaluate.load import Speaker, load_run

    console = consoles(as_json=True)  # the answer alone goes to standard output
    trained = load_run(run, progress=console.print)
    messages = [Message(role="system", content=system)] if system else []
    with trained.speaking(Speaker.chosen(expert=expert, base_alone=base_alone)):
        (answer,) = generate_answers(
            trained.model,
            trained.tokenizer,
            [[*messages, Message(role="user", content=prompt)]],
            max_new_tokens=max_new_tokens,
            end_token_ids=[end_token_id(trained.tokenizer)],
        )
    if as_json:
        click.echo(json.dumps(asdict(answer), ensure_ascii=False))
        return
    click.echo(answer.text)
    if answer.routing:
        shares = sorted(answer.routing.items(), key=lambda item: -item[1])
        spoken = ", ".join(f"{name} {share:.0%}" for name, share in shares if share >= 0.005)
        spoken = spoken or "the base, as the prompt is like none of the known skills'"
        console.print(f"[dim]spoken by {spoken}[/]", highlight=False)
    if not answer.stopped:
        console.print(f"[dim]cut at --max-new-tokens {max_new_tokens}[/]", highlight=False)
