"""`save_mlx_adapters` and `load_mlx_adapters`: mlx-lm computes with ours what PEFT does, and PEFT with mlx-lm's what
mlx-lm does, within what rounding can do; what one of them cannot express is refused by name."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest
import torch
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import torch_fused_lora as tfl
from tests.models.mlx.checkpoints import Within, convert, in_double, our_logits, save, tensor, their_logits

ATTENTION = ["q_proj", "v_proj"]


def _plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "hf")


def adapted(folder, **options) -> PeftModel:
    """A float32 model of a folder with random adapters."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ATTENTION, "init_lora_weights": False} | options)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)


def exact(folder, model: PeftModel) -> Within:
    """What float64 makes of a float32 model's adapters over a folder's weights."""
    double = get_peft_model(in_double(folder), model.peft_config["default"], autocast_adapter_dtype=False).double()
    own = double.state_dict()
    double.load_state_dict({name: t for name, t in model.state_dict().items() if "lora_" in name}, strict=False)
    assert {name for name in own if "lora_" in name} == {name for name in model.state_dict() if "lora_" in name}
    return Within(double.eval())


ADAPTERS = {
    "two targets": {},
    "every linear layer": {"target_modules": "all-linear", "use_rslora": True},
    "rank and alpha patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"layers.1.self_attn.q_proj": 7, "down_proj": 1},
        "alpha_pattern": {"o_proj": 1.7},
    },
    "some layers": {"layers_to_transform": [0]},
    "the head": {"target_modules": [*ATTENTION, "lm_head"]},
    "half factors": {"autocast": torch.bfloat16},
}


@pytest.mark.parametrize("quantize", [False, True], ids=["float32", "4 bits"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_mlx_lm_reads_ours(name, quantize, tmp_path):
    folder = convert(tmp_path, quantize=quantize)
    options = dict(ADAPTERS[name])
    half = options.pop("autocast", torch.float32)
    ours = adapted(tmp_path / "hf", **options).eval()
    for part, weight in ours.named_parameters():
        if "lora_" in part:
            weight.data = weight.data.to(half)
    tfl.save_mlx_adapters(ours, tmp_path / "adapters")
    float64 = exact(tmp_path / "hf", ours.float())
    assert our_logits(ours) == float64
    assert our_logits(_plain(tmp_path)) != float64
    theirs = load_adapters(load_model(folder)[0], str(tmp_path / "adapters"))
    theirs.eval()
    assert their_logits(theirs) == float64

    base = tfl.load_mlx(folder) if quantize else _plain(tmp_path)
    again = tfl.load_mlx_adapters(base, tmp_path / "adapters").eval()
    assert our_logits(again) == float64
    assert again.peft_config["default"].lora_dropout == 0.0
    ranks = {name: t.shape for name, t in ours.state_dict().items() if "lora_" in name}
    assert {name: t.shape for name, t in again.state_dict().items() if "lora_" in name} == ranks


def test_configuration_is_what_mlx_lm_writes(tmp_path):
    save(tmp_path / "hf", "llama")
    tfl.save_mlx_adapters(adapted(tmp_path / "hf", lora_dropout=0.1), tmp_path / "adapters")
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    keys = ["self_attn.q_proj", "self_attn.v_proj"]
    parameters = {"rank": 4, "scale": 1.5, "dropout": 0.1, "keys": keys}
    assert config == {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    stored = load_file(tmp_path / "adapters" / "adapters.safetensors")
    assert stored["model.layers.1.self_attn.v_proj.lora_a"].shape == (64, 4)
    assert stored["model.layers.1.self_attn.v_proj.lora_b"].shape == (4, 32)


def train_there(folder, **options):
    """mlx-lm's model with random adapters in its last layer, saved as its trainer does."""
    model, _ = load_model(folder)
    parameters = {"rank": 4, "scale": 3.0, "dropout": 0.0} | options
    model.freeze()
    linear_to_lora_layers(model, 1, parameters)
    weights = [(name, mx.random.normal(w.shape) / 8) for name, w in tree_flatten(model.trainable_parameters())]
    model.load_weights(weights, strict=False)
    (folder / "adapters").mkdir()
    mx.save_safetensors(str(folder / "adapters" / "adapters.safetensors"), dict(weights))
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters}
    (folder / "adapters" / "adapter_config.json").write_text(json.dumps(config))
    model.eval()
    return model


@pytest.mark.parametrize("quantize", [False, True], ids=["float32", "4 bits"])
@pytest.mark.parametrize("options", [{}, {"keys": ["self_attn.k_proj", "mlp.up_proj"]}], ids=["all", "keys"])
def test_mlx_lm_s_are_read(options, quantize, tmp_path):
    folder = convert(tmp_path, "qwen3", quantize=quantize)
    theirs = train_there(folder, **options)
    ours = tfl.load_mlx_adapters(tfl.load_mlx(folder), folder / "adapters").eval()
    assert len(tfl.patch_peft(ours).patched) == (2 if options else 7)
    float64 = exact(tmp_path / "hf", tfl.load_mlx_adapters(_plain(tmp_path), folder / "adapters"))
    assert their_logits(theirs) == float64
    assert our_logits(ours) == float64
    again = tfl.load_mlx_adapters(tfl.load_mlx(folder), folder / "adapters", adapter_name="theirs")
    tfl.save_mlx_adapters(again, folder / "again")
    for name, stored in load_file(folder / "again" / "adapters.safetensors").items():
        assert torch.equal(stored, tensor(mx.load(str(folder / "adapters" / "adapters.safetensors"))[name]))


def test_beside_another_adapter(tmp_path):
    save(tmp_path / "hf", "llama")
    model = adapted(tmp_path / "hf").eval()
    tfl.save_mlx_adapters(model, tmp_path / "adapters")
    first = our_logits(model)
    other = adapted(tmp_path / "hf", r=2, target_modules=["k_proj"])
    assert tfl.load_mlx_adapters(other, tmp_path / "adapters", adapter_name="second") is other
    assert set(other.peft_config) == {"default", "second"}
    other.set_adapter("second")
    assert torch.equal(our_logits(other.eval()), first)


def test_a_scaling_of_zero_loses_no_factor(tmp_path):
    save(tmp_path / "hf", "llama")
    model = adapted(tmp_path / "hf", lora_alpha=0)
    tfl.save_mlx_adapters(model, tmp_path / "adapters")
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert config["lora_parameters"]["scale"] == 0.0
    loaded = tfl.load_mlx_adapters(_plain(tmp_path), tmp_path / "adapters").state_dict()
    for name, factor in model.state_dict().items():
        assert torch.equal(loaded[name], factor)


# ------------------------------------------------------------------------------------------------------------ refusals

CANNOT = {
    "layers.\\*.self_attn.q_proj: DoraLinearVariant": {"use_dora": True},
    "q_proj.lora_B.bias: a tensor that": {"lora_bias": True},
    "q_proj.base_layer.bias: a tensor that": {"bias": "all"},
    "lm_head.weight: a tensor that": {"modules_to_save": ["lm_head"]},
    "embed_tokens.lora_embedding_A: a tensor that": {"target_modules": [*ATTENTION, "embed_tokens"]},
    "embed_tokens.token_adapter.trainable_tokens_delta: a tensor": {"trainable_token_indices": [1]},
    "layer_replication: layers that": {"layer_replication": [[0, 2], [1, 2]]},
    "mlp.up_proj: LoRA over a": {"target_parameters": ["mlp.up_proj.weight"]},
}


@pytest.mark.parametrize("message", CANNOT)
@pytest.mark.filterwarnings("ignore")
def test_what_mlx_lm_cannot_express(message, tmp_path):
    save(tmp_path / "hf", "qwen2", tie_word_embeddings=False)
    model = adapted(tmp_path / "hf", **CANNOT[message])
    with pytest.raises(ValueError, match=message):
        tfl.save_mlx_adapters(model, tmp_path / "adapters")
    assert not (tmp_path / "adapters").exists()


def test_a_tied_head(tmp_path):
    save(tmp_path / "hf", "qwen2")
    with pytest.raises(ValueError, match="lm_head: LoRA over a head that shares the embedding's weight"):
        tfl.save_mlx_adapters(adapted(tmp_path / "hf", target_modules=["lm_head"]), tmp_path / "adapters")


def test_what_is_no_adapter_to_save(tmp_path):
    with pytest.raises(TypeError, match=r"model: expected a peft\.PeftModel, got Linear"):
        tfl.save_mlx_adapters(nn.Linear(2, 2), tmp_path)
    save(tmp_path / "hf", "llama")
    model = adapted(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"adapter_name: expected a LoRA adapter among \['default'\], got 'other'"):
        tfl.save_mlx_adapters(model, tmp_path / "adapters", "other")
    model.save_pretrained(tmp_path / "peft")
    with pytest.raises(ValueError, match=r"folder: .* holds an adapter of PEFT's"):
        tfl.save_mlx_adapters(model, tmp_path / "peft")
    assert PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), tmp_path / "peft")


Q = "model.layers.0.self_attn.q_proj"
A, B = torch.ones(32, 4), torch.ones(4, 64)
UNFIT = {
    "layers.\\*.self_attn.q_proj.lora_b: .* of shape \\(4, 65\\)": {f"{Q}.lora_b": torch.ones(4, 65)},
    "embed_tokens.lora_a: ": {
        "model.embed_tokens.lora_a": torch.ones(32, 4),
        "model.embed_tokens.lora_b": torch.ones(4, 64),
    },
    "q_proj.m: ": {f"{Q}.m": torch.ones(64)},
    "norm.weight: ": {"model.norm.weight": torch.ones(64)},
    "layers.\\*.self_attn.q_proj.lora_a: .* of shape \\(64, 3\\)": {f"{Q}.lora_a": torch.ones(64, 3)},
}


@pytest.mark.parametrize("message", UNFIT)
def test_tensors_that_do_not_fit(message, tmp_path):
    save(tmp_path / "hf", "llama")
    tfl.save_mlx_adapters(adapted(tmp_path / "hf"), tmp_path / "adapters")
    file = tmp_path / "adapters" / "adapters.safetensors"
    save_file(load_file(file) | UNFIT[message], file)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match=f"no adapter of a linear layer of the model: .*{message}"):
        tfl.load_mlx_adapters(model, tmp_path / "adapters")
    assert not any("lora" in name for name, _ in model.named_modules())


def test_no_tensors(tmp_path):
    save(tmp_path / "hf", "llama")
    tfl.save_mlx_adapters(adapted(tmp_path / "hf"), tmp_path / "adapters")
    save_file({}, tmp_path / "adapters" / "adapters.safetensors")
    with pytest.raises(ValueError, match=r"no adapter of a linear layer of the model: .*no lora_a"):
        tfl.load_mlx_adapters(_plain(tmp_path), tmp_path / "adapters")


@pytest.mark.parametrize("kind", ["dora", "full"])
def test_other_fine_tuning(kind, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"fine_tune_type": kind}))
    with pytest.raises(ValueError, match=f"fine_tune_type: expected 'lora', got '{kind}'"):
        tfl.load_mlx_adapters(nn.Linear(2, 2), tmp_path)


CONFIGURATIONS = {
    "": "expected JSON: ",
    "[" * 100_000: "expected JSON: ",
    "[]": r"expected an object, got \[\]",
    '{"peft_type": "LORA", "r": 4}': "lora_parameters: expected an object, as mlx-lm writes it, got None",
    '{"lora_parameters": [2.0]}': r"lora_parameters: expected an object, .*got \[2\.0\]",
}
_OPTION = '{"lora_parameters": {"scale": %s, "dropout": %s}}'
CONFIGURATIONS |= {
    _OPTION % (value, 0): "scale: expected a finite number, got "
    for value in ("null", '"2"', "true", "[2]", "NaN", "-Infinity", "1e300", "1" + "0" * 400)
}
CONFIGURATIONS |= {
    _OPTION % (2, value): r"dropout: expected a probability in \[0, 1\), got "
    for value in ("null", '"0"', "false", "NaN", "-0.1", "1.0")
}


@pytest.mark.parametrize("text", CONFIGURATIONS, ids=lambda text: text[-20:])
def test_configurations_of_another_kind(text, tmp_path):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {CONFIGURATIONS[text]}"):
        tfl.load_mlx_adapters(nn.Linear(2, 2), tmp_path)


def test_a_model_that_is_none_of_transformers_stays_as_it_was(tmp_path):
    save(tmp_path / "hf", "llama")
    tfl.save_mlx_adapters(adapted(tmp_path / "hf"), tmp_path / "adapters")
    model = nn.ModuleDict({"model": _plain(tmp_path).model})  # whose modules have the names that the file has
    with pytest.raises(TypeError, match=r"model: expected a Transformers causal language model, .*got ModuleDict"):
        tfl.load_mlx_adapters(model, tmp_path / "adapters")
    assert not any("lora" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_file_that_is_no_configuration_is_not_replaced(text, tmp_path):
    save(tmp_path / "hf", "llama")
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config\.json: expected "):
        tfl.save_mlx_adapters(adapted(tmp_path / "hf"), tmp_path)
    assert not (tmp_path / "adapters.safetensors").exists()
