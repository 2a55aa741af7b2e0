"""Lays `sdkernels` out as a kernel of the Hub and loads it from there, offline, as the `kernels` library does."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import hub_kernel

# What kernels 0.17 does: the variant's `__init__.py`, under the metadata's id, after which it is a module like others.
LOAD = """
import importlib.util, json, sys
from pathlib import Path

def load(variant):
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

variants = Path(sys.argv[1]) / "build"
"""


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    return hub_kernel.lay_out(tmp_path / "hub", repo_id="me/sdkernels")


def test_a_copy_from_the_layout_trains_where_sdkernels_is_not_installed(
    layout: Path, run_python: Callable[..., str]
) -> None:
    code = (
        LOAD
        + """
sys.modules |= dict.fromkeys(["sdkernels", "sdcore", "triton", "transformers"])  # an import raises ImportError
import torch
torch.manual_seed(0)
kernel = load(variants / "torch-cpu")
hidden = torch.randn(9, 8, dtype=torch.float64, requires_grad=True)
weight = torch.randn(13, 8, dtype=torch.float64, requires_grad=True)
teacher, ids = torch.randn(9, 8, dtype=torch.float64), torch.arange(9)
out = kernel.linear_divergence(hidden, weight, teacher, alpha=0.0, target_ids=ids)
out.loss.backward()
found = hidden.grad.clone(), weight.grad.clone()
hidden.grad = weight.grad = None
log_p = (hidden @ weight.T).log_softmax(-1)
log_q = (teacher @ weight.detach().T).log_softmax(-1)
loss = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
loss.backward()
torch.testing.assert_close(out.loss, loss)
torch.testing.assert_close(found, (hidden.grad, weight.grad))
kernel.linear_topk(hidden, weight, 3), kernel.linear_logprobs(hidden, weight, ids)
kernel.logit_divergence(log_p, log_q)
print(kernel.__name__, out.backend)
"""
    )
    name, backend = run_python(code, str(layout), path=layout).split()
    assert name.startswith("_sdkernels_cpu_")
    assert backend == "torch"


def test_copies_and_the_package_live_in_one_process(layout: Path, run_python: Callable[..., str]) -> None:
    """Each has operators of its own, in a namespace of its name; so have two versions of the kernel."""
    code = (
        LOAD
        + """
import torch, sdkernels
first, second = load(variants / "torch-cpu"), load(variants / "torch-cuda")
states, weight = torch.randn(5, 4), torch.randn(7, 4)
results = []
for package in (sdkernels, first, second):
    hidden = states.clone().requires_grad_()
    loss = package.linear_divergence(hidden, weight, states.flip(0)).loss
    loss.backward()
    results.append((float(loss), hidden.grad.tolist()))
assert results[0] == results[1] == results[2]
names = [name.split("::") for name in torch._C._dispatch_get_all_op_names()]
print(json.dumps({space: sorted(n for s, n in names if s == space) for space, _ in names if "sdkernels" in space}))
"""
    )
    found = json.loads(run_python(code, str(layout)))
    metadata = [json.loads(file.read_text()) for file in sorted((layout / "build").glob("*/metadata.json"))]
    assert set(found) == {"sdkernels", *(one["id"] for one in metadata)}
    assert len({tuple(names) for names in found.values()}) == 1
    assert "divergence" in found["sdkernels"]


def test_the_folder_of_older_loaders_has_the_same_symbols(layout: Path, run_python: Callable[..., str]) -> None:
    code = """
import importlib.util, sys
sys.modules |= dict.fromkeys(["sdkernels", "sdcore", "triton"])
spec = importlib.util.spec_from_file_location("sdkernels_0123abcd", sys.argv[1])  # a name of the loader's own
sys.modules[spec.name] = kernel = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
print(*sorted(kernel.__all__))
import torch
hidden = torch.randn(3, 4, requires_grad=True)
kernel.linear_divergence(hidden, torch.randn(5, 4), torch.randn(3, 4)).loss.backward()
assert hidden.grad.isfinite().all()
"""
    file = layout / "build" / "torch-cpu" / "sdkernels" / "__init__.py"
    names = run_python(code, str(file), path=layout).split()
    import sdkernels

    assert names == sorted(sdkernels.__all__)


def test_the_kernels_library_loads_it(layout: Path) -> None:
    kernels = pytest.importorskip("kernels")
    if not hasattr(kernels, "get_local_kernel"):
        pytest.skip("no kernels library: this is another package of the name")
    kernel: ModuleType = kernels.get_local_kernel(layout, backend="cpu")
    assert kernel.__name__ == json.loads((layout / "build" / "torch-cpu" / "metadata.json").read_text())["id"]


def test_the_metadata_describes_the_files(layout: Path) -> None:
    build = tomllib.loads((layout / "build.toml").read_text())
    assert build["general"] == {
        "name": "sdkernels",
        "version": 0,
        "edition": 5,
        "license": "Apache-2.0",
        "backends": ["cpu", "cuda"],
        "hub": {"repo-id": "me/sdkernels"},
    }
    assert build["torch-noarch"] == {}
    assert hub_kernel.release_of().startswith("0.")
    for backend in ("cpu", "cuda"):
        folder = layout / "build" / f"torch-{backend}"
        metadata = json.loads((folder / "metadata.json").read_text())
        assert metadata["id"].isidentifier()
        assert metadata["backend"] == {"type": backend}
        files = [file for file in folder.rglob("*") if file.is_file() and file.name != "metadata.json"]
        assert metadata["digest"]["files"] == {
            file.relative_to(folder).as_posix(): base64.b64encode(hashlib.sha256(file.read_bytes()).digest()).decode()
            for file in files
        }


def test_the_copy_is_the_package_without_what_development_needs(layout: Path) -> None:
    package = {file.relative_to(hub_kernel.SOURCES) for file in hub_kernel.SOURCES.rglob("*.py")}
    copied = {file.relative_to(layout / "torch-ext/sdkernels") for file in (layout / "torch-ext").rglob("*.py")}
    development = {"compile_check.py", "tuning.py"}
    assert copied == package - {Path(name) for name in development}
    for file in (layout / "torch-ext").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.split(".")[0] == "sdkernels"], f"{file} imports by name"


def test_the_name_changes_with_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Path) -> None:
    again = hub_kernel.lay_out(tmp_path / "again")
    sources = tmp_path / "sources"
    for file in (again / "torch-ext" / "sdkernels").rglob("*.py"):
        target = sources / file.relative_to(again / "torch-ext" / "sdkernels")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    (sources / "py.typed").touch()
    (sources / "types.py").write_text((sources / "types.py").read_text() + "# changed\n")
    monkeypatch.setattr(hub_kernel, "SOURCES", sources)
    changed = hub_kernel.lay_out(tmp_path / "changed")
    names = [json.loads((one / "build/torch-cpu/metadata.json").read_text())["id"] for one in (layout, again, changed)]
    assert names[0] == names[1] != names[2]


def test_a_layout_is_written_anew_and_other_files_are_not_overwritten(
    tmp_path: Path, layout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stale = layout / "build" / "torch-cpu" / "gone.py"
    stale.touch()
    hub_kernel.main([str(layout)])
    assert capsys.readouterr().out == f"{layout}\n"
    assert not stale.exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match=r"output must be new, empty or an earlier layout, got .*other"):
        hub_kernel.lay_out(other)
    assert (other / "thesis.txt").exists()
