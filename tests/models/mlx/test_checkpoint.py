"""`load_mlx`: what `mlx_lm.convert` writes, to mlx-lm's logits; what does not fit is refused by name."""

from __future__ import annotations

import itertools
import json
import shutil

import mlx.core as mx
import pytest
import torch
from mlx_lm.utils import load_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.profiler import ProfilerActivity, profile

import torch_fused_lora as tfl
from tests.models.mlx.checkpoints import FAMILIES, IDS, Within, convert, in_double, our_logits, tensor, their_logits


@pytest.mark.parametrize("quantize", [False, True], ids=["float32", "4 bits"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_mlx_lm_s(family, quantize, tmp_path):
    folder = convert(tmp_path, family, quantize=quantize)
    exact = Within(in_double(tmp_path / "hf"))
    assert exact.bound.max() < 2e-3 * exact.logits.abs().max()  # less than what any fault of loading does
    assert their_logits(load_model(folder)[0]) == exact
    assert our_logits(tfl.load_mlx(folder)) == exact


def _mixed(path, module):
    if "layers.0" in path and "mlp" in path:
        return {"bits": 8, "group_size": 32}
    return "o_proj" not in path and "lm_head" not in path


@pytest.mark.parametrize(
    "options",
    [{"q_bits": 8}, {"q_group_size": 32}, {"q_group_size": 128}, {"quant_predicate": _mixed}],
    ids=["8 bits", "groups of 32", "groups of 128", "mixed"],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_words_and_what_they_stand_for(dtype, options, tmp_path):
    folder = convert(tmp_path, sizes={"hidden_size": 128}, quantize=True, dtype=dtype, **options)
    theirs, model = dict(load_model(folder)[0].named_modules()), tfl.load_mlx(folder)
    kinds = set()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            their = theirs[name]
            kinds.add((type(module).__name__, getattr(module, "bits", None), getattr(module, "group_size", None)))
            if not hasattr(their, "scales"):
                assert type(module) in (nn.Linear, nn.Embedding)
                continue
            scales, biases = (
                their.scales.astype(mx.float32),
                their.biases.astype(mx.float32),
            )  # it rounds to their dtype
            found = mx.dequantize(their.weight, scales, biases, their.group_size, their.bits)
            assert torch.equal(module.weight.view(torch.int32), tensor(their.weight).view(torch.int32))
            assert torch.equal(module.dequantize(torch.float32), tensor(found))
    if "quant_predicate" in options:
        expected = {("QuantEmbedding", 4, 64), ("QuantLinear", 4, 64), ("QuantLinear", 8, 32), ("Linear", None, None)}
        assert kinds == expected
    floats = {t.dtype for t in model.state_dict().values()} - {torch.uint32}
    assert floats == {getattr(torch, dtype)}
    assert model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 12)


def test_a_tied_head_shares_the_embedding_s_words(tmp_path):
    model = tfl.load_mlx(convert(tmp_path, "gemma3_text", quantize=True))
    head, embedding = model.lm_head, model.model.embed_tokens
    assert type(head) is tfl.QuantLinear
    assert all(getattr(head, name) is getattr(embedding, name) for name in ("weight", "scales", "biases"))
    model.tie_weights()
    assert head.weight is embedding.weight


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_what_is_saved_again_is_read_by_both(family, tmp_path):
    convert(tmp_path, family, quantize=True)
    model = tfl.load_mlx(tmp_path / "mlx")
    model.save_pretrained(tmp_path / "again")
    exact = Within(in_double(tmp_path / "hf"))
    assert their_logits(load_model(tmp_path / "again")[0]) == exact
    assert torch.equal(our_logits(tfl.load_mlx(tmp_path / "again")), our_logits(model))


def test_adapters_are_trained_over_it(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tfl.load_mlx(convert(tmp_path, quantize=True)), LoraConfig(target_modules="all-linear"))
    assert len(tfl.patch_peft(model).patched) == 14
    losses = []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        losses.append(model(IDS, labels=IDS).loss)
        losses[-1].backward()
        optimizer.step(), optimizer.zero_grad()
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="dequantize_"):
        model.merge_and_unload()


def test_onto_a_device(mps, tmp_path):
    folder = convert(tmp_path, "gemma3_text", quantize=True)
    host, device = tfl.load_mlx(folder), tfl.load_mlx(folder, device=mps)
    for name, found in device.state_dict().items():
        assert found.device.type == "mps"
        assert torch.equal(*(t.cpu().view(torch.uint8) for t in (found, host.state_dict()[name])))
    assert device.lm_head.scales is device.model.embed_tokens.scales
    assert all(buffer.device.type == "mps" for buffer in device.buffers())


# -------------------------------------------------------------------------------------------------------------- shards


def _shard(folder, names=("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")):
    """Split a checkpoint in two; a layer's words are in one shard, its scales in the other."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = [dict(itertools.islice(sorted(tensors.items()), i, None, 2)) for i in range(2)]
    for part, name in zip(parts, names, strict=True):
        save_file(part, folder / name)
    placed = {key: name for part, name in zip(parts, names, strict=True) for key in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))


@pytest.mark.parametrize("index", [True, False])
def test_shards(index, tmp_path):
    folder = convert(tmp_path, quantize=True)
    whole = our_logits(tfl.load_mlx(folder))
    _shard(folder)
    if not index:
        (folder / "model.safetensors.index.json").unlink()
    assert torch.equal(our_logits(tfl.load_mlx(folder)), whole)


@pytest.mark.parametrize("name", ["../{}.safetensors", "{}.bin", "sub/{}.safetensors", "/{}.safetensors"])
def test_shards_do_not_leave_the_folder(name, tmp_path):
    folder = convert(tmp_path, quantize=True)
    index = {"weight_map": {"model.norm.weight": name.format("model")}}
    shutil.copy(folder / "model.safetensors", folder.parent)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"expected names of safetensors files in its folder, got '.*model\."):
        tfl.load_mlx(folder)


# ------------------------------------------------------------------------------------------------------------ refusals


def _change(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj"
WRONG_TENSORS = {
    f"{NORM}: missing": lambda t: t.pop(NORM),
    f"{DOWN}.biases: missing": lambda t: t.pop(f"{DOWN}.biases"),
    f"{DOWN}.scales: left over": lambda t: t.update({f"{DOWN}.scales": t[f"{DOWN}.scales"].byte()}),
    "model.extra.weight: left over": lambda t: t.update({"model.extra.weight": torch.ones(1)}),
    "model.norm.scales: left over": lambda t: t.update({"model.norm.scales": torch.ones(1, 1)}),
    f"{NORM}: expected \\(64,\\) of float16 or bfloat16 or float32, got \\(65,\\) of torch.float32": lambda t: t.update(
        {NORM: torch.ones(65)}
    ),
    f"{NORM}: expected .*, got \\(64,\\) of F64": lambda t: t.update({NORM: torch.ones(64).double()}),
    f"{DOWN}: bits: expected 4 or 8 .*, got 2": lambda t: t.update(
        {f"{DOWN}.weight": t[f"{DOWN}.weight"][:, ::2].clone()}
    ),
    f"{DOWN}: group_size: expected 32, 64 or 128, got 42": lambda t: t.update({f"{DOWN}.scales": torch.ones(64, 3)}),
    f"{DOWN}.weight: expected \\(64, 16\\) of uint32, got \\(63, 16\\)": lambda t: t.update(
        {f"{DOWN}.weight": t[f"{DOWN}.weight"][1:].clone()}
    ),
}


@pytest.mark.parametrize("message", WRONG_TENSORS)
def test_tensors_that_do_not_fit(message, tmp_path):
    folder = convert(tmp_path, quantize=True)
    _change(folder, WRONG_TENSORS[message])
    with pytest.raises(ValueError, match=message):
        tfl.load_mlx(folder)


def test_a_tensor_in_two_shards(tmp_path):
    folder = convert(tmp_path)
    _shard(folder)
    save_file({NORM: torch.ones(64)}, folder / "model-00003-of-00003.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=f"{NORM}: in two shards"):
        tfl.load_mlx(folder)


WRONG_CONFIGS = {
    "model_type: expected one of gemma2, .*, got 'gpt2'": {"model_type": "gpt2"},
    "quantization: mode: expected 'affine', got 'mxfp4'": {"quantization": {"mode": "mxfp4", "bits": 4}},
    "lm_head: mode: expected 'affine', got 'nvfp4'": {"quantization": {"bits": 4, "lm_head": {"mode": "nvfp4"}}},
    "model.layers.7.mlp.up_proj.weight: missing": {"num_hidden_layers": 8},
}


@pytest.mark.parametrize("message", WRONG_CONFIGS)
def test_configurations_that_do_not_fit(message, tmp_path):
    folder = convert(tmp_path, quantize=True)
    config = json.loads((folder / "config.json").read_text()) | WRONG_CONFIGS[message]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        tfl.load_mlx(folder)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        tfl.load_mlx(tmp_path)
    folder = convert(tmp_path)
    (folder / "model.safetensors").rename(folder / "model.bin")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="no model"):
        tfl.load_mlx(folder)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (4, "expected a safetensors file"),
        (100, "expected a safetensors file"),
        (-1, "expected a safetensors file: .*not fully covered"),
    ],
)
def test_a_file_that_is_cut_off(keep, message, tmp_path):
    folder = convert(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"model\.safetensors: {message}"):
        tfl.load_mlx(folder)


ENTRY = b'{"a": {"dtype": "F32", "shape": [%s], "data_offsets": [%s]}}'
HEADERS = [b"{}[", b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32"}}', ENTRY % (b"1", b"0")]
HEADERS += [ENTRY % (shape, b"0, 4") for shape in (b"1.0", b"true", b'"1"', b"null", b"[1]")]
HEADERS += [b"[" * 100_000, b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}']
HEADERS += [ENTRY % (b"1", offsets) for offsets in (b"0, 4.0", b"false, 4", b'"0", "4"')]


@pytest.mark.parametrize("text", HEADERS)
def test_a_header_of_another_kind(text, tmp_path):
    folder = convert(tmp_path)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ValueError, match=r"model\.safetensors: expected a safetensors file: "):
        tfl.load_mlx(folder)


def test_tensors_that_overlap(tmp_path):
    folder = convert(tmp_path)
    entries = {name: {"dtype": "F32", "shape": [2], "data_offsets": [at, at + 8]} for name, at in (("a", 0), ("b", 4))}
    text = json.dumps(entries).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(12))
    with pytest.raises(ValueError, match=r"model\.safetensors: expected a safetensors file: .*offset"):
        tfl.load_mlx(folder)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_no_object(name, text, tmp_path):
    folder = convert(tmp_path)
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}: expected (JSON|an object)"):
        tfl.load_mlx(folder)


@pytest.mark.parametrize("places", [[], "model.safetensors", None])
def test_an_index_without_places(places, tmp_path):
    folder = convert(tmp_path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ValueError, match=r"index\.json: weight_map: expected an object"):
        tfl.load_mlx(folder)


@pytest.mark.parametrize("entry", [{"data_offsets": [-4, 0]}, {"shape": [-1, -1]}, {"shape": [1 << 40]}])
def test_sizes_are_checked_before_anything_is_allocated(entry, tmp_path):
    folder = convert(tmp_path)
    text = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | entry}).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(ValueError, match=r"model\.safetensors: expected a safetensors file: "):
        tfl.load_mlx(folder)


# -------------------------------------------------------------------------------------------------------------- memory


def _peak(run) -> int:
    """The most that torch's allocator has held at once for a call, and what that still holds at its end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    events = profiler.profiler.kineto_results.events()
    sizes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = list(itertools.accumulate(size for _, size in sorted(sizes)))
    del kept
    return max(held)


@pytest.mark.parametrize("quantize", [False, True])
def test_memory_is_the_checkpoint_and_one_tensor(quantize, tmp_path):
    sizes = {"hidden_size": 512, "vocab_size": 2048, "intermediate_size": 1024}
    folder = convert(tmp_path, "gemma2", sizes, quantize=quantize, dtype="bfloat16")
    _shard(folder)
    tensors = [t for file in folder.glob("*.safetensors") for t in load_file(file).values()]
    total, largest = sum(t.nbytes for t in tensors), max(t.nbytes for t in tensors)
    small = 1 << 16  # norms before they are loaded, rotary frequencies
    peak = _peak(lambda: tfl.load_mlx(folder))
    assert total < peak <= total + largest + small


def test_nothing_is_allocated_for_what_is_refused(tmp_path):
    folder = convert(tmp_path, quantize=True)
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 1 << 40}
    (folder / "config.json").write_text(json.dumps(config))

    def load():
        with pytest.raises(ValueError, match="embed_tokens"):
            tfl.load_mlx(folder)

    assert _peak(load) < 1 << 16


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
def test_a_checkpoint_names_no_code(name, tmp_path):
    """Transformers would fetch this kernel from the hub, and run it."""
    folder = convert(tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {name: "kernels-community/flash-attn3"}
    (folder / "config.json").write_text(json.dumps(config))
    assert tfl.load_mlx(folder).config._attn_implementation == "sdpa"


def test_scales_and_biases_of_two_dtypes(tmp_path):
    folder = convert(tmp_path, quantize=True)
    _change(folder, lambda t: t.update({f"{DOWN}.biases": t[f"{DOWN}.biases"].half()}))
    with pytest.raises(ValueError, match=rf"{DOWN}\.biases: expected .* of float32, got .* of torch\.float16"):
        tfl.load_mlx(folder)


def test_nothing_of_a_hidden_size_is_allocated_for_what_is_refused(tmp_path):
    folder = convert(tmp_path, quantize=True)
    config = json.loads((folder / "config.json").read_text()) | {"hidden_size": 1 << 22}
    (folder / "config.json").write_text(json.dumps(config))

    def load():
        with pytest.raises(ValueError, match="embed_tokens"):
            tfl.load_mlx(folder)

    assert _peak(load) < 1 << 16
