"""Fetch the photos of the DreamBooth data set (google/dreambooth, CC BY 4.0): 30 subjects, 158 files, 150 MB.

    python data/benchmark/download.py --output data/dreambench
"""
import argparse
import http.client
import shutil
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.disk import fail
from data.images import SUFFIXES

SOURCE = "https://github.com/google/dreambooth/archive/refs/heads/main.tar.gz"


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    p.add_argument("--output", default="data/dreambench", help="folder to fill: one folder a subject")
    p.add_argument("--url", default=SOURCE, help="of the repository's archive, or of a mirror")
    args = p.parse_args(argv)
    output = Path(args.output)
    if output.exists():
        fail(f"--output {output} is already there; remove it to fetch anew")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".dreambench") as work:
        try:
            with (urllib.request.urlopen(args.url, timeout=60) as answer,
                  tarfile.open(fileobj=answer, mode="r|gz") as archive):
                for member in archive:
                    parts = Path(member.name).parts  # dreambooth-main/dataset/SUBJECT/NAME
                    inside = len(parts) == 4 and parts[1] == "dataset" and ".." not in parts
                    if member.isfile() and inside and Path(parts[3]).suffix.lower() in SUFFIXES:
                        target = Path(work, "photos", parts[2], parts[3])
                        target.parent.mkdir(parents=True, exist_ok=True)
                        with open(target, "wb") as f:
                            shutil.copyfileobj(archive.extractfile(member), f)
        except (OSError, ValueError, tarfile.TarError, http.client.HTTPException) as error:
            fail(f"--url {args.url} could not be fetched ({error}); look at the network, or unpack the "
                 f"archive's dataset/ into {output}")
        found = sorted(Path(work).glob("photos/*/*"))
        if not found:
            fail(f"--url {args.url} holds no dataset/SUBJECT/*.jpg")
        (Path(work) / "photos").rename(output)
    print(f"{len(found)} photos of {len({f.parent for f in found})} subjects in {output}")


if __name__ == "__main__":
    main()
