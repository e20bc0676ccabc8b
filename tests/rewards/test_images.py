import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from rewards.images import MAX_PIXELS, ImageError, crop_to_square, describe_image, load_image, to_rgb, to_tensor


def encoded(image, kind="PNG", **options):
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb():
    """A PNG of 70 bytes that says it has 50,000 x 50,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_the_same_picture_from_a_path_bytes_and_an_array(tmp_path, make_picture):
    image = make_picture()
    path = tmp_path / "picture.png"
    image.save(path)
    pixels = np.array(image)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    arrays = (pixels, pixels / 255, (pixels / 255).astype(np.float32), tensor, tensor / 255, (tensor / 255).double())
    for source in (path, str(path), path.read_bytes(), image, *arrays):
        assert np.array_equal(np.array(load_image(source)), pixels), describe_image(source)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_a_mode_stays_as_it_is(make_picture, mode):
    image = make_picture(mode="RGBA").convert(mode) if mode == "LA" else make_picture().convert(mode)
    assert load_image(image).mode == mode


def test_exif_rotation_is_ignored_and_the_first_frame_is_taken(make_picture):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown rotated by 90 degrees
    assert load_image(encoded(make_picture(48, 40), "JPEG", exif=exif)).size == (48, 40)
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    animation = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert to_rgb(load_image(animation)).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"not an image at all", "no image that Pillow can read"),
        (b"", "no image that Pillow can read"),
        (encoded(Image.new("RGB", (64, 64)), "PNG")[:60], "can't be decoded"),
        (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:300], "Truncated File Read"),
        (bomb(), "larger than any picture"),
        ("missing.png", "Can't open the image missing.png: No such file"),
        (np.zeros((4, 4, 2), np.uint8), r"must be \(height, width\)"),
        (np.zeros((4, 4, 3), np.int64), "must be uint8, or floats"),
        (np.full((4, 4, 3), np.nan), "NaN"),
        (np.full((4, 4, 3), 255.0), r"must lie in \[0, 1\], but go from 255 to 255"),
        (np.zeros((0, 4, 3), np.uint8), "has no pixels"),
        (Image.new("I;16", (4, 4)), "deeper than 8 bits"),
        (Image.new("F", (4, 4)), "deeper than 8 bits"),
        (
            torch.zeros(2, 3, 4, 4),
            r"<Tensor torch.float32 \(2, 3, 4, 4\)>: a tensor must be \(channels, height, width\)",
        ),
        (torch.full((3, 4, 4), 2.0), "must lie in"),
        (None, "<NoneType> is no image"),
        (7, "<int> is no image"),
    ],
)
def test_what_is_no_picture_says_why(source, message):
    with pytest.raises(ImageError, match=message):
        load_image(source)


def test_a_folder_is_no_picture(tmp_path):
    with pytest.raises(ImageError, match="Can't open the image"):
        load_image(tmp_path)


def test_the_pixel_limit_holds_for_every_source(make_picture):
    with pytest.raises(ImageError, match="48x40 is more than 1,000 pixels"):
        load_image(make_picture(48, 40), max_pixels=1_000)
    with pytest.raises(ImageError, match="48x40 is more than 1,000 pixels"):
        load_image(encoded(make_picture(48, 40)), max_pixels=1_000)
    assert MAX_PIXELS > 7680 * 4320


@pytest.mark.parametrize(("width", "height"), [(640, 360), (512, 768), (333, 224), (224, 225), (31, 17), (1, 1)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_the_crop_is_torchvisions(make_picture, width, height, mode):
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    image = make_picture(width, height, 3, mode)
    expected = Compose([Resize(224, InterpolationMode.BICUBIC), CenterCrop(224)])(image)
    assert np.array_equal(np.array(crop_to_square(image, 224)), np.array(expected))


def test_a_thread_of_a_picture_is_refused_before_it_fills_the_memory():
    with pytest.raises(ImageError, match="60000x1 is too thin; with 224 pixels on its short side it would have 3,010"):
        crop_to_square(Image.new("RGB", (60_000, 1)), 224)


def test_a_tensor_is_channels_first_in_0_to_1():
    image = Image.new("RGB", (3, 2), (255, 51, 0))
    tensor = to_tensor(image)
    assert tensor.shape == (3, 2, 3)
    assert tensor[:, 0, 0].tolist() == pytest.approx([1.0, 0.2, 0.0])
    tensor.zero_()  # a copy: the picture is not changed
    assert image.getpixel((0, 0)) == (255, 51, 0)
