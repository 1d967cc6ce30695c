import pytest

from lowmem_db.config.sizes import parse_bytes


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("8GiB", 8 << 30),
        ("7.5 GB", 7_500_000_000),
        ("512mib", 512 << 20),
        ("1024", 1024),
        (4096, 4096),
        (" 2 KB ", 2000),
    ],
)
def test_reads_sizes(size, expected):
    assert parse_bytes(size) == expected


@pytest.mark.parametrize("size", ["", "GiB", "8 gigs", "-1GiB", "1e9", "nan", None, True, [8]])
def test_refuses_what_is_no_size(size):
    with pytest.raises(ValueError, match="allowed: 8GiB"):
        parse_bytes(size)
