"""The command line. The only part that imports both packages, and each verb imports only what it needs."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Sequence

from kosmos_lit._version import __version__
from kosmos_lit.errors import UserError

VERBS = {
    "fit": "train, or resume with --ckpt_path last",
    "validate": "loss on held-out rows",
    "test": "the tasks of eval.tasks, or without any the loss on all held-out rows",
    "predict": "captions for held-out images, as JSON lines",
    "prepare": "make a tokenizer or an indexed corpus out of raw files",
    "plan": "say what a run would take, and what contradicts itself, before it is started",
    "report": "tables of evaluations, one or several side by side",
    "rows": "print what the model gets at given rows of the stream",
    "verify-resume": "compare the rows that two runs read, and their weights",
    "generate": "continue a prompt with images",
    "import": "turn weights of transformers, fairseq or open_clip into a model folder",
    "export": "write a trained model for transformers, or as safetensors",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code: 0, 1 for a negative answer, 2 for a user's mistake, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    verb, *rest = arguments
    try:
        if verb not in VERBS:
            raise UserError(f"unknown verb {verb!r}; there are {', '.join(VERBS)}")
        return _runner(verb)(rest) or 0
    except UserError as error:
        print(f"error: {_innermost(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `rows ... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor will Python's last flush complain
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        goes_on = "; the same command goes on from there"
        said = {"fit": f"{goes_on} (with --ckpt_path last)", "prepare": goes_on, "test": f"{goes_on} if it runs tasks"}
        advice = said.get(verb, "")
        print(f"interrupted{advice}", file=sys.stderr)
        return 130


def _runner(verb: str) -> Callable[[list[str]], int | None]:
    if verb in ("prepare", "rows", "verify-resume", "generate", "import", "export"):
        from kosmos_lit.cli import verbs

        run: Callable[[list[str]], int | None] = getattr(verbs, "import_" if verb == "import" else verb.replace("-", "_"))
        return run
    if verb == "plan":
        from kosmos_lit.cli.plan import plan

        return plan
    if verb == "report":
        from kosmos_lit.cli.report import report

        return report
    from kosmos_lit.cli.trainer import run_trainer

    return lambda rest: run_trainer([verb, *rest])


def _innermost(message: str) -> str:
    """Return the mistake itself where a loader's process has wrapped it in its traceback."""
    found = re.search(r"Caught UserError in DataLoader worker.*UserError: (.*)", message, re.DOTALL)
    return found[1].strip() if found else message


def _usage() -> str:
    lines = [f"  {verb:<15}{what}" for verb, what in VERBS.items()]
    return "\n".join(["usage: main.py VERB ...", "", *lines, "", "main.py VERB --help says more."])
