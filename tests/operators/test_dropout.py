"""Dropout from a seed: the generator itself, the mask as a function of (seed, stream, index), and reproducibility."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import torch_fused_lora as tfl
from torch_fused_lora.ops.dropout import operator
from torch_fused_lora.ops.dropout.operator import draw_seed, gpu_mask, keep_mask, philox

CPU = torch.device("cpu")


def philox4x32_7(counter: list[int], key: list[int]) -> list[int]:
    """Philox as the paper writes it, a counter at a time in Python integers."""
    (c0, c1, c2, c3), (k0, k1), word = counter, key, 0xFFFFFFFF
    for _ in range(7):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & word, (p0 >> 32) ^ c3 ^ k1, p0 & word
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123's known answers
        ([0] * 4, [0] * 2, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "4dfccaba 190a87f0 c47362ba b6b5242a",
        ),
    ],
)
def test_reference_philox_is_philox(counter, key, words):
    assert philox4x32_7(counter, key) == [int(word, 16) for word in words.split()]


@pytest.mark.parametrize("first", [0, 5, 2**32 - 2, 2**40])
@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (2**63 - 1, 3), (0x123456789ABCDEF, 1)])
def test_philox(seed, stream, first):
    expected = []
    for i in range(first, first + 5):
        expected += philox4x32_7([i & 0xFFFFFFFF, i >> 32, stream, 0], [seed & 0xFFFFFFFF, seed >> 32])
    assert philox(seed, stream, first, first + 5).tolist() == expected


def test_the_mask_is_as_documented():
    """Element i: word i % 8 // 2 of counter i // 8, rotated by 16 bits where i is odd, against p * 2**32."""
    seed, stream, p, rows, columns = 0x123456789ABCDEF, 2, 0.3, 5, 7
    key, expected = [seed & 0xFFFFFFFF, seed >> 32], []
    for i in range(rows * columns):
        word = philox4x32_7([i // 8, 0, stream, 0], key)[i % 8 // 2]
        rotated = (word << 16 | word >> 16) & 0xFFFFFFFF if i % 2 else word
        expected.append(rotated >= round(p * 2**32))
    assert gpu_mask(seed, stream, 0, rows * columns, round(p * 2**32)).tolist() == expected


def test_the_mask_of_a_cpu_is_as_documented(monkeypatch):
    """Element i: half i % 16 of counter i // 16 of NumPy's Philox, the other half of its word below it; however many
    threads draw it."""
    seed, stream, p, rows, columns = 0x123456789ABCDEF, 2, 0.3, 50, 7
    words = np.random.Philox(key=np.array((seed, stream), np.uint64)).random_raw(4 * 22)
    halves = [int(word) >> shift & 0xFFFF for word in words for shift in (0, 16, 32, 48)]
    expected = [halves[i] << 16 | halves[i ^ 1] for i in range(rows * columns)]
    expected = [word >= round(p * 2**32) for word in expected]
    assert keep_mask(seed, stream, 0, rows, columns, p, CPU).flatten().tolist() == expected
    monkeypatch.setattr(operator, "_CHUNK", 32)
    assert keep_mask(seed, stream, 0, rows, columns, p, CPU).flatten().tolist() == expected
    # where the high half decides nothing, the low one does
    exact = sorted(halves[i] << 16 | halves[i ^ 1] for i in range(100))[40]
    mask = operator._cpu_mask(seed, stream, 0, 100, exact)
    assert mask.tolist() == [halves[i] << 16 | halves[i ^ 1] >= exact for i in range(100)]


def test_masks_are_drawn_after_a_fork():
    """The threads that draw them do not survive one."""
    keep_mask(1, 0, 0, 3, operator._CHUNK, 0.5, CPU)
    script = """
import os, torch
from torch_fused_lora.ops.dropout import keep_mask, operator
if torch.get_num_threads() == 1:
    torch.set_num_threads(2)
draw = lambda: keep_mask(1, 0, 0, 3, operator._CHUNK, 0.5, torch.device("cpu"))
whole = draw()
if os.fork() == 0:
    os._exit(0 if torch.equal(draw(), whole) else 1)
assert os.wait()[1] == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_elements_that_share_a_word_are_independent():
    mask = keep_mask(3, 0, 0, 1 << 10, 1 << 11, 0.3, CPU).view(-1, 2)
    both = (~mask[:, 0] & ~mask[:, 1]).double().mean()
    assert abs(both - 0.09) < 5 * (0.09 * 0.91 / len(mask)) ** 0.5


def test_blocks_of_the_mask_join():
    """Any rows of the mask can be drawn alone, wherever they begin within a counter or a block of counters."""
    rows, columns = 9000, 13
    whole = keep_mask(7, 1, 0, rows, columns, 0.4, CPU)
    for start, end in ((0, 1), (1, 2), (3, 10), (4999, 9000), (8191, 8200)):
        assert torch.equal(keep_mask(7, 1, start, end - start, columns, 0.4, CPU), whole[start:end])


@pytest.mark.parametrize("p", [1e-4, 0.05, 0.5, 0.9])
def test_keep_rate(p):
    """Binomial: within 5 standard deviations, overall and for every column; streams and seeds independent."""
    rows, columns = 20000, 50
    masks = [keep_mask(seed, stream, 0, rows, columns, p, CPU).double() for seed, stream in ((1, 0), (2, 0), (1, 1))]
    for mask in masks:
        assert abs(mask.mean() - (1 - p)) < 5 * (p * (1 - p) / mask.numel()) ** 0.5
        assert ((mask.mean(0) - (1 - p)).abs() < 5 * (p * (1 - p) / rows) ** 0.5 + 1 / rows).all()
    for a, b in ((0, 1), (0, 2), (1, 2)):
        both = ((1 - masks[a]) * (1 - masks[b])).mean()
        assert abs(both - p * p) < 5 * (p * p * (1 - p * p) / masks[a].numel()) ** 0.5


def test_extreme_probabilities_keep_their_meaning():
    assert keep_mask(0, 0, 0, 100, 100, 2.0**-40, CPU).all()
    assert keep_mask(0, 0, 0, 100, 100, 1 - 2.0**-40, CPU).sum() <= 1
    assert keep_mask(0, 0, 0, 0, 5, 0.5, CPU).shape == (0, 5)


def operands(device="cpu"):
    return [torch.randn(s).to(device).requires_grad_() for s in ((6, 5), (4, 5), (4,), (2, 5), (4, 2))]


def test_manual_seed_reproduces_and_advances(device):
    a = operands(device)
    torch.manual_seed(1)
    first, second = (tfl.lora_linear(*a, 1.0, 0.5, training=True) for _ in range(2))
    torch.manual_seed(1)
    again = tfl.lora_linear(*a, 1.0, 0.5, training=True)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_a_seed_is_the_same_as_a_number():
    """So that a call which something watches, and its recomputation that nothing does, drop alike. In any mode and
    thread."""
    x = torch.ones(2)
    torch.manual_seed(5)
    expected = [draw_seed(x).item() for _ in range(3)]
    torch.manual_seed(5)
    found = []
    thread = threading.Thread(target=lambda: found.append(draw_seed(x, True)))
    thread.start()
    thread.join()
    with torch.inference_mode():
        found.append(draw_seed(x, True))
    found.append(draw_seed(x, True))
    assert found == expected
    assert {type(seed) for seed in found} == {int}


def test_backward_finds_a_small_mask_of_forward_s(monkeypatch):
    draw = functools.partial(keep_mask, 11, 0, 3, 50, 20, 0.4, CPU)
    expected = draw().clone()
    with monkeypatch.context() as patch:
        patch.setattr(operator, "_philox64", None)
        draw().fill_(True)  # whose memory is its own
        draw(torch.uint8).fill_(1)
        for dtype in (torch.bool, torch.float32, torch.bfloat16):
            assert torch.equal(draw(dtype), expected.to(dtype))
    monkeypatch.setattr(operator, "_philox64", None)
    with pytest.raises(TypeError):
        keep_mask(11, 0, 3, 1 + operator._SMALL // 20, 20, 0.4, CPU)


def test_forward_and_backward_drop_what_the_seed_says(device):
    """Rows enough for several tiles: where x was dropped, y and dx say so."""
    x, W, A, B = torch.ones(70, 33), torch.zeros(33, 33), torch.eye(33), torch.eye(33)
    x, W, A, B = (t.to(device) for t in (x, W, A, B))
    torch.manual_seed(9)
    seed = int(draw_seed(x))
    torch.manual_seed(9)
    y = tfl.lora_linear(x.requires_grad_(), W, None, A, B, 1.0, 0.4, training=True)
    (grad,) = torch.autograd.grad(y.sum(), x)
    expected = keep_mask(seed, 0, 0, 70, 33, 0.4, device).cpu() / 0.6
    torch.testing.assert_close(y.detach().cpu(), expected)
    torch.testing.assert_close(grad.cpu(), expected)


def test_eval_and_zero_probability_draw_nothing(device):
    a = operands(device)
    state = torch.get_rng_state()
    plain = tfl.lora_linear(*a)
    assert torch.equal(tfl.lora_linear(*a, 1.0, 0.5, training=False), plain)
    assert torch.equal(tfl.lora_linear(*a, 1.0, 0.0, training=True), plain)
    assert torch.equal(torch.get_rng_state(), state)


def test_mean_over_seeds_is_the_layer_without_dropout():
    """Unbiased: the mean over many masks tends to the undropped output."""
    x, W, b, A, B = (t.detach() for t in operands())
    op = torch.ops.torch_fused_lora.lora_linear
    s, n = torch.tensor(1.0), 4000
    samples = torch.stack([op(x, W, b, A, B, s, 0.5, torch.tensor(seed)) for seed in range(n)]).double()
    exact = op(*(t.double() for t in (x, W, b, A, B, s)))
    assert ((samples.mean(0) - exact).abs() < 5 * samples.std(0) / n**0.5 + 1e-5).all()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_the_mask(device, use_reentrant, compiled):
    """The seed comes from the CPU generator, which checkpointing saves: gradients equal those without it."""
    if compiled and use_reentrant:
        pytest.skip("torch.compile does not trace reentrant checkpointing")
    x, *rest = operands(device)

    def layer(x):
        return tfl.lora_linear(x, *rest, 1.0, 0.5, training=True).sin()

    def stack(x):
        again = functools.partial(checkpoint, layer, use_reentrant=use_reentrant)
        return again(again(x) @ rest[0])

    def plain(x):
        return layer(layer(x) @ rest[0])

    run = torch.compile(stack, backend="aot_eager", fullgraph=True) if compiled else stack
    reference = torch.compile(plain, backend="aot_eager", fullgraph=True) if compiled else plain
    torch.manual_seed(3)
    expected = torch.autograd.grad(reference(x).sum(), (x, *rest))
    torch.manual_seed(3)
    actual = torch.autograd.grad(run(x).sum(), (x, *rest)) if not use_reentrant else _backward(run(x), (x, *rest))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def _backward(y: torch.Tensor, leaves: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    y.sum().backward()  # reentrant checkpointing refuses torch.autograd.grad
    return [leaf.grad for leaf in leaves]


def test_only_the_seed_is_saved(device):
    """For backward: x itself, the parameters, h (M x r) and 0-dim tensors; no mask, no dropped or converted copy."""
    x = torch.randn(64, 32).to(device, torch.bfloat16).requires_grad_()
    W, b = torch.randn(48, 32).to(device, torch.bfloat16), torch.randn(48).to(device, torch.bfloat16)
    A, B = (torch.randn(s).to(device).requires_grad_() for s in ((4, 32), (48, 4)))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = tfl.lora_linear(x, W, b, A, B, 2.0, 0.5, training=True)
    own = {t.data_ptr() for t in (x, W, b, A, B)}
    extra = [tuple(t.shape) for t in saved if t.data_ptr() not in own]
    assert sorted(extra) == [()] * (device.type == "mps") + [(64, 4)]  # scaling (for a Metal kernel), h
    y.sum().backward()


def test_a_frozen_adapter_input_side_saves_no_x(device):
    x, W, A, B = (torch.randn(s).to(device) for s in ((64, 32), (48, 32), (4, 32), (48, 4)))
    x.requires_grad_(), B.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        tfl.lora_linear(x, W, None, A, B)
    assert x.data_ptr() not in {t.data_ptr() for t in saved}


def test_philox_words_are_uniform_bits():
    bits = np.unpackbits(philox(3, 0, 0, 50000).view(np.uint8))
    assert abs(bits.mean() - 0.5) < 5 * 0.5 / len(bits) ** 0.5


def test_the_triton_kernel_draws_the_same_mask():
    """Bit for bit, executed by Triton's interpreter on the CPU (test_cuda.py does it on a GPU)."""
    pytest.importorskip("triton", reason="triton is not installed")
    script = """
import torch
from torch_fused_lora.ops.dropout import triton as kernels
from torch_fused_lora.ops.dropout.operator import gpu_mask
cpu = torch.device("cpu")
for shape in ((1, 1), (3, 5), (1000, 129), (0, 7)):
    for start, seed, stream, p in ((0, 5, 0, 0.3), (7, 2**63 - 1, 2, 0.05), (2**28, 1, 1, 0.9)):
        first, threshold = start * shape[1], round(p * 2**32)
        expected = gpu_mask(seed, stream, first, shape[0] * shape[1], threshold).view(shape)
        for dtype in (torch.bool, torch.float32, torch.float16):
            ours = kernels.mask(seed, stream, first, p, *shape, cpu, dtype)
            assert torch.equal(ours, expected.to(dtype)), (shape, start, dtype)
"""
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"TRITON_INTERPRET": "1"})


def test_the_package_imports_where_there_is_no_fork():
    """As on Windows."""
    script = "import os, concurrent.futures, torch; del os.register_at_fork; import torch_fused_lora"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
