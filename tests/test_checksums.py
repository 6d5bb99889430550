"""What carries its own digest: any changed byte is noticed, what earlier versions wrote is still read."""

import hashlib
import io
import json
import random

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dpo_fast.checksums import (
    Damaged,
    check_text,
    file_digest,
    png_is_whole,
    read_signed_json,
    sha256_of,
    signed_png,
    signed_text,
    write_signed_json,
)

VALUE = {"scores": {"a": 0.93, "b": -1e-7}, "name": "größe", "none": None, "list": [1, 2, {"x": 0.5}]}


def flipped(data: bytes) -> list[bytes]:
    """The data with any one bit changed."""
    return [
        data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]
        for place in range(len(data))
        for bit in range(8)
    ]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_file_is_read_back_and_no_flipped_bit_is(tmp_path, indent):
    file = tmp_path / "note.json"
    write_signed_json(file, VALUE, indent=indent)
    assert read_signed_json(file, "mend it", ["scores"]) == VALUE
    assert list(json.loads(file.read_text())) == [*VALUE, "digest"]  # anybody reads it
    data = file.read_bytes()
    for changed in [*flipped(data), b"", data[: len(data) // 2], data[:-1], data * 2, data.replace(b"0.93", b"NaN")]:
        file.write_bytes(changed)
        with pytest.raises(Damaged, match=r"note\.json cannot be read or is damaged .*: mend it"):
            read_signed_json(file, "mend it")


def test_what_earlier_versions_wrote_is_read_unless_it_is_none_of_them(tmp_path):
    file = tmp_path / "note.json"
    file.write_text(json.dumps(VALUE, indent=2) + "\n")
    assert read_signed_json(file, "mend it") == VALUE
    for text in ("[]", '{"a": NaN}', '{"a": 1}', '{"a": 1, "digest": "0123"}'):
        file.write_text(text)
        with pytest.raises(Damaged):
            read_signed_json(file, "mend it", ["scores"])
    with pytest.raises(Damaged, match="No such file"):
        read_signed_json(tmp_path / "nowhere", "mend it")
    with pytest.raises(ValueError):
        write_signed_json(file, {"a": float("nan")})


def test_a_text_with_a_comment(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(signed_text("seed: 1\nbeta: 500.0\n"))
    check_text(file, "mend it")
    data = file.read_bytes()
    body = data.index(b"\n") + 1
    for changed in [*flipped(data[body:]), b"seed: 1\n", b""]:
        file.write_bytes(data[:body] + changed)
        with pytest.raises(Damaged, match=r"config\.yaml .*: mend it"):
            check_text(file, "mend it")
    file.write_text("seed: 1\n")  # somebody's own
    check_text(file, "mend it")
    file.write_text("")
    with pytest.raises(Damaged):
        check_text(file, "mend it")


def test_a_png_is_the_same_picture_and_no_flipped_bit_is_whole():
    random_ = np.random.default_rng(0)
    image, texts, buffer = Image.fromarray(random_.integers(0, 256, (5, 4, 3), dtype=np.uint8)), PngInfo(), io.BytesIO()
    texts.add_text("prompt", "a cat — 雪")
    image.save(buffer, "PNG", pnginfo=texts)
    plain = buffer.getvalue()
    data = signed_png(plain)
    with Image.open(io.BytesIO(data)) as read:
        read.load()
        assert np.array_equal(np.asarray(read), np.asarray(image)) and read.text["prompt"] == "a cat — 雪"
        assert len(read.text["checksum"]) == 32
    assert png_is_whole(data) is True and png_is_whole(plain) is None and png_is_whole(b"") is None
    assert not any(png_is_whole(changed) for changed in [*flipped(data), data[:-1], data[: len(data) // 2]])


def test_digests_of_files(tmp_path):
    data = random.Random(0).randbytes(5 << 20)  # more than is read at once
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "b").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert sha256_of(tmp_path / "a") == hashlib.sha256(data).hexdigest()
    assert file_digest(tmp_path / "a") != file_digest(tmp_path / "b")
    assert len(file_digest(tmp_path / "a")) == 32
