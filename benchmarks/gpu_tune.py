"""Tunes the kernels of this machine in parts, for gpu_run.sh: `python benchmarks/gpu_tune.py PART FOLDER [--quick]`.

PART is a kernel, `workspace` (speed of the output layer against workspace), or `table`, which sums up what both left in
the folder of a run, as the file that `backend="auto"` reads. `--quick` is for a CPU: tiny sizes.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from math import inf
from pathlib import Path
from statistics import mean

import torch

from sdcore.bench.options import Options
from sdcore.bench.peers import at_workspace
from sdcore.bench.shapes import GOAL_SHAPES, JSD, QUICK_SHAPE, REVERSE_KL, Group, groups
from sdcore.bench.suite import run
from sdcore.bench.suites.divergence import SUITE
from sdcore.bench.tables import by_group, floor_seconds
from sdkernels import tuned
from sdkernels.tuning import SHAPES, as_json, chosen_of, merged, tune

MEGABYTES, MOST = (128, 256, 512, 768, 1024, 1536, 2048), 1536  # MOST: the bound of the goals
ABOUT_AS_FAST = 1.02
SECONDS = 50.0  # for the candidates of a kernel


def enough(multiples: dict[Group, dict[int, float]]) -> list[tuned.WorkspaceRow]:
    """Per trained head the smallest workspace that is about as fast as any, by the mean of the divergences."""
    rows = []
    for shape in {group.shape for group in multiples}:
        curves = [sizes for group, sizes in multiples.items() if group.shape == shape and not group.frozen_head]
        means = {size: mean(curve.get(size, inf) for curve in curves) for size in MEGABYTES if size <= MOST}
        least = min(size for size, multiple in means.items() if multiple <= ABOUT_AS_FAST * min(means.values()))
        rows.append(tuned.WorkspaceRow(shape.vocab, shape.hidden, least))
    return rows


part, folder, quick = sys.argv[1], Path(sys.argv[2]), "--quick" in sys.argv
device = torch.device("cpu" if quick else "cuda")
if part == "workspace":
    options = Options(suite="divergence", device=device.type, output=folder, quick=quick, seconds=1.0)
    planned = [group for group in groups(device.type, quick=quick) if group.divergence in (REVERSE_KL, JSD)]
    planned = [group for group in planned if group.dtype == "bf16" and group.shape in (QUICK_SHAPE, *GOAL_SHAPES)]
    run(replace(SUITE, planned=planned, contenders=[at_workspace(size) for size in MEGABYTES]), options)
elif part == "table":
    trials = [chosen_of(json.loads(path.read_text())) for path in sorted(folder.glob("tune/*/tuned.json"))]
    multiples = {
        group: {
            int(row.contender.split()[1]): row.median / floor_seconds(rows) for row in rows if " MB" in row.contender
        }
        for path in folder.glob("workspace/*/divergence-*.json")
        for group, rows in by_group(SUITE.load(path).speed).items()
    }
    tuned.write(merged(trials, enough(multiples), device), folder / "tables")
else:
    found = tune(part, ((3, 600),) if quick else SHAPES, device, seconds=SECONDS)
    (folder / "tuned.json").write_text(json.dumps(as_json(found), indent=1) + "\n")
