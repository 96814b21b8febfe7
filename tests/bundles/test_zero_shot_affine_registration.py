# SPDX-License-Identifier: Apache-2.0
"""The bundle's configurations run: for the model zoo's ``ci/unit_tests``, which starts it from the zoo's root.

It stands alone: unittest, MONAI and what the bundle itself needs. Here the bundle is in ``bundles``, there in
``models``.
"""

from __future__ import annotations

import json
import tempfile
import unittest
from pathlib import Path

from monai.bundle import ConfigWorkflow
from monai.utils import set_determinism

NAME = "zero_shot_affine_registration"
FOUND = [Path("models") / NAME, *(folder / "bundles" / NAME for folder in Path(__file__).resolve().parents)]
BUNDLE = next((folder for folder in FOUND if (folder / "configs").is_dir()), FOUND[0])


class TestZeroShotAffineRegistration(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.addCleanup(set_determinism, None)  # which the training sets
        self.output = Path(folder.name)

    def run_workflow(self, kind: str, *names: str, **options: object) -> None:
        workflow = ConfigWorkflow(
            config_file=[str(BUNDLE / "configs" / name) for name in names],
            meta_file=str(BUNDLE / "configs" / "metadata.json"),
            logging_file=str(BUNDLE / "configs" / "logging.conf"),
            workflow_type=kind,
            bundle_root=str(BUNDLE),
            output_dir=str(self.output),
            device="cpu",
            **options,
        )
        workflow.initialize()
        self.assertEqual(workflow.check_properties(), [])
        workflow.run()
        workflow.finalize()

    def report(self) -> dict:
        return json.loads((self.output / "demonstration" / "report.json").read_text(encoding="utf-8"))

    def test_train(self) -> None:
        quick = {"max_epochs": 1, "epoch_length": 2, "val_batches": 1, "batch_size": 16, "hidden": [32]}
        self.run_workflow("train", "train.json", **quick)
        self.assertTrue((self.output / "model.pt").is_file())

    def test_inference(self) -> None:
        self.run_workflow("infer", "inference.json", demonstration_dims=2, page=False)
        self.assertLess(self.report()["metrics"]["after"]["tre"], 0.5)  # mm; 5 and more before

    def test_evaluation(self) -> None:
        self.run_workflow("infer", "inference.json", "evaluate.json", demonstration_dims=2, page=False)
        self.assertEqual(self.report()["verdict"], "PASS")


if __name__ == "__main__":
    unittest.main()
