"""Measures how few columns of the vocabulary carry a gradient, on trained models, and what becomes of the others.

    python -m reproduce.columns --states smollm2 --states gemma --output docs/reproduction/columns.json

For chunks of rows of a model's own answers, as `sdcore bench --states` takes them: the share of the columns of a tile
of logit gradients that has to be kept so that what is dropped has a given share of its norm; and the relative error of
the gradients of hidden states and head, where what is dropped is left out (rank 0), or goes through the first so many
right singular vectors of the head. `gradient_tolerance` of `linear_divergence` is made of this; nothing of it is used
here but the logits' gradient. One thread takes some minutes for two models.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import typer
from torch import Tensor

from sdcore.bench.states import States, load
from sdkernels import logit_divergence

from .topk import ALPHAS

DROPPED: Final = (2**-8, 2**-9, 2**-10)  # shares of the tile's norm
RANKS: Final = (0, 1, 8, 64)
ROWS: Final = 256  # of a chunk
CHUNKS: Final = (0, 2)  # which of them are measured


def directions(weight: Tensor) -> Tensor:
    """Returns the head's right singular vectors (H, H), the one with the largest singular value first."""
    gram = weight.t() @ weight
    return torch.linalg.eigh(gram.double()).eigenvectors.flip(1).to(weight.dtype)


def of_tile(states: States, rows: slice, alpha: float, basis: Tensor) -> Iterator[dict[str, float]]:
    """Yields kept share and errors for each share that is dropped."""
    hidden, weight = states.student[rows].float(), states.head.float()
    logits = (hidden @ weight.t()).requires_grad_()
    teacher = states.teacher[rows].float() @ weight.t()
    (tile,) = torch.autograd.grad(logit_divergence(logits, teacher, alpha=alpha).loss, logits)
    squares = tile.square().sum(0)
    ordered, order = squares.sort()
    masses = ordered.double().cumsum(0)
    whole, whole_head = (tile @ weight).norm(), (tile.t() @ hidden).norm()
    for dropped in DROPPED:
        out = order[: int((masses <= dropped**2 * masses[-1]).sum())]
        part, of_head = tile[:, out], weight[out]
        missing = part @ of_head
        by_rank = {f"rank {rank}": missing - missing @ basis[:, :rank] @ basis[:, :rank].t() for rank in RANKS}
        yield {
            "dropped": dropped,
            "kept": 1 - len(out) / len(weight),
            **{rank: float(left.norm() / whole) for rank, left in by_rank.items()},
            "head": float((part.t() @ hidden).norm() / whole_head),
        }


def measured(name: str) -> dict[str, Any]:
    """Returns the means over the chunks, for each divergence and share that is dropped."""
    states = load(name)
    basis, found = directions(states.head.float()), []
    for divergence, alpha in ALPHAS.items():
        tiles = [list(of_tile(states, slice(ROWS * i, ROWS * (i + 1)), alpha, basis)) for i in CHUNKS]
        for chunks in zip(*tiles, strict=True):
            means = {key: sum(chunk[key] for chunk in chunks) / len(chunks) for key in chunks[0]}
            found.append({"divergence": divergence} | {key: float(f"{x:.4g}") for key, x in means.items()})
    return {"states": name, "vocabulary": len(states.head), "width": states.head.shape[1], "means": found}


def table(models: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yields the lines of a Markdown table."""
    ranks = [f"rank {rank}" for rank in RANKS]
    yield f"| model | divergence | dropped | kept | {' | '.join(ranks)} | head |"
    yield f"| --- | --- | ---: | ---: | {'---: | ' * len(ranks)}---: |"
    for model in models:
        for row in model["means"]:
            errors = [f"{100 * row[key]:.2f} %" for key in (*ranks, "head")]
            dropped = f"1/{round(1 / row['dropped'])}"
            kept = f"{100 * row['kept']:.0f} %"
            yield f"| {model['states']} | {row['divergence']} | {dropped} | {kept} | {' | '.join(errors)} |"


def main(
    states: Annotated[list[str], typer.Option(help="smollm2 or gemma; may be given several times.")],
    output: Annotated[Path | None, typer.Option(help="JSON file for every number.")] = None,
) -> None:
    """Measure which columns of the vocabulary carry a gradient, on states of trained models."""
    torch.set_num_threads(1)
    models = [measured(name) for name in states]
    if output is not None:
        output.write_text(json.dumps({"rows": ROWS, "models": models}, indent=1) + "\n", encoding="utf-8")
    typer.echo("\n".join(table(models)))


if __name__ == "__main__":
    typer.run(main)
