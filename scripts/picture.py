"""The picture of README.md: what a run came to, and a conversation with it, as `dylora` shows them.

    python scripts/picture.py runs/quickstart       docs/readme.svg

The tables are of the run's record, the questions those that it kept of each domain, which it was not trained on. The
answers are made anew, and each token has the colour of the expert that has most of its weight, by the same code as on a
terminal.
"""

import io
import json
import re
from pathlib import Path

import click
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from dylora_moe.cli.chat_show import Show
from dylora_moe.cli.quiet import quiet_libraries
from dylora_moe.cli.show import show_losses, show_routing

_NORMAL = [
    (0, 0, 0),
    (215, 95, 95),
    (120, 180, 90),
    (200, 160, 60),
    (90, 140, 200),
    (170, 110, 170),
    (80, 170, 170),
    (200, 200, 200),
]
# Of rich's own themes none has a black that is read on a ground of colour.
_THEME = TerminalTheme((30, 32, 36), (215, 218, 222), _NORMAL, _NORMAL)
_FONT_FACE = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--output", type=click.Path(path_type=Path), default=Path("docs/readme.svg"), show_default=True)
@click.option("--tokens", default=48, show_default=True, help="Longest answer.")
def main(run: Path, output: Path, tokens: int) -> None:
    """Draw it."""
    quiet_libraries()
    from dylora_moe.evaluate.load import Speaker, load_trained
    from dylora_moe.serve.engine import Engine
    from dylora_moe.serve.talk import Talk

    console = Console(
        record=True, file=io.StringIO(), width=100, force_terminal=True, color_system="truecolor", legacy_windows=False
    )
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    console.print(Text("$ make quickstart", style="bold"))
    show_losses(console, result["before"], result["after"])
    show_routing(console, result["after"]["routing"])
    console.print(Text(f"$ dylora chat runs/{run.name}", style="bold"))
    trained = load_trained(str(run), progress=lambda line: None)
    engine = Engine(trained.model, trained.tokenizer)
    try:
        show = Show(console, console, trained.model.expert_names)
        show.routes = True
        for question in (sample["before"]["prompt"] for sample in result["samples"]):
            talk = Talk(engine, max_tokens=tokens)
            console.print(Text(f"you> {question}", style="bold"))
            show.begin("mixture")
            answer = talk.ask(question, Speaker(kind="routed"), show.piece)
            show.end()
            show.legend(answer.shares)
    finally:
        engine.close(drain=False)
    drawn = console.export_svg(title="dylora", unique_id="dylora", theme=_THEME)
    # Fonts of another site are asked for by nobody: each text has its width, whatever the font.
    drawn = _FONT_FACE.sub("", drawn).replace("Fira Code", "ui-monospace, Menlo, Consolas")
    output.write_text("\n".join(line.rstrip() for line in drawn.splitlines()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
