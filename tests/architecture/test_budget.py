"""The size of things: what fits a reader's head. Run as a script it prints the counts and fails like the tests.

A file has at most 500 lines (a kernel file 1,000), a function at most 80 besides its docstring (kernels aside), and
the package reads at most 3 environment variables.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = ("kimi_linear", "benchmarks", "examples", "tests")
FILE_LINES, KERNEL_LINES, FUNCTION_LINES, EXAMPLE_LINES, ENVIRONMENT_READS = 500, 1000, 80, 100, 3
KERNELS = ("kimi_linear/kernels/",)


def sources() -> dict[str, str]:
    """Every Python file of the project: path from the root, text."""
    files = [file for folder in CODE for file in sorted((ROOT / folder).rglob("*.py"))]
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}


def long_files(sources: dict[str, str]) -> list[str]:
    found = []
    for path, text in sources.items():
        most = KERNEL_LINES if path.startswith(KERNELS) else FILE_LINES
        most = EXAMPLE_LINES if path.startswith("examples/") else most
        if (lines := text.count("\n")) > most:
            found.append(f"{path}: {lines} lines, at most {most}")
    return found


def functions(text: str) -> list[tuple[str, int]]:
    """Name and lines of every function, its docstring not counted."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            found.append((node.name, lines))
    return found


def long_functions(sources: dict[str, str]) -> list[str]:
    return [
        f"{path}: {name} has {lines} lines, at most {FUNCTION_LINES}"
        for path, text in sources.items()
        if not path.startswith(KERNELS)
        for name, lines in functions(text)
        if lines > FUNCTION_LINES
    ]


def environment_reads(sources: dict[str, str]) -> list[str]:
    """Every use of ``os.environ`` or ``os.getenv`` inside the package, however it was imported."""
    found = []
    for path, text in sources.items():
        if path.startswith("kimi_linear/"):
            for node in ast.walk(ast.parse(text)):
                name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
                if name in ("environ", "environb", "getenv", "getenvb"):
                    found.append(f"{path}:{node.lineno}")
    return found


def without_docstring(sources: dict[str, str]) -> list[str]:
    return [path for path, text in sources.items() if ast.get_docstring(ast.parse(text)) is None]


def counts() -> str:
    every = sources()
    package = {path: text for path, text in every.items() if path.startswith("kimi_linear/")}
    longest_file = max((text.count("\n"), path) for path, text in every.items() if not path.startswith(KERNELS))
    longest = max(
        (lines, f"{path}: {name}")
        for path, text in every.items()
        if not path.startswith(KERNELS)
        for name, lines in functions(text)
    )
    return "\n".join(
        [
            f"package        {len(package)} files, {sum(t.count(chr(10)) for t in package.values())} lines",
            f"longest file   {longest_file[0]} lines of {FILE_LINES}  {longest_file[1]}",
            f"longest func   {longest[0]} lines of {FUNCTION_LINES}  {longest[1]}",
            f"environment    {len(environment_reads(package))} reads of {ENVIRONMENT_READS}",
        ]
    )


def test_files_are_short() -> None:
    print(counts())
    assert long_files(sources()) == []


def test_functions_are_short() -> None:
    assert long_functions(sources()) == []


def test_few_environment_variables_are_read() -> None:
    found = environment_reads(sources())
    assert len(found) <= ENVIRONMENT_READS, found


def test_every_file_says_what_it_holds() -> None:
    assert without_docstring(sources()) == []


def test_the_checks_can_fail() -> None:
    body = "    x = 1\n"
    bad = {
        "kimi_linear/ops/long.py": "x = 1\n" * 501,
        "kimi_linear/kernels/torch/long.py": "x = 1\n" * 501 + "def f():\n" + body * 90,
        "kimi_linear/ops/function.py": '"""Doc."""\ndef f():\n' + body * 80,
        "kimi_linear/ops/fits.py": '"""Doc."""\ndef f():\n    """A\n\n    docstring."""\n' + body * 79,
        "kimi_linear/ops/env.py": '"""Doc."""\nimport os\nos.environ["A"]\nos.getenv("B")\n',
        "tests/env.py": '"""Doc."""\nimport os\nos.environ["A"]\n',
        "examples/long.py": '"""Doc."""\n' + "x = 1\n" * 100,
    }
    assert long_files(bad) == [
        "kimi_linear/ops/long.py: 501 lines, at most 500",
        "examples/long.py: 101 lines, at most 100",
    ]
    assert long_functions(bad) == ["kimi_linear/ops/function.py: f has 81 lines, at most 80"]
    assert environment_reads(bad) == ["kimi_linear/ops/env.py:3", "kimi_linear/ops/env.py:4"]
    assert without_docstring(bad) == ["kimi_linear/ops/long.py", "kimi_linear/kernels/torch/long.py"]


def main() -> int:
    every = sources()
    broken = [*long_files(every), *long_functions(every), *(f"{p}: no docstring" for p in without_docstring(every))]
    reads = environment_reads(every)
    broken += [f"environment read at {place}" for place in reads] if len(reads) > ENVIRONMENT_READS else []
    print("\n".join([counts(), *broken]))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
