import torch

from rewards.two_towers import normalize_pixels, pad_token_ids, unit


def test_unit_vectors_are_float32():
    vectors = unit(torch.tensor([[3.0, 4.0], [0.0, 2.0]], dtype=torch.bfloat16))
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors, torch.tensor([[0.6, 0.8], [0.0, 1.0]]))


def test_pixels_are_normalised_by_channel():
    pixels = torch.tensor([0.48145466, 0.4578275 + 0.26130258, 0.40821073 - 0.27577711]).view(3, 1, 1)
    torch.testing.assert_close(normalize_pixels(pixels).flatten(), torch.tensor([0.0, 1.0, -1.0]))


def test_pieces_are_padded_on_the_right():
    ids = pad_token_ids([(5,), (6, 7, 8), ()], start=1, end=2, pad=0, device=torch.device("cpu"))
    assert ids.tolist() == [[1, 5, 2, 0, 0], [1, 6, 7, 8, 2], [1, 2, 0, 0, 0]]
