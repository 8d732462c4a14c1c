"""What stands in the way of plain LoRA, and whether what is said to help does."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

from lorakit.adapters.reading import load_adapter
from lorakit.convert.check import check_adapter
from lorakit.merge.base import read_base
from lorakit.merge.merge import merge


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory, bases: Callable[[str], Path]) -> Path:
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForSequenceClassification.from_pretrained(bases("llama"), num_labels=3)
    model.config.pad_token_id = 0
    folder = tmp_path_factory.mktemp("classifier") / "base"
    model.save_pretrained(folder)
    return folder


def classes_of(base: Path, adapter: Path | None = None) -> torch.Tensor:
    model: Any = AutoModelForSequenceClassification.from_pretrained(base)
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(torch.arange(3, 20)[None]).logits
    return logits


def test_a_classifiers_adapter_names_a_cure_that_works(tmp_path: Path, classifier: Path) -> None:
    """PEFT says that it saved 'classifier' and 'score', and a model has one of the two."""
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS", init_lora_weights=False)
    trained = get_peft_model(AutoModelForSequenceClassification.from_pretrained(classifier), config)
    torch.nn.init.normal_(trained.base_model.model.score.modules_to_save["default"].weight)
    trained.save_pretrained(tmp_path / "adapter")
    (problem,) = check_adapter(load_adapter(tmp_path / "adapter"), read_base(classifier)).problems
    assert "lorakit merge" in problem
    assert "--approximate" not in problem
    merge(classifier, [(tmp_path / "adapter", 1.0)], out=tmp_path / "merged")
    wanted = classes_of(classifier, tmp_path / "adapter")
    assert not torch.allclose(wanted, classes_of(classifier), atol=0.1)
    torch.testing.assert_close(classes_of(tmp_path / "merged"), wanted, rtol=1e-4, atol=1e-4)
