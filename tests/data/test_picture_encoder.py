import threading

import numpy as np
import pytest
import torch

from megachameleon.data.preprocessing.picture_encoder import PictureEncoder
from megachameleon.tokens.vq.quantizer import Codebook
from megachameleon.tokens.vq.tokenizer import ImageTokenizer, save_image_tokenizer
from megachameleon.tokens.vq.vqgan import VQGAN, VQGANConfig


class Tokenizer:
    """Codes of a picture are its first pixel; says who computed, with how many threads."""

    encode_batch = 2
    device = torch.device("cpu")

    def __init__(self, seen, meet):
        self._seen, self._meet, self._busy = seen, meet, threading.Lock()

    def twin(self):
        return Tokenizer(self._seen, self._meet)

    def encode(self, pictures):
        assert self._busy.acquire(blocking=False)  # never two threads in one
        self._meet.wait(20)
        self._seen.append((threading.get_ident(), torch.get_num_threads(), len(pictures)))
        self._busy.release()
        return torch.from_numpy(pictures[:, 0, :1, 0].astype(np.int64))


def test_threads_compute_batches_side_by_side_each_alone():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        seen: list[tuple[int, int, int]] = []
        encoder = PictureEncoder(Tokenizer(seen, threading.Barrier(3)))
        assert encoder.batch_size == 6
        pictures = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 4, 4), np.uint8)
        codes = encoder.encode(pictures)
        assert codes.dtype == np.int32 and codes.tolist() == [[0], [1], [2], [3], [4]]
        assert len({thread for thread, _, _ in seen}) == 3
        assert sorted((number, size) for _, number, size in seen) == [(1, 1), (1, 2), (1, 2)]
        encoder.close()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_the_codes_are_those_of_one_thread(tmp_path, num_threads):
    torch.manual_seed(0)
    config = VQGANConfig(
        image_size=16, base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, latent_channels=8, code_dim=8,
        num_codes=12,
    )  # fmt: skip
    codebook = Codebook(12, 8)
    codebook.codes.normal_(std=0.1)
    save_image_tokenizer(tmp_path, config, VQGAN(config), codebook, {})
    tokenizer = ImageTokenizer.load(tmp_path)
    pictures = np.random.default_rng(0).integers(0, 256, (7, 3, 16, 16), np.uint8)
    encoder = PictureEncoder(tokenizer, num_threads)
    codes = encoder.encode(pictures)
    encoder.close()
    assert np.array_equal(codes, tokenizer.encode(pictures).numpy()) and len(np.unique(codes)) > 1
