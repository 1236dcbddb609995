"""The diagram of the house, executable: layers point one way, and every heavy dependency has one door."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import smsbatch

PACKAGE = Path(smsbatch.__file__).parent

# Rooms from the top down: one may import those on the lines below its own, never a sibling on its line.
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
    ("errors", "text", "parallel", "tiny"),
)
# Which modules may import it; a room stands for all of its modules.
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
    "lpips": {"metrics"},
    "fsspec": {"storage.backend", "storage.resolve"},
    "tenacity": {"storage.backend"},
    "botocore": {"storage.s3"},
    "aiohttp": {"storage.s3", "storage.http"},
    "yarl": {"storage.http"},
    "pyarrow": {"data"},
    "tensorboard": {"training.log"},
    "PIL": {"data.pixels"},
    "pydantic": {"manifest"},
    "yaml": {"manifest.file"},
    "typer": {"cli"},
    "rich": {"cli.display"},
}
FLOORS = {room: floor for floor, rooms in enumerate(LAYERS) for room in rooms}


def modules() -> dict[str, ast.Module]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def imports(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_layers() -> None:
    wrong = []
    for module, tree in modules().items():
        room = module.split(".")[0]
        for name in imports(tree):
            top, _, rest = name.partition(".")
            other = rest.split(".")[0] or "smsbatch"
            if top == "smsbatch" and other != room and FLOORS[other if other in FLOORS else "__init__"] <= FLOORS[room]:
                wrong.append(f"{module} imports {name}")
    assert wrong == []


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
    lengths = {path.name: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
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
