"""One picture to a tensor: formats, colours, orientation, scaling, and every kind of damage."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from scrimp.data.decode import ImageError, Peek, common_form, decode_image, peek_image
from scrimp.primitives.errors import InputError

RED, BLUE = (200, 30, 20), (10, 40, 220)


def halves(width=40, height=20):
    """Red left, blue right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2], pixels[:, width // 2 :] = RED, BLUE
    return Image.fromarray(pixels)


def smooth(width, height):
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return Image.fromarray((np.stack([x, y, (x + y) / 2], 2) * 255).astype(np.uint8))


def test_png_comes_back_exactly(tmp_path):
    halves().save(tmp_path / "a.png")
    image = decode_image(tmp_path / "a.png", size=(20, 40), mode="RGB")
    assert image.dtype == torch.uint8
    assert image.is_contiguous()
    assert torch.equal(image, torch.from_numpy(np.array(halves())).permute(2, 0, 1))
    assert torch.equal(image, decode_image((tmp_path / "a.png").read_bytes(), size=(20, 40), mode="RGB"))


@pytest.mark.parametrize(("orientation", "turn"), [(3, 2), (6, 3), (8, 1)])
def test_exif_orientation_is_applied(tmp_path, orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    halves().save(tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0)
    size = (20, 40) if turn == 2 else (40, 20)
    image = decode_image(tmp_path / "a.jpg", size=size, mode="RGB").float()
    upright = torch.from_numpy(np.rot90(np.array(halves()), turn).copy()).permute(2, 0, 1).float()
    assert (image - upright).abs().mean() < 3
    assert peek_image(tmp_path / "a.jpg") == Peek(size, grey=False)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_damaged_exif_does_not_lose_the_picture(tmp_path):
    halves().save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(20))
    assert decode_image(tmp_path / "a.jpg", size=(8, 8), mode="RGB").shape == (3, 8, 8)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    Image.fromarray(levels).save(tmp_path / "a.png")
    image = decode_image(tmp_path / "a.png", size=(16, 16), mode="L")
    assert torch.equal(image[0], torch.arange(256, dtype=torch.uint8).view(16, 16))
    assert peek_image(tmp_path / "a.png") == Peek((16, 16), grey=True)


def test_cmyk_jpeg_keeps_its_colours(tmp_path):
    halves().convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    image = decode_image(tmp_path / "a.jpg", size=(20, 40), mode="RGB").float()
    assert (image[:, 10, 5] - torch.tensor(RED)).abs().max() < 12
    assert (image[:, 10, 35] - torch.tensor(BLUE)).abs().max() < 12


def test_transparency_is_laid_on_white(tmp_path):
    palette = Image.new("P", (4, 2), 0)
    palette.putpalette([*RED, *BLUE])
    palette.paste(1, (2, 0, 4, 2))
    palette.save(tmp_path / "p.png", transparency=0)
    see_through = halves(4, 2).convert("RGBA")
    see_through.putalpha(Image.fromarray(np.array([[0, 0, 255, 255]] * 2, np.uint8)))
    see_through.save(tmp_path / "a.png")
    for name in ("p.png", "a.png"):
        image = decode_image(tmp_path / name, size=(2, 4), mode="RGB")
        assert image[:, 0, 0].tolist() == [255, 255, 255]
        assert image[:, 0, 3].tolist() == list(BLUE)


def test_animated_gif_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (6, 6), colour) for colour in (RED, BLUE)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    image = decode_image(tmp_path / "a.gif", size=(6, 6), mode="RGB").float()
    assert (image.mean((1, 2)) - torch.tensor(RED)).abs().max() < 4


def test_one_pixel_fills_any_size(tmp_path):
    Image.new("RGB", (1, 1), RED).save(tmp_path / "a.png")
    image = decode_image(tmp_path / "a.png", size=(5, 7), mode="RGB")
    assert torch.equal(image, torch.tensor(RED, dtype=torch.uint8)[:, None, None].expand(3, 5, 7))


def test_scaling_is_short_side_then_centre_crop(tmp_path):
    from torchvision.transforms import functional as transforms

    picture = smooth(90, 60)
    picture.save(tmp_path / "a.png")
    image = decode_image(tmp_path / "a.png", size=(20, 20), mode="RGB").float()
    wanted = transforms.center_crop(transforms.resize(picture, 20), [20, 20])
    assert (image - torch.from_numpy(np.array(wanted)).permute(2, 0, 1).float()).abs().mean() < 1


def test_large_jpeg_is_shrunk_while_decoding_without_visible_loss(tmp_path):
    blocks = np.random.default_rng(0).integers(0, 256, (48, 64), dtype=np.uint8)
    picture = Image.fromarray(blocks).resize((640, 480), Image.Resampling.BILINEAR).convert("RGB")
    picture.save(tmp_path / "a.jpg", quality=95)
    image = decode_image(tmp_path / "a.jpg", size=(48, 48), mode="RGB").float()
    wanted = picture.crop((80, 0, 560, 480)).resize((48, 48), Image.Resampling.BILINEAR)
    assert (image - torch.from_numpy(np.array(wanted)).permute(2, 0, 1).float()).abs().mean() < 4


def damaged(tmp_path, kind):
    path = tmp_path / f"{kind}.png"
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("no picture")
    elif kind == "truncated jpeg":
        smooth(64, 64).save(path, format="JPEG")
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "truncated png":
        smooth(64, 64).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "float":
        Image.fromarray(np.ones((4, 4), np.float32)).save(path, format="TIFF")
    elif kind == "wide":
        Image.fromarray(np.full((4, 4), 70000, np.int32)).save(path, format="TIFF")
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("empty", "empty file"),
        ("text", "no image format recognised"),
        ("truncated jpeg", "truncated"),
        ("truncated png", "truncated"),
        ("float", "no agreed range"),
        ("wide", "no agreed range"),
        ("absent", "No such file"),
    ],
)
def test_damage_names_file_reason_and_remedy(tmp_path, kind, reason):
    path = damaged(tmp_path, kind)
    with pytest.raises(ImageError) as caught:
        decode_image(path, size=(8, 8), mode="RGB")
    text = str(caught.value)
    assert f"{str(path)!r}" in text
    assert reason in text
    assert "on_corrupt='skip'" in text
    assert "\n" not in text
    if kind in ("empty", "text", "absent"):
        assert peek_image(path) is None


def test_error_survives_pickle_and_torch_rebuilding_it_from_text():
    error = ImageError.of("odd; got name; x.png", "truncated")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    rebuilt = ImageError(
        f"Caught ImageError in worker 0.\nTraceback:\n  line\nscrimp.data.decode.ImageError: {error}\n"
    )
    assert str(rebuilt) == str(error)
    assert isinstance(rebuilt, InputError)
    assert (rebuilt.got, rebuilt.remedy) == (error.got, error.remedy)


def test_common_form():
    grey, colour, large = Peek((28, 28), True), Peek((28, 28), False), Peek((80, 80), True)
    assert common_form([grey, grey], None) == ((28, 28), "L")
    assert common_form([grey, colour, None], None) == ((28, 28), "RGB")
    assert common_form([Peek((20, 30), True)], None) == ((20, 30), "L")
    assert common_form([grey, large], None) == ((224, 224), "L")
    assert common_form([large, large], None) == ((224, 224), "L")
    assert common_form([grey], (9, 9)) == ((9, 9), "L")
    assert common_form([None], None) == ((224, 224), "RGB")


def test_common_form_reads_no_further_than_it_must():
    def heads():
        yield Peek((300, 200), False)
        raise AssertionError("read on")

    assert common_form(heads(), None) == ((224, 224), "RGB")
    assert common_form(heads(), (32, 32)) == ((32, 32), "RGB")
