"""Runs cases in processes that talk to each other, started once: each leaves a file of what it found. And a server."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def serving(answer: Callable[[str, Any, dict[str, str]], tuple[int, bytes]]) -> Iterator[str]:
    """Serves HTTP on this machine, and yields the address: `answer(path, body, headers)` gives status and text."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, text = answer(self.path, body, dict(self.headers))
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()


def verdicts_of(
    work: Callable[..., None], folder: Path, *arguments: Any, ranks: int, seconds: float
) -> list[dict[str, str]]:
    """Runs `work(rank, *arguments)` in as many processes; returns what each left in `folder` as `{rank}.json`.

    That is "" for a case that is right, else why not. A case that was not reached in this time is missing: the ranks
    hung, or died.
    """
    context = mp.start_processes(work, args=arguments, nprocs=ranks, join=False, start_method="spawn")
    end = time.monotonic() + seconds
    try:
        for process in context.processes:
            process.join(max(0.0, end - time.monotonic()))
    finally:
        for process in context.processes:
            process.kill()
    files = [folder / f"{rank}.json" for rank in range(ranks)]
    return [json.loads(file.read_text()) if file.exists() else {} for file in files]


def launch(script: str, folder: Path, *arguments: str, ranks: int, seconds: float) -> None:
    """Runs a script in as many processes by torchrun; fails the test if it fails, or is not done in this time."""
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), script,
         str(folder), *arguments],
        cwd=folder,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "CI": "1",  # TRL sends no telemetry
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher, which ends its workers: they are in sessions of their own
        said, _ = process.communicate(timeout=60)
        pytest.fail(f"hung: {said[-3000:]}")
    if process.returncode:
        pytest.fail(said[-6000:])


def leave() -> None:
    """Ends a rank that has written what it found, without the interpreter's shutdown.

    Now and then that aborts a process, beside torch's threads.
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def run_cases(
    rank: int,
    folder: str,
    cases: Mapping[str, Callable[[], None]],
    *,
    ranks: int,
    seconds: float = 20.0,
    prepare: Callable[[], None] = lambda: None,
) -> None:
    """Runs named cases as one rank of a gloo group, in order, and leaves what `verdicts_of` reads.

    `seconds`: a collective that waits this long fails. `prepare` is called once the group is there.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=ranks, timeout=timedelta(seconds=seconds)
    )
    prepare()
    verdicts: dict[str, str] = {}
    for case, run in cases.items():
        started = time.monotonic()
        try:
            run()
            verdicts[case] = ""
        except BaseException:  # pytest's Failed among them
            verdicts[case] = traceback.format_exc()
        finally:
            Path(folder, f"{rank}.json").write_text(json.dumps(verdicts))
        # Whoever waited for the other in vain is no longer in step with it.
        if "timeout" in verdicts[case].lower() or time.monotonic() - started > seconds - 2:
            break
    with contextlib.suppress(Exception):
        dist.destroy_process_group()


def assert_right(case: str, verdicts: Sequence[Mapping[str, str]]) -> None:
    for rank, of_rank in enumerate(verdicts):
        assert of_rank.get(case, "it was not reached: the ranks hung, or died, in a case before") == "", f"rank {rank}"
