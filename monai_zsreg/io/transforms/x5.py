# SPDX-License-Identifier: Apache-2.0
"""X5, the HDF5 files of NiTransforms: fixed to moving, RAS."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from monai_zsreg.io.transforms.images import Images


def sniff(content: bytes) -> bool:
    return content.startswith(b"\x89HDF") and b"DimensionKinds" in content


def read(path: Path, images: Images) -> np.ndarray:
    import h5py

    with h5py.File(path, "r") as file:
        group = file.get("TransformGroup")
        if group is None:
            raise ValueError("it holds no TransformGroup, as the X5 files of NiTransforms do; fslpy's are others")
        if len(group) != 1:
            raise ValueError(f"{len(group)} transforms instead of one")
        node = group["0"]
        if node.attrs["Type"] != "linear":
            raise ValueError(f"a transform of type {node.attrs['Type']} instead of linear")
        matrix = np.array(node["Transform"], dtype=np.float64)
    if matrix.ndim == 3 and len(matrix) != 1:
        raise ValueError(f"{len(matrix)} transforms instead of one")
    return matrix.reshape(matrix.shape[-2:])


def write(path: Path, matrix: np.ndarray, images: Images) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        file.attrs["Format"], file.attrs["Version"] = "X5", np.uint16(1)
        node = file.create_group("TransformGroup").create_group("0")
        node.attrs["Type"], node.attrs["ArrayLength"] = "linear", 1
        node.create_dataset("Transform", data=matrix)
        node.create_dataset("DimensionKinds", data=np.array(["space", "space", "space", "vector"], dtype="S"))
