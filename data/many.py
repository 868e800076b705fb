"""Many runs, one concept each, over one or several processes; they need no word from each other.

    python train.py --concept photos/*
    torchrun --nproc_per_node=4 train.py --concept photos/*

Of several concepts the same command goes on after any stop: finished runs are passed over and unfinished ones resumed.
"""
import os
import sys
from pathlib import Path

import torch

from data.disk import fail
from data.recipe import Parser
from data.run import checkpoints


def share(argv=None):
    """[(concept, command line)] of this process's runs: all that --concept names, or under torchrun every WORLD_SIZE-th of them.

    A concept that stands alone keeps its command line, but not under torchrun. Of several, each run goes to a folder of its own in --output_dir.
    """
    argv = list(map(str, sys.argv[1:] if argv is None else argv))
    rank, world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    p = Parser(prog="train.py", add_help=False, allow_abbrev=False)
    p.add_argument("--concept", nargs="+", default=[])
    for flag in ("output_dir", "resume_from_checkpoint", "device"):
        p.add_argument(f"--{flag}")
    args, rest = p.parse_known_args(argv)
    if not args.concept or len(args.concept) < 2 and world == 1:
        return [(None, argv)]
    folders = [c for c in args.concept if os.path.isdir(c)]
    outs = [Path(args.output_dir or "out", Path(c).resolve().name) for c in folders]
    if len(set(outs)) < len(outs):
        twice = next(o for o in outs if outs.count(o) > 1)
        fail(f"two folders of --concept are called {twice.name}, so both runs would go to {twice}; rename one")
    if args.resume_from_checkpoint not in (None, "latest"):
        fail(f"--resume_from_checkpoint {args.resume_from_checkpoint} is of one run; with several concepts each goes on by itself")
    if not folders:
        fail(f"--concept {args.concept[0]} and what follows it are no folders; give the folder that holds the photos")
    if rank == 0 and len(folders) < len(args.concept):
        print(f"note: passed over, for they are no folders: {', '.join(map(repr, (c for c in args.concept if c not in folders)))}")
    device = args.device
    if device is None and world > 1 and torch.cuda.device_count() > 1:
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', rank)) % torch.cuda.device_count()}"
    runs = []
    for concept, out in list(zip(folders, outs))[rank::world]:
        if (out / "config.json").is_file():
            print(f"{out} is finished and passed over; remove it to train {concept} again")
            continue
        go_on = ["--resume_from_checkpoint", "latest"] if checkpoints(out) else []
        runs.append((concept, ["--concept", concept, "--output_dir", str(out), *(["--device", device] if device else []), *go_on, *rest]))
    return runs
