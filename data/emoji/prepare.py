"""Make the sprite sheet and the split of the emoji world from three npm packages.

    python data/emoji/prepare.py            # needs the npm client and network, about a minute

Writes sprites.webp (RGBA tiles of 64 px, row by row) and sprites.json (one entry a tile) next to this file:
    name    plain English name of the emoji (unicode-emoji-json)
    class   the noun that captions use for it
    style   "3d" (Fluent, MIT), "flat" (Twemoji, CC BY 4.0) or "noto" (Noto, Apache-2.0)
    split   "pretrain"  every pretraining stage may draw it
            "extra"     only the frozen encoders may draw it (more individuals, so that identity means something)
            "held_out"  no pretraining stage ever sees it: the subjects to personalise
    live    of a held-out entry: whether it is an animal, which can wear and do things
The three artists drew the same name as three different individuals, which is the personalisation problem in small:
the base knows the class word from Fluent and Twemoji, and has never seen Noto's individual.
"""
import argparse
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
TILE, COLUMNS = 64, 32
PACKAGES = {
    "3d": ("@lobehub/fluent-emoji-3d@1.1.0", "assets/{}.webp"),
    "flat": ("emoji-datasource-twitter@16.0.0", "img/twitter/64/{}.png"),
    "noto": ("emoji-datasource-google@16.0.0", "img/google/64/{}.png"),
    "names": ("unicode-emoji-json@0.9.0", None),
}
GROUPS = ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")
UNUSED = ("o’clock", "-thirty", "moon", "globe", "sun", "cloud", "banknote", "book", "mailbox", "speaker")

# class word -> the emoji that the base learns it from
CLASSES = {
    # live
    "dog": ["dog face", "dog", "poodle", "guide dog"], "cat": ["cat face", "cat", "black cat"], "fox": ["fox"],
    "bear": ["bear", "polar bear"], "horse": ["horse face", "horse"], "cow": ["cow face", "cow"], "pig": ["pig face", "pig"],
    "rabbit": ["rabbit face", "rabbit"], "frog": ["frog"], "bird": ["bird", "black bird"], "chicken": ["chicken", "rooster"],
    "penguin": ["penguin"], "owl": ["owl"], "turtle": ["turtle"], "fish": ["fish", "tropical fish"], "octopus": ["octopus"],
    "butterfly": ["butterfly"], "ladybug": ["lady beetle"],
    # plants and food
    "flower": ["hibiscus", "sunflower", "blossom"], "tree": ["evergreen tree", "deciduous tree"], "cactus": ["cactus"],
    "mushroom": ["mushroom"], "apple": ["red apple", "green apple"], "hamburger": ["hamburger"],
    "cake": ["birthday cake", "shortcake"], "cupcake": ["cupcake"], "cookie": ["cookie"], "doughnut": ["doughnut"],
    "cup": ["hot beverage", "teacup without handle"], "teapot": ["teapot"], "bowl": ["bowl with spoon", "cooked rice"],
    "vase": ["amphora", "funeral urn"], "can": ["canned food"],
    # vehicles and places
    "car": ["automobile", "oncoming automobile", "sport utility vehicle", "taxi"], "bus": ["bus", "oncoming bus"],
    "truck": ["delivery truck", "fire engine"], "train": ["locomotive", "train"], "boat": ["sailboat", "speedboat"],
    "airplane": ["airplane", "small airplane"], "rocket": ["rocket"], "house": ["house", "hut"], "tent": ["tent", "circus tent"],
    # things
    "balloon": ["balloon"], "ball": ["soccer ball", "basketball", "volleyball", "baseball"], "gift": ["wrapped gift"],
    "drum": ["drum", "long drum"], "guitar": ["guitar", "violin"], "clock": ["alarm clock", "mantelpiece clock"],
    "hat": ["top hat", "woman’s hat"], "crown": ["crown"], "shoe": ["running shoe", "hiking boot"], "bag": ["handbag", "purse"],
    "backpack": ["backpack"], "television": ["television"],
}
# Noto's individuals that look least like the two that the base knows; the first 14 are live.
HELD_OUT = [
    "dog face", "cat face", "cow face", "horse face", "polar bear", "rabbit", "chicken", "bird", "penguin", "octopus", "turtle",
    "tropical fish", "lady beetle", "butterfly", "blossom", "deciduous tree", "cactus", "mushroom", "green apple",
    "hamburger", "birthday cake", "cupcake", "cookie", "hot beverage", "teapot", "bowl with spoon", "amphora", "canned food",
    "automobile", "oncoming bus", "fire engine", "locomotive", "sailboat", "small airplane", "rocket", "house", "circus tent",
    "balloon", "volleyball", "wrapped gift", "drum", "guitar", "alarm clock", "woman’s hat", "running shoe", "handbag",
    "backpack", "television",
]
LIVE = 14


def fetch(folder):
    """Download and unpack the packages; {style: package folder}."""
    roots = {}
    for style, (package, _) in PACKAGES.items():
        archive = subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True)
        roots[style] = Path(folder) / style
        with tarfile.open(Path(folder) / archive.stdout.split()[-1]) as tar:
            tar.extractall(roots[style], filter="data")
        roots[style] /= "package"
    return roots


def load(roots, style, emoji):
    """The emoji in one style as a TILE x TILE RGBA image, or None where the set lacks it."""
    points = [f"{ord(c):04x}" for c in emoji]
    bare = [p for p in points if p != "fe0f"]
    for name in ("-".join(points), "-".join(bare), "-".join(bare + ["fe0f"])):
        path = roots[style] / PACKAGES[style][1].format(name)
        if path.exists():
            image = Image.open(path).convert("RGBA")
            return image.crop(image.getbbox()).resize(fit(image), Image.LANCZOS)


def fit(image):
    """Size of the image's visible box scaled so that its longer side fills the tile."""
    left, top, right, bottom = image.getbbox()
    scale = TILE / max(right - left, bottom - top)
    return max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale))


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        roots = fetch(folder)
        emoji = {v["name"]: e for e, v in json.loads((roots["names"] / "data-by-emoji.json").read_text()).items()
                 if v["group"] in GROUPS}
        class_of = {name: word for word, names in CLASSES.items() for name in names}
        held_out = HELD_OUT
        wanted = [(n, c, s, "pretrain") for n, c in class_of.items() for s in ("3d", "flat")]
        wanted += [(n, n.lower(), s, "extra") for n in emoji if n not in class_of and not any(u in n for u in UNUSED)
                   for s in ("3d", "flat")]
        wanted += [(n, class_of[n], "noto", "held_out") for n in held_out]
        tiles, entries = [], []
        for name, word, style, split in wanted:
            sprite = load(roots, style, emoji[name])
            if sprite is None:
                continue
            tile = Image.new("RGBA", (TILE, TILE))
            tile.paste(sprite, ((TILE - sprite.width) // 2, (TILE - sprite.height) // 2))
            tiles.append(tile)
            entries.append({"name": name, "class": word, "style": style, "split": split}
                           | ({"live": name in held_out[:LIVE]} if split == "held_out" else {}))
    sheet = Image.new("RGBA", (COLUMNS * TILE, -(-len(tiles) // COLUMNS) * TILE))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % COLUMNS * TILE, i // COLUMNS * TILE))
    sheet.save(HERE / "sprites.webp", lossless=True, quality=100, method=6)
    rows = ",\n".join(json.dumps(e, ensure_ascii=False) for e in entries)
    (HERE / "sprites.json").write_text(f"[\n{rows}\n]\n", encoding="utf-8")
    print(f"{len(entries)} sprites, {len(CLASSES)} classes, {len(held_out)} held out")


if __name__ == "__main__":
    main()
