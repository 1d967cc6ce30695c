import pytest

from lowmem_db.config.sizes import parse_bytes


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("8GiB", 8 << 30),
        ("8", 8 << 30),
        (8, 8 << 30),
        ("8G", 8 << 30),
        ("8 GB", 8 << 30),
        ("7.5g", 15 << 29),
        ("0.5", 1 << 29),
        ("512mib", 512 << 20),
        ("1024", 1024),
        (4096, 4096),
        (" 2 KB ", 2048),
        ("1TB", 1 << 40),
    ],
)
def test_reads_sizes(size, expected):
    assert parse_bytes(size) == expected


@pytest.mark.parametrize("size", ["", "GiB", "8 gigs", "-1GiB", "1e9", "nan", None, True, [8]])
def test_refuses_what_is_no_size(size):
    with pytest.raises(ValueError, match="allowed: 8, 8G, 8GiB"):
        parse_bytes(size)
