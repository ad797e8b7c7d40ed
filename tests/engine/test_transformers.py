# SPDX-License-Identifier: Apache-2.0
"""Small networks of transformers, as they are: the clipped sum is that of a loop of autograd over single examples."""

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import dpquant
from dpquant.engine.leaves import Routes

B, T, C, VOCABULARY = 4, 16, 0.5, 60
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = {**SIZES, "vocab_size": VOCABULARY, "pad_token_id": 0}


def opt():
    from transformers import OPTConfig, OPTForSequenceClassification

    sizes = {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32, "dropout": 0.0}
    return OPTForSequenceClassification(OPTConfig(**SMALL, **sizes, num_labels=3))


def longformer():
    from transformers import LongformerConfig, LongformerForSequenceClassification

    sizes = {"intermediate_size": 24, "attention_window": 8, "max_position_embeddings": 64, "num_labels": 3}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return LongformerForSequenceClassification(LongformerConfig(**SMALL, **sizes, **dropout))


def deberta():
    from transformers import DebertaConfig, DebertaForSequenceClassification

    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pooler_dropout": 0.0}
    return DebertaForSequenceClassification(DebertaConfig(**SMALL, **dropout, intermediate_size=24, num_labels=3))


def mixtral():
    from transformers import MixtralConfig, MixtralForSequenceClassification

    sizes = {"intermediate_size": 24, "num_key_value_heads": 1, "num_local_experts": 3, "num_labels": 3}
    return MixtralForSequenceClassification(MixtralConfig(**SMALL, **sizes))


def mpnet():
    from transformers import MPNetConfig, MPNetForSequenceClassification

    sizes = {"intermediate_size": 24, "max_position_embeddings": 40, "num_labels": 3}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return MPNetForSequenceClassification(MPNetConfig(**SMALL, **sizes, **dropout))


def t5():
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "relative_attention_num_buckets": 8}
    return Classifier(T5EncoderModel(T5Config(vocab_size=VOCABULARY, **sizes, dropout_rate=0.0)), 16)


class Classifier(torch.nn.Module):
    """Classes of the mean of an encoder's states."""

    def __init__(self, encoder, width):
        super().__init__()
        self.encoder, self.head = encoder, torch.nn.Linear(width, 3)

    def forward(self, input_ids, attention_mask):
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return SimpleNamespace(logits=self.head((states * attention_mask[..., None]).mean(1)))


def texts():
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(T) < torch.tensor([[7], [16], [3], [11]])).long()
    ids = torch.randint(3, VOCABULARY, (B, T), generator=generator) * mask
    return {"inputs": {"input_ids": ids, "attention_mask": mask}, "labels": torch.arange(B) % 3}


def rows(batch, keep):
    return {"inputs": {name: part[keep] for name, part in batch["inputs"].items()}, "labels": batch["labels"][keep]}


def losses(model, batch):
    return F.cross_entropy(model(**batch["inputs"]).logits, batch["labels"], reduction="none")


def flat(grads):
    return torch.cat([grads[name].double().flatten() for name in sorted(grads)])


def summed(model, keep):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*one example at a time.*")
        found = dpquant.clipped_sum(
            model, losses, rows(texts(), keep), max_grad_norm=C, record_ids=torch.tensor(keep), step=0, seed=0,
            microbatch_size=len(keep),
        )  # fmt: skip
    return flat(found.grads)


@pytest.mark.parametrize("make", [opt, longformer, deberta, mixtral, mpnet, t5])
def test_networks_are_taken_as_they_are(make):
    torch.manual_seed(0)
    model = make().train()
    wanted = torch.zeros(())
    for row in range(B):
        model.zero_grad()
        losses(model, rows(texts(), [row])).sum().backward()
        one = flat({name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()})
        wanted = wanted + one * min(1, C / one.norm().item())
    model.zero_grad()
    model = dpquant.prepare(model, format="luq-fp4", backend="simulate")
    assert (summed(model, list(range(B))) - wanted).norm() <= 1e-3 * wanted.norm()
    dpquant.set_policy(model, dpquant.quantizable_layers(model))
    parts = [summed(model, [row]) for row in range(B)]
    assert max(part.norm() for part in parts) <= C
    assert (sum(parts) - summed(model, list(range(B)))).norm() <= 1e-4


@pytest.mark.parametrize("make", [mpnet, t5])
def test_a_table_of_relative_positions_leaves_the_layers_quantizable(make):
    model = dpquant.prepare(make(), format="int8", backend="simulate")
    layers = set(dpquant.quantizable_layers(model))
    summed(model, [0, 1])
    assert set(dpquant.quantizable_layers(model)) == layers and not Routes.of(model).alone
