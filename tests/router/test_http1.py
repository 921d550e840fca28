"""The response parser, with the bytes cut in every possible place and with hostile ones."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.http1 import MAX_HEAD_BYTES, ProtocolError, ResponseParser, whole_chunks

LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-A:  b \r\n\r\nhello"
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5\r\nhello\r\nB;x=y\r\n, and more!\r\n0\r\nTrailer: x\r\n\r\n"
)
CONTINUED = b"HTTP/1.1 100 Continue\r\n\r\n" + LENGTH


def parse(pieces: list[bytes]) -> tuple[ResponseParser, bytes]:
    parser = ResponseParser()
    body = b"".join(part for piece in pieces for part in parser.feed(piece))
    return parser, body


@pytest.mark.parametrize(("data", "body"), [(LENGTH, b"hello"), (CHUNKED, b"hello, and more!"), (CONTINUED, b"hello")])
def test_any_cut_in_three_gives_the_same_body(data, body):
    for first in range(len(data)):
        for second in range(first, len(data), 7):
            parser, got = parse([data[:first], data[first:second], data[second:]])
            assert got == body
            assert parser.done
            assert not parser.leftover
            assert parser.head is not None
            assert parser.head.status == 200


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=8), st.lists(st.integers(0, 3000), max_size=12))
def test_chunks_come_out_as_they_went_in_however_they_are_cut(chunks, cuts):
    data = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    data += b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    parser, body = parse([data[a:b] for a, b in itertools.pairwise(places)])
    assert body == b"".join(chunks)
    assert parser.done


def test_headers_have_lower_names_and_clean_values():
    parser, _ = parse([LENGTH])
    assert parser.head.get(b"x-a") == b"b"
    assert parser.head.get(b"x-b") is None


@pytest.mark.parametrize(
    ("head", "kept"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nConnection: Close\r\nContent-Length: 0\r\n\r\n", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", False),
        (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\n", True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", True),
    ],
)
def test_whether_the_connection_lives_on(head, kept):
    parser, _ = parse([head])
    assert parser.done
    assert parser.head.keep_alive is kept


def test_without_length_the_end_of_input_is_the_end():
    parser, body = parse([b"HTTP/1.1 200 OK\r\n\r\nsome", b"thing"])
    assert body == b"something"
    assert not parser.done
    assert parser.end_of_input()


@pytest.mark.parametrize("data", [LENGTH[:-1], CHUNKED[:-2], b"HTTP/1.1 200"])
def test_an_early_end_of_input_is_no_end(data):
    parser, _ = parse([data])
    assert not parser.end_of_input()


def test_surplus_bytes_are_noticed():
    parser, body = parse([LENGTH + b"HTTP/1.1 200"])
    assert body == b"hello"
    assert parser.leftover


@pytest.mark.parametrize(
    "data",
    [
        b"ICY 200 OK\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nname : x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b\r\n folded\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"x" * (MAX_HEAD_BYTES + 1),
        *(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk
            for chunk in (b"-5\r\n", b"+5\r\n", b"0x5\r\n", b"1_0\r\n", b"\r\n", b"g\r\n", b"5\r\nhelloXX", b"1" * 5000)
        ),
    ],
)
def test_what_is_not_http_is_an_error(data):
    with pytest.raises(ProtocolError):
        parse([data])


def noted(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(b"%x%b\r\n%b\r\n" % (len(data), note, data) for note, data in chunks)
    return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"


def test_chunks_with_an_extension_come_whole_and_their_extensions_are_kept():
    stream = noted((b";t=1", b"one"), (b"", b"plain"), (b";t=2.3", b"two and three"), (b" ;end", b"last"))
    for step in range(1, len(stream)):
        parser = ResponseParser()
        seen: list[bytes] = []
        for at in range(0, len(stream), step):
            for piece in parser.feed(stream[at : at + step]):
                seen.append(piece)
                done = b"".join(seen)
                assert parser.notes.startswith(b";t=1")
                assert (b";t=2.3" in parser.notes) >= (b"two" in done)
        assert parser.done
        assert b"".join(seen) == b"oneplaintwo and threelast"
        assert {b"one", b"two and three", b"last"} <= set(seen)
        assert bytes(parser.notes) == b";t=1;t=2.3;end"
        assert not parser.leftover


def test_a_chunk_with_an_extension_that_breaks_off_is_not_seen_at_all():
    stream = noted((b";t=1", b"one"), (b";t=2", b"two"))
    for end in range(len(stream)):
        parser = ResponseParser()
        seen = b"".join(parser.feed(stream[:end]))
        assert (seen, bytes(parser.notes)) in ((b"", b""), (b"one", b";t=1"), (b"onetwo", b";t=1;t=2"))


def test_a_huge_chunk_with_an_extension_is_refused_before_it_is_collected():
    parser = ResponseParser()
    with pytest.raises(ProtocolError, match="extension"):
        parser.feed(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n7fffffff;t=1\r\nabc")


def test_where_a_chunk_begins_is_known():
    parser = ResponseParser()
    assert not parser.at_chunk
    expected = []
    for byte in b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3;a\r\nabc\r\n2\r\nde\r\n0\r\n\r\n":
        parser.feed(bytes([byte]))
        expected.append(parser.at_chunk)
    body = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    begins = {len(body) - 1, len(body + "3;a\r\nabc\r\n") - 1, len(body + "3;a\r\nabc\r\n2\r\nde\r\n") - 1}
    assert {at for at, begin in enumerate(expected) if begin} == begins
    parser = ResponseParser()
    parser.feed(b"HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\n")
    assert not parser.at_chunk


@given(
    st.lists(st.tuples(st.binary(max_size=20), st.sampled_from([b"", b";t=1", b";end"])), max_size=4),
    st.binary(max_size=4),
)
def test_whole_chunks_are_what_the_parser_makes_of_them(chunks, rest):
    data = b"".join(b"%x%b\r\n%b\r\n" % (len(piece), note, piece) for piece, note in chunks) + rest
    found = whole_chunks(data)
    if not rest and all(piece and b"\r" not in piece and b"\n" not in piece for piece, _ in chunks):
        assert found is not None
    if found is not None:
        parser = ResponseParser()
        pieces = parser.feed(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + data)
        assert found == (b"".join(pieces), bytes(parser.notes))
        assert parser.at_chunk


@pytest.mark.parametrize("size", [b"+1", b"01", b"0x1", b" 1", b"1 ", b"1_", b"-1", b"", b"2", b"A"])
def test_whole_chunks_have_sizes_in_plain_hex(size):
    assert whole_chunks(size + b"\r\nx\r\n") is None
    assert whole_chunks(b"1\r\nx\r\n") == (b"x", b"")
    assert whole_chunks(b"1\r\nx\r\n0\r\n\r\n") is None
