import io
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from megachameleon.tokens import pictures
from megachameleon.tokens.pictures import FAST_DISTANCE, fitted_size, open_picture, prepare_encoded, prepare_picture


def encoded(image, format="PNG", **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image, np.uint8))
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def smooth(height, width, seed=0):
    """Something like a photograph: blurred noise with edges and a little grain, uint8 [height, width, 3]."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    pixels[height // 4 : height // 2, width // 3 :] += 90
    return (pixels + random.normal(0, 4, (height, width, 1))).clip(0, 255).astype(np.uint8)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 2, (height, width, 3), dtype=np.uint8) * 255


@pytest.fixture(params=[False, True], ids=["fast", "exact"])
def exact(request):
    return request.param


def distance(a, b):
    difference = np.abs(a.astype(int) - b)
    return difference.mean(), difference.max()


def test_white_stays_white(exact):
    for fit in ("crop", "pad"):
        prepared = prepare_encoded(encoded(np.full((70, 90, 3), 255)), "x", 64, fit=fit, exact=exact)
        assert prepared.shape == (3, 64, 64) and prepared.dtype == np.uint8
        assert (prepared == 255).all()


def test_transparency_is_blended_over_white_and_truncated(exact):
    data = encoded(Image.new("RGBA", (1, 1), (10, 20, 200, 100)))
    # 100/255 · c + 155/255 · 255, truncated: 158.9 → 158, 162.8 → 162, 233.4 → 233
    assert prepare_encoded(data, "x", 1, exact=exact).reshape(3).tolist() == [158, 162, 233]


def test_every_colour_under_every_opacity(exact):
    alpha, colour = np.indices((256, 256)).astype(np.uint8)
    blended = (1 - alpha / 255) * 255 + alpha / 255 * colour
    data = encoded(np.stack([colour, colour, colour, alpha], axis=2))
    assert (prepare_encoded(data, "x", 256, exact=exact) == blended.astype(np.uint8)).all()


def test_opaque_rgba_equals_rgb(exact):
    rgb = noise(9, 9)
    rgba = np.concatenate([rgb, np.full((9, 9, 1), 255)], axis=2)
    a, b = (prepare_encoded(encoded(pixels), "x", 8, exact=exact) for pixels in (rgb, rgba))
    assert (a == b).all()


@pytest.mark.parametrize(
    "mode, colour, expected",
    [
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("LA", (0, 51), (204, 204, 204)),
        ("P", 200, (200, 200, 200)),
        ("I;16", 100, (100, 100, 100)),
        ("I;16", 1000, (255, 255, 255)),  # Pillow clips 16-bit greys, and so does the release
    ],
)
def test_other_modes(mode, colour, expected, exact):
    image = Image.new(mode, (8, 8), colour)
    if mode == "P":
        image.putpalette([value for value in range(256) for _ in range(3)])
    assert prepare_encoded(encoded(image), "x", 8, exact=exact)[:, 3, 4].tolist() == list(expected)


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_a_transparent_palette_entry_is_white(format, exact):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    prepared = prepare_encoded(encoded(image, format, transparency=1), "x", 2, fit="pad", exact=exact)
    assert prepared[:, 0, 0].tolist() == [10, 20, 30] and prepared[:, 0, 1].tolist() == [255, 255, 255]


def test_cmyk_jpegs_are_pillows(exact):
    image = Image.fromarray(smooth(40, 40)).convert("CMYK")
    data = encoded(image, "JPEG", quality=95)
    reference = np.asarray(open_picture(data, "x").convert("RGB")).transpose(2, 0, 1)
    assert (prepare_encoded(data, "x", 40, exact=exact) == reference).all()


def test_of_an_animation_the_first_picture_is_taken(exact):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for format in ("GIF", "WEBP"):
        options = {"lossless": True} if format == "WEBP" else {}
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert prepare_encoded(data, "x", 8, exact=exact)[:, 4, 4].tolist() == [255, 0, 0]


def test_orientation_and_colour_profile_are_not_applied(exact):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    pixels = smooth(32, 32)
    plain = prepare_encoded(encoded(pixels, "JPEG"), "x", 24, exact=exact)
    told = prepare_encoded(encoded(pixels, "JPEG", exif=exif, icc_profile=profile), "x", 24, exact=exact)
    assert (plain == told).all()


def test_long_side_is_rounded():
    assert fitted_size(333, 777, 512, "crop") == (512, 1195)  # 512/333 · 777 = 1194.67
    assert fitted_size(777, 333, 512, "crop") == (1195, 512)
    assert fitted_size(777, 333, 512, "pad") == (512, 219)
    with pytest.raises(ValueError, match="fit: 'stretch'"):
        fitted_size(1, 1, 512, "stretch")


def test_crop_is_centred(exact):
    stripes = np.zeros((4, 9, 3), np.uint8)
    stripes[:, 2:6] = 255  # (9 - 4) // 2 = 2
    assert (prepare_encoded(encoded(stripes), "x", 4, exact=exact) == 255).all()


def test_border_is_white_and_the_picture_in_its_middle(exact):
    prepared = prepare_encoded(encoded(np.full((4, 9, 3), 7)), "x", 9, fit="pad", exact=exact)
    assert (prepared[:, 2:6] == 7).all()  # (9 - 4) // 2 = 2
    assert (prepared[:, :2] == 255).all() and (prepared[:, 6:] == 255).all()
    tall = prepare_encoded(encoded(np.full((9, 4, 3), 7)), "x", 9, fit="pad", exact=exact)
    assert (tall == prepared.transpose(0, 2, 1)).all()


def test_channels_come_first(exact):
    prepared = prepare_encoded(encoded(Image.new("RGB", (6, 5), "red")), "x", 4, exact=exact)
    assert prepared.reshape(3, -1).mean(1).tolist() == [255, 0, 0]


@pytest.mark.parametrize("height, width", [(768, 1024), (333, 777), (90, 60), (64, 64), (900, 80)])
def test_fast_pixels_are_close_to_pillows(height, width):
    for fit in ("crop", "pad"):
        for pixels, most in ((smooth(height, width), 0.02), (noise(height, width), FAST_DISTANCE[0])):
            fast, exact = (prepare_encoded(encoded(pixels, "BMP"), "x", 64, fit=fit, exact=e) for e in (False, True))
            mean, largest = distance(fast, exact)
            assert mean <= most and largest <= FAST_DISTANCE[1]


def test_exact_is_what_chameleons_pillow_does():
    """Horizontally first, whatever the shape; Pillow 13 turns this round for tall pictures."""
    for height, width in ((100, 40), (96, 40), (40, 100)):
        image = Image.fromarray(noise(height, width))
        wide, tall = fitted_size(width, height, 20, "crop")
        reference = image.resize((wide, height), Image.Resampling.LANCZOS).resize(
            (wide, tall), Image.Resampling.LANCZOS
        )
        left, top = (wide - 20) // 2, (tall - 20) // 2
        cropped = np.asarray(reference.crop((left, top, left + 20, top + 20))).transpose(2, 0, 1)
        assert (prepare_picture(image, 20) == cropped).all()
        assert (prepare_encoded(encoded(image), "x", 20, exact=True) == cropped).all()


JPEGS = {
    "baseline": {"quality": 85},
    "progressive": {"progressive": True},
    "4:4:4": {"subsampling": "4:4:4"},
    "4:2:2": {"subsampling": "4:2:2"},
    "4:1:1": {"subsampling": "4:1:1"},
    "rgb": {"keep_rgb": True},
    "restarts": {"restart_marker_blocks": 3},
}


@pytest.mark.parametrize("kind", [*JPEGS, "grey"])
def test_jpegs_are_decoded_to_pillows_pixels(kind, monkeypatch):
    image = Image.fromarray(smooth(61, 83))
    data = encoded(image.convert("L"), "JPEG") if kind == "grey" else encoded(image, "JPEG", **JPEGS[kind])
    reference = np.asarray(open_picture(data, "x").convert("RGB"))[:, 11:72].transpose(2, 0, 1)
    monkeypatch.setattr(pictures, "_load", None)  # Pillow has no part in it
    assert (prepare_encoded(data, "x", 61) == reference).all()


def outcome(data, exact):
    try:
        return prepare_encoded(data, "a.tar/7.jpg", 16, exact=exact)
    except ValueError as error:
        assert str(error).startswith("a.tar/7.jpg: ")
        return str(error)


def agree(data):
    fast, exact = outcome(data, False), outcome(data, True)
    if isinstance(fast, str) or isinstance(exact, str):
        return fast == exact if isinstance(fast, str) and isinstance(exact, str) else False
    return distance(fast, exact)[1] <= FAST_DISTANCE[1]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_damaged_pictures_are_refused_or_taken_as_pillow_does(format):
    data = encoded(smooth(40, 56), format)
    random = np.random.default_rng(0)
    for _ in range(120):
        damaged = bytearray(data)
        for _ in range(random.integers(1, 4)):
            damaged[random.integers(len(damaged))] = random.integers(256)
        if random.random() < 0.3:
            start = random.integers(len(damaged))
            del damaged[start : start + random.integers(1, 40)]
        assert agree(bytes(damaged))
    assert agree(data + b"more")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_every_truncation_is_a_value_error(format, exact):
    data = encoded(smooth(40, 56), format)
    for end in range(0, len(data) - 16, max(1, len(data) // 40)):
        assert isinstance(outcome(data[:end], exact), str)


@pytest.mark.parametrize("data", [b"", b"not a picture", encoded(np.zeros((64, 64, 3)))[:60]])
def test_damaged_pictures_name_their_origin(data):
    with pytest.raises(ValueError, match=r"a\.tar/7\.png"):
        open_picture(data, "a.tar/7.png")


def test_sizes_are_bounded(monkeypatch, exact):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 100)
    data = encoded(np.zeros((10, 11, 3)))
    with pytest.raises(ValueError, match="x: 11 x 10 pixels exceed the limit of 100"):
        prepare_encoded(data, "x", 8, exact=exact)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)  # Pillow's own limit is twice that
    with pytest.raises(ValueError, match="x: 110 pixels exceed the limit of 100; shrink it"):
        prepare_encoded(data, "x", 8, exact=exact)
    with pytest.raises(ValueError, match="x: a picture of 1 x 50 pixels would become 8 x 400; crop it"):
        prepare_encoded(encoded(np.zeros((50, 1, 3))), "x", 8, exact=exact)


def test_nothing_is_left_of_a_line_in_a_border():
    with pytest.raises(ValueError, match="would become 8 x 0"):
        prepare_picture(Image.new("RGB", (50, 1)), 8, fit="pad")


def with_huge_sides(format):
    """A small file that says it has 65,000 x 65,000 pixels."""
    data = bytearray(encoded(smooth(16, 16), format))
    if format == "JPEG":
        start = data.index(b"\xff\xc0") + 5
        data[start : start + 4] = (65000).to_bytes(2) * 2
    else:
        data[16:24] = (65000).to_bytes(4) * 2
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4)
    return bytes(data)


def test_text_bombs_in_a_png_name_their_origin(exact):
    """Pillow refuses 2 MiB of zeros in two kilobytes of comment with an error of its own."""
    data = encoded(smooth(16, 16))
    body = b"zTXtcomment\0\0" + zlib.compress(bytes(2**21), 9)
    chunk = (len(body) - 4).to_bytes(4) + body + zlib.crc32(body).to_bytes(4)
    with pytest.raises(ValueError, match=r"^x: damaged picture .*too large"):
        prepare_encoded(data[:33] + chunk + data[33:], "x", 16, exact=exact)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_bombs_are_refused_by_their_header(format, exact, monkeypatch):
    for decoder in ((pictures, "_load"), (pictures.simplejpeg, "decode_jpeg")):
        monkeypatch.setattr(*decoder, None)
    with pytest.raises(ValueError, match="x: 4,225,000,000 pixels exceed the limit"):
        prepare_encoded(with_huge_sides(format), "x", 16, exact=exact)
