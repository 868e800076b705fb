"""What every stage shares: the loop that logs, previews, checkpoints and resumes, and the world that it draws from."""
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tqdm import tqdm

from data.images import grid, save_png
from data.run import read_checkpoint, restore, save_checkpoint
from world import World

P = {"beside": .35, "size": .25}  # more neighbours and sizes than the world draws of itself: they are harder to learn


class Batches(torch.utils.data.Dataset):
    """Batch i of a stage, as `draw(i, generator)` makes it on the CPU. It depends on the seed, i and the process alone, so that a
    killed run goes on as if nothing had happened, and --workers may draw ahead."""
    def __init__(self, draw, seed, rank, processes):
        self.draw, self.first, self.every = draw, seed * 1_000_003 + rank, processes

    def __getitem__(self, i):
        return self.draw(i, torch.Generator().manual_seed(self.first + i * self.every))


def run(name, args, modules, optimizers, draw, step, preview):
    """Call `step(draw(i, generator)) -> {loss name: tensor}` args.steps times, or for args.minutes; log, preview, checkpoint and resume."""
    folder = Path(args.work) / name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "checkpoint.safetensors"
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    first, before = 0, 0.
    if path.exists():
        meta, tensors = read_checkpoint(path)
        restore(tensors, meta["state"], modules | {f"optimizer.{k}": o for k, o in optimizers.items()})
        first, before = meta["step"], meta["seconds"]
    stop = []
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, lambda *_: stop.append(1))
    log = open(folder / ("log.txt" if rank == 0 else f"log{rank}.txt"), "a", buffering=1)
    sums, start = {}, time.time()
    batches = iter(torch.utils.data.DataLoader(Batches(draw, args.seed, rank, processes), batch_size=None, sampler=range(first, args.steps),
                                               num_workers=args.workers, multiprocessing_context="fork" if args.workers else None,
                                               pin_memory=args.device == "cuda"))
    for i in tqdm(range(first, args.steps), initial=first, total=args.steps, desc=name, mininterval=5, disable=rank > 0):
        seconds, stopped = together(before + time.time() - start, len(stop))
        progress = max(i / args.steps, seconds / 60 / args.minutes if args.minutes else 0)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("base_lr", group["lr"]) * trapezoid(i, progress, args.decay)
        losses = step(next(batches))
        for k, v in losses.items():
            sums.setdefault(k, []).append(v.detach())
        last = i + 1 == args.steps or progress >= 1
        if (i + 1) % args.log_every == 0 or last:
            means = {k: torch.stack(v).float().mean().item() for k, v in sums.items()}
            log.write(f"step {i + 1} " + " ".join(f"{k} {v:.4f}" for k, v in means.items()) + f" sec {seconds:.0f}\n")
            sums = {}
        if rank == 0 and ((i + 1) % args.save_every == 0 or last or stopped):
            save_checkpoint(path, modules | {f"optimizer.{k}": o for k, o in optimizers.items()}, {"step": i + 1, "seconds": seconds})
            save_png(grid([("", row) for row in preview().split(12)]), folder / "preview.png")
        if stopped:
            sys.exit(130)
        if last:
            break
    return folder


def together(*numbers):
    """The largest of each number over processes, so that all of them stop at one step."""
    if dist.is_initialized():
        shared = torch.tensor(numbers)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return shared.tolist()
    return numbers


def saved(args, stage, name):
    """State of one module in a stage's checkpoint."""
    state = load_file(Path(args.work) / stage / "checkpoint.safetensors", device=args.device)
    return {k[len(name) + 1:]: v for k, v in state.items() if k.startswith(name + "/")}


def average_gradients(module):
    """Mean over processes, when started with torchrun (one thread each is faster than two threads in one process)."""
    if dist.is_initialized():
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        flat = torch.cat([x.flatten() for x in gradients])
        dist.all_reduce(flat)
        for x, y in zip(gradients, flat.div_(dist.get_world_size()).split([x.numel() for x in gradients])):
            x.copy_(y.view_as(x))


def descend(module, loss, optimizers):
    """One step of all the optimizers of a module, with gradients averaged over processes and clipped to norm 1."""
    module.zero_grad()
    loss.backward()
    average_gradients(module)
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    for optimizer in optimizers.values():
        optimizer.step()


def follow(ema, model, step, decay=.999):
    """One step of the exponential moving average of the parameters."""
    decay = min(decay, (step + 1) / (step + 10))
    torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in model.parameters()], 1 - decay)


def trapezoid(i, progress, decay, warmup=200):
    """Learning-rate factor at step i: linear warm-up, constant, linear decay over the last part of the progress from 0 to 1."""
    return max(0, min(1, (i + 1) / warmup, (1 - progress) / max(decay, 1e-9)))


def make_world(args, splits="pretrain", p=P):
    """The world as --freedom and --cells have it."""
    return World(splits, p, args.freedom, args.cells)


def opened(world, args, i):
    """The world at step i of a curriculum: freedom rises from 0 to --freedom over --open_steps steps."""
    world.freedom = args.freedom * min(1, (i + 1) / max(1, args.open_steps))
    return world
