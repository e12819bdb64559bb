"""The command line: verbs are dispatched here, each has a file of its own and imports only what it needs."""

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
    "test": "the tasks of eval.tasks, or without tasks the loss on all held-out rows",
    "predict": "captions for held-out images, as JSON lines",
    "prepare": "make a tokenizer or an indexed corpus out of raw files",
    "plan": "print what a run takes and what is wrong with it, before it starts",
    "report": "tables of one evaluation, or of several side by side",
    "rows": "print what the model gets at given rows of the stream",
    "verify-resume": "compare the rows that two runs read, and their weights",
    "generate": "continue a prompt with images",
    "import": "turn weights of transformers, fairseq or open_clip into a model folder",
    "export": "write a trained model for transformers, or as safetensors",
}

SPIN_COUNT = 2_000
"""How often a thread of libgomp, the OpenMP of PyTorch's Linux wheels, looks for work before it sleeps. By default these are
300,000 times, milliseconds in which it keeps a CPU that the thread that it waits for may need (docs/speed.md)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code: 0, 1 for a negative answer, 2 for a user's mistake, 130 when interrupted."""
    set_spin_count()
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
        return _function_of(verb)(rest) or 0  # most verbs return None
    except UserError as error:
        print(f"error: {_without_worker_traceback(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # as in `rows ... | head`
        # Python flushes stdout once more when it exits, which would raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        resume = "; run the same command again to continue"
        advice = {"fit": f"{resume}, with --ckpt_path last", "prepare": resume, "test": f"{resume}, if it evaluates tasks"}
        print(f"interrupted{advice.get(verb, '')}", file=sys.stderr)
        return 130  # 128 + SIGINT, as shells have it


def set_spin_count() -> None:
    """Let this process and its children share CPUs with other work, unless the environment says how threads wait.

    libgomp reads the environment once, when torch is imported, so this comes before a verb's imports.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def _function_of(verb: str) -> Callable[[list[str]], int | None]:
    match verb:
        case "prepare":
            from kosmos_lit.cli.prepare import prepare

            return prepare
        case "plan":
            from kosmos_lit.cli.plan import plan

            return plan
        case "report":
            from kosmos_lit.cli.report import report

            return report
        case "rows":
            from kosmos_lit.cli.rows import rows

            return rows
        case "verify-resume":
            from kosmos_lit.cli.verify_resume import verify_resume

            return verify_resume
        case "generate":
            from kosmos_lit.cli.generate import generate

            return generate
        case "import":
            from kosmos_lit.cli.weights import import_weights

            return import_weights
        case "export":
            from kosmos_lit.cli.weights import export_weights

            return export_weights
    # fit, validate, test and predict, whose verb Lightning's parser reads itself.
    from kosmos_lit.cli.trainer import run_trainer

    return lambda rest: run_trainer([verb, *rest])


def _without_worker_traceback(message: str) -> str:
    """Return the message of the original error, which a DataLoader worker wraps in its traceback."""
    # DOTALL: a traceback has many lines. Greedy: of several messages the last one is the original.
    match = re.search(r"Caught UserError in DataLoader worker.*UserError: (.*)", message, re.DOTALL)
    return match[1].strip() if match else message


def _usage() -> str:
    lines = [f"  {verb:<15}{summary}" for verb, summary in VERBS.items()]
    return "\n".join(["usage: main.py VERB ...", "", *lines, "", "main.py VERB --help lists the options of a verb."])
