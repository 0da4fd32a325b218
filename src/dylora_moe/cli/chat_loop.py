"""`dylora chat RUN`: a conversation in a terminal, or with lines from a pipe."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dylora_moe.cli.chat_show import Show, name_of
from dylora_moe.errors import DyLoraError, ServeError

if TYPE_CHECKING:
    from dylora_moe.evaluate.load import Speaker
    from dylora_moe.serve.talk import Answer, Talk

_HELP = """\
/expert NAME      one expert answers from now on
/base             the base answers alone
/mixture          the router chooses again
/route            show which expert speaks each token, on and off
/compare [NAME]   the last question, answered by the base, the mixture and one expert
/system [TEXT]    a system message from now on; without a text none
/save FILE        all conversations of this session, as JSON lines in a new file
/clear            begin a new conversation
/help             this list
/quit             leave, as Ctrl-D does
Ctrl-C stops an answer. A line that ends with \\ goes on in the next one.
A question that begins with / is written with //."""


class Loop:
    """Reads lines, asks, and shows answers.

    Args:
        talk: With the engine.
        show: Writes to the terminal.
        experts: Names in the router's order.
        speaker: Who answers at first.
    """

    def __init__(self, talk: "Talk", show: Show, experts: Sequence[str], speaker: "Speaker") -> None:
        self._talk, self._show, self._experts, self._speaker = talk, show, experts, speaker
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda text: show.tell(_HELP),
            "expert": self._expert,
            "base": lambda text: self._choose(replace(self._speaker, kind="base", expert=None)),
            "mixture": lambda text: self._choose(replace(self._speaker, kind="routed", expert=None)),
            "route": self._route,
            "compare": self._compare,
            "system": self._system,
            "save": self._save,
            "clear": self._clear,
        }

    def run(self) -> None:
        """Until Ctrl-D, /quit or the end of the pipe."""
        _edit_lines([f"/{name}" for name in (*self._commands, "quit")], self._experts)
        while (line := self._read()) is not None:
            text = line.strip()
            if text == "/quit":
                return
            try:
                if text.startswith("/") and not text.startswith("//"):
                    self._command(text)
                elif text:
                    self._ask(text[text.startswith("//") :])
            except KeyboardInterrupt:
                self._show.tell("stopped")
            except DyLoraError as error:
                self._show.tell(f"Error: {error}")

    def _read(self) -> str | None:
        """A line, or several of which all but the last end with a backslash; None at the end."""
        lines: list[str] = []
        while True:
            try:
                line = _input("...> " if lines else "you> ")
            except KeyboardInterrupt:
                self._show.tell("\nCtrl-D leaves.")
                return ""
            except EOFError:
                if sys.stdin.isatty():
                    self._show.tell("")
                return "\n".join(lines) if lines else None
            lines.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                return "\n".join(lines)

    def _command(self, text: str) -> None:
        name, _, rest = text[1:].partition(" ")
        if name not in self._commands:
            raise ServeError(f"a command must be one that /help tells, got /{name}.")
        self._commands[name](rest.strip())

    def _ask(self, question: str) -> None:
        self._show.begin(name_of(self._speaker))
        try:
            answer = self._talk.ask(question, self._speaker, self._show.piece)
        finally:
            self._show.end()
        if self._show.routes and answer.pieces and answer.text:
            self._show.legend(_shares(answer))
        if answer.finish != "stop":
            self._show.tell("cut at the longest answer" if answer.finish == "length" else "stopped")

    def _compare(self, name: str) -> None:
        expert = self._known(name or self._likely())
        speakers = [
            replace(self._speaker, kind="base", expert=None),
            replace(self._speaker, kind="routed", expert=None),
            replace(self._speaker, kind="expert", expert=expert),
        ]
        with self._show.working("Three answers are being written."):
            answers = self._talk.compare(speakers)
        self._show.beside(answers)
        if self._show.routes:
            self._show.legend()

    def _likely(self) -> str:
        """The expert that answers, or that had the most of the last answer, or the first."""
        if self._speaker.expert is not None:
            return self._speaker.expert
        last = self._talk.turns[-1].answer if self._talk.turns else None
        shares = (_shares(last) if last is not None else None) or {self._experts[0]: 1.0}
        return max(shares, key=lambda name: shares[name])

    def _expert(self, name: str) -> None:
        self._choose(replace(self._speaker, kind="expert", expert=self._known(name)))

    def _known(self, name: str) -> str:
        if name not in self._experts:
            raise ServeError(f"an expert must be one of {', '.join(self._experts)}, got {name!r}.")
        return name

    def _choose(self, speaker: "Speaker") -> None:
        self._speaker = speaker
        self._show.tell(f"{name_of(speaker)} answers from now on")

    def _route(self, text: str) -> None:
        self._show.routes = not self._show.routes
        if self._show.routes:
            self._show.legend()
        else:
            self._show.tell("tokens are shown without their experts again")

    def _system(self, text: str) -> None:
        self._talk.system = text or None
        self._show.tell("the system message is set" if text else "there is no system message now")

    def _save(self, text: str) -> None:
        if not text:
            raise ServeError("/save must have the name of a new file, got none.")
        number = self._talk.save(Path(text))
        self._show.tell(f"{number} conversation{'' if number == 1 else 's'} written to {text}")

    def _clear(self, text: str) -> None:
        self._talk.clear()
        self._show.tell("a new conversation begins")


def _shares(answer: "Answer") -> dict[str, float]:
    """Share of each expert in an answer."""
    if answer.speaker.expert is not None:
        return {answer.speaker.expert: 1.0}
    return answer.shares or {}


def _input(prompt: str) -> str:
    """One line of standard input, edited where both ends are a terminal; a prompt where a person sits."""
    if not sys.stdin.isatty():
        prompt = ""
    elif not sys.stdout.isatty():
        sys.stderr.write(prompt)
        sys.stderr.flush()
        prompt = ""
    # Bytes that are no UTF-8 come as halves of characters, which no tokenizer takes.
    return input(prompt).encode("utf-8", "replace").decode("utf-8")


def _edit_lines(commands: Sequence[str], experts: Sequence[str]) -> None:
    """Line editing, recall of earlier lines, and Tab for commands and experts, where Python was built with it."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return
    try:
        import readline
    except ImportError:  # on Windows, whose terminal edits lines by itself
        return

    def complete(text: str, state: int) -> str | None:
        line = readline.get_line_buffer()
        whole = [f"{word} {name}" for word in ("/expert", "/compare") for name in experts] if " " in line else commands
        found = [each for each in whole if each.startswith(text)]
        return f"{found[state]} " if state < len(found) else None

    readline.set_completer_delims("")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")
