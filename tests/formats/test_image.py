"""Every kind of image becomes three channels of 8 bits, with torchvision's own pixels."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from torchvision.datasets.folder import pil_loader
from torchvision.transforms.functional import pil_to_tensor

from concurrent_dataloader.errors import SampleDecodeError
from concurrent_dataloader.formats.image import (
    DECODER_NAMES,
    DecoderName,
    check_decoder,
    decode_image,
)


def make_rgb(width: int = 90, height: int = 61) -> Image.Image:
    rng = np.random.default_rng(7)
    ramp_y, ramp_x = np.mgrid[0:height, 0:width]
    pixels = np.stack([ramp_x * 2, ramp_y * 3, (ramp_x + ramp_y)], axis=-1) % 256
    noise = rng.integers(-12, 12, pixels.shape)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def make_palette_with_transparency() -> bytes:
    image = make_rgb().quantize(16)
    return encode(image, "PNG", transparency=bytes(range(16)))


def make_16_bit() -> bytes:
    ramp = np.linspace(0, 65535, 90 * 61).reshape(61, 90).astype(np.uint16)
    return encode(Image.fromarray(ramp), "PNG")


def make_exif_rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 270 degrees
    return encode(make_rgb(), "JPEG", quality=95, exif=exif)


KINDS: dict[str, Callable[[], bytes]] = {
    "rgb_jpeg": lambda: encode(make_rgb(), "JPEG", quality=95),
    "progressive_jpeg": lambda: encode(make_rgb(), "JPEG", quality=80, progressive=True),
    "subsampled_jpeg": lambda: encode(make_rgb(), "JPEG", quality=75, subsampling=2),
    "grey_jpeg": lambda: encode(make_rgb().convert("L"), "JPEG"),
    "cmyk_jpeg": lambda: encode(make_rgb().convert("CMYK"), "JPEG"),
    "exif_rotated_jpeg": make_exif_rotated,
    "rgb_png": lambda: encode(make_rgb(), "PNG"),
    "rgba_png": lambda: encode(make_rgb().convert("RGBA"), "PNG"),
    "grey_alpha_png": lambda: encode(make_rgb().convert("LA"), "PNG"),
    "palette_png": lambda: encode(make_rgb().quantize(32), "PNG"),
    "palette_png_with_transparency": make_palette_with_transparency,
    "one_bit_png": lambda: encode(make_rgb().convert("1"), "PNG"),
    "16_bit_png": make_16_bit,
    "gif": lambda: encode(make_rgb().quantize(32), "GIF"),
    "bmp": lambda: encode(make_rgb(), "BMP"),
    "webp": lambda: encode(make_rgb(), "WEBP"),
    "tiff": lambda: encode(make_rgb(), "TIFF"),
    "one_pixel_jpeg": lambda: encode(make_rgb(1, 1), "JPEG"),
}


def as_array(image: Image.Image | torch.Tensor) -> np.ndarray:
    return image.numpy() if isinstance(image, torch.Tensor) else np.asarray(image)


def read_with_torchvision(raw: bytes, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    path = tmp_path_factory.mktemp("oracle") / "image"
    path.write_bytes(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Pillow's, of transparent palettes
        return np.array(pil_loader(path))


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_of_torchvisions_image_folder(
    kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = KINDS[kind]()

    image = decode_image(raw)

    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.array(image), read_with_torchvision(raw, tmp_path_factory))


@pytest.mark.parametrize("kind", KINDS)
def test_torchvisions_decoder_gives_the_pixels_of_pillow(kind: str) -> None:
    raw = KINDS[kind]()

    pixels = decode_image(raw, "torchvision")

    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, pil_to_tensor(decode_image(raw)))


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("decoder", DECODER_NAMES)
def test_any_buffer_is_decoded(decoder: DecoderName, wrap: Callable[[bytes], bytes]) -> None:
    raw = KINDS["rgb_jpeg"]()

    image = decode_image(wrap(raw), decoder)

    expected = decode_image(raw, decoder)
    np.testing.assert_array_equal(as_array(image), as_array(expected))


def test_a_decoded_image_is_loaded_and_pickles() -> None:
    image = decode_image(KINDS["rgb_jpeg"]())

    again = pickle.loads(pickle.dumps(image))

    assert isinstance(image, ImageFile.ImageFile)
    assert image.fp is None
    np.testing.assert_array_equal(np.array(again), np.array(image))


@pytest.mark.parametrize("decoder", DECODER_NAMES)
@pytest.mark.parametrize(
    "kind", ["rgb_jpeg", "progressive_jpeg", "grey_jpeg", "cmyk_jpeg", "rgb_png"]
)
def test_a_cut_image_is_an_error_or_has_lost_no_pixel(kind: str, decoder: DecoderName) -> None:
    raw = KINDS[kind]()
    whole = as_array(decode_image(raw, decoder))

    for length in [*range(0, len(raw) - 40, len(raw) // 23), *range(len(raw) - 40, len(raw))]:
        try:
            image = decode_image(raw[:length], decoder)
        except SampleDecodeError:
            continue
        assert length > len(raw) - 40
        np.testing.assert_array_equal(as_array(image), whole)


@pytest.mark.parametrize("decoder", DECODER_NAMES)
def test_bytes_that_are_no_image_are_an_error_that_shows_them(decoder: DecoderName) -> None:
    with pytest.raises(SampleDecodeError) as caught:
        decode_image(b"<?xml version='1.0'?><Error/>", decoder)

    assert str(caught.value) == (
        'image: got 29 bytes that begin with b"<?xml version=\'1": no image format begins like that'
    )


@pytest.mark.parametrize("decoder", DECODER_NAMES)
def test_a_decompression_bomb_is_an_error(decoder: DecoderName) -> None:
    raw = bytearray(KINDS["rgb_jpeg"]())
    frame = raw.index(b"\xff\xc0")
    raw[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"  # 65535 x 65535 pixels in 3 kB

    with pytest.raises(SampleDecodeError, match="decompression bomb"):
        decode_image(bytes(raw), decoder)


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), data=st.data())
def test_damaged_bytes_give_an_image_or_our_error(kind: str, data: st.DataObject) -> None:
    raw = bytearray(KINDS[kind]())
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))

    for decoder in DECODER_NAMES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of odd metadata and large sizes
            try:
                image = decode_image(bytes(raw), decoder)
            except SampleDecodeError:
                continue
        assert as_array(image).dtype == np.uint8


def test_an_unknown_decoder_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"^decode: got 'opencv', expected 'pillow' or 'torchvision'"
    ):
        check_decoder("opencv")
