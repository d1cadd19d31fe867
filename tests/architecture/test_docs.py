"""The prose is true: its Python runs, its commands exist, its tree is the tree on disk."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from kimi_linear.cli.main import VERBS, main

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
ALWAYS = {"--help", "--debug"}


def blocks(text: str, language: str) -> list[tuple[int, str]]:
    """(line where it begins, code) of every fenced block in a language."""
    found = FENCE.finditer(text)
    return [(text[: m.start(2)].count("\n"), m.group(2)) for m in found if m.group(1) == language]


def run_page(text: str, name: str) -> None:
    """Execute a page's Python blocks in one namespace; a traceback shows the page's own line numbers."""
    namespace: dict = {"__name__": "__page__"}
    for line, code in blocks(text, "python"):
        exec(compile("\n" * line + code, name, "exec"), namespace)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p.read_text(), "python")], ids=name_of)
def test_python_in_the_docs_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(page.read_text(), str(page))


# Commands: `kimi-linear ...` and `make ...` in bash blocks and in `inline code`.


def commands(text: str) -> list[list[str]]:
    """The words of every command of ours that a page shows; a comment, a pipe or a redirection ends a command."""
    lines = [line for _, code in blocks(text, "bash") for line in code.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`((?:kimi-linear|make) [^`\n]*)`", FENCE.sub("", text))
    found = []
    for line in lines:
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words and words[0] in ("kimi-linear", "make"):
            stop = next((i for i, word in enumerate(words) if word in ("|", ">", "&&", "||", ";", "2>&1")), len(words))
            found.append(words[:stop])
    return found


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def verbs_of(command: list[str]) -> tuple[str, ...]:
    """The words between ``kimi-linear`` and the first flag."""
    return tuple(itertools.takewhile(lambda word: not word.startswith("-"), command[1:]))


def problems(command: list[str], help_of: Callable[[tuple[str, ...]], str | None]) -> list[str]:
    """What is wrong with a command: a target, verb or flag that does not exist.

    ``help_of(("study", "mqar"))`` is the text of ``kimi-linear study mqar --help``, or None where there is no such verb.
    """
    shown = " ".join(command)
    if command[0] == "make":
        targets = [word for word in command[1:] if "=" not in word and not word.startswith("-")]
        return [f"{shown}: no target {word}" for word in targets if word not in make_targets()]
    words = command[1:]
    verbs = verbs_of(command)
    if not verbs:
        return [] if set(words) <= {"--help", "--version"} else [f"{shown}: no verb"]
    # `study mqar` has flags of its own; in `generate "def "` the second word is no verb, and its help is the verb's.
    texts = [help_of(verbs[:1]), help_of(verbs[:2])]
    if None in texts:
        return [f"{shown}: no verb {' '.join(verbs[: texts.index(None) + 1])}"]
    flags = {word.partition("=")[0] for word in words if word.startswith("--")}
    return [f"{shown}: no flag {flag}" for flag in sorted(flags - set(FLAG.findall("\n".join(texts))) - ALWAYS)]


@pytest.fixture
def help_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[[tuple[str, ...]], str | None]:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    @cache
    def ask(verbs: tuple[str, ...]) -> str | None:
        capsys.readouterr()
        code = main([*verbs, "--help"])
        out = capsys.readouterr().out
        return re.sub(r"\x1b\[[0-9;]*m", "", out) if code == 0 else None

    return ask


def test_commands_in_the_docs_exist(help_of: Callable[[tuple[str, ...]], str | None]) -> None:
    shown = [(page, command) for page in PAGES for command in commands(page.read_text())]
    wrong = [f"{name_of(page)}: {problem}" for page, command in shown for problem in problems(command, help_of)]
    assert wrong == []
    assert help_of(("no-such-verb",)) is None


def flags_told(text: str) -> set[str]:
    """Flags in a page's inline code and bash blocks, ``make`` lines aside."""
    code = [code for _, code in blocks(text, "bash")] + re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    return {flag for part in code if not part.startswith("make") for flag in FLAG.findall(part)}


def test_every_verb_has_a_page_and_its_flags_exist(help_of: Callable[[tuple[str, ...]], str | None]) -> None:
    pages = {page.stem: page.read_text() for page in (ROOT / "docs/cli").glob("*.md") if page.stem != "README"}
    assert set(pages) == set(VERBS), "one page in docs/cli for each verb"
    wrong = []
    for verb, text in pages.items():
        shown = {(verb,), *(verbs_of(command)[:2] for command in commands(text) if command[1:2] == [verb])}
        known = ALWAYS.union(*(FLAG.findall(help_of(verbs) or "") for verbs in shown))
        wrong += [f"docs/cli/{verb}.md: {flag}" for flag in sorted(flags_told(text) - known)]
    assert wrong == []


# The tree at the end of README.md.


def tree(text: str) -> set[str]:
    """Paths of an indented tree: two spaces a level, a folder ends in /, two spaces before the remark."""
    _, code = (blocks(text, "text") or [(0, "")])[-1]
    found, parents = set(), []
    for line in code.splitlines():
        if line.strip():
            depth = (len(line) - len(line.lstrip())) // 2
            names = re.split(r"\s{2,}", line.strip())[0].split()
            parents = [*parents[:depth], names[0]]
            found |= {"".join(parents[:depth]) + name for name in names}
    return found


def folders(root: Path) -> set[str]:
    """The folders that must be named: every one of the package, and the top level."""
    hidden = {"runs", "build", "dist"}
    top = {f"{p.name}/" for p in root.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name not in hidden}
    inner = (p for p in (root / "kimi_linear").rglob("*") if p.is_dir() and any(p.glob("*.*")))
    return {t for t in top if any((root / t).rglob("*.*"))} | {
        f"{p.relative_to(root).as_posix()}/" for p in inner if "__pycache__" not in p.parts
    }


def tree_problems(text: str, root: Path) -> list[str]:
    named = tree(text)
    gone = [f"{path}: named, not there" for path in named if not (root / path).exists()]
    return sorted([*gone, *(f"{path}: there, not named" for path in folders(root) - named)])


def test_the_tree_in_the_readme_is_the_tree_on_disk() -> None:
    assert tree_problems((ROOT / "README.md").read_text(), ROOT) == []


LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


def broken_links(text: str, folder: Path) -> list[str]:
    """Links to files that are not there; addresses on the web are left alone."""
    links = LINK.findall(FENCE.sub("", text))
    return [link for link in links if "://" not in link and not (folder / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page.read_text(), page.parent) == []


LEFTOVERS = ("TODO" + "-NUMBER", "FIX" + "ME")
"""Marks of unfinished text."""
TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".html", ".jinja", ".json", ".css", ".js", ""}


def test_no_unfinished_text_is_left_in_the_files() -> None:
    top = [p for p in ROOT.iterdir() if p.name not in ("runs", "build", "dist") and not p.name.startswith(".")]
    files = [f for p in [*top, ROOT / ".ci"] for f in ([p] if p.is_file() else p.rglob("*")) if f.is_file()]
    texts = {f: f.read_text(encoding="utf-8") for f in files if f.suffix in TEXT and "__pycache__" not in f.parts}
    assert len(texts) > 50
    assert [f"{name_of(f)}: {word}" for f, text in texts.items() for word in LEFTOVERS if word in text] == []


def test_the_checks_can_fail(tmp_path: Path) -> None:
    page = "# Page\n```python\nx = 1\n```\nand\n```python\nassert x == 2\n```\n"
    with pytest.raises(AssertionError) as failure:
        run_page(page, "page.md")
    assert failure.traceback[-1].lineno + 1 == 7  # the page's own line

    helps = {("study",): "--folder", ("study", "mqar"): "--mixer --steps", ("train",): "--steps"}
    text = "```bash\n$ kimi-linear study mqar \\\n  --mixer kda  # why\nkimi-linear train --stops=3 | tee\n```\n"
    text += "`kimi-linear fly`, `kimi-linear study mqa --folder x`, `make demo`, `make tea`, `kimi-linear`\n"
    assert [problem for command in commands(text) for problem in problems(command, helps.get)] == [
        "kimi-linear train --stops=3: no flag --stops",
        "kimi-linear fly: no verb fly",
        "kimi-linear study mqa --folder x: no verb study mqa",
        "make tea: no target tea",
    ]
    assert flags_told(text + "and `--dark`, --not-code") == {"--mixer", "--stops", "--folder", "--dark"}

    for folder in ("kimi_linear/ops", "kimi_linear/new", "docs"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.py").touch()
    text = "```text\nkimi_linear/\n  ops/  mathematics\n    x.py y.py  two files\ndocs/\n```\n"
    assert tree(text) == {"kimi_linear/", "kimi_linear/ops/", "kimi_linear/ops/x.py", "kimi_linear/ops/y.py", "docs/"}
    assert tree_problems(text, tmp_path) == [
        "kimi_linear/new/: there, not named",
        "kimi_linear/ops/y.py: named, not there",
    ]

    assert broken_links("[a](docs/x.py) [b](gone.md#part) [c](https://x.org)", tmp_path) == ["gone.md"]
