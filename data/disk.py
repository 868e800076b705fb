"""What every file that is written has in common: one sentence when something is wrong, and never half a file."""
import contextlib
import json
import os
import sys
from pathlib import Path

from tqdm import tqdm


def fail(message):
    """Say in one sentence what is wrong and how to mend it, and exit with code 2."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # or the sentence would stand behind a progress bar
    print(f"error: {readable(message)}", file=sys.stderr)
    sys.exit(2)


def readable(text):
    """Text in one line: what has no glyph (line ends in a file's name, bytes that are no UTF-8) is shown as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def refuse_foreign_bytes(args):
    """Texts among parsed flags must be UTF-8: they go into JSON, into file names and through tokenizers."""
    for flag, value in vars(args).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and any("\ud800" <= c <= "\udfff" for c in text):
                fail(f"--{flag} {text} is no UTF-8; rename the folder or type it anew")


def make_folder(folder, flag):
    """An output folder, made before any model is loaded."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"{flag} {folder} cannot be made ({error.strerror}); choose another folder")
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        fail(f"{flag} {folder} cannot be written to; choose another folder")
    return Path(folder)


def write_atomically(path, write):
    """Call `write(temporary_path)` and rename the result to `path`: a reader never sees half a file, and none stays behind."""
    from safetensors import SafetensorError
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


def save_text(path, text):
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def fill_marks(path, begin, end, new, flag):
    """Put text between two marks of a Markdown file that `flag` named."""
    head, mark, rest = Path(path).read_text(encoding="utf-8").partition(f"<!-- {begin} -->\n")
    _, closing, tail = rest.partition(f"<!-- {end} -->")
    if not mark or not closing:
        fail(f"{flag} {path} has no <!-- {begin} --> ... <!-- {end} --> to fill")
    save_text(path, f"{head}{mark}{new}{closing}{tail}")


def save_json(path, value):
    save_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def save_tensors(path, tensors, metadata=None):
    """Write tensors that are all finite; a run that went astray leaves the last good file as it was."""
    from safetensors.torch import save_file
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    for k, v in tensors.items():
        if not v.isfinite().all():
            fail(f"{path} is not written: {k} holds values that are not finite; lower the learning rates or try --mixed_precision no")
    write_atomically(path, lambda p: save_file(tensors, p, metadata=metadata))
