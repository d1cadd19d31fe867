"""``kimi-linear``: find the verb, run it, turn what went wrong into one line and an exit code.

0: done. 1: something the caller can mend, said in one message. 2: a flag or verb that does not exist. 130: Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

VERBS = {
    "demo": "train a hybrid and an attention model, compare them, write a report: minutes, no download",
    "train": "train a model on text; resumes where it stopped",
    "generate": "continue a prompt with a trained model",
    "chat": "talk to a model, turn by turn",
    "eval": "measure a trained model: perplexity by position, task accuracy",
    "study": "run an experiment of the paper at a size that fits the machine",
    "check": "name what is wrong with a model folder, what breaks where, and the repair",
    "convert": "rewrite a model folder in the layout of the release, transformers or fla; repair it",
    "info": "show versions, devices, implementations, and what a preset costs",
}
"""Every verb is a module of this package with ``main(argv)``; it is imported only when it is asked for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (``sys.argv[1:]`` where None) and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = words[:1] == ["--debug"]
    words = words[1:] if debug else words
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] == "--version":
        from kimi_linear import __version__

        print(f"kimi-linear {__version__}")
        return 0
    verb = words[0]
    if verb not in VERBS:
        print(f"kimi-linear: unknown verb {verb!r}{_suggestion(verb)}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        return _run(verb, words[1:])
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        # These carry messages for the caller; a bug of ours raises something else and keeps its traceback.
        if debug:
            raise
        print(f"kimi-linear {verb}: {_message(error)}", file=sys.stderr)
        return 1


def usage() -> str:
    """The text of ``kimi-linear --help``."""
    lines = [f"  {verb:<10}{summary}" for verb, summary in VERBS.items()]
    return "\n".join(
        [
            "usage: kimi-linear [--debug] VERB [flags]",
            "",
            "Train, run and understand Kimi Linear models. Every verb works without flags.",
            "",
            *lines,
            "",
            "  kimi-linear VERB --help shows a verb's flags; --debug shows the traceback of an error.",
        ]
    )


def _run(verb: str, argv: list[str]) -> int:
    from importlib import import_module

    try:
        import_module(f"kimi_linear.cli.{verb}").main(argv)
    except SystemExit as exit_:  # tyro's --help (0) and bad flags (2)
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BrokenPipeError:
        # The reader of a pipe has gone (``| head``): nothing is wrong, but the interpreter's last flush must not fail.
        import os

        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}"
    return str(error) or type(error).__name__


def _suggestion(verb: str) -> str:
    from difflib import get_close_matches

    close = get_close_matches(verb, VERBS, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


if __name__ == "__main__":
    sys.exit(main())
