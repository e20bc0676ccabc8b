"""The chunked output layer beside log_softmax and autograd."""

import pytest
import torch
from torch import nn

from align.trainers.linear_logps import linear_logps

ROWS, WIDTH, VOCABULARY = 7, 5, 11
HEADS = torch.tensor([0, 0, 1, 3, 3, 3, 4, 6])  # rows 2 and 5 are asked nothing, row 3 the same token twice
TOKENS = torch.tensor([2, 10, 0, 4, 4, 5, 7, 1])
CHUNKS = {"one row": 1, "two rows": 2 * VOCABULARY, "three rows": 4 * VOCABULARY - 1, "one chunk": 2**20}
every_chunk = pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS)


def inputs(dtype=torch.float64, bias=True):
    generator = torch.Generator().manual_seed(0)
    shapes = ((ROWS, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))
    hidden, weight, offset = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    made = [hidden.to(dtype), weight.to(dtype), offset.to(dtype) if bias else None]
    return [None if part is None else part.requires_grad_() for part in made]


def plain(hidden, weight, bias):
    return nn.functional.linear(hidden, weight, bias).log_softmax(-1)[HEADS, TOKENS]


def gradients(values, parts):
    weights = torch.arange(1, len(values) + 1, dtype=values.dtype) / len(values) - 0.4
    return torch.autograd.grad((values * weights).sum(), [part for part in parts if part is not None])


@every_chunk
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients(chunk, bias):
    parts = inputs(bias=bias)
    found, expected = linear_logps(*parts, HEADS, TOKENS, chunk_elements=chunk), plain(*parts)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients(found, parts), gradients(expected, parts), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@every_chunk
def test_gradcheck(chunk):
    parts = inputs()
    assert torch.autograd.gradcheck(lambda *p: linear_logps(*p, HEADS, TOKENS, chunk_elements=chunk), parts)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2), (0, 2)])
@every_chunk
def test_frozen_parts_get_no_gradient(chunk, frozen):
    parts = inputs()
    for number in frozen:
        parts[number].requires_grad_(False)
    learning = [part for part in parts if part.requires_grad]
    found = gradients(linear_logps(*parts, HEADS, TOKENS, chunk_elements=chunk), learning)
    for ours, theirs in zip(found, gradients(plain(*parts), learning), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    linear_logps(*parts, HEADS, TOKENS, chunk_elements=chunk).sum().backward()
    assert all(parts[number].grad is None for number in frozen)


@every_chunk
def test_tied_weight_gets_both_gradients(chunk):
    _, weight, _ = inputs()
    ids = torch.tensor([1, 0, 10, 3, 3, 2, 9])
    mix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = linear_logps(weight[ids] @ mix, weight, None, HEADS, TOKENS, chunk_elements=chunk)
    expected = plain(weight[ids] @ mix, weight, None)
    torch.testing.assert_close(gradients(found, [weight]), gradients(expected, [weight]), rtol=1e-12, atol=1e-12)


@every_chunk
def test_large_logits_do_not_overflow(chunk):
    hidden = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]], requires_grad=True)
    heads, tokens = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0])
    found = linear_logps(hidden, weight, None, heads, tokens, chunk_elements=chunk)
    assert found.tolist() == [0.0, -1000.0, -2000.0]
    found.sum().backward()
    # d/dh (w_token - w_likeliest): 0, -1, and 1 + 1 of the second row.
    assert hidden.grad.tolist() == [[-1.0], [2.0]]


@every_chunk
def test_bfloat16_inputs_are_right_within_rounding(chunk):
    parts = inputs(torch.bfloat16)
    wide = [part.detach().float().requires_grad_() for part in parts]
    found, expected = linear_logps(*parts, HEADS, TOKENS, chunk_elements=chunk), plain(*wide)
    assert found.dtype == torch.float32
    # Logits up to 6 in bfloat16, 8 bits: off by 2^-6 at most, and so is their logsumexp.
    torch.testing.assert_close(found, expected, rtol=0, atol=2**-5)
    for ours, theirs in zip(gradients(found, parts), gradients(expected, wide), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), theirs, rtol=2**-5, atol=2**-5)


@every_chunk
def test_autocast_is_bfloat16_forward_and_backward(chunk):
    """Logits computed once more for the gradient must be those that the normalisers belong to."""
    parts = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_logps(*parts, HEADS, TOKENS, chunk_elements=chunk)
    narrow = [part.detach().to(torch.bfloat16).requires_grad_() for part in parts]
    expected = linear_logps(*narrow, HEADS, TOKENS, chunk_elements=chunk)
    assert torch.equal(found, expected)
    for ours, theirs in zip(gradients(found, parts), gradients(expected, narrow), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs.float(), rtol=2**-7, atol=2**-9)


@every_chunk
def test_a_second_backward_pass_gives_the_same_gradients(chunk):
    parts = inputs()
    found = linear_logps(*parts, HEADS, TOKENS, chunk_elements=chunk)
    first = torch.autograd.grad(found.sum(), parts, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), parts), first, rtol=1e-14, atol=1e-14)


@every_chunk
def test_no_gradient_no_graph(chunk):
    with torch.no_grad():
        found = linear_logps(*inputs(), HEADS, TOKENS, chunk_elements=chunk)
    assert not found.requires_grad
    torch.testing.assert_close(found, plain(*inputs()).detach(), rtol=1e-12, atol=1e-12)
