"""The files of `configs/` by name: they are part of the package, so that a name works wherever a command is run.

In a checkout `kosmos_lit/configs` is a link to `configs/`; a wheel holds the files themselves.
"""

from __future__ import annotations

from pathlib import Path

from kosmos_lit.errors import UserError, did_you_mean, nearest

CONFIGS = Path(__file__).parent / "configs"
PREFIX = "configs/"
"""How the files are named in a checkout; with it they are found from elsewhere too."""


def find_file(name: str | Path, what: str, ending: str = ".yaml") -> Path:
    """Return a file by its path, or else the shipped one of that name.

    Args:
        name: a path, from the working directory; or a file below `configs/`, with or without that prefix and its ending:
            `quickstart`, `trainer/fsdp`, `configs/vision/tiny_48.json`.
        what: where the name is written, for the message.
        ending: of the files that may be meant.

    Raises: UserError that lists the shipped files, those with the nearest names first.
    """
    path = Path(name)
    if path.is_file():
        return path
    short = str(name).removeprefix(PREFIX).removesuffix(ending)
    names = shipped_names(ending)
    # Only listed names: "../" must lead nowhere.
    if short in names:
        return CONFIGS / f"{short}{ending}"
    raise UserError(
        f"{what}: no file {name} (looked from {Path.cwd()}), and none of that name is shipped"
        f"{did_you_mean(short, names)} (there are {', '.join(nearest(short, names))})"
    )


def shipped_names(ending: str = ".yaml") -> list[str]:
    """Return the names of the shipped files with an ending, without it."""
    # Not `rglob` of the package's folder: it does not follow a link.
    files = CONFIGS.resolve().rglob(f"*{ending}")
    return sorted(path.relative_to(CONFIGS.resolve()).with_suffix("").as_posix() for path in files)
