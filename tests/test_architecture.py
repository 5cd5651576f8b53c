"""The house rules a machine can check: import arrows, docstrings, file names, experiments that build."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "s2s").rglob("*.py"))
}
EXPERIMENTS = sorted(path for path in (ROOT / "experiments").glob("*.py") if path.name != "__init__.py")

# Which group a module is of: the longest prefix that fits.
GROUPS = {
    "s2s": "package",
    "s2s.shapes": "names",
    "s2s.batch": "names",
    "s2s.config": "names",
    "s2s.axes": "names",
    "s2s.variation": "variation",
    "s2s.data": "data",
    "s2s.kernels": "kernels",
    "s2s.nn": "nn",
    "s2s.nn.bound": "loops",
    "s2s.nn.equations": "loops",
    "s2s.search": "search",
    "s2s.learn": "learn",
    "s2s.infra": "infra",
    "s2s.workdir": "drivers",
    "s2s.translator": "drivers",
    "s2s.likelihood": "drivers",
    "s2s.ensemble": "drivers",
    "s2s.judge": "drivers",
    "s2s.train": "drivers",
    "s2s.sweep": "drivers",
    "s2s.report": "drivers",
    "s2s.explain": "drivers",
    "s2s.serve": "drivers",
    "s2s.flags": "drivers",
    "s2s.translate": "drivers",
    "s2s.evaluate": "drivers",
    "s2s.score": "drivers",
    "s2s.commandline": "main",
    "s2s.main": "main",
    "s2s.sweep.__main__": "main",
    "experiments": "experiments",
}

# What each group may import of s2s, besides itself: the arrows. Nothing on the left imports the right.
ALLOWED = {
    "package": set(),
    "names": set(),
    "variation": {"names"},
    "data": {"names"},
    "kernels": set(),
    "loops": {"kernels"},
    "nn": {"names", "kernels", "loops"},
    "search": {"names", "kernels", "loops"},
    "learn": {"names", "variation", "kernels", "loops", "nn"},
    "infra": {"names"},
    "drivers": {"package", "names", "variation", "data", "loops", "nn", "search", "learn", "infra"},
    "main": {"names", "variation", "data", "infra", "drivers"},
    "experiments": {"names"},
}

# Libraries that would let a group do what is another's work.
FORBIDDEN_LIBRARIES = {
    "names": {"jax", "flax", "optax", "orbax", "grain", "tensorflow_datasets"},
    "variation": {"numpy", "jax", "flax", "optax", "orbax", "grain", "tensorflow_datasets"},
    "data": {"jax", "flax", "optax", "orbax", "tensorflow"},
    "kernels": {"flax", "optax", "orbax", "grain", "tensorflow_datasets", "tensorflow"},
    "nn": {"optax", "orbax", "grain", "tensorflow_datasets", "tensorflow"},
    "search": {"flax", "optax", "orbax", "grain", "tensorflow_datasets", "tensorflow"},
    "main": {"jax", "flax", "optax", "orbax", "grain", "tensorflow_datasets", "tensorflow"},
    "experiments": {"jax", "flax", "optax", "orbax", "grain", "tensorflow_datasets", "tensorflow"},
}

DRAWERS = {"utils", "util", "helpers", "common", "misc", "core", "base"}


def group_of(module: str) -> str:
    prefixes = [prefix for prefix in GROUPS if module == prefix or module.startswith(prefix + ".")]
    group = GROUPS[max(prefixes, key=len)]
    if group == "package" and module != "s2s":
        raise LookupError(f"{module} has no place in the table: give it one in GROUPS, and say why")
    return group


def imports_of(tree: ast.Module, module: str, is_package: bool = False) -> Iterator[tuple[str, int, bool]]:
    """Every imported module of a syntax tree, its line, and whether a function does it.

    ``from s2s import shapes`` and ``from . import shapes`` are imports of s2s.shapes.
    """
    inside = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                home = module.split(".")
                home = home[: len(home) - node.level + is_package]
                base = ".".join([*home, base] if base else home)
            for alias in node.names:
                deeper = f"{base}.{alias.name}"
                names.append(deeper if deeper in MODULES else base)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            names = [str(node.args[0].value)]
        for name in names:
            yield name, node.lineno, id(node) in inside


def wrong_arrows(module: str, source: str, is_package: bool = False) -> list[str]:
    """What a module imports against the tables, each with its line."""
    group = group_of(module)
    wrong = []
    for name, line, in_function in imports_of(ast.parse(source), module, is_package):
        top = name.split(".")[0]
        where = f"{module}, line {line}: imports {name}"
        if top in ("experiments", "tests", "benchmarks"):
            wrong.append(f"{where}, but nothing in s2s depends on {top}")
        elif top == "s2s":
            theirs = group_of(name)
            own = theirs == group and group != "names"  # the three names files stand alone
            if not own and theirs not in ALLOWED[group]:
                wrong.append(f"{where}, but {group} may import {sorted(ALLOWED[group]) or 'nothing'} only")
            if group == "experiments" and name not in ("s2s.config", "s2s.axes"):
                wrong.append(f"{where}, but an experiment states a config and axes: it needs no more")
            if group == "main" and name != "s2s.config" and not in_function:
                wrong.append(f"{where}, but main imports all else inside main(): flags answer first")
        elif top in FORBIDDEN_LIBRARIES.get(group, ()):
            wrong.append(f"{where}, but {group} knows nothing of {top}")
    return wrong


def module_cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Cycles among modules, each as the path that closes it."""
    cycles: list[list[str]] = []
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            cycles.append([*path[path.index(module) :], module])
        elif module not in done:
            for other in sorted(edges.get(module, ())):
                visit(other, [*path, module])
            done.add(module)

    for module in sorted(edges):
        visit(module, [])
    return cycles


@pytest.mark.parametrize("module", MODULES)
def test_arrows_of_a_module(module):
    path = MODULES[module]
    wrong = wrong_arrows(module, path.read_text(encoding="utf-8"), path.name == "__init__.py")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_arrows_of_an_experiment(path):
    wrong = wrong_arrows(f"experiments.{path.stem}", path.read_text(encoding="utf-8"))
    assert not wrong, "\n".join(wrong)


def test_arrows_make_no_cycle():
    edges = {}
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {name for name, _, _ in imports_of(tree, module, path.name == "__init__.py")}
        edges[module] = {name for name in names if name in MODULES and name not in ("s2s", module)}
    assert len(edges) > 3
    assert not module_cycles(edges)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("s2s.shapes", "import s2s.batch as b"),
        ("s2s.batch", "import s2s.data.tasks"),
        ("s2s.config", "def f():\n    import jax"),
        ("s2s.data.tasks", "import jax.numpy as jnp"),
        ("s2s.data.tasks", "from jax import numpy"),
        ("s2s.data.tasks", "from s2s import config\nfrom s2s.nn import cells"),
        ("s2s.data.tasks", "import importlib\nimportlib.import_module('jax')"),
        ("s2s.data.tasks", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from s2s import train"),
        ("s2s.data.tasks", "from ..nn import cells"),
        ("s2s.data.tasks", "from .. import train"),
        ("s2s.nn.cells", "from s2s.data.vocab import Vocabulary"),
        ("s2s.nn.cells", "import optax"),
        ("s2s.search", "from s2s import nn"),
        ("s2s.search", "from s2s.nn.seq2seq import Seq2Seq"),
        ("s2s.search", "from s2s.learn import loss"),
        ("s2s.learn.loss", "from s2s.data.vocab import Vocabulary"),
        ("s2s.learn.step", "from s2s.infra import sharding"),
        ("s2s.infra.report", "from s2s.learn import loss"),
        ("s2s.train", "from s2s import main"),
        ("s2s.train", "from experiments import luong_general"),
        ("s2s.main", "from s2s import train"),
        ("s2s.main", "import jax"),
        ("experiments.x", "from s2s import batch"),
        ("experiments.x", "import jax"),
    ],
)
def test_a_planted_arrow_is_found(module, source):
    assert wrong_arrows(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("s2s.data.vocab", "import numpy\nfrom s2s.config import VocabConfig\nfrom s2s.data import tasks"),
        ("s2s.learn.step", "import jax\nfrom s2s.nn.seq2seq import Seq2Seq"),
        ("s2s.train", "from s2s import __version__, search\nfrom s2s.data import pipeline"),
        ("s2s.main", "from s2s import config\ndef main():\n    from s2s import train"),
        ("experiments.x", "from s2s import config"),
        ("experiments.x", "from s2s import axes"),
    ],
)
def test_an_allowed_arrow_is_not_found(module, source):
    assert not wrong_arrows(module, source)


def test_a_planted_cycle_of_modules_is_found():
    assert module_cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == [["a", "b", "c", "a"]]
    assert not module_cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_a_module_without_a_place_is_refused():
    with pytest.raises(LookupError, match="s2s.newcomer has no place"):
        group_of("s2s.newcomer")


def test_every_module_has_a_docstring():
    paths = [*MODULES.values(), *EXPERIMENTS]
    bare = [str(path) for path in paths if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert not bare


def test_no_module_is_a_drawer():
    named = [module for module in MODULES if DRAWERS & set(module.split("."))]
    assert not named


def test_only_sharding_counts_devices():
    counting = {"devices", "local_devices", "device_count", "local_device_count"}
    found = []
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Attribute)
                and ast.unparse(node.value) == "jax"
                and node.attr in counting
                and module != "s2s.infra.sharding"
            ):
                found.append(f"{module}, line {node.lineno}: jax.{node.attr}")
    assert not found


def load(path: Path):
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_builds(path):
    """Its config converts, validates, and its model's every parameter has a shape."""
    import jax
    from flax import nnx

    from s2s import config
    from s2s.nn.seq2seq import Seq2Seq

    mutable = load(path).get_config()
    assert mutable.is_locked, "start from config.default(): an unlocked config takes mistyped names"
    cfg = config.freeze(mutable)
    target_vocab = 100 if cfg.data.vocab.shared else 90

    def build():
        model = Seq2Seq(cfg.model, source_vocab=100, target_vocab=target_vocab, rngs=nnx.Rngs(0))
        return nnx.state(model, nnx.Param)

    leaves = jax.tree.leaves(jax.eval_shape(build))
    assert leaves and all(leaf.size for leaf in leaves)


def test_main_imports_nothing_slow():
    """A mistaken flag must be answered at once, and data loader processes import main again."""
    import subprocess

    code = (
        "import sys, s2s.main; print(*(set(sys.modules) & {'jax', 'flax', 'tensorflow_datasets', 'grain'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_every_experiment_has_its_own_name():
    from s2s import config

    names = [config.freeze(load(path).get_config()).name for path in EXPERIMENTS]
    assert len(names) == len(set(names))
    assert names == [path.stem for path in EXPERIMENTS]


COMMANDS = (
    "main",
    "translate",
    "evaluate",
    "score",
    *(f"{command}.__main__" for command in ("sweep", "report", "explain", "serve")),
)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_reads_its_flags_before_anything_slow_is_imported(command):
    slow = ("jax", "flax", "orbax", "grain", "tensorflow_datasets", "sacrebleu", "matplotlib", "numpy")
    code = f"import sys, s2s.{command}; print(*(name for name in {slow!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
