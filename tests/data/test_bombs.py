"""Small files that are made to cost much: refused by their headers, decoded within a budget, or free of what costs."""

import multiprocessing
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import bombs
from dpo_fast.data import boxes, budget, colour, images
from dpo_fast.data.budget import UNIT, Budget
from dpo_fast.data.headers import orientation_of_exif, read_header
from dpo_fast.data.images import BadImage, decode, scaled
from tests.helpers.pairs import as_file


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("jpeg-scans", r"has 620 bytes for 9459 x 9459 pixels, less than a bit"),
        ("jpeg-baseline", r"has 150 bytes for 9459 x 9459 pixels, less than a bit"),
        ("jpeg-many-scans", r"comes in 1000 scans; the limit is 64"),
        ("jpeg-exif-pieces", r"more than 10000 segments"),
        ("tiff-tags", r"tags of 32000000000 bytes in a file of 1384366"),
        ("png-profile-bomb", r"cannot be decoded \(ValueError: Decompressed data too large"),
    ],
)
def test_bombs_are_bad_rows(name, reason):
    with pytest.raises(BadImage, match=reason):
        decode(bombs.BOMBS[name]())


METADATA = ["jpeg-exif-shared", "png-exif-shared", "png-texts", "gif-comments", "webp-exif-shared"]


@pytest.mark.parametrize("name", METADATA)
def test_metadata_does_not_reach_pil(name, monkeypatch):
    data = bombs.BOMBS[name]()
    monkeypatch.setattr(Image.Exif, "load", lambda self, data: pytest.fail("PIL reads EXIF"))
    assert decode(data).size == (16, 16)
    assert len(read_header(data).data) < 1500 or name.startswith("webp")


def test_a_file_of_many_pages_costs_its_first():
    data = bombs.tiff(pages=2000)
    assert decode(data).size == (16, 16)


LYING = {
    "webp": lambda: bombs.saved(Image.new("RGB", (3000, 3000)), "WEBP", lossless=True, quality=0, method=0),
    "avif": lambda: bombs.avif_lie(3000),
    "tiff": lambda: bombs.tiff(tile=8192),
    "jpeg2000": bombs.jpeg_2000_tiles,
    "gif": lambda: _gif_beyond_its_screen(),
}


def _gif_beyond_its_screen() -> bytes:
    whole = bytearray(as_file(Image.new("P", (6000, 6000)), "GIF"))
    whole[6:10] = struct.pack("<HH", 1, 1)
    return bytes(whole)


@pytest.mark.parametrize("name", LYING)
def test_what_is_large_behind_its_header_is_counted(name, monkeypatch):
    """Canvases, frames, tiles and strips that are larger than the size that a file names."""
    if name.upper() not in images.FORMATS:
        pytest.skip(f"this Pillow reads no {name}")
    assert read_header(LYING[name]()).bytes > 60 << 20
    monkeypatch.setattr(images, "IN_FLIGHT", 60 << 20)
    with pytest.raises(
        BadImage, match=r"is too large \(decoding \d+ x \d+ pixels of \w+ takes \d+ MiB; the limit is 60"
    ):
        scaled(LYING[name](), 64)


@pytest.mark.parametrize("kind", ["AVIF", "WEBP", "JPEG2000", "TIFF", "BMP", "GIF", "PNG", "JPEG"])
def test_headers_know_the_size(kind, seed):
    if kind not in images.FORMATS:
        pytest.skip(f"this Pillow reads no {kind}")
    for size in ((1, 1), (37, 5), (64, 200)):
        image = Image.new("RGB", size, (seed % 256, 7, 9))
        header = read_header(as_file(image, kind))
        assert (header.format, header.width, header.height) == (kind, *size)
    if kind == "AVIF":
        frames = as_file(image, kind, save_all=True, append_images=[Image.new("RGB", size)])
        assert read_header(frames).bytes >= boxes.AVIF * 64 * 200 and decode(frames).size == size


def test_several_scans_are_counted_and_draft_does_not_save_them():
    image = Image.new("RGB", (640, 640))
    plain, progressive = (read_header(as_file(image, "JPEG", subsampling=0, progressive=p)) for p in (False, True))
    assert plain.coefficients == 0 and progressive.coefficients == 2 * 3 * 640 * 640
    assert progressive.bytes - plain.bytes == progressive.coefficients


def test_an_image_beyond_the_budget_is_a_bad_row_with_the_numbers(monkeypatch):
    data = as_file(Image.new("RGB", (2048, 2048)), "PNG")
    monkeypatch.setattr(images, "IN_FLIGHT", 50 << 20)
    with pytest.raises(BadImage, match=r"decoding 2048 x 2048 pixels of PNG takes 56 MiB; the limit is 50 MiB"):
        decode(data)
    monkeypatch.setattr(images, "IN_FLIGHT", 56 << 20)
    assert decode(data).size == (2048, 2048)


def test_a_large_profile_is_a_bad_row(monkeypatch):
    monkeypatch.setattr(colour, "LARGEST", 100)
    with pytest.raises(BadImage, match=r"colour profile of 200 bytes; the limit is 100"):
        decode(as_file(Image.new("RGB", (4, 4)), "PNG", icc_profile=bytes(200)))


def test_threads_decode_within_the_budget(monkeypatch):
    """Eight threads, room for two: never more than two at a time, and all come through."""
    data = as_file(Image.new("RGB", (1024, 1024)), "PNG")
    share = read_header(data).bytes + images.CONVERTING * images.BAND
    monkeypatch.setattr(budget, "IN_FLIGHT", 2 * (-(-share // UNIT)) * UNIT)
    monkeypatch.setattr(images, "_budget", Budget.of_threads())
    inside, most, lock, opened = 0, 0, threading.Lock(), images._open

    def counted(header, part):
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        try:
            time.sleep(0.02)
            return opened(header, part)
        finally:
            with lock:
                inside -= 1

    monkeypatch.setattr(images, "_open", counted)
    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(decode, [data] * 24))) == 24
    assert most == 2


def test_a_share_comes_back_after_an_error(monkeypatch):
    monkeypatch.setattr(budget, "IN_FLIGHT", 2 * UNIT)
    shares = Budget.of_threads()
    for _ in range(5):
        with pytest.raises(KeyError), shares.held(2 * UNIT):
            raise KeyError
    with shares.held(UNIT), shares.held(UNIT):
        pass


def _hold(shares: Budget, held, done) -> None:
    with shares.held(2 * UNIT):
        held.set()
        done.wait(20)


def test_processes_share_a_budget(monkeypatch):
    monkeypatch.setattr(budget, "IN_FLIGHT", 2 * UNIT)
    context = multiprocessing.get_context()
    shares, held, done = Budget.of_processes(context), context.Event(), context.Event()
    other = context.Process(target=_hold, args=(shares, held, done))
    other.start()
    assert held.wait(60)
    got = threading.Event()

    def take() -> None:
        with shares.held(UNIT):
            got.set()

    thread = threading.Thread(target=take)
    thread.start()
    assert not got.wait(0.3)
    done.set()
    assert got.wait(20)
    thread.join()
    other.join()


def test_workers_of_a_loader_decode_within_one_budget(monkeypatch):
    from dpo_fast.data import stream

    given = []
    monkeypatch.setattr(stream, "share", given.append)
    monkeypatch.setattr(stream.signal, "signal", lambda *_: None)
    monkeypatch.setattr(stream.signal, "pthread_sigmask", lambda *_: None)
    monkeypatch.setattr(stream.torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(stream, "Thread", lambda **_: threading.Thread())
    stream._start_worker(1, "the budget", 0)
    assert given == ["the budget"]


@pytest.mark.parametrize("length", range(0, 60, 3))
def test_exif_that_is_cut_off_or_circular_is_read_without_an_error(length):
    exif = Image.Exif()
    exif[274] = 6
    block = exif.tobytes()
    assert orientation_of_exif(block) == 6
    assert orientation_of_exif(block[:length]) in (0, 6)
    assert orientation_of_exif(block[:10] + struct.pack(">I", length) + block[14:]) in range(9)


@pytest.mark.drawn(1)
@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gif", "webp-frames", "jpeg2000-tiles", "tiff-tile"])
def test_eight_threads_stay_within_the_budget(name):
    """What is measured beside it, at most a quarter more: the images that come out, and the allocator's share."""
    took = bombs.measure(bombs.BOMBS[name](), Path(bombs.__file__).parents[1])
    assert took["mib"] < 1.25 * budget.IN_FLIGHT / 2**20, took
