"""Image bombs, small files made to cost much: peak memory and CPU time of decoding each in eight threads at once.

    python benchmarks/bombs.py                              a line a bomb
    python benchmarks/bombs.py --tree OTHER --json FILE     the same of another checkout
    python benchmarks/bombs.py --only jpeg-scans webp       some of them
    python benchmarks/bombs.py --per_pixel                  peak bytes a pixel of honest images, one at a time

Each bomb is decoded for training at 512 pixels in a process of its own, which may hold 10 GiB at most: beyond that an
allocation fails, which is printed. Times are of all threads together.
"""

import argparse
import io
import json
import os
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

SIDE = 9459  # its square is just within PIL's limit
LIMIT = 10 << 30  # bytes per process

# Runs in the tree under test, so it imports nothing that an older tree is missing.
CHILD = """
import json, resource, sys, time
from concurrent.futures import ThreadPoolExecutor
from dpo_fast.data.images import BadImage, decode, scaled
data, threads, limit = open(sys.argv[1], "rb").read(), int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
def one(_):
    try:
        image = scaled(data, 512)[0] if threads > 1 else decode(data)
        return "%d x %d" % image.size
    except BadImage as error:
        return error.reason
def used(field):
    usage = resource.getrusage(resource.RUSAGE_SELF)
    status = open("/proc/self/status").read()
    return int(status.split(field + ":")[1].split()[0]), usage.ru_utime + usage.ru_stime
with ThreadPoolExecutor(threads) as pool:
    list(pool.map(lambda _: time.sleep(0.01), range(threads)))
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    memory, cpu = used("VmRSS"); wall = time.perf_counter()
    said = list(pool.map(one, range(threads)))
    after, seconds = used("VmHWM")
print(json.dumps(dict(mib=(after - memory) / 1024, cpu=seconds - cpu, wall=time.perf_counter() - wall,
                      said=sorted(set(said)))))
"""


def segment(code: int, body: bytes) -> bytes:
    """Return a marker segment of a JPEG."""
    return struct.pack(">BBH", 0xFF, code, 2 + len(body)) + body


def jpeg(scans: int = 1, progressive: bool = True, padding: int = 0, extra: bytes = b"", side: int = SIDE) -> bytes:
    """Return a JPEG with headers only: libjpeg takes the missing coefficients as zero."""
    table = segment(0xDB, b"\0" + bytes([1] * 64))
    huffman = b"".join(segment(0xC4, bytes([kind << 4, 1, *[0] * 15, 0])) for kind in (0, 1))
    parts = b"".join(bytes([k, 0x11, 0]) for k in (1, 2, 3))
    frame = segment(0xC2 if progressive else 0xC0, struct.pack(">BHHB", 8, side, side, 3) + parts)
    first = segment(0xDA, bytes([3, 1, 0, 2, 0, 3, 0, 0, 0 if progressive else 63, 0])) + bytes(padding)
    more = segment(0xDA, bytes([1, 1, 0, 1, 63, 0]))
    return b"\xff\xd8" + extra + table + huffman + frame + first + more * (scans - 1) + b"\xff\xd9"


def saved(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(*more: bytes) -> bytes:
    """Return a PNG of 16 x 16 pixels with extra chunks after its header."""
    whole = saved(Image.new("RGB", (16, 16)), "PNG")
    return whole[:33] + b"".join(more) + whole[33:]


def tiff(pages: int = 1, tile: int = 0, shared: int = 0) -> bytes:
    """Return a TIFF of 16 x 16 pixels: with many pages, with one much larger tile, or with tags that share a value."""
    pixels = zlib.compress(bytes(tile * tile), 9) if tile else bytes(256)
    start = 8 + len(pixels) + len(pixels) % 2
    tags = [(256, 16), (257, 16), (258, 8), (259, 8 if tile else 1), (262, 1)]
    tags += [(322, tile), (323, tile), (324, 8), (325, len(pixels))] if tile else [(273, 8), (278, 16), (279, 256)]
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags]
    entries += [struct.pack("<HHII", 32768 + k, 7, shared, 8) for k in range(32000 if shared else 0)]
    size = 2 + 12 * len(entries) + 4
    body = b"".join(
        struct.pack("<H", len(entries)) + b"".join(entries)
        + struct.pack("<I", start + (page + 1) * size if page + 1 < pages else 0)
        for page in range(pages)
    )  # fmt: skip
    return (b"II*\0" + struct.pack("<I", start) + pixels).ljust(start, b"\0") + body + bytes(shared)


def exif_pieces() -> bytes:
    """Return a JPEG whose EXIF is split into a hundred thousand segments."""
    return jpeg(side=16, extra=segment(0xE1, b"Exif\0\0" + bytes(30)) * 100_000)


def gif_comments() -> bytes:
    whole = saved(Image.new("P", (16, 16)), "GIF")
    head = 13 + (3 << (whole[10] & 7) + 1 if whole[10] & 128 else 0)
    return whole[:head] + b"!\xfe" + (b"\xff" + bytes(255)) * 40_000 + b"\0" + whole[head:]


def jpeg_2000_tiles() -> bytes:
    """Return a JPEG 2000 of 65,025 tiles of one pixel each."""
    whole = bytearray(saved(Image.new("RGB", (255, 255)), "JPEG2000", no_jp2=True))
    at = whole.index(b"\xff\x51")
    struct.pack_into(">II", whole, at + 6 + 16, 1, 1)  # the tiles' size
    return bytes(whole)


def avif_lie(side: int = SIDE - 1) -> bytes:
    """Return an AVIF whose container declares 8 x 8 pixels but whose frame has many more."""
    whole = saved(Image.new("RGB", (side, side)), "AVIF", speed=10)
    at = whole.index(b"ispe")
    return whole[: at + 8] + struct.pack(">II", 8, 8) + whole[at + 16 :]


def shared_exif(kind: str) -> bytes:
    """Return an image with 64 KB of EXIF: four thousand tags that share one value of 16,000 bytes."""
    entries = b"".join(struct.pack("<HHII", k + 1, 7, 16_000, 48_100) for k in range(4000))
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 4000) + entries
    exif = exif.ljust(48_106, b"\0") + bytes(16_000)
    return jpeg(side=16, extra=segment(0xE1, exif)) if kind == "JPEG" else saved(
        Image.new("RGB", (16, 16)), kind, exif=exif
    )  # fmt: skip


def wide_grey() -> bytes:
    return saved(Image.fromarray(np.zeros((SIDE, SIDE), np.uint16)), "PNG")


def frames(kind: str, count: int, side: int) -> bytes:
    images = [Image.new("RGB", (side, side), (k % 256, 0, 0)) for k in range(2)]
    return saved(images[0], kind, save_all=True, append_images=[images[k % 2] for k in range(1, count)])


BOMBS: dict[str, Callable[[], bytes]] = {
    "jpeg-scans": lambda: jpeg(scans=48),
    "jpeg-scans-padded": lambda: jpeg(scans=60, padding=600_000),
    "jpeg-many-scans": lambda: jpeg(scans=1000, padding=600_000),
    "jpeg-baseline": lambda: jpeg(progressive=False),
    "jpeg-baseline-padded": lambda: jpeg(progressive=False, padding=600_000),
    "webp": lambda: saved(Image.new("RGB", (SIDE, SIDE), (9, 99, 200)), "WEBP", lossless=True, quality=0, method=0),
    "webp-frames": lambda: frames("WEBP", 8, 6000),
    "png-grey-16": wide_grey,
    "png-alpha": lambda: saved(Image.new("LA", (SIDE, SIDE)), "PNG"),
    "gif": lambda: saved(Image.new("P", (SIDE, SIDE)), "GIF", transparency=0),
    "bmp": lambda: b"BM" + struct.pack("<IIIIiiHHIIIIII", 0, 0, 1078, 40, SIDE, SIDE, 1, 8, 1, 0, 0, 0, 256, 0)
    + bytes(1024) + b"\xff\0" * 400_000 + b"\0\1",
    "avif": avif_lie,
    "jpeg2000": lambda: saved(Image.new("RGB", (SIDE, SIDE)), "JPEG2000"),
    "jpeg2000-tiles": jpeg_2000_tiles,
    "tiff-pages": lambda: tiff(pages=100_000),
    "tiff-tile": lambda: tiff(tile=16_384),
    "tiff-tags": lambda: tiff(shared=1_000_000),
    "jpeg-exif-pieces": exif_pieces,
    "jpeg-exif-shared": lambda: shared_exif("JPEG"),
    "png-exif-shared": lambda: shared_exif("PNG"),
    "webp-exif-shared": lambda: shared_exif("WEBP"),
    "gif-comments": gif_comments,
    "gif-frames": lambda: frames("GIF", 3000, 64),
    "png-texts": lambda: png(*[chunk(b"zTXt", b"t%d\0\0" % k + zlib.compress(bytes(1_000_000), 9)) for k in range(63)]),
    "png-text-bomb": lambda: png(chunk(b"zTXt", b"t\0\0" + zlib.compress(bytes(200_000_000), 9))),
    "png-profile-bomb": lambda: png(chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(200_000_000), 9))),
}  # fmt: skip


def photograph(width: int = 3000, height: int = 2000) -> Image.Image:
    """Return an image of smooth colours with some noise."""
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 256, (12, 18, 3), dtype=np.uint8)).resize((width, height), 3)
    noise = random.normal(0, 4, (height, width, 3))
    return Image.fromarray((np.asarray(small) + noise).clip(0, 255).astype(np.uint8))


def honest() -> dict[str, bytes]:
    """Return ordinary images of six million pixels, encoded, by format."""
    image = photograph()
    alpha = image.convert("RGBA")
    alpha.putalpha(image.convert("L"))
    grey = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    return {
        "JPEG": saved(image, "JPEG"),
        "JPEG progressive": saved(image, "JPEG", progressive=True),
        "JPEG progressive 4:4:4": saved(image, "JPEG", progressive=True, subsampling=0),
        "JPEG CMYK": saved(image.convert("CMYK"), "JPEG"),
        "PNG": saved(image, "PNG"),
        "PNG alpha": saved(alpha, "PNG"),
        "PNG grey of 16 bits": saved(grey, "PNG"),
        "GIF": saved(image.quantize(64), "GIF"),
        "BMP": saved(image, "BMP"),
        "WEBP": saved(image, "WEBP", method=0),
        "WEBP alpha": saved(alpha, "WEBP", method=0),
        "WEBP lossless": saved(image, "WEBP", lossless=True, quality=0, method=0),
        "WEBP lossless alpha": saved(alpha, "WEBP", lossless=True, quality=0, method=0),
        "AVIF": saved(image, "AVIF", speed=10),
        "AVIF 4:4:4 alpha": saved(alpha, "AVIF", speed=10, subsampling="4:4:4"),
        "TIFF": saved(image, "TIFF"),
        "TIFF deflate": saved(image, "TIFF", compression="tiff_adobe_deflate"),
        "TIFF deflate, one strip": saved(
            image, "TIFF", compression="tiff_adobe_deflate", tiffinfo=_one_strip(image.height)
        ),
        "JPEG2000": saved(image, "JPEG2000"),
        "JPEG2000 alpha": saved(alpha, "JPEG2000"),
    }


def _one_strip(height: int) -> ImageFileDirectory_v2:
    tags = ImageFileDirectory_v2()
    tags[278] = height
    return tags


def measure(data: bytes, tree: Path, threads: int = 8) -> dict:
    """Decode `data` in `threads` threads at once; return peak MiB, CPU and wall seconds, and the outcomes."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        environment = dict(os.environ, PYTHONPATH=str(tree), OMP_NUM_THREADS="1", MALLOC_ARENA_MAX="8")
        command = [sys.executable, "-W", "ignore", "-c", CHILD, file.name, str(threads), str(LIMIT)]
        try:
            done = subprocess.run(
                command, env=environment, cwd=tree, capture_output=True, text=True, timeout=600, check=False
            )
        except subprocess.TimeoutExpired:
            return {"mib": None, "cpu": None, "wall": 600, "said": ["stopped after 600 s"]}
    if done.returncode:
        return {"mib": None, "cpu": None, "wall": None, "said": [f"died ({done.returncode}): {done.stderr[-200:]}"]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=Path(__file__).resolve().parents[1], help="the checkout to run")
    parser.add_argument("--only", nargs="+", choices=BOMBS, default=list(BOMBS))
    parser.add_argument("--per_pixel", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    Image.MAX_IMAGE_PIXELS = None
    tree, rows = arguments.tree.resolve(), []
    if arguments.per_pixel:
        for name, data in honest().items():
            row = measure(data, tree, threads=1)
            rows.append({"image": name, "bytes_a_pixel": row["mib"] * 2**20 / 6e6})
            print(f"{name:26}{rows[-1]['bytes_a_pixel']:8.1f}   {row['said'][0]}", flush=True)
    else:
        print(f"{'bomb':22}{'bytes':>10}{'MiB':>9}{'CPU s':>8}{'wall s':>8}  result")
        for name in arguments.only:
            data = BOMBS[name]()
            row = {"bomb": name, "bytes": len(data)} | measure(data, tree)
            rows.append(row)
            mib, cpu, wall = (
                "-" if row[k] is None else f"{row[k]:.{d}f}" for k, d in (("mib", 0), ("cpu", 1), ("wall", 1))
            )
            print(f"{name:22}{len(data):>10}{mib:>9}{cpu:>8}{wall:>8}  {'; '.join(row['said'])[:150]}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
