# SPDX-License-Identifier: Apache-2.0
"""OpenCV's SIFT: ratio test 0.75, RANSAC at 3 pixels. 2D only."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from monai_zsreg.benchmark.peers import Task
from monai_zsreg.benchmark.volumes import Volume


def prepare(fixed: Volume, moving: Volume, task: Task) -> Callable[[], np.ndarray]:
    images = [_bytes(image.values) for image in (fixed, moving)]
    cv2.setNumThreads(task.threads)
    fit = cv2.estimateAffine2D if task.transform == "affine" else cv2.estimateAffinePartial2D

    def run() -> np.ndarray:
        cv2.setRNGSeed(task.seed)
        detector = cv2.SIFT.create()
        (keys, words), (moving_keys, moving_words) = (detector.detectAndCompute(image, None) for image in images)
        if words is None or moving_words is None or len(moving_words) < 2:
            raise RuntimeError("no keypoints")
        matches = cv2.BFMatcher(cv2.NORM_L2).knnMatch(words, moving_words, k=2)
        good = [m for m, n in (pair for pair in matches if len(pair) == 2) if m.distance < 0.75 * n.distance]
        if len(good) < 3:
            raise RuntimeError(f"{len(good)} matches, 3 are needed")
        source = np.array([keys[m.queryIdx].pt for m in good], dtype=np.float32)
        target = np.array([moving_keys[m.trainIdx].pt for m in good], dtype=np.float32)
        found, _ = fit(source, target, method=cv2.RANSAC, ransacReprojThreshold=3.0)
        if found is None:
            raise RuntimeError("RANSAC found no transform")
        # OpenCV's x runs along the second array axis
        pull = np.eye(3)
        pull[:2] = found[::-1, [1, 0, 2]]
        return np.asarray(moving.affine @ pull @ np.linalg.inv(fixed.affine))

    return run


def _bytes(image: np.ndarray) -> np.ndarray:
    low, high = np.percentile(image, [0.5, 99.5])
    return (np.clip((image - low) / max(high - low, 1e-12), 0, 1) * 255).astype(np.uint8)
