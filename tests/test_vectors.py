"""Cut, normalise, quantise: against arithmetic written out number by number."""

import base64
import math
import struct
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fundament.vectors import Encoding, Floats, cosine, dot, encode, encode_each, maxsim, shorten, shorten_each

LARGEST = float(np.finfo(np.float32).max)

numbers = st.floats(-LARGEST, LARGEST, width=32)
vectors = arrays.arrays(np.float32, st.integers(1, 40), elements=numbers)
matrices = arrays.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 40)), elements=numbers)


def length(vector: Floats) -> float:
    return math.sqrt(math.fsum(float(number) ** 2 for number in vector))


@given(matrix=matrices, dimensions=st.none() | st.integers(1, 40))
def test_shorten_keeps_the_first_numbers(matrix: Floats, dimensions: int | None) -> None:
    kept = shorten(matrix, dimensions, normalized=False)
    np.testing.assert_array_equal(kept, matrix[:, :dimensions])
    assert kept.dtype == np.float32
    assert kept.flags.c_contiguous


@given(matrix=matrices, dimensions=st.none() | st.integers(1, 40))
def test_shorten_cuts_first_and_then_scales_to_unit_length(matrix: Floats, dimensions: int | None) -> None:
    before = matrix.copy()
    scaled = shorten(matrix, dimensions, normalized=True)
    np.testing.assert_array_equal(matrix, before)
    assert scaled.dtype == np.float32
    for given_, found in zip(matrix[:, :dimensions], scaled, strict=True):
        whole = length(given_)
        if whole == 0:
            assert not found.any()
        else:
            assert length(found) == pytest.approx(1, abs=1e-5)
            np.testing.assert_allclose(found, [float(number) / whole for number in given_], rtol=1e-5, atol=1e-7)


@given(vector=vectors)
def test_base64_is_the_floats_little_endian(vector: Floats) -> None:
    written = encode(vector, "base64")
    assert isinstance(written, str)
    assert base64.b64decode(written, validate=True) == struct.pack(f"<{len(vector)}f", *vector)


@given(vector=vectors)
def test_bits_say_which_numbers_are_above_zero(vector: Floats) -> None:
    bits = "".join("1" if number > 0 else "0" for number in vector)
    octets = [int(bits[start : start + 8].ljust(8, "0"), 2) for start in range(0, len(bits), 8)]
    unsigned, signed = encode(vector, "ubinary"), encode(vector, "binary")
    assert isinstance(unsigned, np.ndarray)
    assert isinstance(signed, np.ndarray)
    assert unsigned.tolist() == octets
    assert signed.tolist() == [octet - 128 for octet in octets]
    assert signed.dtype == np.int8


def test_binary_is_the_measured_offset() -> None:
    octets = np.array([50, 193, 128, 255], dtype=np.uint8)
    vector = np.unpackbits(octets).astype(np.float32) - 0.5
    assert np.asarray(encode(vector, "ubinary")).tolist() == [50, 193, 128, 255]
    assert np.asarray(encode(vector, "binary")).tolist() == [-78, 65, 0, 127]


@given(vector=vectors)
def test_float_is_the_vector_itself(vector: Floats) -> None:
    assert encode(vector, "float") is vector


def test_each_of_several_vectors_is_cut_scaled_and_written_alone() -> None:
    generator = np.random.default_rng(5)
    rows = [generator.standard_normal((n, 12)).astype(np.float32) for n in (3, 1, 5)]
    for row, short in zip(rows, shorten_each(rows, 8, normalized=True), strict=True):
        np.testing.assert_array_equal(short, shorten(row, 8, normalized=True))
        for encoding in get_args(Encoding):
            for written, vector in zip(encode_each(short, encoding), short, strict=True):
                alone = encode(vector, encoding)
                assert written == alone if isinstance(alone, str) else (written == alone).all()


def naive_cosine(one: Floats, other: Floats) -> float:
    product = math.fsum(float(a) * float(b) for a, b in zip(one, other, strict=True))
    return product / (length(one) * length(other) or 1)


def documents_of(dim: int, n_tokens: int) -> st.SearchStrategy[Floats]:
    return arrays.arrays(np.float32, (n_tokens, dim), elements=st.floats(-100, 100, width=32))


@given(data=st.data(), dim=st.integers(1, 20))
def test_cosine_compares_one_vector_with_each(data: st.DataObject, dim: int) -> None:
    query, documents = data.draw(documents_of(dim, 1))[0], data.draw(documents_of(dim, 4))
    expected = [naive_cosine(query, document) for document in documents]
    np.testing.assert_allclose(cosine(query, documents), expected, atol=1e-5)


def test_no_cosine_is_above_one() -> None:
    """Of these, some are where the product of two unit vectors is rounded up."""
    drawn = np.random.default_rng(0).standard_normal((200, 7)).astype(np.float32)
    unit = shorten(drawn, None, normalized=True)
    assert max(float(one @ one) for one in unit) > 1
    for one in drawn:
        assert np.abs(cosine(one, np.stack([one, -one]))).max() <= 1
        assert maxsim(one[None], [one[None]])[0] <= 1


@given(data=st.data(), dim=st.integers(1, 20))
def test_maxsim_sums_each_query_tokens_best(data: st.DataObject, dim: int) -> None:
    query = data.draw(documents_of(dim, data.draw(st.integers(1, 5))))
    documents = [data.draw(documents_of(dim, n)) for n in data.draw(st.lists(st.integers(1, 5), max_size=4))]
    expected = [sum(max(naive_cosine(q, d) for d in document) for q in query) for document in documents]
    np.testing.assert_allclose(maxsim(query, documents), expected, atol=1e-4)


def test_dot_multiplies_the_weights_of_shared_tokens() -> None:
    query = {"a": 2.0, "b": 0.5}
    assert dot(query, [{"a": 3.0, "c": 9.0}, {}, {"b": 1.0, "a": 1.0}]).tolist() == [6.0, 0.0, 2.5]
    assert dot({}, [{"a": 1.0}]).tolist() == [0.0]
