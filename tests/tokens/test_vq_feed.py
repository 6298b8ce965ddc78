import io

import numpy as np
import pytest
import torch
from PIL import Image

from megachameleon.tokens.vq.feed import FeedConfig, picture_weights
from megachameleon.tokens.vq.order import Order
from megachameleon.tokens.vq.source import PictureInput, find_pictures
from megachameleon.tokens.vq.stream_feed import Augmentation, StreamFeed, split_files

SIZE = 16


def encoded(seed, width=20, height=16):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02d}.png").write_bytes(encoded(i))
    return tmp_path


def feed_of(folder, augmentation=Augmentation(zoom=1, flip=False), **changes):  # noqa: B008
    split = split_files(find_pictures([PictureInput(folder)]).files, held_out=4)
    config = FeedConfig(image_size=SIZE, steps=20, **({"batch_size": 8, "seed": 0, "chunk": 3} | changes))
    return StreamFeed(split, config, augmentation, workers=2)


def batches(feed, steps):
    taken = [feed.batch(step) for step in steps]
    feed.close()
    return torch.stack(taken)


def test_epochs_visit_every_picture_once_and_differ():
    order = Order(10, seed=0)
    places = order.at(0, 30).tolist()
    assert [sorted(places[i : i + 10]) for i in (0, 10, 20)] == [list(range(10))] * 3
    assert places[:10] != places[10:20]
    assert Order(10, seed=0).at(7, 23).tolist() == places[7:23]
    assert Order(10, seed=1).at(0, 10).tolist() != places[:10]


def test_weights_are_shares_in_every_epoch():
    weights = np.array([2.0] * 10 + [1.0] * 30)
    order = Order(40, seed=0, weights=weights)
    assert order.epoch_size == 50
    for epoch in range(3):
        counts = np.bincount(order.at(50 * epoch, 50 * epoch + 50), minlength=40)
        assert (counts == weights).all()
    odd = Order(4, seed=0, weights=np.array([0.3, 1.0, 2.5, 1.2]))
    counts = np.bincount(odd.at(0, 5 * 400), minlength=4) / 400
    assert counts == pytest.approx([0.3, 1.0, 2.5, 1.2], abs=0.07)
    chance = np.random.default_rng(0)
    drawn = np.bincount([order.by_chance(chance) for _ in range(4000)], minlength=40)
    assert drawn[:10].sum() / 4000 == pytest.approx(0.4, abs=0.03)


def test_the_weight_of_a_picture_is_the_product_of_its_tags(folder):
    found = find_pictures([PictureInput(folder, "faces"), PictureInput(folder, "logos"), PictureInput(folder)])
    weights = picture_weights(found.files, {"faces": 2.0, "logos": 0.5})
    assert weights.tolist() == [2.0] * 40 + [0.5] * 40 + [1.0] * 40
    assert picture_weights(found.files, {}) is None
    with pytest.raises(ValueError, match=r"--weight face: no picture has this tag; there are: faces, logos"):
        picture_weights(found.files, {"face": 2.0})
    with pytest.raises(ValueError, match=r"--weight faces=0: a factor must be positive"):
        picture_weights(found.files, {"faces": 0})


def test_batches_are_a_function_of_seed_and_step(folder):
    augmentation = Augmentation()
    first = batches(feed_of(folder, augmentation), range(6))
    assert first.shape == (6, 8, 3, SIZE, SIZE) and first.dtype == torch.uint8
    assert torch.equal(batches(feed_of(folder, augmentation), range(3, 6)), first[3:])
    assert not torch.equal(batches(feed_of(folder, augmentation, seed=1), range(6)), first)


def test_crops_and_flips_come_from_the_picture(folder):
    plain = batches(feed_of(folder), range(4)).reshape(-1, 3, SIZE, SIZE)
    windows = []
    for i in range(40):
        pixels = torch.from_numpy(np.array(Image.open(folder / f"{i:02d}.png"))).permute(2, 0, 1)
        windows += [pixels[:, :, left : left + SIZE] for left in range(5)]
    windows = torch.stack(windows)
    places = [(windows == picture).flatten(1).all(1).nonzero() for picture in plain]
    assert all(len(place) == 1 for place in places)
    assert len({int(place) % 5 for place in places}) > 2
    flipped = batches(feed_of(folder, Augmentation(zoom=1)), range(4)).reshape(-1, 3, SIZE, SIZE)
    mirrored = [torch.equal(a, b.flip(2)) for a, b in zip(flipped, plain, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(flipped, plain, strict=True)]
    assert sum(mirrored) + sum(same) == 32 and 8 < sum(mirrored) < 24


def test_held_out_pictures_are_never_trained_on(folder):
    for i in range(40):
        (folder / f"copy-{i}.png").write_bytes(encoded(i))
    feed = feed_of(folder)
    assert (feed.num_held_out, feed.num_duplicates) == (4, 4) and feed.num_train == 72
    held_out = torch.cat(list(feed.held_out()))
    assert torch.equal(feed.shown(4), held_out) and len(held_out) == 4
    trained_on = torch.cat([*feed.sample(100)])
    assert len(trained_on) == 72
    assert not any((trained_on == picture).flatten(1).all(1).any() for picture in held_out)


def test_a_damaged_picture_costs_one_picture(folder):
    names = [f"{i:02d}.png" for i in range(0, 40, 3)]
    for name in names:
        (folder / name).write_bytes(encoded(0)[:200])
    feed = feed_of(folder)
    taken = [feed.batch(step) for step in range(5)]
    again = feed_of(folder)
    assert torch.equal(again.batch(3), taken[3])
    assert {entry["origin"].rsplit("/", 1)[1] for entry in feed.quarantine} <= set(names)
    assert len(feed.quarantine) >= len(names) - 1 and "damaged" in feed.quarantine[0]["reason"]
    feed.close(), again.close()


def test_many_damaged_pictures_do_not_stop_training(folder):
    for i in range(28):
        (folder / f"{i:02d}.png").write_bytes(b"oops" * 300)
    feed = feed_of(folder)
    assert len(batches(feed, range(20))) == 20


def test_nothing_but_damaged_pictures_stops_training(folder):
    feed = feed_of(folder)
    for path in folder.glob("*.png"):
        path.write_bytes(b"oops" * 300)
    with pytest.raises(ValueError, match="32 pictures in a row could not be decoded"):
        batches(feed, range(3))
    with pytest.raises(ValueError, match="0 distinct usable pictures in 40 files"):
        feed_of(folder)


def test_fewer_pictures_may_be_asked_for(folder):
    files = find_pictures([PictureInput(folder)]).files
    split = split_files(files, held_out=100, max_pictures=10)
    assert len(split.train) == 10 and len(split.held_out) == 4 and split.num_files == 40
    assert split.fingerprint != split_files(files, held_out=3, max_pictures=10).fingerprint
    with pytest.raises(ValueError, match="zoom"):
        Augmentation(zoom=0.5)
