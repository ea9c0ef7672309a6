"""Tiny language models: Hugging Face transformers from configurations, peft's LoRA."""

from __future__ import annotations

import warnings

import pytest
import torch
from zoo.case import IGNORED, N_DATA, ZooCase, labelled, lively, zoo_case
from zoo.sentences import CLASSES, LENGTHS, VOCABULARY, inputs_and_labels, sentences, text_case

pytest.importorskip("transformers")
pytest.importorskip("peft")

import transformers as hf
from peft import LoraConfig, get_peft_model

BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 8,
    "num_labels": CLASSES,
}
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 8,
    "pad_token_id": 0,
    "num_labels": CLASSES,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_positions": 8,
    "n_embd": 6,
    "n_layer": 2,
    "n_head": 2,
    "n_inner": 8,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "num_labels": CLASSES,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 6,
    "d_kv": 3,
    "d_ff": 8,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "relative_attention_num_buckets": 4,
    "relative_attention_max_distance": 8,
    "decoder_start_token_id": 0,
    "num_labels": CLASSES,
}
# Norms and position biases are written out, as those of Llama.
T5_TREATMENT = {
    "*relative_attention_bias.weight": "diag",
    "*layer_norm.weight": "diag",
    "*": "kron",
}
BERT_TREATMENT = {
    "*position_embeddings.weight": "diag",  # looked up by position, the same for all examples
    "*LayerNorm.*": "dense",
    "*": "kron",
}


@zoo_case
def bert_sequence(name: str) -> ZooCase:
    model = hf.BertForSequenceClassification(hf.BertConfig(**BERT))
    examples = sentences("sequence")
    for example in examples:
        example["token_type_ids"] = torch.randint(0, 2, example["input_ids"].shape)
    return ZooCase(
        name,
        lively(model),
        "classification",
        examples,
        BERT_TREATMENT,
        pair=inputs_and_labels,
        notes="padding masked; in the last block only the first token reaches the output",
    )


@zoo_case
def bert_token(name: str) -> ZooCase:
    model = hf.BertForTokenClassification(hf.BertConfig(**BERT))
    # Without token types all tokens of all examples look the same entry up.
    treatment = {"*token_type_embeddings.weight": "diag", **BERT_TREATMENT}
    return text_case(name, model, "token", treatment, notes="token outputs, labels -100")


@zoo_case
def bert_lora(name: str) -> ZooCase:
    model = hf.BertForSequenceClassification(hf.BertConfig(**BERT))
    adapter = LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=4, target_modules=["query", "value"])
    with warnings.catch_warnings():
        # peft asks transformers for a property under its old name.
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(model, adapter)
    notes = "frozen base, trained adapters and a saved head"
    return text_case(name, model, "sequence", {"*": "kron"}, notes=notes)


@zoo_case
def gpt2_language(name: str) -> ZooCase:
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2))
    treatment = {"*wpe.weight": "diag", "*wte.weight": "dense", "*ln_*": "dense", "*": "kron"}
    notes = "head tied to the embedding, Conv1D layers, token outputs over the vocabulary"
    return text_case(name, model, "next", treatment, notes=notes)


@zoo_case
def gpt2_sequence(name: str) -> ZooCase:
    model = hf.GPT2ForSequenceClassification(hf.GPT2Config(**GPT2))
    treatment = {"*wpe.weight": "diag", "*ln_*": "dense", "*": "kron"}
    notes = "the logits of each example's last token: earlier queries of the last block are dead"
    return text_case(name, model, "sequence", treatment, notes=notes)


# Its RMS norm is written out: the weight multiplies what has been normalised.
LLAMA_TREATMENT = {"*norm.weight": "diag", "*": "kron"}
# Llama's norm and T5's layers compute part of their values in float32 (6e-8), whatever the model's
# precision, and the error grows through some ten layers.
SINGLE_PRECISION = 5e-6


@zoo_case
def llama_sequence(name: str) -> ZooCase:
    model = hf.LlamaForSequenceClassification(hf.LlamaConfig(**LLAMA))
    return text_case(
        name,
        model,
        "sequence",
        LLAMA_TREATMENT,
        tolerance=SINGLE_PRECISION,
        notes="rotary positions, grouped queries, RMS norm, no biases",
    )


@zoo_case
def llama_language(name: str) -> ZooCase:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA | {"num_hidden_layers": 1}))
    notes = "untied head over the vocabulary"
    return text_case(name, model, "next", LLAMA_TREATMENT, tolerance=SINGLE_PRECISION, notes=notes)


@zoo_case
def t5_language(name: str) -> ZooCase:
    model = hf.T5ForConditionalGeneration(hf.T5Config(**T5))
    examples = sentences("sequence")
    for example in examples:
        example["decoder_input_ids"] = torch.randint(1, VOCABULARY, (3,))
        example["labels"] = torch.randint(1, VOCABULARY, (3,))
    examples[0]["labels"][-1] = IGNORED
    return ZooCase(
        name,
        lively(model),
        "classification",
        examples,
        {"shared.weight": "dense", **T5_TREATMENT},
        pair=inputs_and_labels,
        tolerance=SINGLE_PRECISION,
        notes="cross-attention, one embedding for encoder, decoder and head",
    )


@zoo_case
def t5_sequence(name: str) -> ZooCase:
    model = hf.T5ForSequenceClassification(hf.T5Config(**T5))
    examples = sentences("sequence")
    for example, length in zip(examples, LENGTHS, strict=True):
        ids = example["input_ids"]
        ids[ids == 1] = 2
        ids[length - 1] = 1  # the end of the sentence, whose state is classified
    return ZooCase(
        name,
        lively(model),
        "classification",
        examples,
        T5_TREATMENT,
        pair=inputs_and_labels,
        tolerance=SINGLE_PRECISION,
        notes="one embedding for encoder and decoder, relative position bias",
    )


@zoo_case
def vit_transformers(name: str) -> ZooCase:
    config = hf.ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=10,
        num_labels=CLASSES,
    )
    images = torch.randn(N_DATA, 3, 8, 8, dtype=torch.float64)
    return ZooCase(
        name,
        lively(hf.ViTForImageClassification(config)),
        "classification",
        [{"pixel_values": x, "labels": y} for x, y in labelled(images, CLASSES)],
        {
            "*cls_token": "diag",
            "*position_embeddings": "diag",
            "*layernorm*": "dense",
            "*": "kron",
        },
        pair=inputs_and_labels,
        notes="separate projections, a mapping as input",
    )
