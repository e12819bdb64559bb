"""Import and export of the whole Kosmos-2: time, peak memory, and whether every tensor comes back bit by bit.

    python benchmarks/full_size_weights.py [--folder DIR]

Writes a folder of transformers' Kosmos-2 with random weights in bfloat16 (3.3 GB), runs `import` and `export` on it as a
user does, and compares. 11 GB of disk, 8 GB of memory.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from kosmos_lit.checks.device import describe_device

ROOT = Path(__file__).parents[1]
TENSORS = "model.safetensors"


def write_random(folder: Path) -> None:
    """Write what `Kosmos2ForConditionalGeneration.save_pretrained` would, with random weights and a small tokenizer."""
    from safetensors.torch import save_file
    from transformers import Kosmos2Config, Kosmos2ForConditionalGeneration

    from datamodules.prepare.tokenizer import train_tokenizer
    from kosmos_lit.tokenizer import Tokenizer, grounding

    config = Kosmos2Config()
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in Kosmos2ForConditionalGeneration(config).state_dict().items()}
    shapes.pop("text_model.lm_head.weight")  # the embedding again
    torch.manual_seed(0)
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.05, 0.05) for name, shape in shapes.items()}
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    text = folder / "text.jsonl"
    text.write_text('{"text": "a few words are enough for a vocabulary of some pieces"}\n' * 20, encoding="utf-8")
    made = train_tokenizer([str(text)], 25, folder / "tokenizer")
    Tokenizer(made.to_bytes(), grounding(1024)).save_transformers(folder)


def run(*arguments: str) -> tuple[float, float]:
    """Run a verb; return seconds and the largest memory of any verb so far in GB."""
    started = time.monotonic()
    subprocess.run([sys.executable, ROOT / "main.py", *arguments], check=True, cwd=ROOT)
    return time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6


def is_equal(first: Path, second: Path) -> bool:
    from safetensors import safe_open

    with safe_open(first / TENSORS, "pt") as a, safe_open(second / TENSORS, "pt") as b:
        return set(a.keys()) == set(b.keys()) and all(torch.equal(a.get_tensor(n), b.get_tensor(n)) for n in a.keys())  # noqa: SIM118


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; default: the system's temporary folder")
    with tempfile.TemporaryDirectory(dir=parser.parse_args().folder) as folder:
        theirs, ours, back = (Path(folder) / name for name in ("theirs", "ours", "back"))
        theirs.mkdir()
        write_random(theirs)
        for verb, *rest in (
            ("import", "--format", "transformers", "--input", str(theirs), "--output", str(ours)),
            ("export", "--ckpt_path", str(ours), "--format", "transformers", "--output", str(back)),
        ):
            seconds, peak = run(verb, *rest)
            print(f"{verb}: {seconds:.0f} s, peak {peak:.1f} GB")
        equal = is_equal(theirs, back)
    print("every tensor came back bit by bit" if equal else "TENSORS DIFFER", f"({describe_device(torch.device('cpu'))})")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
