"""`dylora serve RUN`"""

import json
import os
from pathlib import Path

import click

from dylora_moe.cli.quiet import quiet_libraries
from dylora_moe.cli.show import consoles
from dylora_moe.errors import ServeError

KEY_VARIABLE = "DYLORA_API_KEY"


@click.command("serve")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help=f"Where to listen; others need {KEY_VARIABLE}.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 for any free one.")
@click.option("--rows", default=64, show_default=True, type=click.IntRange(1), help="Answers written at a time.")
@click.option(
    "--cache-tokens",
    default=65_536,
    show_default=True,
    type=click.IntRange(1),
    help="Tokens of all of them that memory is held for: rows times the longest.",
)
@click.option("--queue", default=256, show_default=True, type=click.IntRange(1), help="Requests that may wait.")
@click.option("--max-tokens", default=1024, show_default=True, type=click.IntRange(1), help="Longest answer.")
@click.option(
    "--timeout",
    default=300.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Seconds an answer has.",
)
@click.option(
    "--grace", default=30.0, show_default=True, type=click.FloatRange(0), help="Seconds to finish in after SIGTERM."
)
@click.option(
    "--upstream",
    metavar="URL",
    help="Route here, and let a server with OpenAI's interface that has the experts as models answer, such as vLLM; "
    "for runs that route whole prompts. Its key is that of DYLORA_UPSTREAM_KEY.",
)
@click.option("--json", "as_json", is_flag=True, help="Print address and models as JSON when requests are taken.")
def command(
    run: Path,
    host: str,
    port: int,
    rows: int,
    cache_tokens: int,
    queue: int,
    max_tokens: int,
    timeout: float,
    grace: float,
    upstream: str | None,
    as_json: bool,
) -> None:
    """Answer requests for the mixture of RUN, its base and its experts, with OpenAI's interface.

    RUN is a run, a model folder, or a hub id.
    Set the environment variable DYLORA_API_KEY to a key that requests must bring as a bearer token.
    """
    quiet_libraries()
    try:
        from dylora_moe.serve.app import Answers, make_app
        from dylora_moe.serve.guard import is_local
        from dylora_moe.serve.server import listen, make_server
    except ModuleNotFoundError as error:
        raise ServeError(
            f"dylora serve needs {error.name}, and it is not installed. Run `pip install 'dylora-moe[serve]'`."
        ) from error
    from dylora_moe.serve.start import Settings, start

    key = os.environ.get(KEY_VARIABLE) or None
    if key is None and not is_local(host):
        raise ServeError(
            f"a server that other machines can reach needs a key, got --host {host} and no {KEY_VARIABLE}. Set that "
            "environment variable, or leave --host out."
        )
    if key is not None and not (key.isascii() and key.isprintable() and key == key.strip()):
        raise ServeError(
            f"the key in {KEY_VARIABLE} must be of printable ASCII characters, and it is not. Set it again."
        )
    console = consoles(as_json=True)  # the address alone goes to standard output
    listening = listen(host, port)
    settings = Settings(
        rows=rows,
        cache_tokens=cache_tokens,
        queue=queue,
        max_tokens=max_tokens,
        timeout_s=timeout,
        upstream=upstream,
    )
    backend, names, metrics = start(run, settings, progress=console.print)
    answers = Answers(backend, names, metrics)
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{listening.getsockname()[1]}"

    def ready() -> None:
        line = json.dumps({"url": url, "models": list(names)}, ensure_ascii=False)
        click.echo(line if as_json else f"{url}/v1 has {', '.join(names)}. Ctrl-C ends it.")

    app = make_app(answers, key=key, only_local=is_local(host))
    make_server(app, answers, grace_s=grace, ready=ready).run(sockets=[listening])
