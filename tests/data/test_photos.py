import io
import pathlib
import struct
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile, PngImagePlugin, features
from PIL.PngImagePlugin import PngInfo

from lowmem_db import environment
from lowmem_db.data import photos
from lowmem_db.data.photos import duplicates, photo_warnings, read_photo, scan_photos
from lowmem_db.errors import DataError, DependencyError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def scan(folder, prompt="a sks dog", resolution=128):
    return scan_photos(folder, prompt=prompt, resolution=resolution, field="subject.instance_dir")


def save(path, size=(96, 80), colour=RED, mode="RGB", **options):
    Image.new(mode, size, colour).save(path, **options)
    return path


def photo_bytes(image_format):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, image_format)
    return buffer.getvalue()


def corner(path):
    return read_photo(path).getpixel((0, 0))


class TestScan:
    def test_describes_every_picture_in_the_order_of_names(self, tmp_path):
        for name in ("c.webp", "a.JPG", "b.png"):
            save(tmp_path / name, format={"c": "WEBP", "a": "JPEG", "b": "PNG"}[name[0]])
        records = scan(tmp_path)
        assert [record.path.name for record in records] == ["a.JPG", "b.png", "c.webp"]
        assert {(record.width, record.height, record.prompt) for record in records} == {(96, 80, "a sks dog")}
        assert len({record.content_key for record in records}) == 3

    def test_leaves_out_what_is_no_picture_and_names_what_it_does_not_know(self, tmp_path, caplog):
        save(tmp_path / "a.png")
        for name in (".hidden.png", "manifest.json", "notes.md", "film.mp4", "raw.cr2"):
            (tmp_path / name).write_bytes(b"x")
        (tmp_path / "more.png").mkdir()
        assert [record.path.name for record in scan(tmp_path)] == ["a.png"]
        assert "subject.instance_dir: not read: film.mp4, raw.cr2" in caplog.text
        assert "notes.md" not in caplog.text

    def test_a_caption_file_replaces_the_prompt(self, tmp_path):
        save(tmp_path / "a.png")
        save(tmp_path / "b.png")
        (tmp_path / "a.txt").write_bytes("\ufeff  a sks dog\n on a café table \n".encode())
        assert [record.prompt for record in scan(tmp_path)] == ["a sks dog on a café table", "a sks dog"]

    def test_captions_are_counted_and_what_is_left_over_is_named(self, tmp_path, caplog, capfd):
        for name in ("a.png", "b.png", "c.png"):
            save(tmp_path / name)
        for name in ("A.TXT", "b.caption", "c1.txt"):
            (tmp_path / name).write_text(f"a sks dog, {name}")
        (tmp_path / "notes.md").touch()
        assert [record.prompt for record in scan(tmp_path)] == ["a sks dog, A.TXT", "a sks dog, b.caption", "a sks dog"]
        assert "subject.instance_dir: c1.txt is a caption without a photo; is it for c.png?" in caplog.text
        said = capfd.readouterr().err
        assert "2 of 3 photos have their own caption; the others use the prompt 'a sks dog'" in said
        assert "subject.instance_dir: not read: notes.md (not a picture)" in said

    def test_a_dangling_link_is_no_photo_less(self, tmp_path):
        save(tmp_path / "a.png")
        (tmp_path / "b.png").symlink_to("gone.png")
        with pytest.raises(DataError, match=r"b\.png: is a link to gone\.png, which does not exist; allowed: pictures"):
            scan(tmp_path)

    @pytest.mark.parametrize(("head", "kind"), [
        (b"<!DOCTYPE html><html>", "a web page, not a picture"), (b"\x00\x00\x00\x20ftypmp42....", r"a video \(MP4\)"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"), (b"%PDF-1.7", "a PDF document"),
        (b"8BPS\x00\x01", "a Photoshop document"), (b"PK\x03\x04....", "a ZIP archive"), (b"\xff\x0a....", "JPEG XL"),
        (b"II*\x00\x10\x00\x00\x00CR\x02\x00", "a camera's raw file"), (b"  <svg xmlns=", "an SVG drawing"),
        (b"RIFF\x00\x00\x00\x00AVI ....", r"a video \(AVI\)"), (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "JPEG 2000"),
    ])  # fmt: skip
    def test_what_a_file_is_is_said_by_its_name(self, tmp_path, head, kind):
        (tmp_path / "a.jpg").write_bytes(head + b"." * 100)
        with pytest.raises(DataError, match=rf"a\.jpg: is {kind}.*allowed: JPEG, PNG"):
            scan(tmp_path)

    def test_a_size_is_that_of_the_upright_picture(self, tmp_path):
        save(tmp_path / "a.jpg", exif=_orientation(6))
        assert (scan(tmp_path)[0].width, scan(tmp_path)[0].height) == (80, 96)

    def test_all_bad_files_stand_in_one_message(self, tmp_path):
        save(tmp_path / "good.png")
        save(tmp_path / "tiny.png", size=(300, 63))
        (tmp_path / "empty.jpg").touch()
        (tmp_path / "text.png").write_text("no picture")
        (tmp_path / "cut.jpg").write_bytes(photo_bytes("JPEG")[:-800])
        save(tmp_path / "mute.png")
        (tmp_path / "mute.txt").write_text(" \n")
        save(tmp_path / "latin.png")
        (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
        with pytest.raises(DataError) as caught:
            scan(tmp_path)
        lines = str(caught.value).splitlines()
        assert len(lines) == 6
        assert all(line.startswith(f"subject.instance_dir: {tmp_path}") and "allowed: " in line for line in lines)
        for name, reason in {
            "tiny.png": "300 x 63 pixels", "empty.jpg": "0 bytes", "text.png": "cannot be decoded",
            "cut.jpg": "truncated", "mute.txt": "is empty", "latin.txt": "UTF-8",
        }.items():  # fmt: skip
            assert any(name in line and reason in line for line in lines), name

    @pytest.mark.parametrize(("resolution", "smallest"), [(512, 128), (1024, 256), (128, 64), (32, 32)])
    def test_the_smallest_picture(self, tmp_path, resolution, smallest):
        save(tmp_path / "a.png", size=(400, smallest))
        assert len(scan(tmp_path, resolution=resolution)) == 1
        save(tmp_path / "a.png", size=(400, smallest - 1))
        with pytest.raises(DataError, match=f"400 x {smallest - 1} pixels.*{smallest} or more"):
            scan(tmp_path, resolution=resolution)

    def test_a_missing_folder_names_the_nearest(self, tmp_path):
        (tmp_path / "my_dog").mkdir()
        with pytest.raises(
            DataError, match=r"^subject.instance_dir: .*my_dgo does not exist.*did you mean .*my_dog\?$"
        ):
            scan(tmp_path / "my_dgo")
        with pytest.raises(DataError, match=r"does not exist; .*relative paths start at"):
            scan(tmp_path / "nowhere" / "x")

    def test_a_file_in_place_of_the_folder(self, tmp_path):
        with pytest.raises(DataError, match="is a file; allowed: a folder"):
            scan(save(tmp_path / "a.png"))

    def test_a_folder_without_pictures(self, tmp_path):
        with pytest.raises(DataError, match=r"is empty; allowed: JPEG, PNG.*3 to 5 photos"):
            scan(tmp_path)
        (tmp_path / "photos").mkdir()
        with pytest.raises(DataError, match=r"holds no picture \(only photos\).*not in sub-folders"):
            scan(tmp_path)

    def test_the_same_file_twice_is_allowed_and_told(self, tmp_path):
        for name in ("a.png", "b.png"):
            save(tmp_path / name)
        save(tmp_path / "c.png", colour=BLUE)
        records = scan(tmp_path)
        assert [[record.path.name for record in group] for group in duplicates(records)] == [["a.png", "b.png"]]
        told = photo_warnings(records, resolution=64, field="subject.instance_dir")
        assert [line.split(",")[0] for line in told] == ["subject.instance_dir: a.png"]

    def test_pictures_that_must_be_enlarged_are_told(self, tmp_path):
        save(tmp_path / "a.png", size=(200, 100))
        save(tmp_path / "b.png", size=(200, 128))
        (told,) = photo_warnings(scan(tmp_path), resolution=128, field="subject.instance_dir")
        assert "a.png (200 x 100)" in told
        assert "b.png" not in told

    def test_in_buckets_the_pixels_count_and_not_the_shorter_side(self, tmp_path):
        save(tmp_path / "a.png", size=(200, 100))
        save(tmp_path / "b.png", size=(120, 128))
        records = scan(tmp_path)
        (told,) = photo_warnings(records, resolution=128, field="subject.instance_dir", aspect_ratio_buckets=True)
        assert "b.png (120 x 128)" in told
        assert "a.png" not in told


class TestEnormousPictures:
    def png_header(self, width, height):
        """A PNG that claims a size and has no pixels: whoever decodes it fails otherwise than by size."""
        chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        crc = struct.pack(">I", zlib.crc32(chunk))
        return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + crc + struct.pack(">I", 0) + b"IDAT5\xaf\x06\x1e"

    @pytest.mark.parametrize(("width", "height"), [(15_001, 10_000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
    def test_are_refused_by_their_header(self, tmp_path, width, height):
        (tmp_path / "a.png").write_bytes(self.png_header(width, height))
        with pytest.raises(DataError, match=r"a.png: is too large .*allowed: up to 150 megapixels"):
            scan(tmp_path)

    def test_are_not_refused_below_the_limit_where_pillow_warns(self, tmp_path):
        (tmp_path / "a.png").write_bytes(self.png_header(15_000, 10_000))
        with pytest.raises(DataError, match="cannot be decoded"):
            scan(tmp_path)


class TestModes:
    @pytest.mark.parametrize(("mode", "colour", "expected"), [
        ("1", 1, WHITE), ("L", 51, (51, 51, 51)), ("LA", (51, 255), (51, 51, 51)), ("LA", (51, 0), WHITE),
        ("RGB", RED, RED), ("RGBA", (*RED, 255), RED), ("RGBA", (*RED, 0), WHITE),
        ("RGBA", (*RED, 51), (255, 204, 204)),
        ("I;16", 65535, WHITE), ("I;16", 257 * 51, (51, 51, 51)),
    ])  # fmt: skip
    def test_png(self, tmp_path, mode, colour, expected):
        assert corner(save(tmp_path / "a.png", mode=mode, colour=colour)) == expected

    @pytest.mark.parametrize(("mode", "colour", "expected"), [
        ("CMYK", (0, 255, 255, 0), RED), ("I", 257 * 51, (51, 51, 51)), ("I", 2**31 - 1, WHITE),
        ("F", 0.2, (51, 51, 51)), ("F", 51.0, (51, 51, 51)), ("F", 257.0 * 51, (51, 51, 51)), ("F", 1e9, WHITE),
        ("F", -1.0, (0, 0, 0)), ("LAB", (255, 128, 128), (254, 255, 254)), ("I;16B", 257 * 51, (51, 51, 51)),
    ])  # fmt: skip
    def test_tiff(self, tmp_path, mode, colour, expected):
        assert corner(save(tmp_path / "a.tif", mode=mode, colour=colour)) == expected

    def test_a_float_picture_with_holes(self, tmp_path):
        Image.fromarray(np.array([[np.nan, 0.2], [np.inf, 0.4]], np.float32)).save(tmp_path / "a.tif")
        with pytest.raises(DataError, match=r"a\.tif: has 2 pixels that are infinite or NaN; save it again"):
            read_photo(tmp_path / "a.tif")

    def test_a_cmyk_photo(self, tmp_path):
        path = save(tmp_path / "a.jpg", mode="CMYK", colour=(0, 255, 255, 0), quality=100)
        assert np.abs(np.subtract(corner(path), RED)).max() <= 2

    @pytest.mark.parametrize("image_format", ["PNG", "GIF"])
    def test_a_palette_with_a_transparent_colour(self, tmp_path, image_format):
        image = Image.new("P", (4, 4), 0)
        image.putpalette([*RED, *BLUE])
        image.putpixel((1, 0), 1)
        image.save(tmp_path / "a", image_format, transparency=0)
        assert corner(tmp_path / "a") == WHITE
        assert read_photo(tmp_path / "a").getpixel((1, 0)) == BLUE

    def test_a_palette_with_opacities(self, tmp_path):
        image = Image.new("P", (4, 4), 0)
        image.putpalette([*RED, *BLUE])
        image.save(tmp_path / "a.png", transparency=b"\x33\xff")
        assert corner(tmp_path / "a.png") == (255, 204, 204)

    @pytest.mark.parametrize(("mode", "colour"), [("L", 7), ("RGB", (1, 2, 3))])
    def test_a_transparent_colour_without_a_palette(self, tmp_path, mode, colour):
        assert corner(save(tmp_path / "a.png", mode=mode, colour=colour, transparency=colour)) == WHITE

    @pytest.mark.parametrize("image_format", ["WEBP", "GIF", "PNG"])
    def test_the_first_frame_of_an_animation(self, tmp_path, image_format):
        frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
        options = {"lossless": True} if image_format == "WEBP" else {}
        frames[0].save(tmp_path / "a", image_format, save_all=True, append_images=frames[1:], **options)
        assert corner(tmp_path / "a") == RED

    @pytest.mark.parametrize("image_format", ["GIF", "PNG", "TIFF"])
    def test_further_frames_are_told_once(self, tmp_path, caplog, image_format):
        frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
        frames[0].save(tmp_path / "a", image_format, save_all=True, append_images=frames[1:])
        for _ in range(2):
            read_photo(tmp_path / "a")
        assert caplog.text.count("a: has 3 pictures; only the first one is used") == 1

    @pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
    @pytest.mark.parametrize("name", ["a.avif", "a.jpg"])
    def test_avif_whatever_its_name(self, tmp_path, name):
        save(tmp_path / name, format="AVIF", quality=100)
        (record,) = scan(tmp_path, resolution=64)
        assert (record.width, record.height) == (96, 80)

    def test_avif_that_pillow_does_not_read(self, tmp_path, monkeypatch):
        monkeypatch.setattr(features, "check", lambda name: False)
        (tmp_path / "a.jpg").write_bytes(b"\x00\x00\x00\x20ftypavif" + b"." * 100)
        with pytest.raises(DataError, match=r"a\.jpg: is AVIF, .*pip install -U pillow, or save it as PNG"):
            scan(tmp_path)

    def test_a_png_with_a_workflow_of_megabytes(self, tmp_path):
        info = PngInfo()
        info.add_text("workflow", '{"a": 1}' * 400_000, zip=True)
        assert corner(save(tmp_path / "a.png", pnginfo=info)) == RED
        assert PngImagePlugin.MAX_TEXT_CHUNK < 1 << 26

    @given(array=st.integers(0, 65535).map(lambda value: np.full((1, 1), value, np.uint16)))
    def test_16_bits_lose_at_most_half_a_step(self, array):
        (grey,) = _pixels(photos._to_8_bits(Image.fromarray(array), pathlib.Path("photo.png")))
        assert abs(grey * 257 - int(array[0, 0])) <= 128


class TestOrientation:
    @pytest.mark.parametrize(("orientation", "stored"), [
        (1, "RG BW BW"), (2, "GR WB WB"), (3, "WB WB GR"), (4, "BW BW RG"),
        (5, "RBB GWW"), (6, "GWW RBB"), (7, "WWG BBR"), (8, "BBR WWG"),
    ])  # fmt: skip
    def test_every_exif_orientation(self, tmp_path, orientation, stored):
        """What cameras write according to the EXIF standard: where row 0 and column 0 of the upright picture lie."""
        colours = {"R": RED, "G": GREEN, "B": BLUE, "W": WHITE}
        rows = [[colours[letter] for letter in row] for row in stored.split()]
        Image.fromarray(np.array(rows, np.uint8)).save(tmp_path / "a.png", exif=_orientation(orientation))
        upright = read_photo(tmp_path / "a.png")
        assert upright.size == (2, 3)
        assert _pixels(upright) == [RED, GREEN, BLUE, WHITE, BLUE, WHITE]

    @pytest.mark.parametrize("exif", [b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b"Exif\x00\x00garbage", b"Exif\x00\x00"])
    def test_a_broken_exif_block_is_ignored(self, tmp_path, exif):
        assert corner(save(tmp_path / "a.png", exif=exif)) == RED


class TestColourProfiles:
    def test_a_wide_gamut_becomes_srgb(self, tmp_path):
        """Colours of a profile with other primaries come out as littlecms alone converts them."""
        profile = _swapped_primaries()
        path = save(tmp_path / "a.png", colour=(200, 30, 60), icc_profile=profile)
        assert np.abs(np.subtract(corner(path), (30, 200, 60))).max() <= 3

    def test_transparency_survives_a_profile(self, tmp_path):
        path = save(tmp_path / "a.png", mode="RGBA", colour=(200, 30, 60, 0), icc_profile=_swapped_primaries())
        assert corner(path) == WHITE

    def test_a_grey_picture_with_a_colour_profile(self, tmp_path, caplog):
        path = save(tmp_path / "a.png", mode="L", colour=90, icc_profile=_srgb())
        assert np.abs(np.subtract(corner(path), 90)).max() <= 1
        assert not caplog.records

    def test_a_grey_picture_with_a_grey_profile(self, tmp_path, caplog):
        """A linear value of 0.2159 is 0.5020 in sRGB's transfer function."""
        path = save(tmp_path / "a.png", mode="L", colour=55, icc_profile=_linear_grey())
        assert np.abs(np.subtract(corner(path), 128)).max() <= 1
        assert not caplog.records

    @pytest.mark.parametrize("damage", ["garbage", "cut", "other colour space"])
    def test_a_broken_profile_is_ignored_and_told(self, tmp_path, caplog, damage):
        whole = _srgb()
        profile = {"garbage": b"x" * 20, "cut": whole[:300], "other colour space": whole[:16] + b"CMYK" + whole[20:]}
        assert corner(save(tmp_path / "a.png", icc_profile=profile[damage])) == RED
        assert "a.png: its colour profile is broken and was ignored" in caplog.text


class TestHeic:
    HEAD = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00"

    def test_without_the_library_the_message_says_how_to_get_it(self, tmp_path, monkeypatch):
        def missing(name):
            raise DependencyError(f'{name} cannot be loaded: pip install "lowmem-db[heic]"')

        monkeypatch.setattr(environment, "require", missing)
        (tmp_path / "a.heic").write_bytes(self.HEAD)
        with pytest.raises(DataError, match=r"a.heic: is HEIC: .*pip install .*, or save it as JPEG"):
            scan(tmp_path)

    def test_is_known_by_its_content_and_registered_once_met(self, tmp_path, monkeypatch):
        asked = []

        class Library:
            @staticmethod
            def register_heif_opener():
                asked.append("registered")
                Image.register_open(
                    "HEIF", lambda file, name: file.close() or Image.new("RGB", (100, 80)), lambda prefix: True
                )

        monkeypatch.setattr(environment, "require", lambda name: asked.append(name) or Library)
        monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
        monkeypatch.setattr(Image, "ID", list(Image.ID))
        save(tmp_path / "a.png")
        scan(tmp_path)
        assert asked == []
        (tmp_path / "from_a_phone.jpg").write_bytes(self.HEAD)
        assert scan(tmp_path)[1].width == 100
        assert asked == ["pillow_heif", "registered"]

    def test_a_real_one_is_upright(self, tmp_path):
        library = pytest.importorskip("pillow_heif")
        library.register_heif_opener()
        image = Image.new("RGB", (200, 100), RED)
        image.paste(BLUE, (0, 0, 100, 100))
        image.save(tmp_path / "a.heic", exif=_orientation(6).tobytes())
        upright = read_photo(tmp_path / "a.heic")
        assert upright.size == (100, 200)
        assert np.abs(np.subtract(upright.getpixel((50, 20)), BLUE)).max() <= 8


class TestDamagedFiles:
    @pytest.mark.parametrize("error", [OSError, EOFError, SyntaxError, ValueError, IndexError, struct.error])
    def test_every_error_of_pillow_s_decoders_names_the_file(self, tmp_path, monkeypatch, error):
        def fail(image):
            raise error("broken\ndata stream")

        monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
        with pytest.raises(DataError, match=r"a.png: cannot be decoded; .*\(broken data stream\)"):
            read_photo(save(tmp_path / "a.png"))

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        image_format=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"]),
        cuts=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=6)), max_size=3),
        length=st.floats(0, 1) | st.just(1.0),
    )
    def test_any_damage_gives_a_picture_or_an_error_with_the_name(self, tmp_path, image_format, cuts, length):
        content = bytearray(photo_bytes(image_format))
        for place, patch in cuts:
            start = int(place * len(content))
            content[start : start + len(patch)] = patch
        (tmp_path / "a").write_bytes(content[: int(length * len(content))])
        try:
            found = read_photo(tmp_path / "a").mode
        except DataError as error:
            found = str(error)
        assert found == "RGB" or (found.startswith(f"{tmp_path / 'a'}: ") and "\n" not in found)

    @pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
    def test_half_a_file_is_refused(self, tmp_path, image_format):
        content = photo_bytes(image_format)
        (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
        with pytest.raises(DataError, match="damaged or truncated"):
            scan(tmp_path)

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(DataError, match="No such file"):
            read_photo(tmp_path / "a.png")


def _pixels(image):
    return [tuple(value) if isinstance(value, np.ndarray) else int(value) for row in np.asarray(image) for value in row]


def _orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def _srgb():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def _swapped_primaries():
    """An sRGB profile whose red and green primaries are exchanged."""
    profile = bytearray(_srgb())
    places = [profile.index(name) for name in (b"rXYZ", b"gXYZ")]
    profile[places[0] : places[0] + 4], profile[places[1] : places[1] + 4] = b"gXYZ", b"rXYZ"
    return bytes(profile)


def _linear_grey():
    """A grey profile with a linear transfer function: header, and the tags for white and for the curve."""
    white = b"XYZ \0\0\0\0" + struct.pack(">iii", 63190, 65536, 54061)
    curve = b"curv\0\0\0\0" + struct.pack(">I", 0)
    tags = struct.pack(">I", 2) + struct.pack(">4sII4sII", b"wtpt", 156, 20, b"kTRC", 176, 12)
    body = tags + white + curve
    header = struct.pack(">I4sI4s4s4s", 128 + len(body), b"lcms", 0x02100000, b"mntr", b"GRAY", b"XYZ ").ljust(
        36, b"\0"
    )
    return (header + b"acsp" + bytes(28) + struct.pack(">iii", 63190, 65536, 54061)).ljust(128, b"\0") + body
