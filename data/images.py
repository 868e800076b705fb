"""Pictures in and out: reading a concept's photos, grids, loss curves. Images are (N, 3, H, W) float in [-1, 1]."""
import contextlib
import hashlib
import itertools
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

from data.disk import fail, write_atomically

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
PROMPTS = Path(__file__).parent / "prompts.json"


def photo_paths(folder):
    """The image files of a concept folder in name order; hidden files and other suffixes are passed over."""
    folder = Path(folder)
    if not os.path.isdir(folder):
        fail(f"--concept {folder} is not a folder; give one that holds 3-6 photos of your subject")
    files = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    apple = [p for p in files if p.suffix.lower() in (".heic", ".heif")]
    if apple:
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            fail(f"{apple[0]} is a HEIC photo, which Pillow cannot read alone; pip install pillow-heif, or export it as JPEG "
                 "(on a phone: \"most compatible\")")
        register_heif_opener()
    paths = [p for p in files if p.suffix.lower() in SUFFIXES or p in apple]
    if not paths:
        fail(f"--concept {folder} holds no image ({', '.join(sorted(SUFFIXES))}); put 3-6 photos of your subject there")
    return paths


def photo_hashes(folder):
    """{name: SHA-256} of a concept's photos."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in photo_paths(folder)}


def refuse_overlap(out, concept, flag="--output_dir"):
    """A folder that is written to may not be, hold or lie in the folder of photos: its pictures would be photos of the next run."""
    ours, photos = (Path(os.path.realpath(folder)) for folder in (out, concept))
    if ours.is_relative_to(photos) or photos.is_relative_to(ours):
        fail(f"{flag} {out} and the photos' folder {concept} are one or lie in each other, so what is drawn would become photos "
             f"of the next run; choose another {flag}")


def load_photo(path, size, crop="centre"):
    """One photo (3, size, size) and its mask (1, size, size): turned upright by EXIF, transparency on grey, antialiased.

    crop: "centre" takes the centre square; "pad" shrinks the whole photo onto grey, which the mask leaves out; "squash" changes its
    proportions.
    """
    if path.exists() and not path.is_file() and not path.is_dir():  # a pipe would be waited for, and a device never ends
        fail(f"{path} is a pipe or a device, not a photo; take it out")
    try:
        with Image.open(path) as image:
            kind, image = image.format, ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16") or image.mode == "I" and kind == "PNG":  # Pillow's own conversion would clip, not scale
                image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
            elif image.mode in ("I", "F"):  # 32 bits per pixel: of their ranges only one is common knowledge
                values = np.asarray(image)
                if image.mode == "I" or not (values.min() >= 0 and values.max() <= 1):
                    fail(f"{path} has 32 bits per pixel that are not numbers from 0 to 1, so nothing tells what is white; save it with 8 or 16 bits")
                image = Image.fromarray((values * 255).round().astype(np.uint8))
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, (128, 128, 128, 255)), image)
            image, (left, top, right, bottom) = image.convert("RGB"), (0, 0, size, size)
            if crop == "centre":
                image = ImageOps.fit(image, (size, size), Image.LANCZOS)
            elif crop == "squash":
                image = image.resize((size, size), Image.LANCZOS)
            else:
                image = ImageOps.contain(image, (size, size), Image.LANCZOS)
                left, top = (size - image.width) // 2, (size - image.height) // 2
                right, bottom = left + image.width, top + image.height
                sheet = Image.new("RGB", (size, size), (128, 128, 128))
                sheet.paste(image, (left, top))
                image = sheet
    except Image.DecompressionBombError:
        fail(f"{path} has more than {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels; shrink or remove it")
    except Exception as error:  # Pillow's decoders raise whatever a broken file makes them stumble over
        fail(f"{path} cannot be read as an image ({type(error).__name__}); replace or remove it")
    mask = torch.zeros(1, size, size)
    mask[:, top:bottom, left:right] = 1
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1, mask


def photo_sizes(folder):
    """{path: (width, height)} of a concept's photos as they lie there."""
    sizes = {}
    for path in photo_paths(folder):
        with Image.open(path) as image:
            sizes[path] = image.size
    return sizes


def load_photos(folder, size, crop="centre", masks=False):
    """All photos of a concept folder, (N, 3, size, size); with masks=True also (N, 1, size, size)."""
    photos, kept = (torch.stack(x) for x in zip(*[load_photo(p, size, crop) for p in photo_paths(folder)]))
    return (photos, kept) if masks else photos


class Photos:
    """The reference photos with their augmentation: flip, and Custom Diffusion's shrink-or-zoom with a mask.

    published: sizes and words as Custom Diffusion has them (Kumari et al. 2023, appendix); else ours, which are narrower.
    """

    SIZES = {"small": (.4, .6), "big": (1.2, 1.4)}  # factor of the photo's size, and the word the prompt then says

    def __init__(self, photos, masks, flip, size_augmentation, published=False):
        self.photos, self.masks = (torch.cat([x, x.flip(3)]) if flip else x for x in (photos, masks))  # (N or 2 N, ...)
        self.count, self.flip, self.size_augmentation, self.published = len(photos), flip, size_augmentation, published

    def batch(self, n, g):
        """n augmented photos (n, 3, S, S), masks (n, 1, S, S), a size word or "" each, and their numbers; g a CPU generator."""
        which = torch.randint(self.count, (n,), generator=g)
        if self.flip:
            which = which + self.count * (torch.rand(n, generator=g) < .5)
        x, mask, said = self.photos[which], self.masks[which], [""] * n
        if self.size_augmentation:
            x, mask = x.clone(), mask.clone()
            kinds, (u, *place) = torch.randint(3, (n,), generator=g).tolist(), torch.rand(3, n, generator=g).tolist()
            second = torch.rand(n, generator=g).tolist() if self.published else u  # which of two words
            for i in range(n):
                factor, word = self.size(kinds[i], u[i], second[i] < .5)
                if factor and self.resize(x[i], mask[i], factor, *(p[i] for p in place)):
                    said[i] = word
        return x, mask, said, which

    def size(self, kind, u, second):
        """A factor of the photo's size and its word, of kind 0, 1 or 2 and u in [0, 1); a factor of 0 leaves the photo alone."""
        if self.published:
            factor = 1.2 + .2 * u if kind == 2 else 1 / 3 + 2 / 3 * u
            words = ("zoomed in", "close up") if factor > 1 else ("far away", "very small") if factor < .6 else ("", "")
            return factor, words[second]
        word = [None, *self.SIZES][kind]
        low, high = self.SIZES.get(word, (0, 0))
        return low + (high - low) * u, word or ""

    def resize(self, x, mask, factor, left, top):
        """Shrink or zoom one photo (3, S, S) and its mask (1, S, S) in place; False if it was left as it was.

        left, top in [0, 1): where the photo is put, or the window cut out.
        """
        size = x.shape[-1]
        new = round(size * factor)
        photo = F.interpolate(x[None], size=(new, new), mode="bilinear", antialias=True)[0]
        part = F.interpolate(mask[None], size=(new, new))[0]
        a, b = (round(abs(size - new) * v) for v in (left, top))
        if new > size:
            photo, part = (v[:, b:b + size, a:a + size] for v in (photo, part))
        if not part.any():
            return False  # nothing of a padded panorama would be seen
        if new > size:
            x[:], mask[:] = photo, part
        else:
            x[:], mask[:] = 0, 0  # grey around the shrunk photo, and no loss there
            x[:, b:b + new, a:a + new], mask[:, b:b + new, a:a + new] = photo, part
        return True

    def zooms(self, i, count, g):
        """Square windows (count, 3, S, S) of photo i at its full size: of random place, .6 to 1 of what fits, none with a border."""
        rows, columns = self.masks[i, 0].any(1).nonzero(), self.masks[i, 0].any(0).nonzero()  # of a padded photo only these are photo
        top, left, height, width = rows[0].item(), columns[0].item(), len(rows), len(columns)
        windows = []
        for u, down, right in torch.rand(count, 3, generator=g).tolist():
            side = max(1, round(min(height, width) * (.6 + .4 * u)))
            y, x = top + round((height - side) * down), left + round((width - side) * right)
            windows.append(F.interpolate(self.photos[i:i + 1, :, y:y + side, x:x + side], size=self.photos.shape[-2:], mode="bilinear", antialias=True))
        return torch.cat(windows)


def read_prompts():
    """prompts.json: {base: {kind: [prompt]}}."""
    return json.loads(PROMPTS.read_text(encoding="utf-8"))


def load_prompts(base, more=None):
    """{"templates", "scenes", "preview"} of a base from prompts.json; "{}" stands for the subject. more: of one's own, for previews."""
    prompts = read_prompts()[base]
    return prompts | {"preview": prompts["preview"] + (more or [])}


def to_bytes(images):
    """Images in [-1, 1] as uint8; such ones stay as they are."""
    return images if images.dtype == torch.uint8 else ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte()


def from_bytes(pixels):
    return pixels.float() / 127.5 - 1


def to_pil(images):
    return [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in to_bytes(images.cpu())]


def save_png(image, path):
    """Write a PIL image as PNG."""
    write_atomically(path, lambda part: image.save(part, format="PNG"))


def add_png(image, path, text):
    """Write a PIL image as PNG with text chunks {key: value}, as NAME-2.png, NAME-3.png where another has the name; returns where."""
    from PIL.PngImagePlugin import PngInfo
    info, text = PngInfo(), {k: str(v) for k, v in text.items()}
    for key, value in text.items():
        info.add_text(key, value)

    def ours(file):  # the same picture, drawn again or left there by train.py, which says nothing in it
        with contextlib.suppress(Exception), Image.open(file) as old:  # Pillow also refuses what is very large
            return old.convert(image.mode).tobytes() == image.tobytes() and getattr(old, "text", text) in ({}, text)

    names = (path.with_stem(f"{path.stem}-{i}") if i > 1 else path for i in itertools.count(1))
    path = next(name for name in names if not os.path.lexists(name) or ours(name))
    write_atomically(path, lambda part: image.save(part, format="PNG", pnginfo=info))
    return path


def grid(rows, columns=()):
    """PIL picture of labelled rows [(label, images (N, 3, H, W)), ...]; sizes are those of the first image, small ones doubled.

    A label may have several lines; columns: names above the pictures.
    """
    scale = 2 if rows[0][1].shape[-1] < 128 else 1
    height, width = (s * scale for s in rows[0][1].shape[-2:])
    margin = 12 + 6 * max(len(line) for label, _ in rows for line in label.split("\n")) if any(label for label, _ in rows) else 0
    top = 16 if columns else 0
    sheet = Image.new("RGB", (margin + max(len(r) for _, r in rows) * width, top + len(rows) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for x, name in enumerate(columns):
        pen.text((margin + x * width + 4, 2), name, fill="black")
    for y, (label, images) in enumerate(rows):
        pen.text((4, top + y * height + height // 2 - 6 - 7 * label.count("\n")), label, fill="black")
        for x, image in enumerate(to_pil(images)):
            sheet.paste(image.resize((width, height), Image.NEAREST), (margin + x * width, top + y * height))
    return sheet


def save_strip(images, path):
    """Square pictures (N, 3, S, S) side by side; `load_strip` reads them back."""
    strip = Image.new("RGB", (len(images) * images.shape[-1], images.shape[-1]))
    for i, image in enumerate(to_pil(images)):
        strip.paste(image, (i * images.shape[-1], 0))
    save_png(strip, path)


def load_strip(path, size):
    """The pictures (N, 3, size, size) of a strip, or None where there is none."""
    if not Path(path).is_file():
        return None
    try:
        with Image.open(path) as strip:
            strip = strip.convert("RGB").resize((max(1, strip.width // strip.height) * size, size), Image.LANCZOS)
    except Exception as error:  # Pillow's decoders raise whatever a broken file makes them stumble over
        fail(f"{path} cannot be read as an image ({type(error).__name__}); remove it")
    return (torch.from_numpy(np.array(strip)).permute(2, 0, 1).float() / 127.5 - 1).unflatten(2, (-1, size)).permute(2, 0, 1, 3)


def curves(history, size=(320, 160)):
    """Loss curves as a PIL picture, one panel a term; history is [{"step": int, term: float, ...}, ...]."""
    terms = [k for k in dict.fromkeys(k for row in history for k in row) if k != "step"]
    columns = min(3, len(terms))
    w, h = size
    sheet = Image.new("RGB", (columns * w, -(-len(terms) // columns) * h), "white")
    pen = ImageDraw.Draw(sheet)
    for i, term in enumerate(terms):
        left, top = i % columns * w + 10, i // columns * h + 20
        points = [(row["step"], row[term]) for row in history if term in row]
        (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points))
        pen.text((left, top - 16), f"{term}   {points[0][1]:.4g} -> {points[-1][1]:.4g}   (range {y0:.4g} to {y1:.4g})", fill="black")
        pen.rectangle((left, top, left + w - 20, top + h - 30), outline="lightgray")
        line = [(left + (x - x0) / max(x1 - x0, 1) * (w - 20), top + (y1 - y) / max(y1 - y0, 1e-12) * (h - 30)) for x, y in points]
        pen.line(line, fill=(30, 90, 200), width=2)
    return sheet
