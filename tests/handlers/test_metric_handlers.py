# SPDX-License-Identifier: Apache-2.0
"""The handlers in a real ignite engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.handlers import MetricsSaver, from_engine

from monai_zsreg.errors import RegistrationError
from monai_zsreg.handlers import PairMetricHandler
from monai_zsreg.metrics import SimilarityMetric, TREMetric, foreground_tre, similarity

MEASURES = ("dice", "ssim", "mi", "mse", "rmse")


def pairs() -> list[dict]:
    """Three pairs on three grids, as an evaluator's loader gives them."""
    out = []
    for seed, shape in enumerate([(20, 24, 16), (15, 18, 22), (12, 30, 14)]):
        rng = np.random.default_rng(seed)
        affine = torch.diag(torch.tensor([1.0 + seed, 1, 2, 1]))
        fixed = rng.random((1, *shape), dtype=np.float32)
        fixed[:, : shape[0] // 2] *= 0.1
        truth = np.eye(4)
        truth[:3] += rng.normal(0, 0.02, (3, 4))
        out.append(
            {
                "fixed": MetaTensor(fixed, affine=affine),
                "pred": MetaTensor(fixed + rng.random(fixed.shape, dtype=np.float32), affine=affine),
                "estimate": torch.eye(4, dtype=torch.float64),
                "truth": torch.tensor(truth),
            }
        )
    return out


def run(handlers: dict, data: list[dict], decollate: bool = True):
    loader = DataLoader(Dataset(data), batch_size=1)
    engine = Engine(lambda _, batch: decollate_batch(batch) if decollate else batch)
    for name, handler in handlers.items():
        handler.attach(engine, name)
    return engine, loader


@pytest.mark.parametrize("decollate", [True, False])
def test_batch_size_one_with_pairs_of_different_shapes(decollate: bool) -> None:
    data = pairs()
    transform = from_engine(["pred", "fixed"]) if decollate else lambda batch: (batch["pred"], batch["fixed"])
    engine, loader = run({n: PairMetricHandler(SimilarityMetric(n), transform) for n in MEASURES}, data, decollate)
    state = engine.run(loader)
    expected = [similarity(pair["fixed"], pair["pred"]) for pair in data]
    for name in MEASURES:
        values = [row[name] for row in expected]
        assert state.metrics[name] == pytest.approx(np.mean(values), rel=1e-5)
        assert state.metric_details[name][:, 0].tolist() == pytest.approx(values, rel=1e-5)


def test_a_second_epoch_starts_anew() -> None:
    engine, loader = run({"mi": PairMetricHandler(SimilarityMetric("mi"), from_engine(["pred", "fixed"]))}, pairs())
    assert engine.run(loader).metrics["mi"] == engine.run(loader, max_epochs=1).metrics["mi"]
    assert len(engine.state.metric_details["mi"]) == 3


def test_target_registration_error() -> None:
    data = pairs()
    transform = from_engine(["estimate", "truth", "fixed"])
    handlers = {name: PairMetricHandler(TREMetric(name), transform) for name in ("mean", "max")}
    engine, loader = run(handlers, data)
    state = engine.run(loader)
    for name in handlers:
        values = [foreground_tre(pair["estimate"], pair["truth"], pair["fixed"])[name] for pair in data]
        assert state.metric_details[name][:, 0].tolist() == pytest.approx(values, rel=1e-5)
        assert state.metrics[name] == pytest.approx(np.mean(values), rel=1e-5)


def test_target_registration_error_of_a_batch_that_was_not_decollated() -> None:
    data = pairs()
    handler = PairMetricHandler(TREMetric(), lambda b: (b["estimate"], b["truth"], b["fixed"]))
    engine, loader = run({"tre": handler}, data, decollate=False)
    values = [foreground_tre(pair["estimate"], pair["truth"], pair["fixed"])["mean"] for pair in data]
    engine.run(loader)
    assert engine.state.metric_details["tre"][:, 0].tolist() == pytest.approx(values, rel=1e-5)


def test_masks_as_further_outputs() -> None:
    data = pairs()
    for pair in data:
        pair["mask"] = MetaTensor(torch.ones_like(pair["fixed"].as_tensor()), affine=pair["fixed"].affine)
    transform = from_engine(["pred", "fixed", "mask", "mask"])
    handlers = {
        "masked": PairMetricHandler(SimilarityMetric("mse"), transform),
        "whole": PairMetricHandler(SimilarityMetric("mse", "image"), from_engine(["pred", "fixed"])),
    }
    engine, loader = run(handlers, data)
    metrics = engine.run(loader).metrics
    assert metrics["masked"] == pytest.approx(metrics["whole"], rel=1e-6)


def test_details_reach_monais_saver(tmp_path) -> None:
    handler = PairMetricHandler(SimilarityMetric("nmi"), from_engine(["pred", "fixed"]))
    engine, loader = run({"nmi": handler}, pairs())
    MetricsSaver(tmp_path, metrics="*", metric_details="*", batch_transform=lambda b: [{}]).attach(engine)
    engine.run(loader)
    assert len((tmp_path / "nmi_raw.csv").read_text().splitlines()) == 4


def test_wrong_number_of_outputs() -> None:
    for metric, outputs in ((TREMetric(), 5), (SimilarityMetric("ssim"), 1)):
        with pytest.raises(RegistrationError, match="output"):
            PairMetricHandler(metric).update([torch.rand(1, 1, 8, 8)] * outputs)
