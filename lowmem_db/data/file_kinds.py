"""Recognises a file by its first bytes, whatever its name says."""

_KINDS = (
    (b"version https://git-lfs", "a Git LFS pointer: run `git lfs pull` in its repository"),
    (b"\xff\xd8\xff", "JPEG"), (b"\x89PNG\r\n\x1a\n", "PNG"), (b"GIF8", "GIF"), (b"BM", "BMP"),
    (b"8BPS", "a Photoshop document"), (b"%PDF", "a PDF document"), (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"), (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"), (b"gimp xcf", "a GIMP document"),
    (b"PK\x03\x04", "a ZIP archive"), (b"\x1f\x8b", "a gzip archive"), (b"Rar!", "a RAR archive"),
    (b"7z\xbc\xaf", "a 7-Zip archive"), (b"\x1aE\xdf\xa3", "a video (Matroska or WebM)"), (b"OggS", "an Ogg file"),
    (b"ID3", "an MP3 file"), (b"\x00\x00\x01\x00", "a Windows icon"), (b"FUJIFILMCCD-RAW", "a camera's raw file"),
    (b"II\x1a\x00\x00\x00HEAPCCDR", "a camera's raw file"), (b"IIU\x00", "a camera's raw file"),
    (b"<!doctype html", "a web page, not a picture"), (b"<html", "a web page, not a picture"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "an XML file"), (b"\x7fELF", "a program"), (b"MZ", "a program"),
)  # fmt: skip
_BRANDS = {
    b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"heim": "HEIC", b"heis": "HEIC",
    b"hevc": "HEIC",
    b"hevx": "HEIC", b"mif1": "HEIC", b"msf1": "HEIC", b"isom": "a video (MP4)", b"iso2": "a video (MP4)",
    b"mp41": "a video (MP4)", b"mp42": "a video (MP4)", b"avc1": "a video (MP4)", b"M4V ": "a video (MP4)",
    b"qt  ": "a video (QuickTime)", b"crx ": "a camera's raw file",
}  # fmt: skip
HEAD_BYTES = 64


def kind_of(head: bytes) -> str | None:
    """Return what kind of file starts with these bytes, or None if that is unknown.

    Args:
        head: The first ``HEAD_BYTES`` bytes of the file.
    """
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12])
    if head[:4] == b"RIFF":
        return {b"WEBP": "WebP", b"AVI ": "a video (AVI)", b"WAVE": "a sound"}.get(head[8:12])
    if head[:4] in (b"II*\x00", b"MM\x00*"):
        return "a camera's raw file" if head[8:10] == b"CR" else "TIFF"
    start = head.lstrip().lower()
    return next((kind for sign, kind in _KINDS if head.startswith(sign) or start.startswith(sign)), None)
