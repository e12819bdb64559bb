# /// script
# requires-python = "==3.11.*"
# dependencies = [
#   "torchscale==0.3.0",
#   "fairscale==0.4.0",
#   "timm==0.6.13",
#   "torch==2.0.1",
#   "torchvision==0.15.2",
#   "numpy==1.26.4",
# ]
# ///
"""Record what torchscale's own decoder computes, and how it starts: torchscale_outputs.json, torchscale_init.json.

    make golden-torchscale                          a virtual environment of its own, .golden-venv, then this script
    uv run tests/golden/make_torchscale.py          the same by way of the block above

torchscale 0.3.0 asks for timm 0.6.13 and fairscale 0.4.0; open_clip asks for timm 1.x, hence an environment of its own. The
block above is the only list of pins: the make target installs from it and this script compares it with what it runs on.

The weights of the outputs follow `torchscale_draws` by parameter name. Those of the initial distribution are
torchscale's own: `Decoder(DecoderConfig(...))`, with its `TextEmbedding` handed in, as a decoder there leaves embeddings
to its caller. The released training code hands in fairseq's, which starts from the same N(0, 1/D) and zero <pad>.
"""

from __future__ import annotations

import json
import platform
import sys
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchscale_draws as draws
from torchscale.architecture.config import DecoderConfig
from torchscale.architecture.decoder import Decoder
from torchscale.component.embedding import PositionalEmbedding, TextEmbedding

GOLDEN = Path(__file__).parent
COMMAND = "make golden-torchscale"
DECIMALS = 7
PAD = 1
FIRST_POSITION = 2
"""torchscale, as fairseq, numbers learned positions from 2."""

NORMS: dict[str, dict[str, bool]] = {
    "sub": {"subln": True, "deepnorm": False, "decoder_normalize_before": True},
    "pre": {"subln": False, "deepnorm": False, "decoder_normalize_before": True},
    "post": {"subln": False, "deepnorm": False, "decoder_normalize_before": False},
    "deepnorm": {"subln": False, "deepnorm": True, "decoder_normalize_before": False},
}


def sizes(L: int, D: int, H: int, F: int, B: int, T: int, V: int = 31) -> dict[str, int]:
    return {
        "n_layers": L,
        "dim": D,
        "n_heads": H,
        "ffn_dim": F,
        "n_rows": B,
        "n_positions": T,
        "vocab_size": V,
    }


IMAGES = {"slots": [[0, 1], [1, 6]], "n_latents": 3}
"""Row and first slot of each image, as our decoder takes them; torchscale gets the spliced `token_embeddings`."""

CASES: dict[str, dict[str, Any]] = {
    "sub xpos small": {"norm": "sub", "positions": "xpos", **sizes(2, 20, 5, 23, 2, 13), "with_logits": True},
    "sub xpos deep": {"norm": "sub", "positions": "xpos", **sizes(7, 42, 3, 57, 2, 11)},
    "sub xpos one head one token": {"norm": "sub", "positions": "xpos", **sizes(1, 14, 1, 9, 3, 1)},
    # Longer than the 512 positions by which xPos counts its decay; every 25th position and the last are kept.
    "sub xpos long": {"norm": "sub", "positions": "xpos", **sizes(3, 24, 2, 31, 1, 601), "keep_every": 25},
    "sub xpos latents": {"norm": "sub", "positions": "xpos", **sizes(3, 20, 5, 23, 2, 13), **IMAGES},
    "sub xpos incremental": {"norm": "sub", "positions": "xpos", **sizes(3, 28, 2, 37, 3, 17), "prompt": 7},
    "sub none": {"norm": "sub", "positions": "none", **sizes(3, 30, 5, 41, 2, 11)},
    "sub none incremental": {"norm": "sub", "positions": "none", **sizes(2, 20, 5, 23, 2, 11), "prompt": 5},
    "sub learned": {"norm": "sub", "positions": "learned", **sizes(3, 20, 5, 23, 2, 13)},
    "pre xpos": {"norm": "pre", "positions": "xpos", **sizes(3, 20, 5, 23, 2, 13)},
    "pre none": {"norm": "pre", "positions": "none", **sizes(5, 18, 3, 29, 2, 11)},
    "post xpos": {"norm": "post", "positions": "xpos", **sizes(3, 20, 5, 23, 2, 13)},
    "post none": {"norm": "post", "positions": "none", **sizes(5, 18, 3, 29, 2, 11)},
    "deepnorm xpos": {"norm": "deepnorm", "positions": "xpos", **sizes(3, 20, 5, 23, 2, 13), "with_logits": True},
    "deepnorm none": {"norm": "deepnorm", "positions": "none", **sizes(5, 18, 3, 29, 2, 11)},
    "deepnorm xpos incremental": {"norm": "deepnorm", "positions": "xpos", **sizes(2, 20, 5, 23, 2, 11), "prompt": 4},
}

START = {"n_layers": 5, "dim": 70, "n_heads": 5, "ffn_dim": 113, "vocab_size": 211}
N_SEEDS = 64
PROBABILITIES = [round(k / 20, 2) for k in range(1, 20)]


def pins() -> dict[str, str]:
    """Return package -> version of the block at the top.

    Raises: SystemExit if this interpreter or an installed package is another one.
    """
    lines = Path(__file__).read_text(encoding="utf-8").split("# ///")[1].splitlines()[1:]
    block = tomllib.loads("\n".join(line.removeprefix("#") for line in lines))
    asked = dict(pin.split("==") for pin in block["dependencies"])
    wrong = [f"{name} {version(name)} instead of {pin}" for name, pin in asked.items() if version(name) != pin]
    if sys.version_info[:2] != (3, 11):
        wrong.insert(0, f"Python {platform.python_version()} instead of 3.11")
    if wrong:
        sys.exit(f"{Path(__file__).name} runs on pinned versions; found {', '.join(wrong)}. Run `{COMMAND}`.")
    return asked


def decoder(case: dict[str, Any], embed_positions: torch.nn.Module | None = None) -> Decoder:
    """Return torchscale's decoder as it starts, without dropout, its output matrix tied."""
    config = DecoderConfig(
        decoder_layers=case["n_layers"],
        decoder_embed_dim=case["dim"],
        decoder_attention_heads=case["n_heads"],
        decoder_ffn_embed_dim=case["ffn_dim"],
        vocab_size=case["vocab_size"],
        xpos_rel_pos=case["positions"] == "xpos",
        share_decoder_input_output_embed=True,
        no_scale_embedding=False,
        **NORMS[case["norm"]],
    )
    embed = TextEmbedding(case["vocab_size"], case["dim"], padding_idx=PAD)
    return Decoder(config, embed_tokens=embed, embed_positions=embed_positions).eval()


def drawn_decoder(case: dict[str, Any]) -> Decoder:
    """Return torchscale's decoder with the weights of `torchscale_draws`."""
    learned = case["positions"] == "learned"
    made = decoder(case, PositionalEmbedding(case["n_positions"] + FIRST_POSITION, case["dim"]) if learned else None)
    for name, parameter in made.named_parameters():
        parameter.data = torch.from_numpy(draws.weight(name, parameter.shape))
    return made


@torch.no_grad()
def hidden_states(name: str, case: dict[str, Any], made: Decoder) -> torch.Tensor:
    """Return (B, T, D) of the last layer, after the final LayerNorm where there is one."""
    B, T = case["n_rows"], case["n_positions"]
    tokens = torch.from_numpy(draws.tokens(name, B, T, case["vocab_size"]))
    if "prompt" in case:
        return incremental(made, tokens, case["prompt"])
    embeddings = None
    if "slots" in case:
        embeddings = made.embed_tokens(tokens).clone()
        latents = draws.latents(name, (len(case["slots"]), case["n_latents"], case["dim"]))
        for (row, start), latent in zip(case["slots"], torch.from_numpy(latents).to(embeddings), strict=True):
            embeddings[row, start : start + case["n_latents"]] = latent
    return made(tokens, token_embeddings=embeddings, features_only=True)[0]


def incremental(made: Decoder, tokens: torch.Tensor, prompt: int) -> torch.Tensor:
    """Read `prompt` tokens at once, then one at a time, on torchscale's incremental state."""
    state: dict[Any, Any] = {"is_first_step": True}
    pieces = [made(tokens[:, :prompt], incremental_state=state, features_only=True)[0]]
    state["is_first_step"] = False
    for end in range(prompt + 1, tokens.shape[1] + 1):
        pieces.append(made(tokens[:, :end], incremental_state=state, features_only=True)[0])
    return torch.cat(pieces, dim=1)


def kept(case: dict[str, Any]) -> list[int]:
    T = case["n_positions"]
    return sorted({*range(0, T, case.get("keep_every", 1)), T - 1})


def outputs() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, case in CASES.items():
        made = drawn_decoder(case)
        hidden = hidden_states(name, case, made)
        record = case | {"kept": kept(case), "n_parameters": sum(p.numel() for p in made.parameters())}
        record["hidden"] = rounded(hidden[:, kept(case)])
        if case.get("with_logits"):
            with torch.no_grad():
                record["logits"] = rounded(made.output_layer(hidden))
        exact = hidden_states(name, case, made.double())
        record["rounding_error"] = float(f"{(hidden - exact).abs().max():.1e}")
        yield name, record


def rounded(values: torch.Tensor) -> Any:
    return np.round(values.double().numpy(), DECIMALS).tolist()


def start(norm: str) -> dict[str, Any]:
    """Return parameter name -> how its values are distributed over `N_SEEDS` decoders that torchscale initialised."""
    values: dict[str, list[np.ndarray]] = {}
    for seed in range(N_SEEDS):
        torch.manual_seed(seed)
        for name, parameter in decoder(START | {"norm": norm, "positions": "xpos"}).named_parameters():
            drawn = parameter.detach().numpy()
            if name == "embed_tokens.weight":
                assert not drawn[PAD].any()
                drawn = np.delete(drawn, PAD, axis=0)
            values.setdefault(name, []).append(drawn)
    return {name: distribution(np.stack(drawn)) for name, drawn in values.items()}


def distribution(drawn: np.ndarray) -> dict[str, Any]:
    x = drawn.astype(np.float64).ravel()
    if x.min() == x.max():
        return {"shape": drawn.shape[1:], "n": x.size, "constant": float(x[0])}
    return {
        "shape": drawn.shape[1:],
        "n": x.size,
        "largest": significant(np.abs(x).max()),
        "mean": significant(x.mean()),
        "std": significant(x.std()),
        "kurtosis": significant(((x - x.mean()) ** 4).mean() / x.var() ** 2),
        "quantiles": [significant(q) for q in np.quantile(x, PROBABILITIES)],
    }


def significant(value: float) -> float:
    return float(f"{value:.6g}")


def write(path: Path, about: dict[str, Any], key: str, entries: dict[str, Any]) -> None:
    """Write JSON with one entry a line."""
    head = json.dumps({"about": about}, indent=1).removesuffix("\n}")
    lines = [f"  {json.dumps(name)}: {json.dumps(entry, separators=(',', ':'))}" for name, entry in entries.items()]
    body = ",\n".join(lines)
    path.write_text(f"{head},\n {json.dumps(key)}: {{\n{body}\n }}\n}}\n", encoding="utf-8")
    print(f"{path.name}: {len(entries)} entries, {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    torch.set_num_threads(1)
    about = {
        "what": "",
        "reference": "torchscale.architecture.decoder.Decoder, dropout 0, evaluation mode, on a CPU",
        "versions": {"python": platform.python_version()} | pins(),
        "command": COMMAND,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.machine(),
        "dtype": "float32",
    }
    write(
        GOLDEN / "torchscale_outputs.json",
        about
        | {
            "what": "hidden states (B, kept positions, D) and some logits for weights of torchscale_draws.py;"
            " rounding_error is the largest difference of hidden states from the same decoder in float64",
            "seed": "PCG64 seeded with the CRC-32 of each parameter's name",
            "decimals": DECIMALS,
        },
        "cases",
        dict(outputs()),
    )
    write(
        GOLDEN / "torchscale_init.json",
        about
        | {
            "what": "distribution of each parameter over decoders that torchscale initialised;"
            " embeddings are its TextEmbedding, without the zero row of <pad>",
            "seed": f"0 to {N_SEEDS - 1}, one decoder each",
            "sizes": START,
            "n_seeds": N_SEEDS,
            "pad": PAD,
            "probabilities": PROBABILITIES,
        },
        "norms",
        {norm: start(norm) for norm in NORMS},
    )


if __name__ == "__main__":
    main()
