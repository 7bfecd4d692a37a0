"""Exports and traces hold torch's own calls and run without this package; counters and checkpoint policies see ours."""

from __future__ import annotations

import copy
import io
import logging
import subprocess
import sys

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import torch_fused_lora as tfl

K, N, R = 8, 6, 4
HALF_BASE = torch.bfloat16


class Call(nn.Module):
    """A function of x and of parameters as a module."""

    def __init__(self, function, *parameters):
        super().__init__()
        self.function, self.parameters_ = function, nn.ParameterList(parameters)

    def forward(self, x):
        # By index: the dynamo of torch 2.11 cannot unpack a ParameterList.
        return self.function(x, *[self.parameters_[i] for i in range(len(self.parameters_))])


def peft_layer(dtype=torch.float32, adapters=1, norms=False, **options):
    layers = [LlamaRMSNorm(K)] * norms + [nn.Linear(K, N, dtype=dtype)]
    config = LoraConfig(r=R, target_modules=[str(len(layers) - 1)], init_lora_weights=False, **options)
    model = get_peft_model(nn.Sequential(*layers), config)
    for i in range(1, adapters):
        model.add_adapter(f"adapter{i}", copy.copy(config))
    model.base_model.set_adapter(["default", *(f"adapter{i}" for i in range(1, adapters))])
    tfl.patch_peft(model), tfl.patch_norms(model)
    return model.get_base_model()


def lora_layer(dtype=torch.float32, **options):
    layer = tfl.LoRALinear.from_linear(nn.Linear(K, N, dtype=dtype), r=R, **options)
    nn.init.normal_(layer.lora_B)
    return layer


def lora_call(dtype=torch.float32, **options):
    A, B, W, b = torch.randn(R, K), torch.randn(N, R), torch.randn(N, K).to(dtype), torch.randn(N).to(dtype)
    return Call(lambda x, A, B, W, b: tfl.lora_linear(x, W, b, A, B, 0.5, **options), A, B, W, b)


def delta_call(dtype=torch.float32, wider=False, **options):
    """Over a base of this dtype; ``wider``: that gives float32."""

    def call(x, W, A, B):
        y = nn.functional.linear(x, W)
        return tfl.lora_delta(y.float() if wider else y, x, A, B, 0.5, **options)

    return Call(call, torch.randn(N, K).to(dtype), torch.randn(R, K), torch.randn(N, R))


MODELS = {
    "peft": peft_layer,
    "peft, half base": lambda: peft_layer(HALF_BASE),
    "peft, two adapters": lambda: peft_layer(adapters=2),
    "peft, bias and norm": lambda: peft_layer(norms=True, lora_bias=True),
    "LoRALinear": lora_layer,
    "LoRALinear, half base": lambda: lora_layer(HALF_BASE),
    "lora_linear": lora_call,
    "lora_delta": delta_call,
    "lora_delta, half base": lambda: delta_call(HALF_BASE),
    "lora_delta, float32 over a half base": lambda: delta_call(HALF_BASE, wider=True),
    "rms_norm": lambda: Call(tfl.rms_norm, torch.randn(K)),
    "rms_norm without weight": lambda: Call(tfl.rms_norm),
    "softmax": lambda: Call(tfl.softmax),
}
WITH_DROPOUT = {
    "peft": lambda: peft_layer(lora_dropout=0.5),
    "peft, two adapters": lambda: peft_layer(adapters=2, lora_dropout=0.5),
    "LoRALinear": lambda: lora_layer(lora_dropout=0.5),
    "lora_linear": lambda: lora_call(dropout_p=0.5, training=True),
    "lora_delta": lambda: delta_call(dropout_p=0.5, training=True),
}
models = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
grad_modes = pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])


def inputs(build, *lead):
    return torch.randn(*lead, K).to(HALF_BASE if "half base" in next(n for n in MODELS if MODELS[n] is build) else None)


def assert_computes(actual, model, x):
    expected = model(x)
    tolerance = {"rtol": 2**-7, "atol": 2**-6} if x.dtype in (torch.bfloat16, torch.float16) else {}
    torch.testing.assert_close(actual, expected, **tolerance or {"rtol": 1e-5, "atol": 1e-5})


def targets(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def assert_torchs_own(program):
    assert not [target for target in targets(program) if "torch_fused_lora" in target]


# --------------------------------------------------------------------------------------------------- torch.jit


@models
@grad_modes
@pytest.mark.filterwarnings("error::torch.jit.TracerWarning:torch_fused_lora")
def test_a_jit_trace_holds_for_other_lengths_and_batches(build, grad):
    model = build().eval()
    file = io.BytesIO()
    with torch.set_grad_enabled(grad):
        torch.jit.save(torch.jit.trace(model, (inputs(build, 1, 5),)), file)
        file.seek(0)
        traced, x = torch.jit.load(file), inputs(build, 3, 9)
        assert_computes(traced(x), model, x)


@pytest.mark.parametrize("build", WITH_DROPOUT.values(), ids=WITH_DROPOUT)
@grad_modes
def test_a_jit_trace_draws_dropout_anew(build, grad):
    model, x = build().train(), torch.randn(64, K)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, (torch.randn(5, K),), check_trace=False)
        first, second = traced(x), traced(x)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    again = traced(x)
    torch.manual_seed(3)
    assert torch.equal(traced(x), again)


def test_a_jit_trace_of_a_patched_norm_is_its_own_code():
    """Bit for bit: Llama's rounds before the weight, too, which rms_norm does not."""
    norm, x = LlamaRMSNorm(K).to(HALF_BASE), torch.randn(64, K).to(HALF_BASE)
    nn.init.normal_(norm.weight)
    expected = norm(x)
    assert tfl.patch_norms(norm).patched
    assert not torch.equal(norm(x), expected)
    assert torch.equal(torch.jit.trace(norm, (x[:3],))(x), expected)


def test_a_jit_trace_trains():
    model, x = peft_layer(), torch.randn(5, K)
    traced = torch.jit.trace(model, (torch.randn(3, K),))
    parameters = [p for p in model.parameters() if p.requires_grad]
    found, expected = (torch.autograd.grad(m(x).sin().sum(), parameters) for m in (traced, model))
    torch.testing.assert_close(found, expected)


# ------------------------------------------------------------------------------------------------ torch.export


@models
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "nonstrict"])
def test_an_export_holds_torchs_own_calls(build, strict):
    model, rows = build().eval(), torch.export.Dim("rows")
    program = torch.export.export(model, (inputs(build, 4, 2),), dynamic_shapes=({0: rows},), strict=strict)
    assert_torchs_own(program)
    x = inputs(build, 9, 2)
    assert_computes(program.module()(x), model, x)
    assert_computes(program.run_decompositions().module()(x), model, x)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "nonstrict"])
@pytest.mark.parametrize("build", WITH_DROPOUT.values(), ids=WITH_DROPOUT)
def test_an_export_for_training(build, strict):
    model, x = build().train(), torch.randn(64, K)
    program = torch.export.export(model, (x,), strict=strict)
    assert_torchs_own(program)
    module = program.module()
    assert not torch.equal(module(x), module(x))
    module(x).sum().backward()
    assert {n for n, p in module.named_parameters() if p.grad is not None} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_a_saved_export_runs_without_this_package(tmp_path):
    model, x, path = peft_layer(norms=True).eval(), torch.randn(3, K), tmp_path / "program.pt2"
    torch.export.save(torch.export.export(model, (x,), strict=True), path)
    torch.save((x, model(x).detach()), tmp_path / "expected.pt")
    script = (
        "import sys, torch; sys.modules['torch_fused_lora'] = None; x, y = torch.load(sys.argv[2]);"
        "torch.testing.assert_close(torch.export.load(sys.argv[1]).module()(x), y)"
    )
    subprocess.run([sys.executable, "-c", script, path, tmp_path / "expected.pt"], check=True)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "nonstrict"])
@pytest.mark.parametrize(
    "name", ["peft", "peft, two adapters", "LoRALinear", "lora_linear", "lora_delta", "rms_norm", "softmax"]
)
def test_keep_operators(name, strict, tmp_path):
    build = MODELS[name]
    model, x = build().eval(), inputs(build, 4)
    with tfl.keep_operators(), pytest.raises(KeyError), tfl.keep_operators():
        raise KeyError
    with tfl.keep_operators():
        program = torch.export.export(model, (x,), strict=strict)
        assert [target for target in targets(program) if "torch_fused_lora" in target]
    torch.export.save(program, tmp_path / "kept.pt2")
    for kept in (program, program.run_decompositions(), torch.export.load(tmp_path / "kept.pt2")):
        assert_computes(kept.module()(x), model, x)
    assert_torchs_own(torch.export.export(model, (x,), strict=strict))


def test_aot_inductor(tmp_path):
    model, x = peft_layer(norms=True).eval(), torch.randn(3, K)
    with torch.no_grad():
        program = torch.export.export(model, (x,), strict=True)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        assert_computes(torch._inductor.aoti_load_package(path)(x), model, x)


# -------------------------------------------------------------------------------------------------------- ONNX

ONNX = [name for name in MODELS if "half base" not in name]  # onnx.reference has no bfloat16 arithmetic


@pytest.mark.parametrize("name", ONNX)
@grad_modes
@pytest.mark.filterwarnings("ignore")
def test_onnx_by_a_trace(name, grad):
    model, file, x = MODELS[name]().eval(), io.BytesIO(), torch.randn(9, K)
    with torch.set_grad_enabled(grad):
        torch.onnx.export(
            model, (torch.randn(5, K),), file, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "rows"}}
        )
    _assert_onnx_computes(onnx.load_from_string(file.getvalue()), model, x)


@pytest.mark.parametrize("name", ONNX)
@pytest.mark.filterwarnings("ignore")
def test_onnx_by_torch_export(name, caplog):
    caplog.set_level(logging.ERROR)
    model, x = MODELS[name]().eval(), torch.randn(9, K)
    found = torch.onnx.export(
        model, (torch.randn(5, K),), dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("rows")},)
    )
    _assert_onnx_computes(found.model_proto, model, x)


def _assert_onnx_computes(file, model, x):
    assert {node.domain for node in file.graph.node} == {""}
    (y,) = ReferenceEvaluator(file).run(None, {file.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------- who watches sees the operator


def test_make_fx_sees_the_operator():
    graph = make_fx(lora_call())(torch.randn(5, K)).graph
    assert torch.ops.torch_fused_lora.lora_linear_forward.default in {node.target for node in graph.nodes}


FLOPS = {
    "peft": (peft_layer, {}),
    "peft, two adapters": (peft_layer, {"adapters": 2}),
    "peft, half base": (peft_layer, {"dtype": HALF_BASE}),
    "LoRALinear": (lora_layer, {}),
    "LoRALinear, half base": (lora_layer, {"dtype": HALF_BASE}),
    "LoRALinear, dropout": (lora_layer, {"lora_dropout": 0.1}),
}


@pytest.mark.parametrize(("build", "options"), FLOPS.values(), ids=FLOPS)
@pytest.mark.parametrize("train_base", [False, True])
@pytest.mark.parametrize("x_needs_grad", [False, True])
def test_flops_are_those_of_stock_peft(build, options, train_base, x_needs_grad):
    """The counter hooks every module, so that a PEFT layer's forward is PEFT's own under it; its backward is not."""

    def flops(model):
        next(p for n, p in model.named_parameters() if n.endswith("weight")).requires_grad_(train_base)
        x = torch.randn(2, 5, K).to(options.get("dtype")).requires_grad_(x_needs_grad)
        forward, backward, both = (FlopCounterMode(display=False) for _ in range(3))
        with forward:
            model(x)
        y = model(x)  # unwatched: the counter of the backward alone sees it all the same
        with backward:
            y.sum().backward()
        with both:
            model(x).sum().backward()
        operators = {str(name) for name in backward.get_flop_counts()["Global"]}
        return operators, [counter.get_total_flops() for counter in (forward, backward, both)]

    stock = peft_layer(**options)
    tfl.unpatch_peft(stock)
    (_, expected), (operators, found) = flops(stock), flops(build(**options))
    assert found == expected
    assert operators == {"torch_fused_lora.lora_linear_backward"}


@pytest.mark.parametrize("grad", ["grad", "inference"])
def test_flops_of_the_public_operator(grad):
    x, W, A, B = torch.randn(5, K), torch.randn(N, K), torch.randn(R, K), torch.randn(N, R)
    with torch.inference_mode(grad == "inference"), FlopCounterMode(display=False) as counter:
        torch.ops.torch_fused_lora.lora_linear(x, W, None, A, B, torch.tensor(1.0))
    assert counter.get_total_flops() == 2 * 5 * (N * K + R * (K + N))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_selective_checkpointing_saves_the_operator(dropout):
    """As the docstring of lora_linear says; the forward is not computed again, and gradients are those without."""
    saved = [
        torch.ops.torch_fused_lora.lora_linear_forward.default,
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
    ]
    model, x = lora_layer(lora_dropout=dropout).train(), torch.randn(5, K, requires_grad=True)
    parameters = [x, *(p for p in model.parameters() if p.requires_grad)]

    def gradients(call):
        torch.manual_seed(3)
        for leaf in parameters:
            leaf.grad = None
        with FlopCounterMode(display=False) as counter:
            call(x).sin().sum().backward()
        return [leaf.grad for leaf in parameters], counter.get_total_flops()

    plain, flops = gradients(model)
    for policy, expected in ((saved, flops), ([], flops + 2 * 5 * (N * K + R * (K + N)))):
        found, counted = gradients(
            lambda x, policy=policy: checkpoint(
                model, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
            )
        )
        torch.testing.assert_close(found, plain)
        assert counted == expected
