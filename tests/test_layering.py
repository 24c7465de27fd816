"""The order of the modules, and what each may name, read from the source; and that importing them does nothing."""
import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ssl_gpu"

# A module imports only from those before it.
ORDER = ["checks", "commandline", "runtime", "geometry", "acoustics", "rng", "microphones", "fused_convolve",
         "convolve", "directivity", "original", "scene", "voices", "corpus", "speech", "fused", "scatter", "synthesis",
         "laws", "bands", "rir", "ism", "hybrid", "rooms", "pool", "measure", "mixture", "products", "conformer",
         "masks", "patches", "symmetry", "features", "doa", "metrics", "model", "localizer", "baselines", "simulator",
         "evalset", "lanes", "muon", "optim", "checkpoint", "outputs", "scenelist", "config", "pretrained", "clips",
         "measured", "protocol", "scoring", "assess", "report", "plots", "webpage", "evaluate", "run", "trainlog",
         "train", "trials", "choices", "methods", "fidelity", "simulate", "localize"]
ENGINE = ORDER[:ORDER.index("simulator") + 1]
ON_DEMAND = {"fused", "fused_convolve"}  # imported inside a function, by who asks for it: it needs Triton
HEAVY = {"torchaudio", "matplotlib", "tensorboard", "soundfile"}
MAY_IMPORT = {"corpus": {"soundfile"}, "speech": {"soundfile"}}
DEVICE_WORD = re.compile(r"cuda|autocast", re.IGNORECASE)

sources = {path.stem: path.read_text(encoding="utf-8") for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
every_module = pytest.mark.parametrize("name", sorted(sources))


def imports_of_ours(source):
    """Names of the ssl_gpu modules that a source imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("ssl_gpu.")}
        elif isinstance(node, ast.ImportFrom):
            path = (["ssl_gpu"] if node.level else []) + (node.module.split(".") if node.module else [])
            if path[0] == "ssl_gpu":
                found |= {path[1]} if len(path) > 1 else {alias.name for alias in node.names}
    return found - {"__version__"}


def imports_at_top(source):
    """Names of the packages that importing a source imports: not those imported inside functions."""
    found, waiting = set(), [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            waiting.extend(ast.iter_child_nodes(node))
    return found


def device_words(source):
    """(line, word) wherever the code of a source, not its texts, says cuda or autocast, or compiles with torch.

    What belongs to our own module runtime may be called by its name, as in runtime.autocast(device).
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        words = []
        if isinstance(node, ast.Name):
            words = [node.id]
        elif isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            words = ["torch.compile"] if (owner, node.attr) == ("torch", "compile") else []
            words += [node.attr] if owner != "runtime" else []
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None) or ""
            words = [module] + [alias.name for alias in node.names]
            words += ["torch.compile"] if module == "torch" and "compile" in words else []
        elif isinstance(node, (ast.arg, ast.keyword)):
            words = [node.arg or ""]
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            words = [node.name]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            words = [node.value] if re.fullmatch(r"cuda(:\d+)?", node.value) else []  # a device, not a sentence
        found += [(node.lineno, word) for word in words if word == "torch.compile" or DEVICE_WORD.search(word)]
    return found


def test_every_module_has_a_place_in_the_order():
    assert set(sources) <= set(ORDER)


@every_module
def test_module_imports_only_from_those_before_it(name):
    before = set(ORDER[:ORDER.index(name)])
    assert imports_of_ours(sources[name]) <= before


@pytest.mark.parametrize("name", sorted(set(sources) - {"runtime"}))
def test_only_runtime_names_devices_and_compilers(name):
    assert device_words(sources[name]) == []


@pytest.mark.parametrize("name", sorted(set(sources) & set(ENGINE)))
def test_engine_needs_no_heavy_package(name):
    assert imports_at_top(sources[name]) & HEAVY <= MAY_IMPORT.get(name, set())


def test_reader_of_imports_sees_every_form():
    source = """
import os, ssl_gpu.train
from ssl_gpu import scene, __version__
from ssl_gpu.rir import render_rir
from . import mixture
from .report import plot
def later():
    from ssl_gpu import evaluate
    import torchaudio.functional
if True:
    import matplotlib.pyplot as plt
class Holder:
    from soundfile import read
"""
    assert imports_of_ours(source) == {"train", "scene", "rir", "mixture", "report", "evaluate"}
    assert imports_at_top(source) == {"os", "ssl_gpu", "matplotlib", "soundfile"}


@pytest.mark.parametrize("source", [
    "torch.cuda.synchronize()", "x.cuda()", "x.is_cuda", "with torch.autocast('cpu'): pass", "torch.compile(f)",
    "from torch import compile", "from torch.cuda import Event", "import torch.cuda", "x.to('cuda')", "x.to('cuda:1')",
    "device.type == 'cuda'", "f(cuda=1)", "def f(use_cuda): pass", "from ssl_gpu.runtime import autocast"])
def test_reader_of_words_sees_every_form(source):
    assert device_words(source) != []


@pytest.mark.parametrize("source", [
    "'''Runs on cuda, under autocast.'''", "raise ValueError('no cuda device, see torch.compile')", "re.compile('a')",
    "runtime.autocast(device, False)", "runtime.compiled(f)", "# torch.cuda"])
def test_reader_of_words_lets_texts_and_runtime_pass(source):
    assert device_words(source) == []


IMPORT_ALL = """
import importlib, logging, os, sys, warnings
for optional in ("matplotlib", "tensorboard", "pyroomacoustics", "conformer", "pytest", "hypothesis"):
    sys.modules[optional] = None  # importing it now raises ImportError
import numpy, soundfile, torch, torchaudio, tqdm, yaml

def refuse(*_, **__):
    raise AssertionError("this must not happen at import")

class Arguments(list):
    __getitem__ = __iter__ = __len__ = refuse

def watch(event, arguments):
    if event in ("subprocess.Popen", "socket.connect", "os.mkdir", "os.remove"):
        refuse()
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        refuse()

sys.argv = Arguments()
torch.cuda._lazy_init = torch.cuda.is_available = torch.manual_seed = torch.set_num_threads = refuse
sys.addaudithook(watch)

def state():
    return (dict(os.environ), os.getcwd(), torch.get_rng_state().tolist(), torch.get_default_dtype(),
            torch.is_grad_enabled(), torch.get_float32_matmul_precision(), list(warnings.filters),
            list(logging.root.handlers), numpy.random.get_state()[1].tolist(), os.listdir())

before = state()
for name in os.environ["MODULES"].split():
    importlib.import_module(name)
    assert state() == before, f"{name} changed the process"
"""


def test_importing_does_nothing(tmp_path):
    names = " ".join(["ssl_gpu", *(f"ssl_gpu.{name}" for name in ORDER if name in sources and name not in ON_DEMAND)])
    environment = {**os.environ, "MODULES": names, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], cwd=tmp_path, env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
