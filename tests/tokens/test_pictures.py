import io

import numpy as np
import pytest
from PIL import Image

from megachameleon.tokens import pictures
from megachameleon.tokens.pictures import open_picture, prepare_picture


def png(array, mode="RGB", format="PNG"):
    file = io.BytesIO()
    Image.fromarray(np.asarray(array, np.uint8), mode).save(file, format)
    return file.getvalue()


def test_white_stays_white():
    image = open_picture(png(np.full((70, 90, 3), 255)), "x")
    prepared = prepare_picture(image, 64)
    assert prepared.shape == (3, 64, 64) and prepared.dtype == np.uint8
    assert (prepared == 255).all()


def test_transparency_is_blended_over_white_and_truncated():
    image = open_picture(png([[[10, 20, 200, 100]]], "RGBA"), "x")
    # 100/255 · c + 155/255 · 255, truncated: 158.9 → 158, 162.8 → 162, 233.4 → 233
    assert prepare_picture(image, 1).reshape(3).tolist() == [158, 162, 233]


def test_opaque_rgba_equals_rgb():
    rgb = np.random.default_rng(0).integers(0, 256, (9, 9, 3))
    rgba = np.concatenate([rgb, np.full((9, 9, 1), 255)], axis=2)
    a, b = open_picture(png(rgb), "x"), open_picture(png(rgba, "RGBA"), "x")
    assert (prepare_picture(a, 8) == prepare_picture(b, 8)).all()


def test_long_side_is_rounded_and_crop_is_centred(monkeypatch):
    sizes = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *rest: (sizes.append(size), resize(self, size, *rest))[1]
    )
    prepare_picture(Image.new("RGB", (333, 777)), 512)
    assert sizes == [(512, 1195)]  # 512/333 · 777 = 1194.67
    stripes = np.zeros((4, 8, 3), np.uint8)
    stripes[:, 2:6] = 255
    assert (prepare_picture(Image.fromarray(stripes), 4) == 255).all()


def test_channels_come_first():
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 255
    assert prepare_picture(Image.fromarray(red), 4).reshape(3, -1).mean(1).tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["L", "P", "LA", "1", "I;16"])
def test_other_modes(mode):
    image = Image.new("RGB", (8, 8), "white").convert("L").convert(mode) if mode != "I;16" else Image.new(mode, (8, 8))
    assert prepare_picture(image, 8).shape == (3, 8, 8)


@pytest.mark.parametrize("data", [b"", b"not a picture", png(np.zeros((64, 64, 3)))[:60]])
def test_damaged_pictures_name_their_origin(data):
    with pytest.raises(ValueError, match=r"a\.tar/7\.png"):
        open_picture(data, "a.tar/7.png")


def test_every_truncation_is_a_value_error():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3))
    for format in ("PNG", "JPEG", "WEBP"):
        data = png(noise, format=format)
        for end in range(0, len(data) - 16, max(1, len(data) // 25)):
            with pytest.raises(ValueError):
                open_picture(data[:end], "x")


def test_sizes_are_bounded(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 100)
    with pytest.raises(ValueError, match="11 x 10 pixels exceed the limit of 100"):
        open_picture(png(np.zeros((10, 11, 3))), "x")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)  # Pillow's own limit is twice that
    with pytest.raises(ValueError, match="x: 110 pixels exceed the limit of 100; shrink it"):
        open_picture(png(np.zeros((10, 11, 3))), "x")
    with pytest.raises(ValueError, match="would become"):
        prepare_picture(Image.new("RGB", (1, 50)), 8)
