"""Pretrain the embedded pair, its training encoders and its judges, stage by stage, on a CPU or a GPU.

    python data/emoji/pretrain.py clip             # image-text encoder; its text tower starts the base's text encoder
    python data/emoji/pretrain.py vae              # autoencoder
    python data/emoji/pretrain.py identity         # instance encoder of the training family
    python data/emoji/pretrain.py judge_clip       # the judges: other architecture, seed and data order
    python data/emoji/pretrain.py judge_identity
    python data/emoji/pretrain.py judge_names      # names the objects of a picture, one or two
    torchrun --nproc_per_node=2 data/emoji/pretrain.py teacher    # one thread a process; plain python works too
    python data/emoji/pretrain.py pairs --seed 0   # teacher samples to distil; any number of seeds, in parallel
    torchrun --nproc_per_node=2 data/emoji/pretrain.py student   # regression on them
    torchrun --nproc_per_node=2 data/emoji/pretrain.py match     # and distribution matching
    python data/emoji/pretrain.py export           # data/emoji/base in the diffusers layout
    python data/emoji/pretrain.py measure          # what the judges say of it

Each training stage goes on from its checkpoint in --work after a kill, and writes log.txt and preview.png beside it.
"""
import argparse
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
from stages.encoders import WIDTHS, build_tokenizer, train_encoder
from stages.export import export
from stages.latents import channels, code
from stages.score import measure
from stages.student import make_pairs, train_student
from stages.teacher import train_teacher
from stages.vae import train_vae
from world import FREEDOM

RECIPE = {  # flags override, --batch is per process; the pair of old rests in the log
    "clip": dict(steps=3000, batch=128, lr=2e-3), "identity": dict(steps=2000, batch=64, lr=2e-3),
    "judge_clip": dict(steps=4000, batch=128, lr=2e-3), "judge_identity": dict(steps=3000, batch=64, lr=2e-3), "judge_names": dict(steps=4000, batch=128, lr=2e-3),
    "vae": dict(steps=7000, batch=16, lr=2e-3), "teacher": dict(steps=80000, batch=64, lr=1e-3),
    "pairs": dict(steps=400, batch=64, lr=0.), "student": dict(steps=4000, batch=48, lr=5e-4),
    "match": dict(steps=4000, batch=32, lr=5e-4),
    "export": {}, "measure": {}}
STAGES = {"vae": train_vae, "teacher": train_teacher, "pairs": make_pairs, "student": train_student, "match": train_student,
          "export": export, "measure": measure} | dict.fromkeys(WIDTHS, train_encoder)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("stage", choices=STAGES)
    p.add_argument("--work", default=str(HERE / "work"), help="folder for checkpoints, logs and previews")
    p.add_argument("--base", default=str(HERE / "base"), help="folder that `export` writes and `measure` reads")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="autocast where it helps")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the UNet of a stage: two minutes first, then a fifth faster")
    p.add_argument("--init", help="folder of a pair, such as base: go on from its weights and in its code")
    p.add_argument("--threads", type=int, default=1, help="per process")
    p.add_argument("--freedom", type=float, default=FREEDOM, help="of the world: 0 upright and in the middle, 1 free geometry and light")
    p.add_argument("--cells", action=argparse.BooleanOptionalAction, default=True, help="places and sizes at whole cells of the code in freedom, too")
    p.add_argument("--open_steps", type=int, default=0, help="steps over which freedom rises from 0 (0: from the first on)")
    p.add_argument("--steps", type=int, help="may be raised on resume")
    p.add_argument("--minutes", type=float, default=0, help="end after so long if that is earlier, with the learning rate decayed; 0: no limit")
    p.add_argument("--decay", type=float, default=.3, help="share of a run over which the learning rate falls to 0; more --minutes on resume raise it again")
    p.add_argument("--workers", type=int, default=0, help="processes that draw batches ahead, for a GPU: a core draws some 1,400 pictures a second")
    p.add_argument("--batch", type=int, help="per process")
    p.add_argument("--noises", type=int, default=1, help="noise levels at which the teacher sees each picture of a batch")
    p.add_argument("--lr", type=float)
    p.add_argument("--only", help="the one module of an encoder stage that learns, such as nouns; the others stay as --init has them")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--guidance", type=float, default=2.5, help="classifier-free guidance of the teacher; matching ends with 1.5, for variety")
    p.add_argument("--channels", type=int, default=24, help="width of the latent code, if --init does not say it")
    p.add_argument("--sharpen", type=float, default=.2, help="share of the vae's steps after which it is asked for sharpness (1: never)")
    p.add_argument("--vae_noise", type=float, default=.6, help="noise on the codes that the decoder learns from, at most: at .25 it sharpens a student's errors, too")
    p.add_argument("--gan", type=float, default=.5, help="vae: weight of realness against exactness, by gradient norm at the picture")
    p.add_argument("--anchor", type=float, default=.25, help="match: weight of the regression on pairs")
    p.add_argument("--samples", type=int, default=500, help="prompts that `measure` draws")
    p.add_argument("--log_every", type=int, default=50)
    p.add_argument("--save_every", type=int, default=500)
    args = p.parse_args(argv)
    args.channels = channels(args)
    for key, value in RECIPE[args.stage].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    torch.set_num_threads(args.threads)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        if dist.get_rank():
            dist.barrier()  # the first process alone writes what all of them read
    if args.init and not (Path(args.work) / "tokenizer").exists():
        shutil.copytree(Path(args.init) / "teacher" / "tokenizer", Path(args.work) / "tokenizer")
    if "RANK" in os.environ and not dist.get_rank():
        build_tokenizer(Path(args.work) / "tokenizer")
        code(args)
        dist.barrier()
    STAGES[args.stage](args)


if __name__ == "__main__":
    main()
