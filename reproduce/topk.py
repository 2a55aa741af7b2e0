"""Measures how near a divergence on k tokens is to the one over the whole vocabulary, on trained models.

    python -m reproduce.topk --model /models/smollm2 --model /models/gemma3 --output docs/reproduction/topk.json

The student answers a question, the teacher is the same model with the facts that the question is about in its prompt,
and the rows are the tokens of sampled answers: in the chat template where a model has one, else in plain text. For each
divergence and k: the value as a share of the full one, and the cosine and the ratio of norms of the hidden states'
gradient to the full one's. The table is printed, the JSON has every number.

What differs from the obvious: shares are of means over all rows, so that few rows far apart count for much, as they do
in training. Both sides' logits of all rows are made once, in float32, so that a comparison costs one matrix product.
One thread takes some minutes for two models.

Not covered: teachers of other weights, output layers with more than a weight (soft caps), and what training on k tokens
does in the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sdcore.bench.states import drawn, states_of
from sdkernels import TopK, logit_divergence

ALPHAS: Final = {"forward KL": 0.0, "reverse KL": 1.0, "JSD": 0.5}
KS: Final = (10, 100, 1000)
MOST_TOKENS: Final = 16  # of an answer


class Rows(NamedTuple):
    """Holds both sides' logits for the answers' tokens, and the output layer that made them."""

    student: Tensor  # (N, V)
    teacher: Tensor  # (N, V)
    weight: Tensor  # (V, H)


def rows_of(model: PreTrainedModel, tokenizer: Any, *, seed: int = 0) -> Rows:
    """Samples an answer to each question and reads it with and without the facts before the question."""
    answers = drawn(model, tokenizer, count=1, most_tokens=MOST_TOKENS, seed=seed)
    weight = model.get_output_embeddings().weight
    student, teacher = (side @ weight.T for side in states_of(model, tokenizer, answers))
    return Rows(student, teacher, weight)


def divergence(rows: Rows, alpha: float, support: TopK | None) -> tuple[float, Tensor]:
    """Returns the mean over the rows, and its gradient with respect to the student's hidden states, (N, H)."""
    student = rows.student.detach().requires_grad_()
    loss = logit_divergence(student, rows.teacher, alpha=alpha, support=support).loss
    (gradient,) = torch.autograd.grad(loss, student)
    return float(loss.detach()), (gradient @ rows.weight).double()


def measured(folder: Path) -> dict[str, Any]:
    """Returns a model's rows, vocabulary and full values, and a comparison per divergence, k, side and tail."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    rows = rows_of(model, tokenizer)
    full = {name: divergence(rows, alpha, None) for name, alpha in ALPHAS.items()}
    sides = {"student": rows.student, "teacher": rows.teacher}
    comparisons = []
    for k in KS:
        for of, logits in sides.items():
            best = logits.topk(k).values - logits.logsumexp(-1, keepdim=True)
            outside = float(1 - best.double().exp().sum(-1).mean())
            for tail in (True, False):
                for name, alpha in ALPHAS.items():
                    value, gradient = divergence(rows, alpha, TopK(k, of=of, tail=tail))  # type: ignore[arg-type]
                    whole, right = full[name]
                    comparison = {
                        "divergence": name,
                        "k": k,
                        "of": of,
                        "tail": tail,
                        "mass outside": outside,
                        "share of the value": value / whole,
                        "gradient cosine": float((gradient * right).sum() / gradient.norm() / right.norm()),
                        "gradient norm ratio": float(gradient.norm() / right.norm()),
                    }
                    comparisons.append(
                        {key: float(f"{x:.4g}") if type(x) is float else x for key, x in comparison.items()}
                    )
    return {
        "model": folder.name,
        "rows": len(rows.student),
        "vocabulary": len(rows.weight),
        "nats": {name: float(f"{value:.4g}") for name, (value, _) in full.items()},
        "comparisons": comparisons,
    }


def table(models: Sequence[Mapping[str, Any]], *, of: str, tail: bool) -> Iterator[str]:
    """Yields the lines of a Markdown table: for each model the value, the gradient's cosine and its norm."""
    yield "| | k | " + " | ".join(f"{m['model']}: value | cosine | norm" for m in models) + " |"
    yield "| --- | ---: |" + " ---: | ---: | ---: |" * len(models)
    for name in ALPHAS:
        for k in KS:
            chosen = [
                next(
                    c
                    for c in model["comparisons"]
                    if (c["divergence"], c["k"], c["of"], c["tail"]) == (name, k, of, tail)
                )
                for model in models
            ]
            cells = [
                f"{100 * c['share of the value']:.0f} % | {c['gradient cosine']:.3f} | {c['gradient norm ratio']:.2f}"
                for c in chosen
            ]
            yield f"| {name} | {k} | " + " | ".join(cells) + " |"


def main(
    model: Annotated[list[Path], typer.Option(help="Folder of a model; may be given several times.")],
    output: Annotated[Path | None, typer.Option(help="JSON file for every number.")] = None,
) -> None:
    """Compare divergences on k tokens with those over the whole vocabulary, on answers of trained models."""
    torch.set_num_threads(1)
    models = []
    for folder in model:
        models.append(measured(folder))
        typer.echo(f"{folder.name}: {models[-1]['rows']} rows, {models[-1]['nats']}", err=True)
    if output is not None:
        output.write_text(json.dumps({"models": models}, indent=1) + "\n", encoding="utf-8")
    for of in ("student", "teacher"):
        for tail in (True, False):
            typer.echo(f"\nThe {of}'s top k, {'with' if tail else 'without'} a tail:\n")
            typer.echo("\n".join(table(models, of=of, tail=tail)))


if __name__ == "__main__":
    typer.run(main)
