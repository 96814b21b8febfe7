# SPDX-License-Identifier: Apache-2.0
"""Tests of the descriptor for images of one contrast."""

from __future__ import annotations

import pytest
import torch

from monai_zsreg.registration.descriptors import LocalScores


@pytest.mark.parametrize("dims", [2, 3])
def test_scores_are_deviations_from_the_surroundings(dims: int) -> None:
    patches = torch.rand(3, *[11] * dims, generator=torch.Generator().manual_seed(0))
    describe = LocalScores(dims)
    scores = describe(patches)
    assert scores.shape == (3, 1, *[11 - 2 * describe.margin] * dims)
    around = patches[(0, *[slice(0, 7)] * dims)]
    deviation = (around.var(correction=0) + 0.02**2).sqrt()
    torch.testing.assert_close(scores[(0, 0, *[0] * dims)], (around[(3,) * dims] - around.mean()) / deviation)
    # brightness and contrast do not change them, inverted contrast does, and where nothing varies they are 0
    torch.testing.assert_close(describe(4 * patches + 2), scores, atol=0.02, rtol=0.02)
    torch.testing.assert_close(describe(1 - patches), -scores, atol=1e-4, rtol=1e-4)
    assert float(describe(torch.full_like(patches, 0.7)).abs().max()) < 1e-2
