"""Adapters of peft on a frozen transformer: they alone are random, wherever they sit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from laws import EXACT, NEGLIGIBLE, Untouched, assert_complete, relative_error
from torch import Tensor, nn

from kfac_laplace import Curvature, Laplace

hf = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

VOCABULARY, CLASSES, LENGTHS = 9, 3, (5, 3, 4, 2, 5, 4, 3)
BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 12,
    "num_labels": CLASSES,
}


def lora(**options: Any) -> Any:
    options = {"target_modules": ["query", "value"]} | options
    return peft.LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=4, **options)


# name: (configuration, parameters that are trained, those of them without Kronecker factors)
ADAPTERS: dict[str, tuple[Callable[[], Any], tuple[str, ...], tuple[str, ...]]] = {
    "lora": (lora, ("lora_", "classifier"), ()),
    "dropout": (lambda: lora(lora_dropout=0.5), ("lora_", "classifier"), ()),
    "all linear": (lambda: lora(target_modules="all-linear"), ("lora_", "classifier"), ()),
    "embedding": (
        lambda: lora(target_modules=["word_embeddings", "query"]),
        ("lora_", "classifier"),
        (),
    ),
    "saved pooler": (
        lambda: lora(modules_to_save=["pooler", "classifier"]),
        ("lora_", "classifier", "pooler"),
        (),
    ),
    "saved norms": (
        lambda: lora(modules_to_save=["LayerNorm"]),
        ("lora_", "LayerNorm.modules_to_save", "classifier"),
        ("LayerNorm",),
    ),
    "trained biases": (
        lambda: lora(bias="lora_only"),
        ("lora_", "query.base_layer.bias", "value.base_layer.bias", "classifier"),
        (),
    ),
    "magnitudes": (
        lambda: lora(use_dora=True),
        ("lora_", "classifier"),
        ("lora_magnitude",),
    ),
    "scales": (
        lambda: peft.IA3Config(
            task_type="SEQ_CLS",
            target_modules=["key", "output.dense"],
            feedforward_modules=["output.dense"],
        ),
        ("ia3_", "classifier"),
        ("ia3_",),
    ),
    "prompt": (
        lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
        ("prompt_encoder", "classifier"),
        ("prompt_encoder",),
    ),
}

every_adapter = pytest.mark.parametrize("name", ADAPTERS)


def sentences() -> list[dict[str, Tensor]]:
    mask = (torch.arange(5) < torch.tensor(LENGTHS)[:, None]).long()
    ids, y = torch.randint(1, VOCABULARY, mask.shape) * mask, torch.randint(0, CLASSES, (7,))
    parts = zip(ids.split(3), mask.split(3), y.split(3), strict=True)
    return [{"input_ids": i, "attention_mask": m, "labels": labels} for i, m, labels in parts]


@pytest.fixture
def adapted(name: str) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """A model in float64 whose adapters are not at their initial zeros, and its batches."""
    base = hf.BertForSequenceClassification(hf.BertConfig(**BERT))
    model = peft.get_peft_model(base, ADAPTERS[name][0]()).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model, sentences()


class Logits(nn.Module):
    """The model on all sentences, as the oracles call it."""

    def __init__(self, model: nn.Module, mask: Tensor):
        super().__init__()
        self.model, self.mask = model, mask

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=self.mask).logits


def exact(model: nn.Module, batches: list[dict[str, Tensor]], params: tuple[str, ...]) -> Tensor:
    ids, mask, y = (torch.cat([b[k] for b in batches]) for k in batches[0])
    names = [f"model.{name}" for name in params]
    return oracles.ggn(Logits(model, mask), ids, y, "classification", names)


@pytest.mark.slow
@every_adapter
def test_the_adapters_alone_are_random(name, adapted):
    model, batches = adapted
    photograph = Untouched(model)
    la = Laplace(model).fit(batches)
    assert_complete(la.curvature, model)
    _, trained, loose = ADAPTERS[name]
    for parameter, kind in la.coverage.items():
        inside = any(part in parameter for part in trained) and "original" not in parameter
        assert (kind != "frozen") == inside, parameter
        if inside:
            assert (kind == "kron") != any(part in parameter for part in loose), (parameter, kind)
    x = {k: torch.cat([b[k] for b in batches]) for k in ("input_ids", "attention_mask")}
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert la.optimize_prior(tolerance=1e-3).sample(2).shape == (2, size)
    for options in ({}, {"pred_type": "nn", "n_samples": 2}, {"pred_type": "linear"}):
        torch.testing.assert_close(la(x, **options).sum(-1), torch.ones(7).double())
    photograph.check()


@every_adapter
@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_exact_blocks(name, adapted, structure):
    """Those of norms, scales and prompts under "kron", all of them under "diag"."""
    model, batches = adapted
    curvature = Curvature(model, "classification", hessian_structure=structure).fit(batches)
    compared = [b for b in curvature.blocks.values() if b.kind in ("diag", "dense")]
    assert compared or (structure == "kron" and not ADAPTERS[name][2])
    found = {block.params: exact(model, batches, block.params) for block in compared}
    floor = NEGLIGIBLE * max((h.norm().item() for h in found.values()), default=0.0)
    for block in compared:
        want = found[block.params]
        want = want if block.kind == "dense" else want.diagonal().diag()
        assert relative_error(block.dense(), want, floor) < EXACT, block.params


@pytest.mark.parametrize("name", ["lora"])
def test_globs_and_the_last_layer(name, adapted):
    """The blocks that they have among all adapters."""
    model, batches = adapted
    whole = Curvature(model, "classification").fit(batches)
    for subset, part in ((["*query*lora_A*"], "query.lora_A"), ("last_layer", "classifier")):
        curvature = Curvature(model, "classification", subset_of_weights=subset).fit(batches)
        inside = [n for n, kind in curvature.coverage.items() if kind != "frozen"]
        assert inside == [n for n, p in model.named_parameters() if part in n and p.requires_grad]
        for key, block in curvature.blocks.items():
            assert relative_error(block.dense(), whole.blocks[key].dense()) < EXACT


def test_adapters_in_single_precision_on_a_base_in_half_precision():
    """As peft makes them: trained in float32 whatever the base."""
    base = hf.BertForSequenceClassification(hf.BertConfig(**BERT)).bfloat16()
    model, batches = peft.get_peft_model(base, lora()).eval(), sentences()
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    la = Laplace(model).fit(batches)
    for block in la.curvature.blocks.values():
        assert block.dense().dtype in (torch.float32, torch.float64)
    before = float(la.log_marginal_likelihood())
    assert float(la.optimize_prior().log_marginal_likelihood()) > before
