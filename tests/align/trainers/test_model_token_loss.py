"""The loss by hand, and in blocks, and beside autograd."""

import math

import pytest
import torch
import torch.nn.functional as F

from align.trainers.model_token_loss import PLAIN, LogitTransform, loss_and_gradient, rank_examples

TRANSFORMS = {
    "plain": PLAIN,
    "scale": LogitTransform(0.25),
    "cap": LogitTransform(1.0, 3.0),
    "both": LogitTransform(2, 5),
}
every_transform = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)


@pytest.fixture
def task():
    """Seven examples of five models; 11 words."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(5, 6), draw(7, 6), torch.tensor([0, 4, 2, 2, 1, 3, 0]), draw(11, 6)


def test_equation_3_by_hand():
    # Words have e^1 + e^1 = 2e in all; the models' logits are 2 and 0: -log(e^2 / (e^2 + 1 + 2e)) and -log(1 / ...).
    rows, hidden = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[1.0, 5.0], [1.0, 5.0]])
    lse = torch.full((2,), 1 + math.log(2))
    total = math.e**2 + 1 + 2 * math.e
    loss, gradient = loss_and_gradient(rows, hidden, torch.tensor([0, 1]), lse)
    assert loss.item() == pytest.approx(((math.log(total) - 2) + math.log(total)) / 2)
    p = torch.tensor([math.e**2 / total, 1 / total])
    expected = torch.stack([(2 * p[0] - 1) * hidden[0] / 2, (2 * p[1] - 1) * hidden[0] / 2])
    torch.testing.assert_close(gradient, expected)


@every_transform
@pytest.mark.parametrize("block_rows", [1, 2, 3, 5, 100])
def test_blocks_are_exact(task, transform, block_rows):
    """Beside cross-entropy over the concatenated vocabulary, and autograd."""
    rows, hidden, labels, words = task
    word_logits = transform(hidden @ words.T)
    leaf = rows.clone().requires_grad_()
    expected = F.cross_entropy(torch.cat([word_logits, transform(hidden @ leaf.T)], 1), labels + len(words))
    expected.backward()
    lse = word_logits.logsumexp(1)
    loss, gradient = loss_and_gradient(rows, hidden, labels, lse, transform=transform, block_rows=block_rows)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, leaf.grad, rtol=0, atol=1e-14)


@pytest.mark.parametrize("block_rows", [2, 100])
def test_pieces_add_up(task, block_rows):
    rows, hidden, labels, words = task
    lse = (hidden @ words.T).logsumexp(1)
    whole = loss_and_gradient(rows, hidden, labels, lse)
    gradient, loss = torch.zeros_like(rows), 0.0
    for piece in torch.arange(7).split(3):
        part, same = loss_and_gradient(
            rows, hidden[piece], labels[piece], lse[piece], count=7, gradient=gradient, block_rows=block_rows
        )
        assert same is gradient
        loss += part.item()
    assert loss == pytest.approx(whole[0].item())
    torch.testing.assert_close(gradient, whole[1])


def test_label_of_a_frozen_row(task):
    rows, hidden, _, words = task
    lse = (hidden @ words.T).logsumexp(1)
    leaf = rows.clone().requires_grad_()
    expected = (torch.logaddexp(lse, (hidden @ leaf.T).logsumexp(1)) - lse).mean()
    expected.backward()
    loss, gradient = loss_and_gradient(rows, hidden, torch.full((7,), -1), lse, block_rows=2)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, leaf.grad)


@every_transform
@pytest.mark.parametrize("block_rows", [1, 2, 100])
def test_ranks(task, transform, block_rows):
    rows, hidden, labels, words = task
    lse = transform(hidden @ words.T).logsumexp(1)
    found = rank_examples(rows, hidden, labels, lse, transform=transform, block_rows=block_rows)
    logits = transform(hidden @ rows.T)
    order = logits.argsort(dim=1, descending=True, stable=True)
    assert found.rank.tolist() == [row.index(label) for row, label in zip(order.tolist(), labels.tolist(), strict=True)]
    torch.testing.assert_close(found.best_logit, logits.amax(1))
    probabilities = torch.cat([lse[:, None], logits], 1).softmax(1)
    torch.testing.assert_close(found.log_models.exp(), probabilities[:, 1:].sum(1))
    torch.testing.assert_close(found.loss, -probabilities[torch.arange(7), labels + 1].log())


@pytest.mark.parametrize("block_rows", [1, 100])
def test_equal_logits_are_no_hit(block_rows):
    """Rows of zeros must not look as if every model were found: of equal ones the first counts."""
    hidden, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 3])
    found = rank_examples(torch.zeros(4, 3), hidden, labels, torch.zeros(4), block_rows=block_rows)
    assert found.rank.tolist() == [0, 1, 2, 3]


def test_large_logits_stay_finite():
    rows, hidden = torch.tensor([[1e4], [-1e4]]), torch.ones(1, 1)
    loss, gradient = loss_and_gradient(rows, hidden, torch.tensor([1]), torch.zeros(1))
    assert loss.item() == 2e4
    torch.testing.assert_close(gradient, torch.tensor([[1.0], [-1.0]]))
