"""Tests of the package's imports: layers, cycles, and the few modules that may import each heavy dependency."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import smsbatch

PACKAGE = Path(smsbatch.__file__).parent

# Top-level modules and subpackages (rooms) from the top layer down; a room may import only from lower lines.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("__init__",),
    ("commands",),
    ("cluster",),
    ("training", "workers", "report"),
    ("engines", "runs"),
    ("generator", "data"),
    ("diffusion", "storage", "metrics"),
    ("manifest",),
    ("parallel", "tiny"),
    ("errors",),
    ("text",),
)
# The modules that may import each dependency; a subpackage stands for all of its modules.
DOORS = {
    "ray": {"cluster"},
    "diffusers": {"diffusion.priors"},
    "transformers": {"diffusion.priors", "metrics.hub"},
    "huggingface_hub": {"diffusion.priors"},
    "torch": {
        "diffusion",
        "metrics",
        "generator",
        "engines",
        "workers.stylizer",
        "training",
        "commands.measure",
        "commands.doctor",
    },
    "safetensors": {"diffusion", "metrics", "generator", "training.distiller"},
    "onnx": {"generator.onnx"},
    "onnxruntime": {"generator.onnx"},
    "onnxscript": {"generator.onnx"},
    "torchvision": {"metrics"},
    "open_clip": {"metrics.hub"},
    "elatentlpips": {"diffusion.latent_lpips"},
    "jinja2": {"text"},
    "markupsafe": {"report.page"},
    "lazy_loader": {"__init__"},
    "lpips": {"metrics"},
    "fsspec": {"storage.backend", "storage.resolve"},
    "tenacity": {"storage.retries"},
    "botocore": {"storage.s3"},
    "aiohttp": {"storage.s3", "storage.http"},
    "yarl": {"storage.http"},
    "pyarrow": {"data"},
    "tensorboard": {"training.log"},
    "PIL": {"data.colours", "data.pixels"},
    "pydantic": {"manifest"},
    "yaml": {"manifest.file"},
    "typer": {"cli"},
    "rich": {"cli.display"},
}
FORWARDS = {"diffusion.generator"}  # import paths of older versions, which re-export from the current module
FLOORS = {room: floor for floor, rooms in enumerate(LAYERS) for room in rooms}


def modules() -> dict[str, ast.Module]:
    """Syntax trees by dotted name below the package; an `__init__` has the name of its subpackage."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = ast.parse(path.read_text())
    return found


def imports(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import, which this map does not read"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_layers() -> None:
    wrong = []
    for module, tree in modules().items():
        if module in FORWARDS:
            continue
        room = module.split(".")[0]
        for name in imports(tree):
            top, _, rest = name.partition(".")
            other = rest.split(".")[0] or "smsbatch"
            if top == "smsbatch" and other != room and FLOORS[other if other in FLOORS else "__init__"] <= FLOORS[room]:
                wrong.append(f"{module} imports {name}")
    assert wrong == []


def test_no_import_circle_between_files() -> None:
    """Imports inside functions and under TYPE_CHECKING count too, because they are dependencies as well."""
    trees = modules()
    arrows: dict[str, set[str]] = {}
    for module, tree in trees.items():
        targets = set()
        for name in imports(tree):
            parts = name.split(".")
            if parts[0] == "smsbatch":
                # `from smsbatch.data import pixels` imports a module, `from smsbatch.data.pixels import fit` a member.
                targets |= {".".join(parts[1:n]) for n in (len(parts), len(parts) - 1)} & trees.keys()
        arrows[module] = targets - {module}
    while leaves := {module for module, targets in arrows.items() if not targets & arrows.keys()}:
        arrows = {module: targets for module, targets in arrows.items() if module not in leaves}
    assert arrows == {}, "these import each other in a circle, or import one that does"


def test_no_top_level_module_has_the_name_of_a_public_function() -> None:
    """Importing a module of that name, as `smsbatch.run`, would replace the function by the module."""
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert names & set(smsbatch.__all__) == set()


def test_doors() -> None:
    wrong, used = [], set()
    for module, tree in modules().items():
        for name in imports(tree):
            package = name.split(".")[0]
            used.add(package)
            doors = DOORS.get(package)
            if doors is not None and not any(f"{module}.".startswith(f"{door}.") for door in doors):
                wrong.append(f"{module} imports {name}")
    assert wrong == []
    assert set(DOORS) <= used, "a door that nobody uses"


def test_no_file_grows_too_long() -> None:
    lengths = {
        path.relative_to(PACKAGE).as_posix(): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")
    }
    assert {name for name, length in lengths.items() if length > 400} == set()


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'ray', 'diffusers', 'pyarrow', 'numpy', 'pydantic', 'rich'}"
    for statement in ("import smsbatch", "import smsbatch.cli.app"):
        code = f"import sys; {statement}; print(sorted({heavy} & set(sys.modules)))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]", statement


def test_a_driver_loads_no_torch() -> None:
    code = "import sys; import smsbatch.commands.run; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
