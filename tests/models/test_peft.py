"""patch_peft: same numbers as stock PEFT, through everything that a PEFT model can do."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners import lora
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import torch_fused_lora as tfl
from torch_fused_lora import peft as tfl_peft


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.first = nn.Linear(8, 12, dtype=dtype)
        self.middle = Conv1D(10, 12).to(dtype)
        self.last = nn.Linear(10, 6, bias=False, dtype=dtype)

    def forward(self, x):
        return self.last(self.middle(self.first(x).tanh()).tanh())


TARGETS = ["first", "middle", "last"]


def config(**options):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "init_lora_weights": False} | options)


def build(dtype=torch.float32, autocast_adapter_dtype=True, **options):
    return get_peft_model(Net(dtype), config(**options), autocast_adapter_dtype=autocast_adapter_dtype)


def add_adapter(model, name, **options):
    """As PEFT does from 0.19 on: before, a later adapter kept the base's dtype, and several dtypes are not fused."""
    model.add_adapter(name, config(**options))
    model.base_model._cast_adapter_dtype(name, autocast_adapter_dtype=True)


def inputs(dtype=torch.float32, rows=5):
    return torch.randn(3, rows, 8).to(dtype)


@pytest.fixture
def fused_calls(monkeypatch):
    """Counts the layer calls that go through the operators."""
    calls = []

    def counting(operator):
        def counted(*arguments):
            calls.append(arguments)
            return operator(*arguments)

        return counted

    for name in ("lora_linear_stacked", "lora_delta_stacked"):
        monkeypatch.setattr(tfl_peft, name, counting(getattr(tfl_peft, name)))
    return calls


def step(model, x):
    """Output, and the gradients of x and of every trainable parameter, by name."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.float().sin().sum().backward()
    return {"y": y.detach(), "x": x.grad} | {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def assert_same_step(model, x, fused_calls, expected_calls=3):
    """The patched model equals the stock one; tolerance: the float32 sums of a three-layer net, or the roundings
    of its half activations."""
    tfl.unpatch_peft(model)
    fused_calls.clear()
    stock = step(model, x)
    assert not fused_calls
    tfl.patch_peft(model)
    patched = step(model, x)
    assert len(fused_calls) == expected_calls
    assert stock.keys() == patched.keys()
    tolerance = 1e-5 if x.dtype == torch.float32 else 8 * torch.finfo(x.dtype).eps
    for name, expected in stock.items():
        scale = max(float(expected.abs().max()), 1e-6)
        torch.testing.assert_close(
            patched[name], expected, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "lora_bias": {"lora_bias": True, "target_modules": ["first", "middle"]},
    "patterns": {"rank_pattern": {"first": 2}, "alpha_pattern": {"last": 32}},
    "inactive dropout": {"lora_dropout": 0.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_as_stock(options, dtype, fused_calls):
    model = build(dtype, **options).eval()
    assert_same_step(model, inputs(dtype), fused_calls, len(options.get("target_modules", TARGETS)))


def test_half_adapters(fused_calls):
    assert_same_step(build(torch.bfloat16, autocast_adapter_dtype=False), inputs(torch.bfloat16), fused_calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_active_adapters(dtype, fused_calls):
    model = build(dtype)
    add_adapter(model, "second", r=2, lora_alpha=1, lora_bias=True, target_modules=["first", "middle"])
    add_adapter(model, "third", r=3)
    model.base_model.set_adapter(["default", "second", "third"])
    assert_same_step(model, inputs(dtype), fused_calls)
    model.base_model.set_adapter(["third", "second"])
    assert_same_step(model, inputs(dtype), fused_calls)


def test_frozen_parts_and_a_trainable_base(fused_calls):
    model = build()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("first.base_layer" in name or "middle.lora_A" in name or "last.lora_B" in name)
    assert_same_step(model, inputs(), fused_calls)


def test_scaling_changed_live_as_number_and_as_tensor(fused_calls):
    model = build()
    layer = model.base_model.model.first
    for scaling in (0.5, 3, torch.tensor(0.25), nn.Parameter(torch.tensor(0.75))):
        layer.scaling["default"] = scaling
        assert_same_step(model, inputs(), fused_calls)


@pytest.mark.parametrize("shape", [(1,), (12,)])
def test_a_scaling_of_several_elements(shape, fused_calls):
    model = build(target_modules=["first"])
    model.base_model.model.first.scaling["default"] = nn.Parameter(torch.rand(shape))
    assert_same_step(model, inputs(), fused_calls, expected_calls=0)


def test_a_scaling_that_is_trained(fused_calls):
    """As a module's parameter, it is none of the fields of the layer itself."""
    model, x = build(target_modules=["first"]), inputs()
    layer = model.base_model.model.first
    del layer.scaling
    layer.scaling = nn.ParameterDict({"default": torch.tensor(0.7)})
    y = model(x)
    expected = y.detach(), *torch.autograd.grad(y.sum(), list(layer.scaling.parameters()))
    assert tfl.patch_peft(model).patched
    y = model(x)
    assert len(fused_calls) == 1
    found = y.detach(), *torch.autograd.grad(y.sum(), list(layer.scaling.parameters()))
    torch.testing.assert_close(found, expected)


def test_tensor_scaling_gets_its_gradient():
    model, x = build(), inputs()
    scaling = nn.Parameter(torch.tensor(0.75))
    model.base_model.model.first.scaling["default"] = scaling
    (stock,) = torch.autograd.grad(model(x).sum(), scaling)
    tfl.patch_peft(model)
    (patched,) = torch.autograd.grad(model(x).sum(), scaling)
    torch.testing.assert_close(patched, stock)


def test_compiled_hotswap_pads_the_rank(fused_calls):
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    model = build()
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert isinstance(model.base_model.model.first.scaling["default"], torch.Tensor)
    assert_same_step(model, inputs(), fused_calls)


@pytest.mark.parametrize("adapters", [["default"], ["default", "second"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout(adapters, dtype, fused_calls):
    """Masks are our own: zeros at PEFT's rate, reproducible, and unbiased around the layer without dropout."""
    model = build(dtype, lora_dropout=0.5)
    add_adapter(model, "second", r=2, lora_dropout=0.25)
    model.base_model.set_adapter(adapters)
    tfl.patch_peft(model)
    layer, x = model.base_model.model.first, inputs(dtype)[0]
    layer.train()
    fused_calls.clear()
    torch.manual_seed(5)
    samples = torch.stack([layer(x) for _ in range(400)]).double()
    assert len(fused_calls) == 400
    torch.manual_seed(5)
    assert torch.equal(layer(x).double(), samples[0])
    assert not torch.equal(samples[0], samples[1])
    exact = layer.eval()(x).double()
    assert ((samples.mean(0) - exact).abs() < 5 * samples.std(0) / 20 + 0.01 * exact.abs().max()).all()


def test_dropout_with_checkpointing():
    model, x = build(lora_dropout=0.5), inputs()
    tfl.patch_peft(model)
    model.train()
    torch.manual_seed(7)
    model(x).sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.manual_seed(7)
    checkpoint(model, x, use_reentrant=False).sum().backward()
    for name, grad in expected.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, fused_calls):
    model, x = build(), inputs()
    with torch.autocast("cpu", dtype):
        stock = model(x)
        tfl.patch_peft(model)
        patched = model(x)
    assert len(fused_calls) == 3
    assert patched.dtype == stock.dtype == dtype
    torch.testing.assert_close(patched, stock, rtol=0, atol=16 * torch.finfo(dtype).eps * float(stock.abs().max()))


def test_autocast_casts_no_float64(fused_calls):
    model, x = build(target_modules=["first"]), inputs()
    layer = model.base_model.model.first
    layer.lora_A.double(), layer.lora_B.double()
    with torch.autocast("cpu", torch.bfloat16):
        stock = model(x)
        tfl.patch_peft(model)
        assert torch.equal(model(x), stock)
    assert not fused_calls


class Far(nn.Linear):
    def forward(self, x):
        return torch.full((*x.shape[:-1], self.out_features), 1e6, dtype=torch.bfloat16)


def test_a_base_of_another_half_dtype_than_autocasts(fused_calls):
    layer, x = build(target_modules=["first"]).base_model.model.first, inputs()
    layer.base_layer.__class__ = Far
    with torch.autocast("cpu", torch.float16):
        stock = layer(x)
        tfl.patch_peft(layer)
        assert torch.equal(layer(x), stock)
    assert not fused_calls


class OfWords(nn.Linear):
    def forward(self, x):
        return super().forward(x.float())


def test_words_under_autocast(fused_calls):
    layer, x = build(target_modules=["first"]).base_model.model.first, torch.randint(5, (3, 8))
    layer.base_layer.__class__ = OfWords
    with torch.autocast("cpu", torch.bfloat16):
        stock = layer(x)
        tfl.patch_peft(layer)
        assert torch.equal(layer(x), stock)
    assert not fused_calls


def test_lifecycle(tmp_path, fused_calls):
    """Merge, unmerge, disable, add, switch, delete, save, load, deepcopy, pickle, unload: as on a stock model."""
    model, x = build().eval(), inputs()
    stock = copy.deepcopy(model)
    tfl.patch_peft(model)

    def same():
        torch.testing.assert_close(model(x), stock(x), rtol=1e-5, atol=1e-5)

    for target in (model, stock):
        torch.manual_seed(1)
        target.add_adapter("late", config(r=2))
    same()
    for act in (
        lambda m: m.set_adapter("late"),
        lambda m: m.merge_adapter(),
        lambda m: m.unmerge_adapter(),
        lambda m: m.base_model.disable_adapter_layers(),
        lambda m: m.base_model.enable_adapter_layers(),
        lambda m: m.set_adapter("default"),
        lambda m: m.delete_adapter("late"),
    ):
        act(model), act(stock)
        same()
    with model.disable_adapter(), stock.disable_adapter():
        same()
    fused_calls.clear()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), model(x))
    assert len(fused_calls) == 3 * 3  # the copy is patched, what was pickled is not: test_pickle.py

    assert list(model.state_dict()) == list(stock.state_dict())
    model.save_pretrained(tmp_path)
    base = Net()
    base.load_state_dict(
        {k.replace(".base_layer", ""): v for k, v in stock.get_base_model().state_dict().items() if "lora" not in k}
    )
    reloaded = PeftModel.from_pretrained(base, tmp_path)
    assert type(reloaded.base_model.model.first) is lora.Linear
    torch.testing.assert_close(reloaded(x), model(x), rtol=1e-5, atol=1e-5)
    expected = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-5, atol=1e-5)


def test_mixed_batches_run_pefts_own_forward(fused_calls):
    model = build().eval()
    torch.manual_seed(2)
    model.add_adapter("second", config(r=2))
    x, names = inputs(), ["default", "__base__", "second"]
    expected = model(x, adapter_names=names)
    tfl.patch_peft(model)
    assert torch.equal(model(x, adapter_names=names), expected)
    assert not fused_calls


def decline_dora():
    return build(use_dora=True, target_modules=["first", "last"]), "DoraLinearVariant, not plain LoRA"


def decline_adapter_hook():
    model = build(target_modules=["first"])
    model.base_model.model.first.lora_A["default"].register_forward_pre_hook(lambda *_: None)
    return model, "adapter 'default' has hooks"


def decline_dropout_hook():
    model = build(target_modules=["first"], lora_dropout=0.1)
    model.base_model.model.first.lora_dropout["default"].register_forward_hook(lambda *_: None)
    return model, "hook"


def decline_other_layers():
    return get_peft_model(nn.Sequential(nn.Embedding(5, 4)), config(target_modules=["0"])), "Embedding"


@pytest.mark.parametrize(
    "case",
    [
        decline_dora,
        decline_adapter_hook,
        decline_dropout_hook,
        decline_other_layers,
    ],
)
def test_declined_with_a_reason_and_left_alone(case, fused_calls):
    model, reason = case()
    classes = {name: type(module) for name, module in model.named_modules()}
    report = tfl.patch_peft(model)
    assert not report.patched
    assert report.declined
    assert all(reason in declined for declined in report.declined.values()), report.declined
    assert {name: type(module) for name, module in model.named_modules()} == classes
    model(torch.randint(0, 4, (2, 3)) if case is decline_other_layers else inputs())
    assert not fused_calls


def add_hook(model):
    model.base_model.model.first.lora_B["default"].register_forward_hook(lambda *_: None)


def add_variant(model):
    model.add_adapter("dora", config(use_dora=True, target_modules=["first"]))
    model.base_model.set_adapter(["default", "dora"])


def add_other_dropout(model):
    model.base_model.model.first.lora_dropout["default"] = nn.Dropout1d(0.5)


def add_bias(model):
    lora_A = model.base_model.model.first.lora_A["default"]
    lora_A.bias = nn.Parameter(torch.ones(lora_A.out_features))


@pytest.mark.parametrize("change", [add_hook, add_variant, add_other_dropout, add_bias])
def test_what_is_unsupported_after_the_patch_runs_pefts_own_forward(change, fused_calls):
    model, x = build(target_modules=["first"]).eval(), inputs()
    tfl.patch_peft(model)
    change(model)
    model.eval()
    fused_calls.clear()
    patched = model(x)
    assert not fused_calls
    tfl.unpatch_peft(model)
    assert torch.equal(patched, model(x))


def test_input_dtype_casting_can_be_disabled(fused_calls):
    """Which changes nothing where there is nothing to cast, and else is PEFT's to refuse."""
    model, x = build().eval(), inputs()
    expected = model(x)
    report = tfl.patch_peft(model)
    with disable_input_dtype_casting(model):
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        assert len(fused_calls) == 3
        layer = model.base_model.model.first.to(torch.bfloat16)
        layer.lora_A.float(), layer.lora_B.float()
        with pytest.raises(RuntimeError, match="dtype"):
            layer(inputs().bfloat16())
    assert "PEFT does not cast" in report.calls()["base_model.model.first"].reason


def test_forward_hooks_of_the_layer_itself_still_run(fused_calls):
    model = build(target_modules=["first"])
    tfl.patch_peft(model)
    seen = []
    model.base_model.model.first.register_forward_hook(lambda _, args, out: seen.append(out.shape))
    model(inputs())
    assert seen == [(3, 5, 12)]
    assert len(fused_calls) == 1


def test_parameters_replaced_by_plain_views(fused_calls):
    """What FSDP1 does for the time of a forward: the weights are attributes, not parameters."""
    model, x = build(target_modules=["first"]), inputs()
    tfl.patch_peft(model)
    expected = model(x)
    layer = model.base_model.model.first
    for module in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
        for name in [name for name, p in module._parameters.items() if p is not None]:
            tensor = module._parameters.pop(name)
            setattr(module, name, tensor.view_as(tensor))
    fused_calls.clear()
    assert torch.equal(model(x), expected)
    assert len(fused_calls) == 1


def test_global_module_hooks_see_every_module(fused_calls):
    model, seen = build(target_modules=["first"]), []
    tfl.patch_peft(model)
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        model(inputs())
    finally:
        handle.remove()
    assert not fused_calls
    assert seen.count(nn.Linear) == 4  # base, lora_A, lora_B and the untargeted layer


def test_patch_is_idempotent_and_unpatch_exact():
    model = build()
    before = {name: (type(m), dict(vars(m))) for name, m in model.named_modules()}
    first = tfl.patch_peft(model)
    assert first.patched == [f"base_model.model.{name}" for name in TARGETS]
    assert not first.declined
    assert tfl.patch_peft(model) == first
    assert isinstance(model.base_model.model.first, lora.Linear)
    assert repr(model.base_model.model.first).startswith("lora.Linear(")
    tfl.unpatch_peft(model)
    tfl.unpatch_peft(model)
    after = {name: (type(m), dict(vars(m))) for name, m in model.named_modules()}
    assert before.keys() == after.keys()
    assert all(before[n][0] is after[n][0] and before[n][1].keys() == after[n][1].keys() for n in before)


def test_the_report_is_a_readable_table():
    net = nn.Module()
    net.layers = nn.ModuleList(Net() for _ in range(3))
    net.embed = nn.Embedding(5, 4)
    model = get_peft_model(net, config(target_modules=["first", "last", "embed"]))
    text = str(tfl.patch_peft(model))
    assert "6 LoRA layers use torch_fused_lora, 1 stay" in text
    assert "   3 x base_model.model.layers.*.first  fused" in text
    assert "Embedding" in text


def test_models_without_lora():
    report = tfl.patch_peft(nn.Linear(2, 2))
    assert report.patched == []
    assert report.declined == {}
    assert "no LoRA layers" in str(report)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        tfl.patch_peft("model")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_without_a_graph_break(backend):
    model, x = build(lora_dropout=0.1).eval(), inputs()
    tfl.patch_peft(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    model.train()
    compiled(x).sum().backward()
    assert model.base_model.model.first.lora_A["default"].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_compiles_to_the_kernels_of_stock(dtype, dropout):
    """What inductor makes of a training step and of inference launches what it launches of stock's."""

    def launched(model):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True)
        x = inputs().to(dtype).requires_grad_()
        _, training = run_and_get_code(lambda: compiled(x).float().pow(2).mean().backward())
        _, inference = run_and_get_code(torch.no_grad()(lambda: compiled(x)))
        return [
            sorted(re.findall(r" (extern_kernels\.\w+|cpp_fused_\w+?)(?:_\d+)?\(", code))
            for code in training + inference
        ]

    model = build(lora_dropout=dropout).to(dtype)
    stock = launched(model)
    assert len(stock) == 3  # forward, backward, inference
    assert all("extern_kernels.addmm" in kernels or "extern_kernels.mm" in kernels for kernels in stock)
    tfl.patch_peft(model)
    assert launched(model) == stock


def test_importing_the_package_imports_neither_peft_nor_transformers():
    code = (
        "import sys, torch_fused_lora as tfl; tfl.lora_linear, tfl.LoRALinear; "
        "assert not {'peft', 'transformers', 'matplotlib', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_peft_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['peft'] = None; import torch_fused_lora as tfl\n"
        "try: tfl.patch_peft\n"
        "except ImportError as e: assert 'torch-fused-lora[peft]' in str(e), e\n"
        "else: raise SystemExit(1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shape", [(3, 7), (7,), ()])
def test_an_input_that_does_not_fit_is_named(shape, grad):
    """The layer does not look at shapes, since torch's own calls do; what they refuse is said as everywhere."""
    model = get_peft_model(nn.Sequential(nn.Linear(8, 5)), LoraConfig(r=2, target_modules=["0"]))
    assert tfl.patch_peft(model).patched
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"lora_linear: x: expected shape \(\.\.\., 8\)"):
        model(torch.randn(shape))
