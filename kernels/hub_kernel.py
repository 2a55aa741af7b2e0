"""Lays `sdkernels` out as a kernel of the Hugging Face Hub, which the `kernels` library loads by path or by name.

    python kernels/hub_kernel.py build/hub --repo-id me/sdkernels        # or: make hub-kernel
    kernels.get_local_kernel(Path("build/hub")).linear_divergence(...)

    build/hub/build.toml  torch-ext/sdkernels/     the sources, for `kernel-builder`
    build/hub/build/torch-{cpu,cuda}/              what is loaded: the package, its metadata and digests

What differs from the obvious: nothing is compiled, Triton does that when a kernel first runs, so a build is a copy of
the sources, one per backend because the loader asks for its own. It has the name `_sdkernels_<backend>_<digest of the
sources>`, which is also the namespace of its operators, so that several versions and the installed package live in one
process. What only development needs (`LEFT_OUT`) is not in it.

The format is that of huggingface/kernels at 8ac69fc (kernels 0.17, build.toml edition 5). Not covered: uploading,
signatures, and `flake.nix`, which `kernel-builder init` writes.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "sdkernels"
VERSION_FILE = SOURCES.parents[1] / "sdcore" / "__init__.py"
NAME = "sdkernels"
LICENSE = "Apache-2.0"
BACKENDS = ("cpu", "cuda")
# Run by developers only.
LEFT_OUT = frozenset({"compile_check.py", "tuning.py"})

# Older loaders look for a folder of the kernel's name; this is what they find there.
COMPATIBILITY = '''"""For loaders that expect a package in a folder of its name: the symbols of one level above."""

import importlib.util
import sys
from pathlib import Path

_file = Path(__file__).resolve().parent.parent / "__init__.py"
_name = "{id}"
if _name not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_name, _file)
    sys.modules[_name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_name])
globals().update({{name: getattr(sys.modules[_name], name) for name in sys.modules[_name].__all__}})
__all__ = sys.modules[_name].__all__
'''

BUILD_TOML = """[general]
name = "{name}"
version = {version}
edition = 5
license = "{license}"
backends = [{backends}]
{hub}
[torch-noarch]
"""

CARD = """---
license: {license}
tags:
  - kernels
---

# sdkernels

{summary}

```python
from kernels import get_kernel

sdkernels = get_kernel("{repo}", version={version}, trust_remote_code=True)
```

Version {release} of the Python package; pure Python and Triton.
"""


def lay_out(output: Path, *, repo_id: str | None = None) -> Path:
    """Writes the layout into `output`, which must be new, empty, or an earlier layout; returns it."""
    if output.exists() and any(output.iterdir()) and not (output / "build.toml").exists():
        raise FileExistsError(f"output must be new, empty or an earlier layout, got {output} with other files in it")
    shutil.rmtree(output, ignore_errors=True)
    files = {path.relative_to(SOURCES): path.read_bytes() for path in _sources()}
    release = release_of()
    version = int(release.split(".")[0])
    _write(output / "torch-ext" / NAME, files)
    (output / "build.toml").write_text(
        BUILD_TOML.format(
            name=NAME,
            version=version,
            license=LICENSE,
            backends=", ".join(f'"{backend}"' for backend in BACKENDS),
            hub=f'\n[general.hub]\nrepo-id = "{repo_id}"\n' if repo_id else "",
        )
    )
    summary = files[Path("__init__.py")].decode().split('"""')[1].split("\n\n")[0].partition(": ")[2]
    (output / "README.md").write_text(
        CARD.format(
            license=LICENSE.lower(),
            summary=summary[0].upper() + summary[1:],
            repo=repo_id or f"OWNER/{NAME}",
            version=version,
            release=release,
        )
    )
    for backend in BACKENDS:
        unique = f"_{NAME}_{backend}_{_digest(files)}"
        built = files | {Path(NAME) / "__init__.py": COMPATIBILITY.format(id=unique).encode()}
        folder = output / "build" / f"torch-{backend}"
        _write(folder, built)
        (folder / "metadata.json").write_text(json.dumps(_metadata(unique, version, backend, built), indent=2) + "\n")
    return output


def release_of() -> str:
    """Reads the version of the whole project, which is not imported for it."""
    line = re.search(r'^__version__ = "([^"]+)"', VERSION_FILE.read_text(), re.MULTILINE)
    if line is None:
        raise ValueError(f'{VERSION_FILE} must have a line __version__ = "...", got none')
    return line[1]


def _sources() -> list[Path]:
    paths = [path for path in SOURCES.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return sorted(path for path in paths if path.name not in LEFT_OUT)


def _digest(files: dict[Path, bytes]) -> str:
    """Returns a digest of names and contents: another one for every change."""
    whole = hashlib.sha256()
    for path, content in sorted(files.items()):
        whole.update(f"{path.as_posix()} {len(content)}\n".encode() + content)
    return whole.hexdigest()[:10]


def _metadata(unique: str, version: int, backend: str, files: dict[Path, bytes]) -> dict[str, object]:
    digests = {
        path.as_posix(): base64.b64encode(hashlib.sha256(content).digest()).decode()
        for path, content in sorted(files.items())
    }
    return {
        "name": NAME,
        "id": unique,
        "version": version,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }


def _write(folder: Path, files: dict[Path, bytes]) -> None:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("output", type=Path, help="the folder to write, new or of an earlier run")
    parser.add_argument("--repo-id", help="the repository on the Hub that it is for, owner/name")
    options = parser.parse_args(arguments)
    sys.stdout.write(f"{lay_out(options.output, repo_id=options.repo_id)}\n")


if __name__ == "__main__":
    main()
