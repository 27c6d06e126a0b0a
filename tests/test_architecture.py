"""The house's rules, read from the source: who may import whom, where, and how large things may be.

    ground   errors progress units extras files budget records locks provenance scratch interruption arguments
             patience inflight
    data     remote mirror shards/ store sharding plan census staging reading content rows source dataset chunks
             indexing appending consolidate tasks
    compute  passes drift distance/ cluster/ encoders/ scores projection
    edge     runtime submission published checkpoint results matrix report publishing uploading
    top      demo pipeline/ cli/

A new module gets a line in HOUSE: its layer, and a height above everything it imports.
"""

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import tsclust_ooc

PACKAGE = "tsclust_ooc"
HOUSE = {
    "": ("ground", 0),  # the package itself: its version, and names that load when they are used
    "errors": ("ground", 0),
    "progress": ("ground", 0),
    "units": ("ground", 1),
    "extras": ("ground", 1),
    "files": ("ground", 1),
    "scratch": ("ground", 1),
    "provenance": ("ground", 1),
    "columns": ("ground", 1),
    "patience": ("ground", 1),
    "inflight": ("ground", 1),
    "budget": ("ground", 2),
    "records": ("ground", 2),
    "locks": ("ground", 2),
    "interruption": ("ground", 1),
    "arguments": ("ground", 3),
    "remote": ("data", 2),
    "mirror": ("data", 3),
    "shards": ("data", 3),
    "store": ("data", 3),
    "plan": ("data", 4),
    "census": ("data", 4),
    "staging": ("data", 4),
    "sharding": ("data", 3),
    "rows": ("data", 4),
    "content": ("data", 5),
    "reading": ("data", 5),
    "dataset": ("data", 5),
    "chunks": ("data", 6),
    "indexing": ("data", 6),
    "appending": ("data", 6),
    "source": ("data", 6),
    "work": ("data", 6),
    "consolidate": ("data", 7),
    "tasks": ("data", 8),
    "passes": ("compute", 3),
    "drift": ("compute", 3),
    "distance": ("compute", 4),
    "cluster": ("compute", 5),
    "encoders": ("compute", 5),
    "scores": ("compute", 5),
    "projection": ("compute", 5),
    "runtime": ("edge", 3),
    "submission": ("edge", 4),
    "published": ("edge", 4),
    "checkpoint": ("edge", 6),
    "results": ("edge", 5),
    "matrix": ("edge", 6),
    "report": ("edge", 6),
    "publishing": ("edge", 7),
    "uploading": ("edge", 8),
    "demo": ("top", 8),
    "pipeline": ("top", 9),
    "cli": ("top", 10),
    "__main__": ("top", 11),
}
APART = {"data": "compute", "compute": "data"}
VAGUE_NAMES = {"util", "utils", "helper", "helpers", "common", "core", "misc", "types"}
MAX_MODULE_LINES, MAX_FUNCTION_LINES = 450, 60
LOADS_BY_NAME = {"", "extras", "cluster"}


@dataclass(frozen=True)
class Module:
    """A module's dotted name below the package ('' is the package itself) and its source."""

    name: str
    text: str
    is_package: bool = False

    @property
    def syntax(self):
        return ast.parse(self.text)

    @property
    def family(self):
        return self.name.split(".")[0]


def modules_of(root):
    """Every module below the package's directory."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        found[name] = Module(name, path.read_text(encoding="utf-8"), is_package)
    return found


def imports_of(module, modules):
    """Names of the package's own modules that `module` imports, the ones in functions included."""
    found = set()
    for node in ast.walk(module.syntax):
        if isinstance(node, ast.Import):
            found |= {_known(alias.name, modules) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module)
            found |= {_known(f"{base}.{alias.name}", modules) for alias in node.names}
    return found - {None, module.name}


def _absolute(node, module):
    """The module an `import from` names, relative ones resolved."""
    if not node.level:
        return node.module
    here = [PACKAGE, *module.name.split(".")] if module.name else [PACKAGE]
    up = node.level - 1 if module.is_package else node.level
    return ".".join([*here[: len(here) - up], *([node.module] if node.module else [])])


def _known(dotted, modules):
    """`dotted` as a module of the package: itself, or what holds the name; None when it is of another package."""
    if dotted.split(".")[0] != PACKAGE:
        return None
    name = dotted.removeprefix(PACKAGE).lstrip(".")
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


# ---- the rules: each takes the modules, returns complaints


def homeless(modules):
    return [
        f"{m.name} is not in the house: give {m.family!r} a layer and a height in HOUSE of {Path(__file__).name}"
        for m in modules.values()
        if m.family not in HOUSE
    ]


def layer(family):
    return HOUSE.get(family, ("", 0))[0]


def height(family):
    return HOUSE.get(family, ("", 0))[1]


def upward_imports(modules):
    found = []
    for module in modules.values():
        for name in sorted(imports_of(module, modules)):
            family = modules[name].family
            mine, theirs = height(module.family), height(family)
            if family != module.family and theirs >= mine:
                found.append(f"{module.name} (height {mine}) imports {name} (height {theirs})")
    return found


def cycles(modules):
    """Modules that import themselves in the end, with the way round."""
    graph = {m.name: sorted(imports_of(m, modules)) for m in modules.values()}
    found = []
    for start in graph:
        ways = [(name, (start, name)) for name in graph[start]]
        seen = set()
        while ways:
            here, way = ways.pop()
            if here == start:
                found.append(" -> ".join(way))
                break
            if here not in seen:
                seen.add(here)
                ways += [(name, (*way, name)) for name in graph[here]]
    return found


def layers_that_meet(modules):
    """Data that reaches compute, or compute that reaches data, directly or by way of anything else."""
    found = []
    for module in modules.values():
        mine, reached, ways = layer(module.family), set(), [(module.name, (module.name,))]
        while mine in APART and ways:
            here, way = ways.pop()
            if layer(modules[here].family) == APART[mine]:
                found.append(f"{mine} reaches {APART[mine]}: {' -> '.join(way)}")
            elif here not in reached:
                reached.add(here)
                ways += [(name, (*way, name)) for name in imports_of(modules[here], modules)]
    return found


def _functions(module):
    return [n for n in ast.walk(module.syntax) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def imports_inside_functions(modules):
    return [
        f"{m.name}:{node.lineno} imports inside {function.name}; use extras.load for what is optional or heavy"
        for m in modules.values()
        for function in _functions(m)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]


def imports_by_name(modules):
    """Calls of import_module or __import__ outside the one place for them."""
    return [
        f"{m.name}:{node.lineno} imports by name; only extras.load does"
        for m in modules.values()
        if m.name not in LOADS_BY_NAME
        for node in ast.walk(m.syntax)
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}
    ]


def vague_names(modules):
    return [
        f"{m.name} says nothing about what is in it: name it for what it does"
        for m in modules.values()
        if VAGUE_NAMES & set(m.name.split("."))
    ]


def long_modules(modules):
    return [
        f"{m.name} has {n} lines, more than {MAX_MODULE_LINES}: split it"
        for m in modules.values()
        if (n := len(m.text.splitlines())) > MAX_MODULE_LINES
    ]


def function_lines(function):
    """Lines of a function from its `def` on, without its docstring."""
    first = function.body[0]
    has_docstring = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    docstring = first.end_lineno - first.lineno + 1 if has_docstring else 0
    return function.end_lineno - function.lineno + 1 - docstring


def long_functions(modules):
    return [
        f"{m.name}.{f.name} has {function_lines(f)} lines, more than {MAX_FUNCTION_LINES}: split it"
        for m in modules.values()
        for f in _functions(m)
        if function_lines(f) > MAX_FUNCTION_LINES
    ]


RULES = [
    homeless, upward_imports, cycles, layers_that_meet, imports_inside_functions, imports_by_name, vague_names,
    long_modules, long_functions,
]  # fmt: skip


# ---- the package keeps them


@pytest.fixture(scope="module")
def package():
    return modules_of(Path(tsclust_ooc.__file__).parent)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_has_no(rule, package):
    complaints = rule(package)
    assert not complaints, "\n".join(complaints)


def test_every_line_of_the_house_is_a_module_that_exists(package):
    assert set(HOUSE) <= {m.family for m in package.values()}


def test_half_of_the_functions_are_at_most_ten_lines(package):
    lengths = sorted(function_lines(f) for m in package.values() for f in _functions(m))
    assert lengths[len(lengths) // 2] <= 10


def test_the_graph_is_the_one_python_sees(package):
    """The imports read from the source agree with what Python loads for a module without optional parts."""
    reached, ways = set(), ["shards.survey"]
    while ways:
        here = ways.pop()
        if here not in reached:
            reached.add(here)
            ways += imports_of(package[here], package)
    parents = {name.rpartition(".")[0] for name in reached}
    names = {f"{PACKAGE}.{name}".rstrip(".") for name in reached | parents | {""}}
    assert {m for m in loaded_by(f"{PACKAGE}.shards.survey") if m.split(".")[0] == PACKAGE} == names


# ---- what a command does not load, it does not pay for


def loaded_by(module):
    """Names in sys.modules of a fresh interpreter that imported `module`."""
    script = f"import sys, {module}; print('\\n'.join(sys.modules))"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("tsclust_ooc.cli", {"numpy", "zarr", "dask", "h5py", "numba", "sklearn", "pyarrow", "distributed", "jinja2"}),
        ("tsclust_ooc.pipeline.looking", {"zarr", "dask", "numba", "h5py", "sklearn", "pyarrow", "distributed"}),
        ("tsclust_ooc.pipeline.consolidating", {"dask", "numba", "h5py", "sklearn", "scipy", "pandas", "distributed"}),
        ("tsclust_ooc.cluster", {"numpy", "numba"}),
        ("tsclust_ooc.cluster.kmeans", {"zarr", "dask", "h5py", "sklearn", "dask_ml", "distributed"}),
    ],
)
def test_importing_loads_nothing_heavy(module, heavy):
    assert loaded_by(module) & heavy == set()


def test_help_loads_no_command():
    script = f"import sys, {PACKAGE}.cli as c; c.main(['--help']); print('\\n'.join(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "consolidate" in done.stdout
    assert not {"numpy", "zarr", "dask", "h5py", "numba"} & set(done.stderr.split())


# ---- each rule can fail


def house_of(**sources):
    """Modules from name=source; dots are written as two underscores, `cluster__` is the package `cluster`."""
    found = {"": Module("", "", is_package=True)}
    for key, text in sources.items():
        name = key.replace("__", ".").rstrip(".")
        found[name] = Module(name, text, key.endswith("__"))
    return found


LONG = "def f():\n" + "    x = 1\n" * 60
DOCUMENTED = 'def f():\n    """One.\n\n    Two.\n    """\n' + "    x = 1\n" * 59


@pytest.mark.parametrize(
    ("rule", "sources", "words"),
    [
        (homeless, {"quicksort": ""}, ["quicksort is not in the house", "HOUSE of test_architecture.py"]),
        (upward_imports, {"units": "from tsclust_ooc.files import x", "files": ""}, ["units (height 1) imports files"]),
        (upward_imports, {"files": "from tsclust_ooc import plan", "plan": ""}, ["files (height 1) imports plan"]),
        (upward_imports, {"files": "import tsclust_ooc.plan as p", "plan": ""}, ["files (height 1) imports plan"]),
        (upward_imports, {"files": "from . import plan", "plan": ""}, ["files (height 1) imports plan"]),
        (
            upward_imports,
            {"plan": "def f():\n  from tsclust_ooc.cli import x", "cli": ""},
            ["plan (height 4) imports cli"],
        ),
        (upward_imports, {"shards__a": "from ..plan import x", "plan": ""}, ["shards.a (height 3) imports plan"]),
        (upward_imports, {"shards__": "from ..plan import x", "plan": ""}, ["shards (height 3) imports plan"]),
        (upward_imports, {"errors": "from tsclust_ooc.shards.a.b import x", "shards__a": ""}, ["imports shards.a"]),
        (
            cycles,
            {"shards__a": "from . import b", "shards__b": "from .a import x"},
            ["shards.a -> shards.b -> shards.a"],
        ),
        (cycles, {"shards__": "from .a import x", "shards__a": "from tsclust_ooc.shards import x"}, ["shards.a"]),
        (layers_that_meet, {"plan": "from tsclust_ooc.passes import x", "passes": ""}, ["plan -> passes"]),
        (layers_that_meet, {"scores": "from tsclust_ooc.plan import x", "plan": ""}, ["scores -> plan"]),
        (
            layers_that_meet,
            {"source": "import tsclust_ooc.report", "report": "import tsclust_ooc.scores", "scores": ""},
            ["data reaches compute: source -> report -> scores"],
        ),
        (imports_inside_functions, {"files": "def f():\n    if x:\n        import os\n"}, ["files:3", "inside f"]),
        (imports_inside_functions, {"files": "class A:\n  async def f(self):\n    from os import a"}, ["files:3"]),
        (imports_by_name, {"files": "import importlib\nx = importlib.import_module('os')"}, ["files:2"]),
        (imports_by_name, {"files": "x = __import__('os')"}, ["files:1"]),
        (vague_names, {"utils": ""}, ["utils"]),
        (vague_names, {"shards__common": ""}, ["shards.common"]),
        (long_modules, {"files": "x = 1\n" * 451}, ["files has 451 lines"]),
        (long_functions, {"files": LONG}, ["files.f has 61 lines"]),
        (long_functions, {"files": "class A:\n" + "".join(f"  {line}\n" for line in LONG.splitlines())}, ["61 lines"]),
    ],
)
def test_breaking_a_rule_is_seen(rule, sources, words):
    complaints = rule(house_of(**sources))
    assert complaints
    for part in words:
        assert part in complaints[0]


@pytest.mark.parametrize(
    ("rule", "sources"),
    [
        (homeless, {"shards__anything": ""}),
        (upward_imports, {"plan": "from tsclust_ooc.shards.a import x\nimport numpy, os.path", "shards__a": ""}),
        (upward_imports, {"shards__a": "from tsclust_ooc.shards import b", "shards__b": ""}),
        (cycles, {"shards__": "from .a import x", "shards__a": "from .b import y", "shards__b": ""}),
        (layers_that_meet, {"pipeline__a": "from .. import plan, passes", "plan": "", "passes": ""}),
        (imports_by_name, {"extras": "import importlib\nx = importlib.import_module('os')"}),
        (imports_by_name, {"files": "from importlib import metadata\nx = metadata.version('zarr')"}),
        (long_modules, {"files": "x = 1\n" * 450}),
        (long_functions, {"files": DOCUMENTED}),
    ],
)
def test_keeping_a_rule_is_seen(rule, sources):
    assert rule(house_of(**sources)) == []
