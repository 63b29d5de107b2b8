"""Videos and sounds: which frames, which samples, and what is refused."""

import io

import numpy as np
import pytest

from fundament.core import Interest, Media, MediaLimits
from fundament.errors import InputError
from fundament.media import frames, sound
from fundament.media.arrays import RGB
from fundament.media.formats import format_of
from tests.media.files import audio, plain, recut, still, turned, video, wav

av = pytest.importorskip("av")

SHADES = list(range(0, 200, 20))


def seen(content: bytes, n: int, limits: MediaLimits | None = None) -> list[RGB]:
    found = list(frames(Media("video", content, limits=limits or MediaLimits()), n))
    assert {told for _, told in found} == {len(found)}
    return [frame for frame, _ in found]


def shades(content: bytes, n: int, limits: MediaLimits | None = None) -> list[int]:
    return [round(float(frame.mean())) for frame in seen(content, n, limits)]


def heard(content: bytes, rate: int = 8000, limits: MediaLimits | None = None) -> np.ndarray:
    found = sound(Media("audio", content, limits=limits or MediaLimits()), rate)
    assert found is not None
    assert found.dtype == np.float32
    return found


def refused(content: bytes, kind: str = "video", limits: MediaLimits | None = None) -> str:
    with pytest.raises(InputError) as refusal:
        shades(content, 4, limits) if kind == "video" else heard(content, limits=limits)
    return refusal.value.faults[0].message


@pytest.mark.parametrize("n", [1, 2, 3, 9, 10, 11, 32])
def test_frames_are_evenly_spread_from_the_first_to_the_last(n: int) -> None:
    wanted = np.linspace(0, 9, min(n, 10)).astype(int)
    np.testing.assert_allclose(shades(video(SHADES), n), [SHADES[place] for place in wanted], atol=1)


@pytest.mark.parametrize("form", ["mp4", "mov"])
def test_frames_that_a_trimmed_video_hides_are_not_read(form: str) -> None:
    content = recut(video(SHADES, "mp4", codec="mpeg4", interval=100), form, n_hidden=4)
    assert len(seen(content, 100)) == 6
    np.testing.assert_allclose(shades(content, 3), [SHADES[place] for place in (4, 6, 9)], atol=3)


@pytest.mark.parametrize("form", ["matroska", "mp4"])
def test_frames_that_build_on_lost_ones_are_not_read(form: str) -> None:
    content = recut(video(SHADES, "matroska", codec="mpeg4", interval=4), form, n_lost=2)
    assert len(seen(content, 100)) == 6
    np.testing.assert_allclose(shades(content, 3), [SHADES[place] for place in (4, 6, 9)], atol=3)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_a_video_is_upright_as_a_player_shows_it(degrees: int) -> None:
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:16, :32], picture[16:, :32], picture[16:, 32:] = 60, 120, 200
    [found] = seen(turned(picture, degrees), 1)
    np.testing.assert_allclose(found.astype(int), np.rot90(picture, -degrees // 90), atol=12)


@pytest.mark.parametrize(
    ("form", "codec"),
    [("matroska", "ffv1"), ("mp4", "mpeg4"), ("avi", "mpeg4"), ("mpegts", "mpeg2video"), ("mov", "mpeg4")],
)
def test_every_container_is_known_by_its_bytes(form: str, codec: str) -> None:
    content = video(SHADES, form, codec=codec, rate=25)
    found = seen(content, 4)
    assert [frame.shape for frame in found] == [(16, 32, 3)] * 4
    for frame, shade in zip(found, (0, 60, 120, 180), strict=True):
        assert abs(float(frame.mean()) - shade) < 4


@pytest.mark.parametrize(
    ("form", "codec", "name"), [("webm", "libvpx", "Matroska"), ("flv", "flv1", "FLV"), ("asf", "wmv2", "ASF")]
)
def test_older_and_other_videos_are_read(form: str, codec: str, name: str) -> None:
    content = video([10, 20, 30], form, codec=codec, rate=25)
    assert format_of(content).name == name
    assert len(shades(content, 3)) == 3


@pytest.mark.parametrize(
    ("form", "codec", "name"),
    [
        ("wav", "pcm_s16le", "WAV"),
        ("flac", "flac", "FLAC"),
        ("mp3", "libmp3lame", "MP3"),
        ("ogg", "libopus", "Ogg"),
        ("ipod", "aac", "M4A"),
        ("adts", "aac", "AAC"),
        ("aiff", "pcm_s16be", "AIFF"),
        ("matroska", "aac", "Matroska"),
    ],
)
def test_sounds_are_read_whatever_they_are_packed_in(form: str, codec: str, name: str) -> None:
    content = audio(form, codec, 48_000)
    assert format_of(content).name == name
    samples = heard(content, 16_000)
    assert 0.9 < len(samples) / 16_000 < 1.15  # codecs add silence at the ends
    assert 0.2 < np.abs(samples).max() < 0.3


def test_a_video_may_have_a_sound_track_or_none() -> None:
    assert sound(Media("video", video([1, 2])), 16000) is None
    with_tone = sound(Media("video", video([1, 2], tone=True)), 16000)
    assert with_tone is not None
    assert with_tone.shape == (8000,)


def test_samples_at_the_files_own_rate_are_the_files_own() -> None:
    samples = np.sin(np.arange(800) / 10).astype(np.float32)
    np.testing.assert_allclose(heard(wav(samples)), samples, atol=1e-6)


def test_channels_become_one_and_the_rate_becomes_what_is_asked() -> None:
    left = np.sin(np.arange(8000) / 40).astype(np.float32)
    mono = heard(wav(np.stack([left, left / 2], axis=1).ravel(), n_channels=2))
    np.testing.assert_allclose(mono, 0.75 * left, atol=1e-6)
    assert abs(len(heard(wav(left), 16000)) - 16000) <= 32
    np.testing.assert_allclose(heard(wav(left), 16000)[100:-100:2][:7000], left[50:7050], atol=0.01)


@pytest.mark.parametrize("n_channels", [1, 2, 7, 8, 9, 16, 64])
def test_any_number_of_channels_becomes_one(n_channels: int) -> None:
    wave = np.sin(np.arange(400) / 10).astype(np.float32)
    loudness = np.arange(1, n_channels + 1, dtype=np.float32) / n_channels
    mono = heard(wav((wave[:, None] * loudness).ravel(), n_channels=n_channels))
    np.testing.assert_allclose(mono, wave * loudness.mean(), atol=1e-5)


@pytest.mark.parametrize("rate", [768_001, 100_000_007])
def test_a_rate_that_takes_long_to_convert_is_refused(rate: int) -> None:
    assert f"{rate:,} samples a second" in refused(wav(np.zeros(160), rate=rate), "audio")


def test_a_video_whose_sound_track_is_empty_has_none() -> None:
    assert sound(Media("video", video([1, 2], tone=True, tone_samples=0)), 16000) is None


def test_a_stream_that_begins_after_the_first_frames_is_no_error_of_the_servers() -> None:
    tag = bytes([0x2E]) + b"\xff\xfb" + bytes(100)  # MP3, and the file's head tells of no sound
    late = bytes([8]) + len(tag).to_bytes(3, "big") + bytes([0, 66, 104, 0, 0, 0, 0]) + tag
    content = video(list(range(200)), "flv", codec="flv1") + late + len(late).to_bytes(4, "big")
    assert "cannot be decoded" in refused(content)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers_are_refused(bad: float) -> None:
    samples = np.zeros(1000, np.float32)
    samples[500] = bad
    assert refused(wav(samples), "audio") == "This sound has samples that are not finite numbers."


def test_length_is_checked_by_what_the_file_says_and_by_what_it_holds() -> None:
    limits = MediaLimits(seconds=1)
    assert len(heard(wav(np.zeros(8000)), limits=limits)) == 8000
    assert "longer than the 1 seconds allowed" in refused(wav(np.zeros(8001)), "audio", limits)
    says_less = bytearray(wav(np.zeros(16000)))
    says_less[40:44] = (100).to_bytes(4, "little")  # the size of its samples
    assert len(heard(bytes(says_less), limits=limits)) <= 8000
    assert "longer than the 1 seconds" in refused(video(SHADES, rate=5), limits=limits)
    assert "more than the 9 frames allowed" in refused(video(SHADES), limits=MediaLimits(video_frames=9))


@pytest.mark.parametrize("form", ["matroska", "webm", "mp4", "avi", "wav"])
def test_a_file_that_was_cut_is_refused(form: str) -> None:
    kind, codec = "audio" if form == "wav" else "video", {"webm": "vp8", "mp4": "mpeg4"}.get(form, "ffv1")
    whole = wav([0.1] * 16_000) if form == "wav" else video(SHADES, form, codec=codec)
    heard(whole) if kind == "audio" else shades(whole, 4)
    for share in (0.5, 0.8):
        told = refused(whole[: int(share * len(whole))], kind)
        assert "cut short" in told or (form == "mp4" and "no pictures" in told)  # whose index is at its end
    if form == "wav":  # what a program writes that does not know how much will follow
        assert len(heard(whole[:4] + b"\xff\xff\xff\xff" + whole[8:40_000])) > 0


def test_a_sound_may_end_before_the_pictures_beside_it() -> None:
    assert len(heard(video(SHADES, tone=True, tone_samples=2000))) == 2000


def test_a_sound_may_begin_late() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.full((1, 8000), 9, np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts = 8000, 80_000
        container.mux([*stream.encode(frame), *stream.encode()])
    assert len(heard(file.getvalue())) == 8000


def test_a_file_of_many_tracks_is_refused() -> None:
    def tracks(n: int) -> bytes:
        file = io.BytesIO()
        with av.open(file, "w", format="mp4") as container:
            streams = [container.add_stream("mpeg4", rate=10) for _ in range(n)]
            for stream in streams:
                stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
            for stream in streams:
                frame = av.VideoFrame.from_ndarray(np.zeros((16, 32, 3), np.uint8), format="rgb24")
                container.mux([*stream.encode(frame), *stream.encode()])
        return file.getvalue()

    assert len(shades(tracks(16), 4)) == 1
    assert "cannot be decoded" in refused(tracks(17))


def test_pixels_of_all_frames_are_counted_before_they_are_decoded() -> None:
    assert len(shades(still(20, 32, 16), 4, MediaLimits(video_pixels=20 * 32 * 16))) == 4
    words = "This video has 10 million pixels in all its frames together, more than the 9.9 million allowed."
    assert refused(still(20, 1000, 500), limits=MediaLimits(video_pixels=9_900_000)).startswith(words)


def test_decoding_ends_when_it_has_taken_its_time() -> None:
    assert list(frames(Media("video", still(20, 32, 16)), 4, most_seconds=60))
    for kind, content in (("video", still(20, 32, 16)), ("audio", wav(np.zeros(8000)))):
        with pytest.raises(InputError) as refusal:
            if kind == "video":
                list(frames(Media("video", content), 4, most_seconds=0))
            else:
                sound(Media("audio", content), 8000, most_seconds=0)
        assert refusal.value.faults[0].message.startswith(f"This {kind} takes too much to decode.")


def test_decoding_ends_when_nobody_waits_any_more() -> None:
    interest = Interest()
    found = frames(Media("video", video(SHADES), interest=interest), 10)
    picture, n_frames = next(found)
    assert (picture.shape, n_frames) == ((16, 32, 3), 10)
    interest.lose()
    with pytest.raises(InputError, match="Nobody waits"):
        next(found)


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        (video([]), "video", "cannot be decoded"),
        (video([1, 2], "mp4", codec="mpeg4")[:600], "video", "cannot be decoded"),
        (video([1, 2], "mp4", codec="mpeg4")[:-300], "video", "cannot be decoded"),
        (video([0], "mp4", codec="mpeg4", width=4000, height=2500), "video", "frames of 4000 x 2500 pixels"),
        (wav([]), "audio", "no samples"),
        (wav(np.zeros(100))[:30], "audio", "cannot be decoded"),
        (video([1, 2]), "audio", "no sound track"),
        (wav(np.zeros(100)), "video", 'its bytes are WAV. Where it is taken, send it as {"audio": …}'),
        (plain((0, 0, 0)), "video", 'its bytes are PNG. Where it is taken, send it as {"image": …}'),
        (b"#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1/x.ts\n", "video", "not a video of a known format"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "video", "not a video of a known format"),
        (b"\x1a\x45\xdf\xa3" + bytes(1000), "video", "cannot be decoded"),
        (b"OggS" + bytes(1000), "audio", "cannot be decoded"),
        (b"ID3" + bytes(1000), "audio", "cannot be decoded"),
    ],
)
def test_what_cannot_be_decoded_is_refused(content: bytes, kind: str, words: str) -> None:
    assert words in refused(content, kind)


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\0\0\0\x1cftypM4A \0\0\0\0M4A mp42isom", "M4A"),
        (b"\0\0\0\x18ftypqt  \0\0\0\0qt  ", "MP4"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "AVIF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\xff\xfb\x90\x64" + bytes(10), "MP3"),
        (b"\xff\xf1\x50\x80" + bytes(10), "AAC"),
        (b"fLaC" + bytes(10), "FLAC"),
        (b"hello", None),
        (b"", None),
    ],
)
def test_formats_are_told_by_their_first_bytes(head: bytes, name: str | None) -> None:
    form = format_of(head)
    assert (form and form.name) == name
