"""`QuantEmbedding`, and what `quantize_(embeddings=True)` does with heads that share an embedding's weight."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, BartConfig, Gemma3ForCausalLM, Gemma3TextConfig, M2M100Config, MBartConfig

import torch_fused_lora as tfl

IDS = torch.arange(12).view(3, 4)


def gemma(tied: bool = True) -> Gemma3ForCausalLM:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = Gemma3TextConfig(vocab_size=32, **sizes, **heads, tie_word_embeddings=tied)
    return Gemma3ForCausalLM(config).bfloat16().eval()


def embedding(**options) -> nn.Module:
    model = nn.Sequential(nn.Embedding(16, 64, dtype=options.pop("dtype", torch.float32)))
    tfl.quantize_(model, embeddings=True, **options)
    return model[0]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_those_of_the_weight(dtype, bits, device):
    layer = embedding(bits=bits, dtype=dtype).to(device)
    assert isinstance(layer, tfl.QuantEmbedding)
    assert isinstance(layer, nn.Embedding)
    assert torch.equal(layer(IDS.to(device)).cpu(), layer.dequantize()[IDS].cpu())
    assert layer(IDS.to(device)).dtype is dtype
    assert layer.to(torch.float16)(IDS.to(device)).dtype is torch.float16


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_copies(way):
    layer = embedding(dtype=torch.bfloat16)
    if way == "deepcopy":
        copied = copy.deepcopy(layer)
    elif way == "pickle":
        copied = pickle.loads(pickle.dumps(layer))
    elif way == "torch.save":
        file = io.BytesIO()
        torch.save(layer, file)
        copied = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    else:
        copied = embedding(dtype=torch.bfloat16)
        assert not torch.equal(copied(IDS), layer(IDS))
        copied.load_state_dict(layer.state_dict())
    assert torch.equal(copied(IDS), layer(IDS))
    assert list(layer.state_dict()) == ["weight", "scales", "biases"]


def test_a_copy_on_a_device(device):
    model = nn.ModuleList([nn.Embedding(16, 64), nn.Linear(64, 16, bias=False)])
    model[1].weight = model[0].weight
    tfl.quantize_(model, embeddings=True)
    table, head = copy.deepcopy(model.to(device))
    assert head.weight is table.weight
    assert torch.equal(table(IDS.to(device)), model[0](IDS.to(device)))


@pytest.mark.parametrize("tied", [True, False])
def test_gemma_quantised_whole(tied):
    model = gemma(tied)
    report = tfl.quantize_(model, embeddings=True, skip=("lm_head",))
    table, head = model.model.embed_tokens, model.lm_head
    assert type(table) is tfl.QuantEmbedding
    assert type(head) is (tfl.QuantLinear if tied else nn.Linear)
    assert (head.weight is table.weight) is tied
    assert "model.embed_tokens" in report.errors
    if tied:
        assert report.bytes_after < 0.3 * report.bytes_before  # the shared words are counted once
    quantised = model(IDS).logits
    copied = copy.deepcopy(model)
    assert torch.equal(copied(IDS).logits, quantised)
    assert (copied.lm_head.weight is copied.model.embed_tokens.weight) is tied
    tfl.dequantize_(model)
    assert type(table).__name__ == "Gemma3TextScaledWordEmbedding"
    assert (head.weight is table.weight) is tied
    assert torch.equal(model(IDS).logits, quantised)


def test_without_it_embeddings_stay():
    model = gemma()
    tfl.quantize_(model)
    assert not isinstance(model.model.embed_tokens, tfl.QuantEmbedding)


def test_skipped_and_unsupported_ones_stay():
    model = nn.ModuleDict({"kept": nn.Embedding(4, 64), "renormed": nn.Embedding(4, 64, max_norm=1.0)})
    report = tfl.quantize_(model, skip=("kept",), embeddings=True)
    assert not report.errors


def test_a_width_that_does_not_divide():
    with pytest.raises(ValueError, match=r"0\.weight: expected a multiple of group_size 64 columns"):
        tfl.quantize_(nn.Sequential(nn.Embedding(4, 65)), embeddings=True)


def test_lora_over_an_embedding_trains_and_is_not_merged():
    model = gemma()
    tfl.quantize_(model, embeddings=True)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    tfl.patch_peft(model)
    model(IDS, labels=IDS).loss.backward()
    grads = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("embed_tokens.lora_embedding" in name for name in grads)
    for merge in (model.merge_and_unload, model.get_input_embeddings().merge):
        with pytest.raises(ValueError, match="dequantize_"):
            merge()
    with pytest.raises(ValueError, match=r"embed_tokens.*: holds packed words, which cannot be resized"):
        model.resize_token_embeddings(8)


@pytest.mark.parametrize("config", [BartConfig, M2M100Config, MBartConfig])
def test_a_scale_that_is_a_number(config):
    """BART's and its kin's, where Gemma's is a buffer."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64}
    heads = {"decoder_ffn_dim": 64, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = AutoModel.from_config(config(**sizes, **heads, scale_embedding=True)).eval()
    tfl.quantize_(model, embeddings=True)
    twin = copy.deepcopy(model)
    tfl.dequantize_(twin)
    ids = torch.arange(3, 9)[None]
    found, expected = (each(input_ids=ids, decoder_input_ids=ids).last_hidden_state for each in (model, twin))
    assert isinstance(model.get_input_embeddings(), tfl.QuantEmbedding)
    torch.testing.assert_close(found, expected)
