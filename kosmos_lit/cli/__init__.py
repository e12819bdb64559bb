"""The command line: verbs are dispatched here, each has a file of its own and imports only what it needs."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path

from kosmos_lit._version import __version__
from kosmos_lit.errors import UserError, describe_os_error, did_you_mean
from kosmos_lit.terminal import program

VERBS = {
    "fit": "train, or resume with --ckpt_path last",
    "validate": "loss on held-out rows",
    "test": "the tasks of eval.tasks, or without tasks the loss on all held-out rows",
    "predict": "captions for held-out images, as JSON lines",
    "prepare tokenizer": "train a tokenizer on raw files",
    "prepare corpus": "index raw files",
    "plan": "print what a run takes and what is wrong with it, before it starts",
    "report eval": "tables of one evaluation, or of several side by side",
    "report run": "losses and speed of runs, and where their settings differ",
    "report data": "what indexes hold, and what was left out of them",
    "rows": "print what the model gets at given rows of the stream",
    "verify-resume": "compare the rows that two runs read, and their weights",
    "generate": "continue a prompt with images",
    "import": "turn weights of transformers, fairseq or open_clip into a model folder",
    "export": "write a trained model for transformers, or as safetensors",
}
"""All verbs; the first word of two names their group."""
TRAINER_VERBS = ("fit", "validate", "test", "predict")
"""Those of Lightning, whose parser reads the verb itself."""
FUNCTIONS = {
    "prepare tokenizer": "prepare.prepare_tokenizer",
    "prepare corpus": "prepare.prepare_corpus",
    "plan": "plan.plan",
    "report eval": "report.report_eval",
    "report run": "report_run.report_run",
    "report data": "report_data.report_data",
    "rows": "rows.rows",
    "verify-resume": "verify_resume.verify_resume",
    "generate": "generate.generate",
    "import": "weights.import_weights",
    "export": "weights.export_weights",
}
"""The function of every other verb, by its place in this package: only that file is imported."""
HELP = ("-h", "--help")

SPIN_COUNT = 2_000
"""How often a thread of libgomp, the OpenMP of PyTorch's Linux wheels, looks for work before it sleeps. By default these are
300,000 times, milliseconds in which it keeps a CPU that the thread that it waits for may need (docs/measurements.md)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code: 0, 1 for a negative answer, 2 for a user's mistake, 130 when interrupted."""
    set_spin_count()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in HELP:
        print(_usage(VERBS))
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    verb = arguments[0]
    group = [other for other in VERBS if other.split()[0] == verb != other]
    if group and (arguments[1:2] == [] or arguments[1] in HELP):
        print(_usage(group))
        return 0 if arguments[1:] else 2
    try:
        if group:
            verb = " ".join(arguments[:2])
        if verb not in VERBS:
            raise UserError(_unknown(verb, group or list(VERBS)))
        if verb in TRAINER_VERBS:
            check_files(arguments)
        return _function_of(verb)(arguments[len(verb.split()) :]) or 0  # most verbs return None
    except UserError as error:
        print(f"error: {_without_worker_traceback(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # as in `rows ... | head`
        # Python flushes stdout once more when it exits, which would raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if (sentence := describe_os_error(error)) is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resume = "; run the same command again to continue"
        advice = {"fit": "; add --ckpt_path last to continue", "test": f"{resume}, if it evaluates tasks"}
        advice |= {"prepare tokenizer": resume, "prepare corpus": resume}
        print(f"interrupted{advice.get(verb, '')}", file=sys.stderr)
        return 130  # 128 + SIGINT, as shells have it


def check_files(arguments: Sequence[str]) -> None:
    """Raises: UserError for a config or a checkpoint that there is not, before Lightning's import, which takes seconds."""
    from kosmos_lit.cli.overlays import with_files_resolved

    words = [part for word in with_files_resolved(arguments) for part in word.split("=", 1 if word[:2] == "--" else 0)]
    for flag, value in pairwise(words):
        if flag == "--ckpt_path" and value not in ("last", "null") and not Path(value).exists():
            raise UserError(f"no checkpoint {value}")


def set_spin_count() -> None:
    """Let this process and its children share CPUs with other work, unless the environment says how threads wait.

    libgomp reads the environment once, when torch is imported, so this comes before a verb's imports.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def _function_of(verb: str) -> Callable[[list[str]], int | None]:
    if verb in TRAINER_VERBS:
        from kosmos_lit.cli.trainer import run_trainer

        return lambda rest: run_trainer([verb, *rest])
    module, _, name = FUNCTIONS[verb].partition(".")
    function: Callable[[list[str]], int | None] = getattr(import_module(f"kosmos_lit.cli.{module}"), name)
    return function


def _unknown(verb: str, verbs: Sequence[str]) -> str:
    """Return the message on a verb that there is not; `verbs` are those of its group, or all."""
    group, _, rest = verb.partition(" ")
    # `report FOLDER ...` was the verb before there was a group of reports.
    new = f"; `{group} FOLDER` is `report eval FOLDER` now" if group == "report" and rest else ""
    return f"unknown verb {verb!r}{new or did_you_mean(verb, verbs)} (there are {', '.join(verbs)})"


def _without_worker_traceback(message: str) -> str:
    """Return the message of the original error, which a DataLoader worker wraps in its traceback."""
    # DOTALL: a traceback has many lines. Greedy: of several messages the last one is the original.
    match = re.search(r"Caught UserError in DataLoader worker.*UserError: (.*)", message, re.DOTALL)
    return match[1].strip() if match else message


def _usage(verbs: Iterable[str]) -> str:
    lines = [f"  {verb:<19}{VERBS[verb]}" for verb in verbs]
    end = f"{program()} VERB --help lists the options of a verb."
    return "\n".join([f"usage: {program()} VERB ...", "", *lines, "", end])
