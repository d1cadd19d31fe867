"""The front door: verbs are found, errors become one line and an exit code, help does not wait for torch."""

import subprocess
import sys
import types

import pytest

from kimi_linear.cli import main as door
from kimi_linear.cli.main import VERBS, main


@pytest.fixture
def verb(monkeypatch):
    """Lets a test put a function in the place of ``kimi-linear info``."""

    def put(function):
        module = types.ModuleType("kimi_linear.cli.info")
        vars(module)["main"] = function
        monkeypatch.setitem(sys.modules, "kimi_linear.cli.info", module)

    return put


def raising(error: BaseException):
    def run(argv):
        raise error

    return run


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_verb(words, capsys):
    assert main(words) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb} " in out for verb in VERBS)


def test_version(capsys):
    from kimi_linear import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"kimi-linear {__version__}\n"


def test_an_unknown_verb_is_an_error_with_a_suggestion(capsys):
    assert main(["generat"]) == 2
    assert "unknown verb 'generat'; did you mean 'generate'?" in capsys.readouterr().err


def test_the_rest_of_the_line_reaches_the_verb(verb):
    seen = []
    verb(seen.append)
    assert main(["info", "--preset", "x"]) == 0
    assert seen == [["--preset", "x"]]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("lr: expected a positive number, got -1"), "lr: expected a positive number, got -1"),
        (FileNotFoundError("runs: no model"), "runs: no model"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), "a.txt: No such file or directory"),
        (OSError(28, "No space left on device", "model.safetensors"), "model.safetensors: No space left on device"),
        (ImportError("tokenizers is missing"), "tokenizers is missing"),
        (ValueError(), "ValueError"),
    ],
)
def test_what_the_caller_can_mend_is_one_line(error, message, verb, capsys):
    verb(raising(error))
    assert main(["info"]) == 1
    assert capsys.readouterr().err == f"kimi-linear info: {message}\n"


def test_debug_shows_the_traceback(verb):
    verb(raising(ValueError("x")))
    with pytest.raises(ValueError, match="x"):
        main(["--debug", "info"])


@pytest.mark.parametrize("error", [TypeError("bug"), AssertionError("bug"), RuntimeError("bug")])
def test_a_bug_keeps_its_traceback(error, verb):
    verb(raising(error))
    with pytest.raises(type(error), match="bug"):
        main(["info"])


def test_ctrl_c(verb, capsys):
    verb(raising(KeyboardInterrupt()))
    assert main(["info"]) == 130
    assert "Interrupted" in capsys.readouterr().err


def test_an_unknown_flag_is_an_error(capsys):
    assert main(["info", "--presets", "tiny"]) == 2
    assert "--presets" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error():
    command = [sys.executable, "-m", "kimi_linear.cli.main", "study"]
    script = f"{' '.join(command)} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr, "BrokenPipe" in done.stderr) == (0, False, False)


def test_help_does_not_wait_for_torch():
    words = [["--help"], *([verb, "--help"] for verb in VERBS), ["study", "mqar", "--help"]]
    script = (
        "import sys; from kimi_linear.cli.main import main\n"
        f"for words in {words!r}:\n"
        "    assert main(words) == 0, words\n"
        "    slow = {'torch', 'transformers', 'matplotlib', 'tensorboard'} & set(sys.modules)\n"
        "    assert not slow, (words, slow)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_verb_has_a_module():
    from importlib.util import find_spec

    assert all(find_spec(f"{door.__package__}.{verb}") for verb in VERBS)
