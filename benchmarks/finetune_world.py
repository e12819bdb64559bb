"""Fine-tune the quickstart's model on a new task of the world, and compare its accuracy before and after.

    python benchmarks/finetune_world.py [--seeds 0 1 2] [--set KEY=VALUE ...]

Trains the quickstart first if its checkpoint is missing; "before" evaluates this checkpoint. `captions` is the exact match
of `CaptionReport` on held-out scenes, `task` that on the new task's held-out questions, `constant` the share of its most
frequent answer, `blind` the exact match with shuffled images.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from kosmos_lit.cli import main  # noqa: E402

BASE = Path("runs/quickstart/checkpoints/step=00002200.ckpt")
COUNTED = ("object", "count")


def run() -> int:
    """Print and write one row per seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of the fine-tuning runs")
    arguments = parser.parse_args()
    if not BASE.exists() and (code := main(["fit", "-c", "configs/quickstart.yaml"])):
        return code
    rows = []
    for seed in arguments.seeds:
        folder = Path("runs/finetune_world") / f"seed{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        config = ["-c", "configs/finetune_world.yaml", "--seed_everything", str(seed)]
        config += ["--trainer.default_root_dir", str(folder), *(f"--{setting}" for setting in arguments.set)]
        if code := main(["predict", *config]):
            return code
        before = [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
        if code := main(["fit", *config]):
            return code
        after = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        rows.append({"seed": seed} | compare(before, after))
    (ROOT / "runs/finetune_world/report.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    heads = list(rows[0])
    print("\n" + "".join(f"{head:>17}" for head in heads))
    for row in rows:
        print("".join(f"{row[head]:>17}" for head in heads))
    return 0


def compare(before: list[dict[str, str]], after: dict[str, dict[str, dict[str, float]]]) -> dict[str, object]:
    """Return the metrics of one run."""
    questions = [row for row in before if row["task"] == "instruct"]
    captions = [row for row in before if row["task"] in COUNTED]
    pairs = [row for row in before if row["task"] == "pair"]
    return {
        "task before": exact(questions),
        "task after": after["tasks"]["instruct"]["exact_match"],
        "constant": round(Counter(row["target"] for row in questions).most_common(1)[0][1] / len(questions), 4),
        "blind": after["tasks"]["instruct"]["exact_match_shuffled"],
        "captions before": exact(captions),
        "captions after": after["exact_match"],
        "pairs before": exact(pairs),
        "pairs after": after["tasks"]["pair"]["exact_match"],
        "seconds": after["train_seconds"],
    }


def exact(rows: list[dict[str, str]]) -> float:
    """Return the share of exact matches."""
    return round(sum(row["prediction"] == row["target"] for row in rows) / len(rows), 4)


if __name__ == "__main__":
    sys.exit(run())
