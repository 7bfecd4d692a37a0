"""Adapters as mlx-lm's files and back: mlx-lm itself, on its CPU back end, computes what the PEFT model does."""

from __future__ import annotations

import json

import numpy
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import torch_fused_lora as tfl
from tests.models.test_quantized import SIZES, batch, language_model, with_lora

mx = pytest.importorskip("mlx.core", reason="mlx[cpu] is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")


def in_mlx(model):
    """The same model in mlx-lm, without adapters."""
    from mlx_lm.models import llama

    mx.set_default_device(mx.cpu)
    config = {name: SIZES[name] for name in SIZES} | {"model_type": "llama", "rms_norm_eps": model.config.rms_norm_eps}
    config |= {"rope_theta": 10_000.0, "attention_bias": True, "tie_word_embeddings": False}
    theirs = llama.Model(llama.ModelArgs.from_dict(config))
    theirs.load_weights([(name, mx.array(value.numpy())) for name, value in model.state_dict().items()])
    return theirs


def logits_of(theirs):
    return torch.from_numpy(numpy.array(theirs(mx.array(batch()["input_ids"].numpy()))))


def with_their_adapters(model, folder):
    from mlx_lm.tuner.utils import load_adapters

    return load_adapters(in_mlx(model), str(folder))


# float32 sums of no more than 192 terms, in two layers
close = {"rtol": 1e-4, "atol": 1e-4}

OPTIONS = {
    "all layers": {},
    "several modules": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "one block and the head": {"target_modules": ["model.layers.1.self_attn.v_proj", "lm_head"]},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"v_proj": 3}},
}


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("patched", [True, False])
def test_mlx_lm_loads_ours_and_we_load_them_back(case, patched, tmp_path):
    base = language_model()
    expected_base = logits_of(in_mlx(base))
    torch.testing.assert_close(base(**batch()).logits.detach(), expected_base, **close)
    model = with_lora(base, **OPTIONS[case])
    if patched:
        tfl.patch_peft(model)
    expected = model(**batch()).logits.detach()
    assert (expected - expected_base).abs().max() > 0.05
    tfl.save_mlx_adapters(model, tmp_path / "adapters")
    torch.testing.assert_close(
        logits_of(with_their_adapters(language_model(), tmp_path / "adapters")), expected, **close
    )
    again = tfl.load_mlx_adapters(language_model(), tmp_path / "adapters")
    torch.testing.assert_close(again(**batch()).logits.detach(), expected)


def test_we_load_what_mlx_lm_made(tmp_path):
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    theirs, parameters = in_mlx(language_model()), {"rank": 3, "scale": 5.0, "dropout": 0.0}
    theirs.freeze()
    linear_to_lora_layers(theirs, 1, parameters | {"keys": {"self_attn.q_proj", "mlp.up_proj"}})
    for name, value in tree_flatten(theirs.trainable_parameters()):
        theirs.load_weights([(name, mx.random.normal(value.shape) * 0.1)], strict=False)
    made = dict(tree_flatten(theirs.trainable_parameters()))
    assert len(made) == 4
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), made)
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters, "learning_rate": 1e-5}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = tfl.load_mlx_adapters(language_model(), tmp_path)
    tfl.patch_peft(model)
    torch.testing.assert_close(model(**batch()).logits.detach(), logits_of(theirs), **close)
    assert sorted(name for name, _ in model.named_parameters() if "lora_A" in name) == [
        f"base_model.model.model.layers.1.{name}.lora_A.default.weight" for name in ("mlp.up_proj", "self_attn.q_proj")
    ]
    model = tfl.load_mlx_adapters(with_lora(language_model()), tmp_path, "theirs")
    model.set_adapter("theirs")
    torch.testing.assert_close(model(**batch()).logits.detach(), logits_of(theirs), **close)


def test_over_a_quantised_base(tmp_path):
    """mlx-lm quantises to the same bits, and its adapters do not depend on them."""
    import mlx.nn

    model = language_model()
    tfl.quantize_(model, 4, 64)
    model = with_lora(model)
    tfl.save_mlx_adapters(model, tmp_path)
    theirs = in_mlx(language_model())
    mlx.nn.quantize(theirs, 64, 4, class_predicate=lambda path, _: "layers" in path and path.endswith("proj"))
    from mlx_lm.tuner.utils import load_adapters

    theirs = load_adapters(theirs, str(tmp_path))
    torch.testing.assert_close(logits_of(theirs), model(**batch()).logits.detach(), **close)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"use_dora": True}, "q_proj: .* a DoraLinearVariant"),
        ({"lora_bias": True}, "lora_bias: mlx-lm's adapters have no place for it"),
        ({"bias": "lora_only"}, "bias='lora_only': mlx-lm's adapters have no biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: mlx-lm's adapters have no place for it"),
        ({"target_modules": ["embed_tokens"]}, r"model\.embed_tokens: .* a Embedding"),
    ],
)
def test_what_their_files_cannot_express(options, expected, tmp_path):
    model = get_peft_model(language_model(), LoraConfig(**{"target_modules": ["q_proj"]} | options))
    with pytest.raises(ValueError, match=expected):
        tfl.save_mlx_adapters(model, tmp_path / "adapters")
    assert not (tmp_path / "adapters").exists()
    with pytest.raises(ValueError, match=r"adapter_name: expected one of \['default'\], got 'other'"):
        tfl.save_mlx_adapters(model, tmp_path, "other")


def rewritten(folder, change):
    """Good files, but for what is changed in them."""
    tfl.save_mlx_adapters(with_lora(language_model(), target_modules=["v_proj"]), folder)
    config, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapters.safetensors"),
    )
    change(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapters.safetensors")


V = "model.layers.0.self_attn.v_proj"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda config, _: config.update(fine_tune_type="dora"), "fine_tune_type: expected 'lora', got 'dora'"),
        (lambda _, tensors: tensors.update({f"{V}.m": torch.ones(3)}), rf"{V}\.m: expected tensors called lora_a"),
        (lambda _, tensors: tensors.pop(f"{V}.lora_b"), rf"{V}\.lora_b: expected shape \(4, 64\), got nothing"),
        (
            lambda _, tensors: tensors.update({f"{V}.lora_a": torch.ones(64, 4)}),
            rf"{V}\.lora_a: expected shape \(128, 4\), got shape \(64, 4\)",
        ),
        (
            lambda _, tensors: tensors.update({"model.embed_tokens.lora_a": torch.ones(96, 4)}),
            r"model\.embed_tokens: expected an nn\.Linear of the model, got a Embedding",
        ),
        (
            lambda _, tensors: tensors.update({"model.layers.9.v_proj.lora_a": torch.ones(1, 4)}),
            r"model\.layers\.9\.v_proj: expected an nn\.Linear of the model, got no such module",
        ),
    ],
)
def test_files_that_do_not_fit(change, expected, tmp_path):
    rewritten(tmp_path, change)
    model = language_model()
    with pytest.raises(ValueError, match=expected):
        tfl.load_mlx_adapters(model, tmp_path)
    assert not any(hasattr(module, "base_layer") for module in model.modules())
    assert all(type(module) is not nn.Linear or module.weight.requires_grad for module in model.modules())
