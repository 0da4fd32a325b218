"""The newcomer's script: it finds every command, does them in one shell, and says which failed first."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]

PAGE = """# A page

```bash
export WORD=blue     # stays
mkdir -p made && cd made
cat > file.txt <<'END'
two
# lines
END
echo "$WORD" \\
  >> file.txt
# a comment alone
```

```text
false
```

```python
from pathlib import Path

assert Path("file.txt").read_text() == "two\\n# lines\\nblue\\n"
```
"""


def test_commands_are_found_whole(newcomer: ModuleType) -> None:
    steps = newcomer.read_steps(PAGE, "page.md")
    assert [(step.line, step.language, len(step.text.splitlines())) for step in steps] == [
        (4, "bash", 1),
        (5, "bash", 1),
        (6, "bash", 4),
        (10, "bash", 2),
        (20, "python", 3),
    ]


def test_they_follow_each_other_in_one_shell(
    newcomer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    steps = newcomer.read_steps(PAGE, "page.md")
    assert newcomer.follow(steps, tmp_path, dict(os.environ)) is None
    assert (tmp_path / "made" / "file.txt").read_text() == "two\n# lines\nblue\n"


@pytest.mark.parametrize(
    ("command", "code"), [("cat nowhere.txt", 1), ("false | cat", 1), ("exit 3", -1), ("echo 'unfinished", -1)]
)
def test_the_first_that_fails_ends_it(newcomer: ModuleType, tmp_path: Path, command: str, code: int) -> None:
    shell = newcomer.Shell(tmp_path, {"PATH": "/usr/bin:/bin"})
    assert shell.run("true")[0] == 0
    assert shell.run(command, seconds=5)[0] == code
    shell.close()


def test_a_clone_is_followed_and_the_failure_is_named(tmp_path: Path) -> None:
    """The script itself, on a repository whose readme has a fault in its second command."""
    source = tmp_path / "source"
    (source / "docs" / "tutorials").mkdir(parents=True)
    (source / "README.md").write_text("```bash\ntest ! -e ~/.cache\ndylora fly\necho never\n```\n")
    for name in ("first-mixture", "own-data", "continual-stream", "teacher", "serving"):
        (source / "docs" / "tutorials" / f"{name}.md").write_text("# Nothing\n")
    git = ["git", "-C", str(source), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "Begin"]):
        subprocess.run([*git, *words], check=True)
    command = [sys.executable, str(ROOT / "scripts" / "newcomer.py"), "--source", str(source)]
    ended = subprocess.run([*command, "--folder", str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and "Failed: README.md:3  dylora fly" in ended.stdout
    assert "1 of 3" in ended.stdout and "3 of 3" not in ended.stdout


def test_every_page_is_there_and_has_commands(newcomer: ModuleType) -> None:
    for page in newcomer.PAGES:
        assert len(newcomer.read_steps((ROOT / page).read_text(encoding="utf-8"), page)) >= 4, page
    tutorials = {f"docs/tutorials/{path.name}" for path in (ROOT / "docs" / "tutorials").glob("*.md")}
    assert tutorials == set(newcomer.PAGES) - {"README.md"}


@pytest.mark.slow
def test_a_newcomer_comes_to_the_end(tmp_path: Path) -> None:
    """Every command of README.md and the tutorials on a fresh clone; about an hour, and it downloads what they need."""
    command = [sys.executable, str(ROOT / "scripts" / "newcomer.py"), "--own-home", "--folder", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-5000:]
