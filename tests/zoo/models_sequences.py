"""torch's own sequence models in small classifiers: LSTM, Transformer encoder and decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from zoo.case import N_DATA, ZooCase, labelled, lively, zoo_case
from zoo.sentences import CLASSES, VOCABULARY, inputs_and_labels, text_case


class LSTMClassifier(nn.Module):
    """Embedding, LSTM, the last hidden state, a head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.lstm = nn.LSTM(4, 3, num_layers=2, batch_first=True)
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.lstm(self.embedding(x))
        return self.head(h[:, -1])


@zoo_case
def lstm(name: str) -> ZooCase:
    tokens = torch.randint(0, VOCABULARY, (N_DATA, 4))
    return ZooCase(
        name,
        lively(LSTMClassifier()),
        "classification",
        labelled(tokens, CLASSES),
        {"*": "kron"},
        notes="the recurrent weights are used at every step",
    )


class EncoderClassifier(nn.Module):
    """torch's own encoder, with padding masked and averaged over the tokens that are there."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6, padding_idx=0)
        layer = nn.TransformerEncoderLayer(6, 2, dim_feedforward=8, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(6))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.encoder(self.embedding(input_ids), src_key_padding_mask=attention_mask == 0)
        weight = attention_mask[..., None] / attention_mask.sum(1)[:, None, None]
        return self.head((h * weight).sum(1))


@zoo_case
def transformer_encoder(name: str) -> ZooCase:
    treatment = {"*norm*": "dense", "*": "kron"}
    notes = "packed attention projections, padding mask, fast path avoided"
    return text_case(name, EncoderClassifier(), "sequence", treatment, notes=notes)


class Translator(nn.Module):
    """torch's own decoder, tokens first: (t, n, e) inside, (n, c, t) outside."""

    def __init__(self):
        super().__init__()
        self.source = nn.Linear(4, 6)
        self.target = nn.Embedding(VOCABULARY, 6)
        self.decoder = nn.TransformerDecoderLayer(6, 2, dim_feedforward=8, activation="gelu")
        self.head = nn.Linear(6, CLASSES)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.source(source).transpose(0, 1)
        h = self.target(target).transpose(0, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(len(h), dtype=h.dtype)
        h = self.decoder(h, memory, tgt_mask=mask, tgt_is_causal=True)
        return self.head(h).permute(1, 2, 0)


@zoo_case
def transformer_decoder(name: str) -> ZooCase:
    examples = [
        {
            "source": torch.randn(3, 4, dtype=torch.float64),
            "target": torch.randint(0, VOCABULARY, (4,)),
            "labels": torch.randint(0, CLASSES, (4,)),
        }
        for _ in range(N_DATA)
    ]
    return ZooCase(
        name,
        lively(Translator()),
        "classification",
        examples,
        {"*norm*": "dense", "*": "kron"},
        rows={"source": "batch", "target": "batch", "*": "second"},
        pair=inputs_and_labels,
        notes="sequence-first layers, cross-attention, causal mask, outputs (n, c, t)",
    )
