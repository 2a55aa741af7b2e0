"""Does the parts of a GPU run that no command does, for gpu_run.sh: `python benchmarks/gpu_tune.py PART FOLDER`.

PART is `kernels`, whose launches are tuned, `workspace` (speed of the output layer against it), `table`, which sums up
both as the file that `backend="auto"` reads, or a model, whose configuration is written. `--quick`: tiny, on a CPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch

from sdcore.bench.models import size_of
from sdcore.bench.options import Options
from sdcore.bench.peers import at_workspace
from sdcore.bench.rows import by_group
from sdcore.bench.shapes import GOAL_SHAPES, JSD, QUICK_SHAPE, REVERSE_KL, Shape, groups
from sdcore.bench.suite import run
from sdcore.bench.suites.divergence import SUITE
from sdcore.bench.tables import floor_seconds
from sdkernels.tile import tuned
from sdkernels.tuning import SHAPES, as_json, chosen_of, merged, tune

MEGABYTES, MOST, ABOUT_AS_FAST = (128, 256, 512, 768, 1024, 1536, 2048), 1536, 1.02  # MOST is the bound of the goals


def enough(paths: Iterable[Path]) -> list[tuned.WorkspaceRow]:
    """Finds per trained head the smallest workspace that is about as fast as any, by the mean of the divergences."""
    multiples: dict[Shape, dict[int, list[float]]] = {}
    for group, rows in by_group(row for path in paths for row in SUITE.load(path).speed).items():
        for row in [row for row in rows if " MB" in row.contender and row.seconds and not group.frozen_head]:
            sizes = multiples.setdefault(group.shape, {})
            sizes.setdefault(int(row.contender.split()[1]), []).append(row.median / floor_seconds(rows))
    recommended = []
    for shape, sizes in multiples.items():
        means = {size: mean(values) for size, values in sizes.items() if size <= MOST}
        least = min(size for size, value in means.items() if value <= ABOUT_AS_FAST * min(means.values()))
        recommended.append(tuned.WorkspaceRow(shape.vocab, shape.hidden, least))
    return recommended


part, folder, quick = sys.argv[1], Path(sys.argv[2]), "--quick" in sys.argv
device = torch.device("cpu" if quick else "cuda")
if part == "workspace":
    options = Options(suite="divergence", device=device.type, output=folder, quick=quick, seconds=1.0)
    goals = [g for g in groups(device.type, quick=quick) if g.shape in (QUICK_SHAPE, *GOAL_SHAPES)]
    planned = [group for group in goals if group.dtype == "bf16" and group.divergence in (REVERSE_KL, JSD)]
    run(replace(SUITE, planned=planned, contenders=[at_workspace(size) for size in MEGABYTES]), options)
elif part == "table":
    trials = [chosen_of(json.loads(path.read_text())) for path in sorted(folder.glob("tune/kernels/*.json"))]
    tuned.write(merged(trials, enough(folder.glob("workspace/*/*.json")), device), folder / "tables")
elif part == "kernels":
    for kernel in tuned.KERNELS[1:2] if quick else tuned.KERNELS:
        tuning = tune(kernel, ((3, 600),) if quick else SHAPES, device, seconds=50.0)
        (folder / f"{kernel}.json").write_text(json.dumps(as_json(tuning), indent=1) + "\n")
else:
    size_of(part).config(vocab=size_of(part).step_vocab).save_pretrained(folder)
