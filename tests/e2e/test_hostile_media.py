"""Files that no client means well: each costs its own request a clear refusal, and the server nothing."""

import base64
import zlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pillow_heif
import pytest

from tests.checkpoints.clip import WIDTH, clip
from tests.checkpoints.omni import HIDDEN, omni
from tests.contract.schemas import conforms
from tests.media.files import (
    RED,
    bmp,
    encrypted,
    flac,
    gif,
    jpeg_video,
    many_frames,
    many_pages,
    many_scans,
    noise,
    painted,
    pdf,
    plain,
    png,
    saved,
    still,
    stream,
    tiff,
    video,
    wav,
    webp,
)
from tests.served import Served, serving

CLIP, OMNI = "jina-clip-v2", "jina-embeddings-v5-omni-small"
ROOM_MEGABYTES = 400  # far less than any of these would fill, far more than decoding what is allowed takes here
FLAT_MEGABYTES = 50  # what memory may differ by when all of these have come again and again


def zeros(n: int) -> bytes:
    """A million bytes of nothing, n times over, compressed."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1_000_000)) for _ in range(n)) + packer.flush()


def page_of_a_large_image() -> bytes:
    """A page that shows 1.6 thousand million pixels."""
    entries = b"/Type/XObject/Subtype/Image/Width 40000/Height 40000/ColorSpace/DeviceGray/BitsPerComponent 8"
    image = stream(zeros(1600), entries + b"/Filter/FlateDecode")
    return pdf([b"72 0 0 36 0 0 cm /I Do"], resources=b"/XObject<</I 5 0 R>>", more=[image])


pillow_heif.register_heif_opener()  # of this process, to write such files


def said_to_be(width: int, height: int, form: str) -> bytes:
    """A HEIC or AVIF file of a small picture that says it is of another size."""
    content, says = saved(noise(64, 64), form), b"ispe" + bytes(4)
    assert content.count(says + (64).to_bytes(4) * 2) == 1
    return content.replace(says + (64).to_bytes(4) * 2, says + width.to_bytes(4) + height.to_bytes(4))


PNG, JPEG = saved(noise(64, 64)), saved(noise(64, 64), "JPEG")
HOSTILE = {
    "nothing": ("image", b"", "neither a URL, nor a data URI, nor base64"),
    "a text": ("image", b"once upon a time", "not an image of a known format"),
    "a cut PNG": ("image", PNG[: len(PNG) // 2], "damaged or cut short"),
    "a cut JPEG": ("image", JPEG[:700], "damaged or cut short"),
    "a PNG's name alone": ("image", PNG[:8], "damaged or cut short"),
    "a PNG without pixels": ("image", png(64, 64), "damaged or cut short"),
    "no height": ("image", png(64, 0), "damaged or cut short"),
    "40,000 x 40,000": ("image", png(40_000, 40_000), "40000 x 40000 pixels"),
    "a PNG bomb": ("image", png(30_000, 30_000, zeros(20)), "30000 x 30000 pixels"),
    "a WebP bomb": ("image", webp(16_384, 16_384), "16384 x 16384 pixels"),
    "a GIF bomb": ("image", gif(65_535, 65_535), "65535 x 65535 pixels"),
    "a BMP bomb": ("image", bmp(50_000, 50_000), "50000 x 50000 pixels"),
    "a TIFF bomb": ("image", tiff(60_000, 60_000), "60000 x 60000 pixels"),
    "a JPEG of 100,000 scans": ("image", many_scans(100_000), "a JPEG of 100,000 scans, more than the 100 allowed"),
    "a cut HEIC": ("image", saved(noise(64, 64), "HEIF")[:-200], "damaged or cut short"),
    "a cut AVIF": ("image", saved(noise(64, 64), "AVIF")[:-200], "damaged or cut short"),
    "a HEIC bomb": ("image", said_to_be(40_000, 40_000, "HEIF"), "40000 x 40000 pixels|damaged or cut short"),
    "an AVIF bomb": ("image", said_to_be(40_000, 40_000, "AVIF"), "40000 x 40000 pixels|damaged or cut short"),
    "a line": ("image", plain(RED, 10_000, 1), "10000 x 1 pixels"),
    "text that unfolds": ("image", png(8, 8, b"", (b"zTXt", b"a\0\0" + zeros(200))), "damaged or cut short"),
    "a sound for an image": ("image", wav(np.zeros(100)), "its bytes are WAV"),
    "a PDF for an image": ("image", pdf([b""]), "its bytes are PDF"),
    "an image for a PDF": ("pdf", PNG, "its bytes are PNG"),
    "a page behind a page": ("image", b"<html><svg></svg></html>", "not an image of a known format"),
    "a GIF that is a script": ("image", b"GIF89a/*" + b"\xff" * 30 + b"*/=1;alert(1)", "damaged or cut short|pixels"),
    "a JPEG that is a PDF": ("pdf", JPEG + pdf([b""]), "its bytes are JPEG"),
    "10,000 pages": ("pdf", many_pages(10_000), "10,000 pages, more than the 100 allowed"),
    "an encrypted PDF": ("pdf", encrypted(), "needs a password"),
    "a cut PDF": ("pdf", b"%PDF-1.7\n1 0 obj\n<</Type/Catalog", "damaged or cut short"),
    "a video": ("video", video([1, 2]), f"Models served here that take video input: {OMNI}"),
    "a sound": ("audio", wav([0.0] * 100), f"Models served here that take audio input: {OMNI}"),
}
MP4 = video([1, 2, 3], "mp4", codec="mpeg4")
HOSTILE_RECORDINGS = {
    "NaN": ("audio", wav([0.0] * 8000 + [np.nan]), "samples that are not finite numbers"),
    "infinity": ("audio", wav([np.inf, -np.inf] * 4000), "samples that are not finite numbers"),
    "no samples": ("audio", wav([]), "no samples"),
    "a cut sound": ("audio", wav(np.zeros(100))[:30], "damaged or cut short"),
    "a sound that unfolds": ("audio", wav(np.zeros(299), rate=1), "takes 299 seconds, and the model reads 30"),
    "a sound of a sample per second": ("audio", wav(np.zeros(400), rate=1), "longer than the 300 seconds allowed"),
    "a sound that unfolds in one step": ("audio", flac(16_000, rate=1), "longer than the 300 seconds allowed"),
    "80 million frames of a byte": ("video", many_frames(80_000_000), "has no frames|cannot be decoded"),
    "no frames": ("video", video([]), "damaged or cut short"),
    "no frames, and an index": ("video", video([], "avi", codec="mpeg4"), "no frames|no pictures"),
    "a cut video": ("video", MP4[: len(MP4) // 2], "damaged or cut short|codec is not known"),
    "a video cut in its index": ("video", MP4[:-300], "damaged or cut short"),
    "a video's name alone": ("video", MP4[:32], "damaged or cut short"),
    "frames as large as a wall": ("video", still(2, 4000, 2500), "frames of 4000 x 2500 pixels"),
    "more frames than minutes hold": ("video", still(10_001, 16, 16), "more than the 10,000 frames allowed"),
    "large frames again and again": ("video", still(1_100, 4096, 2304), "10,381 million pixels in all its frames"),
    "a frame of 100,000 scans": ("video", jpeg_video(many_scans(100_000)), "a JPEG of 100,000 scans"),
    "a list of other files": ("video", b"ffconcat version 1.0\nfile /etc/passwd\n", "not a video of a known format"),
    "a video for a sound": ("audio", video([1, 2]), "no sound track"),
}
TAKEN = {
    "trailing bytes": ("image", PNG + b"PK\x03\x04" + bytes(1000)),
    "a damaged EXIF block": ("image", saved(noise(8, 8), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")),
    "a page as large as a country": ("pdf", pdf([painted(RED)], box="0 0 1000000 1000000")),
    "as many scans as are allowed": ("image", many_scans(100)),
    "a page of a large image": ("pdf", page_of_a_large_image()),
}
TAKEN_RECORDINGS = {
    "as many frames as are allowed": ("video", still(10_000, 16, 16)),
    "a frame of as many scans as are allowed": ("video", jpeg_video(many_scans(100))),
    "a sound of as much as is read": ("audio", wav(np.zeros(30), rate=1)),
}
ROWS = {name: (CLIP, *row) for name, row in {**HOSTILE, **TAKEN}.items()}
ROWS |= {name: (OMNI, *row) for name, row in {**HOSTILE_RECORDINGS, **TAKEN_RECORDINGS}.items()}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("hostile")
    models = f"{CLIP}={clip(folder / 'clip')},{OMNI}={omni(folder / 'omni', 'small')}"
    with serving(folder, dims={CLIP: WIDTH, OMNI: HIDDEN}, models=models, dtype="float32") as server:
        server.http.event_hooks["response"].append(conforms)
        yield server


def send(server: Served, model: str, kind: str, content: bytes) -> httpx.Response:
    body = {"model": model, "input": {kind: base64.b64encode(content).decode()}}
    return server.http.post("/v1/embeddings", json=body)


def megabytes(server: Served, what: str) -> float:
    """Memory of the server: the most that it has had, `VmHWM`, or what it has, `VmRSS`."""
    status = Path(f"/proc/{server.process.pid}/status")
    if not status.exists():
        pytest.skip("this system does not tell")
    [line] = [line for line in status.read_text().splitlines() if line.startswith(what)]
    return int(line.split()[1]) / 1000


@pytest.mark.parametrize("name", ROWS)
def test_a_hostile_file_costs_its_own_request_only(server: Served, name: str) -> None:
    model, kind, content, *words = ROWS[name]
    good = send(server, model, "image", PNG)
    assert good.status_code == 200
    before = megabytes(server, "VmHWM")
    answer = send(server, model, kind, content)
    if words:
        assert answer.status_code == 422, answer.text
        assert any(word in answer.json()["detail"] for word in words[0].split("|")), answer.json()["detail"]
        assert answer.json()["errors"][0]["field"].startswith("body -> input")
    else:
        assert answer.status_code == 200, answer.text
    assert megabytes(server, "VmHWM") - before < ROOM_MEGABYTES
    assert send(server, model, "image", PNG).json()["data"] == good.json()["data"]


def test_hostile_files_leave_nothing_in_memory(server: Served) -> None:
    def send_all() -> float:
        for model, kind, content, *words in ROWS.values():
            if words:
                assert send(server, model, kind, content).status_code == 422
        return megabytes(server, "VmRSS")

    before = send_all()  # what comes first fills caches and pools
    for _ in range(3):
        after = send_all()
    assert after - before < FLAT_MEGABYTES


def test_no_refusal_is_an_error_of_the_server(server: Served) -> None:
    assert not [event for event in server.events() if event.get("level") in ("error", "critical")]
