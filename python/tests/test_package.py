"""The wheel as a stranger meets it: imports, typing, command line."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import flashcore


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        cwd=Path(sys.prefix),
    )


def test_the_installed_wheel_is_under_test() -> None:
    assert not Path(flashcore.__file__).is_relative_to(Path(__file__).resolve().parents[1])


def test_only_the_package_is_installed() -> None:
    files = importlib.metadata.files("flashcore")
    assert files is not None
    tops = {file.parts[0] for file in files if file.suffix != ".pyc"}
    assert all(top == "flashcore" or top.startswith("flashcore-") for top in tops), tops
    names = {file.name for file in files if file.parts[0] == "flashcore"}
    assert {"py.typed", "_core.pyi", "_core.abi3.so"} <= names
    assert flashcore.__version__ == importlib.metadata.version("flashcore")


WITHOUT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
import flashcore
assert not {blocked!r} & set(sys.modules)
{then}
"""

NUMPY_ALONE = """
import numpy
x = numpy.ones((1, 1, 3, 4), numpy.float32)
assert (flashcore.attention(x, x, x, is_causal=True) == x).all()
assert "torch" not in sys.modules
"""

NOTHING = """
try:
    flashcore.attention([1.0], [1.0], [1.0])
except flashcore.InvalidArgumentError as error:
    assert str(error) == "query: given an object of type list; accepted a torch.Tensor or a numpy.ndarray", error
"""


@pytest.mark.parametrize(
    ("blocked", "then"), [({"torch"}, NUMPY_ALONE), ({"torch", "numpy"}, NOTHING)], ids=["no torch", "neither"]
)
def test_import_without(blocked: set[str], then: str) -> None:
    done = python("-c", WITHOUT.format(blocked=blocked, then=then))
    assert done.returncode == 0, done.stderr


OLD_TORCH = """
import ctypes, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
import flashcore

def refusal():
    try:
        flashcore._core.register_torch_operators()
    except flashcore.UnsupportedError as error:
        return str(error)

assert refusal() == "libtorch_cpu.so is not loaded: import torch", refusal()
ctypes.CDLL({library!r})
assert refusal() == "this torch has no torch_library_impl; torch 2.10 or newer has", refusal()
"""


def test_a_torch_that_is_too_old(tmp_path: Path) -> None:
    """Stood in for by a library of its name that lacks what came with 2.10."""
    compiler = shutil.which("cc") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C compiler")
    since_2_10 = {"torch_library_impl", "torch_call_dispatcher"}
    source = tmp_path / "old.c"
    names = [name for name in flashcore._core.torch_symbols() if name not in since_2_10]
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in names))
    library = tmp_path / "libtorch_cpu.so"
    options = ["-x", "c", "-shared", "-fPIC", "-Wl,-soname,libtorch_cpu.so"]
    subprocess.run([compiler, *options, source, "-o", library], check=True)
    done = python("-c", OLD_TORCH.format(library=str(library)))
    assert done.returncode == 0, done.stderr


FORK = """
import os, signal, sys
import numpy
import flashcore

x = numpy.random.default_rng(0).random((2, 8, 256, 64), numpy.float32)
expected = flashcore.attention(x, x, x)

def same():
    return (flashcore.attention(x, x, x) == expected).all()

def in_child(then):
    child = os.fork()
    if not child:
        signal.alarm(30)
        os._exit(0 if same() and then() else 1)
    return os.waitpid(child, 0)[1] == 0

assert in_child(lambda: in_child(lambda: True))
assert same()
"""


def test_forked_processes_compute() -> None:
    """A child has none of its parent's threads; workers of a data loader are such children."""
    done = python("-W", "error", "-c", FORK)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["text", "json"])
@pytest.mark.parametrize("environment", [{}, {"CUDA_VISIBLE_DEVICES": ""}], ids=["as is", "no devices"])
def test_env_always_prints(options: tuple[str, ...], environment: dict[str, str]) -> None:
    done = python("-m", "flashcore", "env", *options, **environment)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    keys = {"flashcore", "python", "platform", "torch", "torch_asked_through", "numpy", "driver", "devices", "bundles"}
    if options:
        report = json.loads(done.stdout)
        assert report.keys() == keys
        assert report["flashcore"] == flashcore.__version__
        assert report["torch_asked_through"] == "C++"
        assert {bundle["arch"] for bundle in report["bundles"]} >= {"sm_90a"}
    else:
        assert {line.split()[0] for line in done.stdout.splitlines()} == keys


def test_kernels() -> None:
    done = python("-m", "flashcore", "kernels", "--json")
    rows = json.loads(done.stdout)
    assert len(rows) == sum(len(bundle.kernels) for bundle in flashcore.bundles())
    done = python("-m", "flashcore", "kernels", "--arch", "sm_90a")
    lines = done.stdout.splitlines()
    assert lines[0].split()[:2] == ["arch", "name"]
    assert len(lines) - 1 == sum(row["arch"] == "sm_90a" for row in rows)
    done = python("-m", "flashcore", "kernels", "--arch", "sm_1")
    assert done.returncode == 1
    assert done.stderr.startswith("no kernels for sm_1; architectures: ")


STUBTEST = """
[mypy]
[mypy-torch.*,numpy.*]
follow_imports = skip
"""


def test_the_stubs_say_what_the_module_is(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "mypy.ini").write_text(STUBTEST)
    config = str(tmp_path / "mypy.ini")
    done = python("-m", "mypy.stubtest", "flashcore._core", "--concise", "--mypy-config-file", config)
    assert done.returncode == 0, done.stdout + done.stderr


SNIPPET = """
import numpy as np
import torch
import flashcore

x = torch.ones(1, 1, 2, 8)
reveal_type(flashcore.attention(x, x, x))
reveal_type(flashcore.attention(x, x, x, return_lse=True))
a = np.ones((1, 1, 2, 8))
reveal_type(flashcore.attention(a, a, a, window=(3, None)))
reveal_type(flashcore.explain(a, a, a).rejected)
flashcore.attention(x, a, x)
flashcore.attention(x, x, x, causal_align="left")
"""


def test_users_can_type_check(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "snippet.py").write_text(SNIPPET)
    done = python("-m", "mypy", "--strict", "--cache-dir", str(tmp_path), str(tmp_path / "snippet.py"))
    types = [line.split('"')[1] for line in done.stdout.splitlines() if "Revealed" in line]
    assert types[0] == "torch._tensor.Tensor"
    assert types[1] == "tuple[torch._tensor.Tensor, torch._tensor.Tensor]"
    assert types[2].startswith("numpy.ndarray[")
    assert types[3] == "list[tuple[str, str]]"
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert {line.split(":")[1] for line in errors} == {"12", "13"}
