"""What a run shows while it trains: the facts at its start, the log line, loss curves, previews, and a stop when a number is not finite."""
import time
from itertools import groupby

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data.base import pick_precision, unknown_words
from data.disk import fail, save_json
from data.images import curves, photo_sizes, save_png
from data.run import checkpoints
from kernels.dispatch import resolve

# which flags to lower when a loss or gradient is not finite
LIKELY = {"reconstruction": "--teacher_lr or --token_lr", "denoising": "--student_lr or --token_lr", "alignment": "--teacher_lr or --student_lr",
          "adversarial": "--critic_lr or --adversarial_weight", "echo": "--teacher_lr or --echo_weight", "critic": "--critic_lr",
          "teacher's gradient": "--teacher_lr", "student's gradient": "--teacher_lr or --student_lr", "token's gradient": "--token_lr",
          "critics' gradient": "--critic_lr"}


def announce(m, args, why, turns):
    """Print the facts that flags, hardware and photos came to, each with its reason."""
    stages = [(who, len(list(part))) for (who, _, _), part in groupby(turns, lambda turn: (turn.who, turn.stage, turn.round))]
    auto, reason = pick_precision(m.device)
    print(f"device {m.device} ({why}), {args.mixed_precision} autocast ({'as asked; ' * (args.mixed_precision != auto)}{reason}), base {args.base}: teacher {m.pair.teacher.prediction_type}, "
          f"student {m.pair.student.prediction_type}, {m.pair.resolution} px")
    for word in unknown_words(m.pair.text.tokenizer, args.class_word):
        print(f"note: the {args.base} base does not know {word!r}; a --class_word that it knows gives the token a better start")
    sizes = photo_sizes(args.concept)
    for path, size in sizes.items() if args.crop == "centre" else ():
        if max(size) > 2 * min(size):
            print(f"note: of {path}, {size[0]} x {size[1]} pixels, only the middle square is seen; --crop pad keeps the whole")
    if m.world == "emoji" and max(map(max, sizes.values())) > 256:  # no picture that was drawn for a small world is so large
        print(f"note: the {args.base} base draws {m.pair.resolution}-px emoji, and your photographs only in that manner; "
              "for pictures like them take --base sd-turbo, on a GPU")
    print("alignment losses in {} ({})".format(*resolve(args.kernels, m.device)))
    print(f"concept {args.concept}: {m.photos.count} photos of {m.name!r}; training {args.train_unet} = "
          f"{sum(p.numel() for p in m.moved['teacher'].values()):,} weights in each UNet and one token of {m.pair.text.row.numel()}")
    print(", then ".join(f"{length} iterations of {who}" for who, length in stages) + f", batch {args.train_batch_size}")


class Progress:
    """Means of every loss term over `log_steps` iterations, and an eye on what may go wrong; a part of the run's state."""

    def __init__(self, out, args, device, total):
        self.out, self.args, self.device, self.total = out, args, device, total
        self.history, self.sums = [], {}  # rows of the log, and each term's values since the last row
        self.watched = []  # losses and gradients not yet looked at
        self.duels, self.first_pull, self.won = [], {}, set()  # critics against the student
        self.started, self.seen = time.time(), 0
        self.writer, self.shown = None, set()  # of tensorboard, and the previews that it has

    def bar(self, steps):
        if self.args.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(self.out / "tensorboard", purge_step=steps.start + 1 if steps.start else None)
        self.line = tqdm(steps, initial=steps.start, total=steps.stop, mininterval=1)
        return self.line

    def after(self, step, terms, norms, duel):
        """Take in one iteration.

        terms  {loss: scalar tensor}; norms  {whose gradient: norm}
        duel   {critic: (norm of its pull on the student's features, share of pictures that it calls what they are)}
        """
        terms, norms = ({k: v.detach() for k, v in part.items()} for part in (terms, norms))
        for k, v in terms.items():
            self.sums.setdefault(k, []).append(v)
        self.watched.append((step + 1, terms | norms))
        self.duels.append(duel)
        self.say_how_long(step + 1)
        log_now = (step + 1) % self.args.log_steps == 0 or step + 1 == self.total
        if self.device.type == "cpu" or log_now or (step + 1) % self.args.checkpointing_steps == 0:  # on a GPU, looking makes it wait
            self.stop_if_not_finite()
        if log_now:
            means = {k: torch.stack(v).mean().item() for k, v in self.sums.items()}
            self.history.append({"step": step + 1, **means})
            self.line.set_postfix_str(" ".join(f"{k} {v:.3f}" for k, v in means.items()))
            self.look_at_critics(step + 1)
            if self.writer:
                self.report(step + 1, means)
            self.sums, self.duels = {}, []

    def say_how_long(self, number):
        """Once, from five iterations after this session's first, which also warms up; the echo's are shorter."""
        self.seen += 1
        if self.seen == 1:
            self.started = time.time()
        elif self.seen == 6:
            pace = (time.time() - self.started) / 5
            every = [f"{part}/ every {n} iterations" for part, n in (("previews", self.args.preview_steps), ("checkpoints", self.args.checkpointing_steps))
                     if 0 < n < self.total]
            print(f"\nabout {pace * (self.total - number) / 60:.1f} minutes to go, {pace:.2g} s an iteration; Ctrl-C keeps what was learned. "
                  f"{self.out} gets {', '.join([*every, 'at the end weights, samples/, preview.png, losses.png'])}")

    def report(self, number, means):
        """The losses of a log row, and the previews drawn since the last one, for tensorboard."""
        for k, v in means.items():
            self.writer.add_scalar(k, v, number)
        for path in sorted((self.out / "previews").glob("*.png")):
            if path not in self.shown:
                self.shown.add(path)
                self.writer.add_image("preview", np.asarray(Image.open(path)), int(path.stem), dataformats="HWC")

    def stop_if_not_finite(self):
        """Every loss and gradient since the last call, in the order in which they came."""
        for number, row in self.watched:
            for what, value in row.items():
                if not value.isfinite():
                    found = checkpoints(self.out)
                    fail(f"{what} is {value.item()} at iteration {number}; lower {LIKELY.get(what, 'the learning rates')}"
                         + (" or try --mixed_precision no" if self.args.mixed_precision != "no" else "") + "; "
                         + (f"the last good checkpoint is {found[-1]}" if found else "no checkpoint had been written yet"))
        self.watched.clear()

    def look_at_critics(self, number):
        """Say once of a critic that it has won: always right, and its pull on the student a hundredth of what it was."""
        for k in dict.fromkeys(k for duel in self.duels for k in duel if k not in self.won):
            pull, right = (torch.stack(v) for v in zip(*(duel[k] for duel in self.duels if k in duel)))
            strength = pull.max().item()
            self.first_pull.setdefault(k, strength)
            if right.min() == 1 and strength < .01 * self.first_pull[k]:
                self.won.add(k)
                print(f"\nnote: the {k} critic has won by iteration {number}: it is always right and its pull on the student is "
                      f"{strength / self.first_pull[k]:.1g} of what it was; lower --critic_lr")

    def finish(self):
        save_json(self.out / "log.json", self.history)
        save_png(curves(self.history), self.out / "losses.png")
        if self.writer:
            self.report(self.total, {})
            self.writer.close()

    def state_dict(self):
        return {"history": self.history, "sums": {k: [x.item() for x in v] for k, v in self.sums.items()},
                "first_pull": self.first_pull, "won": sorted(self.won)}

    def load_state_dict(self, state):
        self.history = state["history"]
        self.sums = {k: [torch.tensor(x, device=self.device) for x in v] for k, v in state["sums"].items()}
        self.first_pull, self.won = state["first_pull"], set(state["won"])
