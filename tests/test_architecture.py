"""How the library is built: which way imports point, what importing costs, and what it must not change."""

import ast
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import torchjax_bridge
from torchjax_bridge import errors

LIBRARY = Path(torchjax_bridge.__file__).resolve().parent

# What the files of each package may import, besides their own package.
ALLOWED_IMPORTS = {
    "errors": (),
    "_lazy": (),
    "_words": (),
    "exchange": (
        "errors",
        "_words",
    ),
    "recording": ("errors",),
    "weights": ("errors", "_words", "_lazy", "exchange", "recording"),
    "wrap": ("errors", "_words", "_lazy", "exchange"),
    "porting": ("errors", "_words", "exchange", "recording", "weights", "wrap"),
    "cli": ("errors", "_words", "exchange", "weights", "wrap", "porting"),
}
# Inside a package: each line may import from the lines above it, and not from itself.
LAYERS = {
    "weights": (
        ("_example", "_nearest", "_report", "layers", "layouts"),
        ("moving", "rules"),
        ("settings",),
        ("_audit_report", "trees"),
        ("pairing",),
        ("flatten",),
        ("_plan_checks", "_plan_hints", "sharded"),
        ("_plan",),
        ("_audit",),
        ("_apply",),
        ("files", "optimizer", "compare", "linking"),
    ),
    "wrap": (("_call", "_cache", "_settings", "_sharded"), ("jax_in_torch", "torch_in_jax")),
}


def _files(package: str) -> list[Path]:
    single = LIBRARY / f"{package}.py"
    return [single] if single.exists() else sorted((LIBRARY / package).rglob("*.py"))


@functools.cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


@functools.cache
def _imports(file: Path) -> list[str]:
    """Every module that a file imports, as an absolute name."""
    package = ["torchjax_bridge", *file.relative_to(LIBRARY).parts[:-1]]
    found = []
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            found += [f"{prefix}.{alias.name}" for alias in node.names]
    return found


def _ours(name: str) -> list[str]:
    parts = name.split(".")
    return parts[1:] if parts[0] == "torchjax_bridge" else []


@pytest.mark.parametrize("package", [package for package in ALLOWED_IMPORTS if _files(package)])
def test_a_package_imports_only_from_the_packages_below_it(package: str) -> None:
    for file in _files(package):
        for name in _imports(file):
            parts = _ours(name)
            if parts and parts[0] != package:
                assert parts[0] in ALLOWED_IMPORTS[package], f"{file.name} imports {name}"


@pytest.mark.parametrize("package", [package for package in ALLOWED_IMPORTS if _files(package)])
def test_packages_import_only_the_public_names_of_other_packages(package: str) -> None:
    for file in _files(package):
        for name in _imports(file):
            parts = _ours(name)
            if (
                parts
                and parts[0] in ALLOWED_IMPORTS
                and parts[0] not in (package, "errors", "_lazy", "_words")
            ):
                assert len(parts) == 2, f"{file.name} imports past an __init__: {name}"
                assert not parts[1].startswith("_"), f"{file.name} imports the private {name}"


@pytest.mark.parametrize("package", LAYERS)
def test_inside_a_package_imports_point_one_way_and_to_the_public_names_of_sub_packages(package: str) -> None:
    rank = {name: place for place, group in enumerate(LAYERS[package]) for name in group}
    for file in _files(package):
        own = file.relative_to(LIBRARY / package).parts[0].removesuffix(".py")
        for name in _imports(file) if own != "__init__" else ():
            parts = _ours(name)
            if parts[:1] == [package] and len(parts) > 1 and parts[1] != own:
                assert rank[parts[1]] < rank[own], f"{file.name} imports {name}"
                if (LIBRARY / package / parts[1]).is_dir():
                    assert len(parts) == 3, f"{file.name} imports past an __init__: {name}"
                    assert not parts[2].startswith("_"), f"{file.name} imports the private {name}"


def test_there_are_no_circular_imports() -> None:
    imports = {file: set(map(_file_of, _imports(file))) - {None, file} for file in LIBRARY.rglob("*.py")}
    open_files: list[Path] = []
    done: set[Path] = set()

    def visit(file: Path) -> None:
        assert file not in open_files, " -> ".join(str(f.relative_to(LIBRARY)) for f in [*open_files, file])
        if file not in done:
            open_files.append(file)
            for other in imports[file]:
                visit(other)
            done.add(open_files.pop())

    for file in imports:
        visit(file)


def _file_of(name: str) -> Path | None:
    """The file that an imported name is in."""
    parts = _ours(name)
    for depth in range(len(parts), 0, -1):
        place = LIBRARY.joinpath(*parts[:depth])
        if place.with_suffix(".py").exists():
            return place.with_suffix(".py")
        if (place / "__init__.py").exists():
            return place / "__init__.py"
    return None


def test_every_sub_package_says_what_it_owns_refuses_and_gives() -> None:
    for package in LAYERS:
        for init in (LIBRARY / package).glob("*/__init__.py"):
            text = ast.get_docstring(_tree(init)) or ""
            for word in ("Owns", "Refuses", "Gives"):
                assert re.search(rf"\b{word}\b", text), f"{init} does not say what it {word.lower()}"


def test_errors_imports_nothing_of_ours() -> None:
    assert not [name for name in _imports(LIBRARY / "errors.py") if _ours(name)]


def test_only_one_file_a_device_touches_capsules() -> None:
    words = ("dlpack_managed_tensor", "_to_dlpack", "_from_dlpack", "from_dlpack(", "to_dlpack(")
    # The buffers of a callback are no arrays and never were capsules: their adapter may use the public call.
    allowed = {"_callback.py": {"from_dlpack("}}
    allowed |= {name: set(words) for name in ("_dlpack.py", "_dlpack_cuda.py")}
    for file in LIBRARY.rglob("*.py"):
        code = ast.unparse(_without_docstrings(ast.parse(file.read_text())))
        assert {word for word in words if word in code} <= allowed.get(file.name, set()), file


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def test_nothing_swallows_every_error_and_no_file_is_called_utils() -> None:
    for file in LIBRARY.rglob("*.py"):
        assert file.stem not in {"utils", "util", "common", "helpers", "misc"}
        for node in ast.walk(_tree(file)):
            if isinstance(node, ast.ExceptHandler):
                bare = node.type is None or (isinstance(node.type, ast.Name) and node.type.id == "Exception")
                assert not bare, f"{file.name}:{node.lineno} swallows every error"
            assert not isinstance(node, ast.Assert), f"{file.name}:{node.lineno} asserts on input"


def test_every_file_says_what_it_owns() -> None:
    for file in LIBRARY.rglob("*.py"):
        docstring = ast.get_docstring(_tree(file))
        assert docstring, file
        assert len(docstring) > 30, file


# --- what importing does -------------------------------------------------------------------------------

_PROBE = """
import json, logging, os, sys, warnings
import jax, torch
before = {
    "jax": {name: str(getattr(jax.config, name)) for name in dir(jax.config)
            if name.startswith("jax_") and not callable(getattr(jax.config, name))},
    "dtype": str(torch.get_default_dtype()), "device": str(torch.get_default_device()),
    "threads": torch.get_num_threads(), "grad": torch.is_grad_enabled(),
    "environment": dict(os.environ), "handlers": len(logging.getLogger().handlers),
    "filters": len(warnings.filters), "methods": sorted(dir(torch.Tensor)), "array": sorted(dir(jax.Array)),
}
modules = set(sys.modules)
import torchjax_bridge
torchjax_bridge.to_jax, torchjax_bridge.torch_device
after = {
    "jax": {name: str(getattr(jax.config, name)) for name in dir(jax.config)
            if name.startswith("jax_") and not callable(getattr(jax.config, name))},
    "dtype": str(torch.get_default_dtype()), "device": str(torch.get_default_device()),
    "threads": torch.get_num_threads(), "grad": torch.is_grad_enabled(),
    "environment": dict(os.environ), "handlers": len(logging.getLogger().handlers),
    "filters": len(warnings.filters), "methods": sorted(dir(torch.Tensor)), "array": sorted(dir(jax.Array)),
}
from jax.extend import backend
print(json.dumps({
    "changed": [key for key in before if before[key] != after[key]],
    "new": sorted({name.split(".")[0] for name in set(sys.modules) - modules}),
}))
"""


@pytest.fixture(scope="module")
def probe() -> dict[str, list[str]]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _PROBE],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_importing_changes_no_setting_of_torch_jax_or_the_process(probe: dict[str, list[str]]) -> None:
    assert probe["changed"] == []


def test_importing_loads_neither_flax_nor_any_other_extra(probe: dict[str, list[str]]) -> None:
    heavy = {"flax", "optax", "orbax", "safetensors", "typer", "click", "rich", "tensorstore", "msgpack"}
    assert not heavy & set(probe["new"])


def test_importing_and_asking_for_help_load_neither_torch_nor_jax() -> None:
    code = (
        "import sys, torchjax_bridge\n"
        "from typer.testing import CliRunner\n"
        "from torchjax_bridge.cli._app import app\n"
        "for command in ('', 'convert', 'inspect', 'plan', 'verify', 'doctor', 'bench'):\n"
        "    assert CliRunner().invoke(app, [*command.split(), '--help']).exit_code == 0\n"
        "print(sorted({'torch', 'jax', 'flax', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_starts_no_jax_backend() -> None:
    code = (
        "import torchjax_bridge, jax\n"
        "for name in torchjax_bridge.__all__: getattr(torchjax_bridge, name)\n"
        "jax.config.update('jax_platforms', 'no_such_platform')\n"  # would raise had a backend started
        "jax.config.update('jax_num_cpu_devices', 3)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- public names --------------------------------------------------------------------------------------


def test_every_public_name_can_be_had_and_is_documented() -> None:
    for name in torchjax_bridge.__all__:
        thing = getattr(torchjax_bridge, name)
        assert thing.__doc__, name


def test_every_public_name_but_the_errors_is_loaded_when_it_is_first_used() -> None:
    assert {*torchjax_bridge._LAZY, "errors"} == set(torchjax_bridge.__all__)
    assert set(torchjax_bridge.__all__) <= set(dir(torchjax_bridge))
    with pytest.raises(AttributeError, match="no_such_name"):
        torchjax_bridge.no_such_name  # noqa: B018


def test_every_error_is_a_bridge_error_and_the_drawing_shows_it() -> None:
    assert errors.__doc__ is not None
    for name in errors.__all__:
        kind = getattr(errors, name)
        assert issubclass(kind, errors.BridgeError)
        assert name in errors.__doc__
        if name not in ("BridgeError", "ExchangeError", "WeightsError", "WrapError"):
            line = next(line for line in errors.__doc__.splitlines() if f"── {name} " in line)
            for builtin in line[line.index("(") + 1 : line.index(")")].split(", "):
                assert issubclass(kind, getattr(__builtins__, builtin, None) or __builtins__[builtin]), name


def test_every_public_function_documents_its_arguments_memory_and_errors() -> None:
    for name in ("to_jax", "to_torch", "to_flax", "to_state_dict"):
        text = getattr(torchjax_bridge, name).__doc__
        for section in ("Args:", "Returns:", "Raises:", "Memory:", ">>>"):
            assert section in text, f"{name} lacks {section}"
