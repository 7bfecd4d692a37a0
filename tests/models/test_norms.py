"""patch_norms: which modules, the same numbers, and nothing else changed."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import weakref

import pytest
import torch
import transformers
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

import torch_fused_lora as tfl
from tests.reference import UNIT
from torch_fused_lora import norms

H = 64
KINDS = {
    "Llama": lambda: LlamaRMSNorm(H),
    "Qwen3": lambda: Qwen3RMSNorm(H),
    "GPT-OSS": lambda: GptOssRMSNorm(H),
    "OLMo 2": lambda: Olmo2RMSNorm(H),
    "Gemma": lambda: GemmaRMSNorm(H),
    "torch": lambda: nn.RMSNorm(H, eps=1e-6),
    "torch, eps None": lambda: nn.RMSNorm(H),
}


@pytest.fixture
def calls(monkeypatch):
    """The weights that rms_norm was called with."""
    seen = []
    monkeypatch.setattr(
        norms, "rms_norm_for", lambda *operands: seen.append(operands[1]) or tfl.rms_norm(*operands[:3])
    )
    return seen


def norm(kind, device, dtype=torch.float32):
    module = KINDS[kind]()
    nn.init.normal_(module.weight)
    return module.to(device, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_norm_computes_what_it_did(device, calls, kind, dtype):
    """Two results that are each within a float32 sum of H squares and three roundings at most."""
    stock = norm(kind, device, dtype)
    fused = copy.deepcopy(stock)
    assert tfl.patch_norms(fused).patched == [""]
    x, grad = (torch.randn(5, 3, H).to(device, dtype) for _ in range(2))
    results = []
    for module in (stock, fused):
        inputs = x.clone().requires_grad_()
        y = module(inputs)
        results.append((y.detach(), *torch.autograd.grad(y, (inputs, module.weight), grad)))
    assert len(calls) == 1
    unit = 2 * H * UNIT[torch.float32] + (0 if dtype == torch.float32 else 6 * UNIT[dtype])
    w = stock.weight.detach().float().abs() + 1
    normed = stock(x).detach().float().abs().amax() + 4
    scale = (normed, w.max() * 8 * normed, 15 * normed * 4)  # of y, of dx, of sums of 15 products
    for (before, after), magnitude in zip(zip(*results, strict=True), scale, strict=True):
        assert before.dtype == after.dtype
        assert (before.float() - after.float()).abs().max() <= unit * magnitude


@pytest.mark.parametrize("kind", ["Llama", "GPT-OSS", "Gemma", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_results_keep_their_dtype(device, calls, kind, dtype):
    """A float32 weight over another x: Llama's form promotes, and is left to its own code; so is float64."""
    if device.type == "mps" and dtype == torch.float64:
        pytest.skip("mps has no float64")
    stock = norm(kind, device)
    x = torch.randn(3, H).to(device, dtype)
    expected = stock(x)
    tfl.patch_norms(stock)
    actual = stock(x)
    assert actual.dtype == expected.dtype
    assert bool(calls) == (dtype == torch.bfloat16 and kind != "Llama")
    if not calls:
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("kind", ["Llama", "Gemma", "torch"])
def test_under_autocast_too(device, calls, kind):
    module = norm(kind, device, torch.bfloat16)
    x = torch.randn(3, H).to(device, torch.bfloat16)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        expected = module(x)
        tfl.patch_norms(module)
        actual = module(x)
    assert calls
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual.float(), expected.float(), rtol=3 * UNIT[torch.bfloat16], atol=0)


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 50,
}


@pytest.mark.parametrize(("family", "count"), [("Llama", 5), ("Qwen3", 9), ("Gemma", 5)])
def test_a_model_computes_what_it_did(device, family, count):
    """Against the same model in float64, patched is as near as stock is, within a factor of two."""
    model = getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**SIZES))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, std=0.5)
    ids = torch.randint(50, (2, 7))

    def run(model, device):
        hidden = model(ids.to(device)).last_hidden_state
        grads = torch.autograd.grad(hidden.sin().sum(), list(model.parameters()))
        return [t.detach().cpu().double() for t in (hidden, *grads)]

    exact = run(copy.deepcopy(model).double(), "cpu")  # norms of float64 compute in float32, where they say so
    model.to(device)
    stock = run(model, device)
    report = tfl.patch_norms(model)
    assert (len(report.patched), report.declined) == (count, {})
    patched = run(model, device)
    for truth, before, after in zip(exact, stock, patched, strict=True):
        unit = 16 * UNIT[torch.float32] * truth.abs().max()
        assert (after - truth).abs().max() <= 2 * (before - truth).abs().max() + unit
    tfl.unpatch_norms(model)
    assert all(torch.equal(a, b) for a, b in zip(run(model, device), stock, strict=True))


class Strange(LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states) + 1


StrangeRMSNorm = type("StrangeRMSNorm", (Strange,), {"forward": Strange.forward})


def test_the_report():
    model = nn.ModuleDict(
        {
            "known": nn.ModuleList(LlamaRMSNorm(8) for _ in range(3)),
            "other_name": T5LayerNorm(8),
            "strange": StrangeRMSNorm(8),
            "two": nn.RMSNorm((2, 8)),
            "weightless": nn.RMSNorm(8, elementwise_affine=False),
            "replaced": LlamaRMSNorm(8),
            "linear": nn.Linear(8, 8),
        }
    )
    model["replaced"].forward = lambda x: x
    report = tfl.patch_norms(model)
    assert set(report.declined) == {"strange", "two", "weightless", "replaced"}
    assert "StrangeRMSNorm is written in a way that is not known" in report.declined["strange"]
    assert report.declined["replaced"] == "its forward is replaced"
    assert "3 x known.*" in str(report)
    assert "stay with their own code" in str(report)
    again = tfl.patch_norms(model)
    assert (again.patched, again.declined) == (report.patched, report.declined)


def test_torchs_own_is_left_alone_where_it_is_one_kernel(monkeypatch):
    module = nn.ModuleList([nn.RMSNorm(8), LlamaRMSNorm(8)])
    monkeypatch.setattr(norms, "FUSED_BY_TORCH", {"cpu"})
    report = tfl.patch_norms(module)
    assert report.patched == ["1"]
    assert report.declined == {"0": "torch's own is one kernel each way on cpu already"}
    assert type(module[0]) is nn.RMSNorm


def test_nothing_else_changes(tmp_path):
    module = LlamaRMSNorm(8)
    before = (repr(module), module.state_dict().keys(), type(module).__name__, type(module).__module__)
    x = torch.randn(2, 8)
    tfl.patch_norms(module)
    assert (repr(module), module.state_dict().keys(), type(module).__name__, type(module).__module__) == before
    assert isinstance(module, LlamaRMSNorm)
    expected = module(x)
    twin = copy.deepcopy(module)
    assert type(twin) is type(module)
    assert torch.equal(twin(x), expected)
    seen = []
    module.register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(module(hidden_states=x), LlamaRMSNorm(8)(x))
    assert seen == [1]
    tfl.unpatch_norms(module)
    assert type(module) is LlamaRMSNorm


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_a_graph_break(device, kind):
    """To the operator on mps, elsewhere to the module's own calls, which a compiler fuses with their neighbours."""
    torch.compiler.reset()
    module = norm(kind, device)
    tfl.patch_norms(module)
    x = torch.randn(3, H, device=device)
    expected = module(x)
    targets = []

    def backend(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(module, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), expected)
    assert any("torch_fused_lora" in target for target in targets) == (device.type == "mps")


def test_what_is_done_to_a_patched_module_stays():
    """A wrapped forward, as accelerate's hooks are, and a parametrization, before a second patch and the undo."""
    x = torch.randn(2, 8)
    wrapped, parametrized = LlamaRMSNorm(8), LlamaRMSNorm(8)
    model = nn.ModuleDict({"wrapped": wrapped, "parametrized": parametrized})
    tfl.patch_norms(model)
    wrapped.forward = lambda x, inner=wrapped.forward: 2 * inner(x)
    nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Tanh())
    expected = wrapped(x), parametrized(x)
    assert set(tfl.patch_norms(model).patched) == {"wrapped", "parametrized"}
    assert torch.equal(wrapped(x), expected[0])
    assert torch.equal(parametrized(x), expected[1])
    with pytest.raises(RuntimeError, match="class of parametrized was changed again after patch_norms"):
        tfl.unpatch_norms(model)
    nn.utils.parametrize.remove_parametrizations(parametrized, "weight")
    tfl.unpatch_norms(model)
    assert type(wrapped) is type(parametrized) is LlamaRMSNorm
    torch.testing.assert_close(wrapped(x), expected[0])


def test_a_weight_that_is_no_plain_parameter_is_declined():
    module = LlamaRMSNorm(8)
    nn.utils.parametrize.register_parametrization(module, "weight", nn.Tanh())
    report = tfl.patch_norms(module)
    assert report.patched == []
    assert "its weight is no plain parameter" in report.declined[""]


def test_other_dtypes_take_the_module_s_own_way(calls):
    module = GemmaRMSNorm(8)
    x = torch.arange(8).expand(2, 8)
    expected = module(x)
    tfl.patch_norms(module)
    assert torch.equal(module(x), expected)
    assert calls == []


def test_a_transformers_without_one_of_the_forms(monkeypatch):
    norms._class.cache_clear()
    monkeypatch.setitem(sys.modules, "transformers.models.gpt_oss.modeling_gpt_oss", None)
    assert tfl.patch_norms(GemmaRMSNorm(8)).patched == [""]
    norms._class.cache_clear()


def test_a_pickle_loads_where_transformers_is_not_imported(monkeypatch):
    module = LlamaRMSNorm(8)
    tfl.patch_norms(module)
    data = pickle.dumps(module)
    monkeypatch.delitem(sys.modules, "transformers")
    x = torch.randn(2, 8)
    assert torch.equal(pickle.loads(data)(x), module(x))


def test_classes_go_when_nobody_uses_them():
    module = type("OwnRMSNorm", (LlamaRMSNorm,), {})(8)
    tfl.patch_norms(module)
    gone = weakref.ref(type(module)), weakref.ref(type(module)._original)
    del module
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_not_a_module():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got dict"):
        tfl.patch_norms({})
