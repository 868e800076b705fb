"""Pictures in and out: reading a concept's photos, grids, loss curves. Images are (N, 3, H, W) float in [-1, 1]."""
import contextlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from safetensors import SafetensorError
from tqdm import tqdm

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
PROMPTS = Path(__file__).parent / "prompts.json"


def fail(message):
    """Say in one sentence what is wrong and how to mend it, and exit with code 2."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # or the sentence would stand behind a progress bar
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def make_folder(folder, flag):
    """An output folder, made before any model is loaded."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"{flag} {folder} cannot be made ({error.strerror}); choose another folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        fail(f"{flag} {folder} cannot be written to; choose another folder")
    return Path(folder)


def write_atomically(path, write):
    """Call `write(temporary_path)` and rename the result to `path`: a reader never sees half a file, and none stays behind."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        mode = part.stat().st_mode  # as this user makes files; safetensors makes them unreadable to others
        write(part)
        os.chmod(part, mode)
        with open(part, "r+b") as f:
            os.fsync(f.fileno())
        os.replace(part, path)
        if hasattr(os, "O_DIRECTORY"):  # the new name, too, must survive a power cut; Windows has no call for it
            folder = os.open(path.parent, os.O_DIRECTORY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, SafetensorError) as error:
        fail(f"{path} cannot be written ({getattr(error, 'strerror', None) or error}); free some space or choose another output folder")
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def photo_paths(folder):
    """The image files of a concept folder in name order; hidden files and other suffixes are passed over."""
    folder = Path(folder)
    if not os.path.isdir(folder):
        fail(f"--concept {folder} is not a folder; give one that holds 3-6 photos of your subject")
    files = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    apple = [p for p in files if p.suffix.lower() in (".heic", ".heif")]
    if apple:
        fail(f"{apple[0]} is a HEIC photo, which Pillow cannot read; export it as JPEG (on a phone: \"most compatible\"), or take it out")
    paths = [p for p in files if p.suffix.lower() in SUFFIXES]
    if not paths:
        fail(f"--concept {folder} holds no image ({', '.join(sorted(SUFFIXES))}); put 3-6 photos of your subject there")
    return paths


def load_photo(path, size, crop="centre"):
    """One photo (3, size, size) and its mask (1, size, size): turned upright by EXIF, transparency on grey, antialiased.

    crop: "centre" takes the centre square; "pad" shrinks the whole photo onto grey, which the mask leaves out.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits per pixel: Pillow's own conversion would clip, not scale
                image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, (128, 128, 128, 255)), image)
            image, (left, top, right, bottom) = image.convert("RGB"), (0, 0, size, size)
            if crop == "centre":
                image = ImageOps.fit(image, (size, size), Image.LANCZOS)
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


def load_photos(folder, size, crop="centre", masks=False):
    """All photos of a concept folder, (N, 3, size, size); with masks=True also (N, 1, size, size)."""
    photos, kept = (torch.stack(x) for x in zip(*[load_photo(p, size, crop) for p in photo_paths(folder)]))
    return (photos, kept) if masks else photos


def load_prompts(base):
    """{"templates", "scenes", "preview"} of a base from prompts.json; "{}" stands for the subject."""
    return json.loads(PROMPTS.read_text(encoding="utf-8"))[base]


def to_pil(images):
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    return [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]


def save_png(image, path):
    """Write a PIL image as PNG."""
    write_atomically(path, lambda part: image.save(part, format="PNG"))


def grid(rows):
    """PIL picture of labelled rows [(label, images (N, 3, H, W)), ...]; sizes are those of the first image, small ones doubled."""
    scale = 2 if rows[0][1].shape[-1] < 128 else 1
    height, width = (s * scale for s in rows[0][1].shape[-2:])
    margin = 12 + 6 * max(len(label) for label, _ in rows) if any(label for label, _ in rows) else 0
    sheet = Image.new("RGB", (margin + max(len(r) for _, r in rows) * width, len(rows) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for y, (label, images) in enumerate(rows):
        pen.text((4, y * height + height // 2 - 6), label, fill="black")
        for x, image in enumerate(to_pil(images)):
            sheet.paste(image.resize((width, height), Image.NEAREST), (margin + x * width, y * height))
    return sheet


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
