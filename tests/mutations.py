"""Deliberate bugs, each of which some test must catch. By hand: python tests/mutations.py [words of a bug's name ...]

Each bug is put into a copy of the repository and the test files named beside it are run until the first failure. Prints a
Markdown table; exit code 1 if one survives. tests/test_mutations.py checks that every bug can still be put in.
"""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WIRING, LOSSES, RESUME = "tests/test_wiring.py", "tests/test_losses.py", "tests/test_resume.py"
METHODS, KERNELS, SCHEDULERS, GRADIENTS = "tests/test_methods.py", "tests/test_kernels.py", "tests/test_schedulers.py", "tests/test_gradients.py"
INPUT, TRAIN, NUMBERS = "tests/test_input.py", "tests/test_train.py", "tests/test_numbers.py"

# (what is wrong, file, its text, the wrong text, pytest's arguments)
MUTATIONS = [
    # the loop: who, when, which way
    ("real and fake exchanged in the critics' turn", "train.py", "(h(real[k]), h(student.features(k).detach()))",
     "(h(student.features(k).detach()), h(real[k]))", f"{WIRING} -k critics"),
    ("critics see the student with its gradient", "train.py", "h(student.features(k).detach())", "h(student.features(k))", f"{WIRING} -k critics_gradient"),
    ("critics keep the gradient that the student's loss left", "train.py",
     '        m.optimizers["critic"].zero_grad()  # of what the student\'s loss left there\n', "", f"{WIRING} -k critics_gradient"),
    ("critics' step forgotten", "train.py", '        m.optimizers["critic"].step()\n', "", f"{WIRING} -k adversarial"),
    ("student's step forgotten", "train.py", '    m.optimizers["student"].step()\n', "", f"{WIRING} -k latent"),
    ("token's step forgotten", "train.py", '    m.optimizers["token"].step()  #', "    #", f"{WIRING} -k teacher_lr"),
    ("student flees from being taken for real", "train.py", 'terms["alignment"] + terms.get("adversarial", 0)', 'terms["alignment"] - terms.get("adversarial", 0)',
     f"{WIRING} -k lowers_it"),
    ("student's noise drawn anew", "train.py", "View(pair.student.one_step(eps, own_context)", "View(pair.student.one_step(torch.randn_like(eps), own_context)",
     f"{WIRING} -k one_noise"),
    ("re-noising with fresh noise", "train.py", "teacher.add_noise(z_s, eps, t)", "teacher.add_noise(z_s, torch.randn_like(eps), t)",
     f"{WIRING} -k one_noise"),
    ("target guessed by the student", "train.py", "z = teacher.denoise(", "z = m.pair.student.denoise(", f"{WIRING} -k one_noise"),
    ("target without guidance", "train.py", "context, m.empty, args.guidance_scale)\n    return", "context, m.empty, 1.0)\n    return", f"{WIRING} -k one_noise"),
    ("target's prompt and empty prompt exchanged", "train.py", "context, m.empty, args.guidance_scale)\n    return", "m.empty.expand_as(context), context[:1], args.guidance_scale)\n    return",
     f"{WIRING} -k one_noise"),
    ("target noise ignored", "train.py", "t = timesteps(m, len(z_s), g, args.target_noise)", "t = timesteps(m, len(z_s), g)", f"{WIRING} -k one_noise"),
    ("c(t') of the next timestep", "train.py", "teacher.alphas_cumprod[t])", "teacher.alphas_cumprod[t - 1])", f"{WIRING} -k one_noise"),
    ("alignment not weighed when asked", "train.py", "(c * losses.alignment(", "(losses.alignment(", f"{WIRING} -k one_noise"),
    ("mask left out of the reconstruction", "train.py", "losses.reconstruction(out[:left], target[:left], photos.mask[:left])", "losses.reconstruction(out[:left], target[:left])", f"{WIRING} -k padded"),
    ("photos' mask inverted", "train.py", 'mode="area").to(m.device)\n', 'mode="area").to(m.device).neg().add(1)\n', f"{WIRING} -k padded"),
    ("echoes scored as the first photos", "train.py", "losses.reconstruction(out[left:], target[left:])", "losses.reconstruction(out[left:], target[:len(out) - left])", f"{WIRING} -k padded"),
    ("the same echoes in each step", "train.py", "seed * 1_000_003 + step + number * 500_009)", "seed * 1_000_003 + number * 500_009)", f"{WIRING} -k depend"),
    ("generator of a step without its step", "train.py", "g = torch.Generator().manual_seed(args.seed * 1_000_003 + step)  #",
     "g = torch.Generator().manual_seed(args.seed * 1_000_003)  #", f"{WIRING} -k depend"),
    ("generator of a step without its seed", "train.py", "g = torch.Generator().manual_seed(args.seed * 1_000_003 + step)  #",
     "g = torch.Generator().manual_seed(1_000_003 + step)  #", f"{WIRING} -k depend"),
    ("teacher carries in the echo stage", "train.py", 'args.carry and turn.stage == "joint"', "args.carry", f"{WIRING} -k all_terms"),
    ("carry the wrong way round", "train.py", "theirs += new - was", "theirs -= new - was", f"{METHODS} -k carried"),
    ("carry doubled", "train.py", "theirs += new - was", "theirs += 2 * (new - was)", f"{METHODS} -k carried"),
    ("teacher trains in the student's turn", "train.py", 'if m.teaches and turn.who != "student":', "if m.teaches:", f"{WIRING} -k all_terms"),
    ("student trains in the teacher's turn", "train.py", 'if m.draws and turn.who != "teacher":', "if m.draws:", f"{WIRING} -k all_terms"),
    ("prompt not detached", "train.py", "own_context = context if args.detach_prompt and args.share_text else", "own_context = context if False else", f"{WIRING} -k identity"),
    ("control hears the echo", "train.py", 'echoes = turn.stage == "echo" and not args.echo_real_only', 'echoes = turn.stage == "echo"', f"{TRAIN} -k three_different"),
    ("learning rates never fall", "train.py", "min(1, (length - i) / max(1, share * length))", "1", f"{WIRING} -k rates"),
    ("learning rates an iteration too low", "train.py", "min(1, (length - i) /", "min(1, (length - i - 1) /", f"{WIRING} -k rates"),
    ("rate of keys and values given to the others", "train.py", "zip(parts, (args.kv_rate, 1.0))", "zip(parts, (1.0, args.kv_rate))", f"{WIRING} -k rates"),
    ("teacher's weights in the student's optimizer", "train.py", '"student": adamw(groups(m.moved["student"])', '"student": adamw(groups(m.moved["teacher"])', f"{WIRING} -k latent"),
    ("critics' heads left out of the checkpoint", "train.py", '"token": rows, "echo": m.echo, **heads,', '"token": rows, "echo": m.echo,', f"{RESUME} -k signal_leaves"),
    ("optimizers left out of the checkpoint", "train.py", "**{f\"optimizer.{k}\": o for k, o in m.optimizers.items()}}", "}", f"{RESUME} -k signal_leaves"),
    ("echo left out of the checkpoint", "train.py", '"token": rows, "echo": m.echo, **heads,', '"token": rows, **heads,', f"{RESUME} -k prompts_ask"),
    # the losses
    ("reconstruction divides by all, not by the mask", "losses.py", "mask.sum((1, 2, 3)).clamp(min=1e-6)", "mask.numel()", LOSSES),
    ("identity grows with likeness", "losses.py", "return 1 - F.cosine_similarity(a, b, dim=-1).mean(1)", "return 1 + F.cosine_similarity(a, b, dim=-1).mean(1)", LOSSES),
    ("student wants to look drawn", "losses.py", "F.cross_entropy(logits, torch.ones_like(logits[:, 0], dtype=torch.long)",
     "F.cross_entropy(logits, torch.zeros_like(logits[:, 0], dtype=torch.long)", LOSSES),
    ("critic's classes exchanged", "losses.py", "(F.cross_entropy(real, one) + on_fake) / 2", "(F.cross_entropy(real, zero) + on_fake) / 2", LOSSES),
    ("scenes judged by the critic too", "losses.py", '* weight).sum() / weight.sum()', ').sum() / weight.sum()', LOSSES),
    ("images in [-1, 1] taken for [0, 1] in CIELAB", "losses.py", "IntoGamut.apply((i + 1) / 2))", "IntoGamut.apply(i))", LOSSES),
    ("beyond white no way back", "losses.py", "outwards = (x < 0) & (grad > 0) | (x > 1) & (grad < 0)", "outwards = (x < 0) | (x > 1)", LOSSES),
    ("an echo of the round before", "train.py", "if m.echo.round != turn.round:", "if not m.echo.round:", "tests/test_echo.py"),
    ("echoes beside all photos where they should replace some", "train.py", "left = n - len(pick) if args.echo_replaces else n", "left = n", "tests/test_echo.py"),
    ("echoes stand beside all photos as real", "train.py", "torch.cat([features[k][:n - len(pick)], m.echo.features[k][pick]])",
     "torch.cat([features[k], m.echo.features[k][pick]])", "tests/test_echo.py -k critics"),
    ("pyramid not low-passed", "losses.py", "[1., 4., 6., 4., 1.]) / 16", "[0., 0., 16., 0., 0.]) / 16", LOSSES),
    ("filters not of unit norm", "losses.py", "return w / w.flatten(1).norm(dim=1).view(-1, 1, 1, 1)", "return w", LOSSES),
    ("latent weight read for identity", "losses.py", "total + weights.identity_weight *", "total + weights.latent_weight *", f"{WIRING} -k identity"),
    ("echo keeps the least alike", "losses.py", "identity.argsort(descending=True, stable=True)", "identity.argsort(stable=True)", LOSSES),
    ("echo's floor refuses the faithful", "losses.py", "allowed = fidelity >=", "allowed = fidelity <=", LOSSES),
    ("copies kept in the echo", "losses.py", ".max() < max_similarity):", ".max() < 9):", LOSSES),
    # networks and kernels
    ("LPIPS lets the gradient reach its target", "kernels/lpips_tail.py", "for i in (a, b.detach()))", "for i in (a, b))", KERNELS),
    ("the teacher's guess has a gradient", "train.py", "@torch.no_grad()\ndef alignment_target", "def alignment_target", f"{WIRING} -k one_noise"),
    ("guidance from the wrong end", "model.py", "return free + guidance * (prompted - free)", "return prompted + guidance * (prompted - free)", f"{WIRING} -k one_noise"),
    ("with and without the prompt exchanged", "model.py", "prompted, free = (self.to_x0(out, z_t, t) for out", "free, prompted = (self.to_x0(out, z_t, t) for out", f"{WIRING} -k one_noise"),
    ("one step from the second-noisiest level", "model.py", "torch.full((len(eps),), self.last, device", "torch.full((len(eps),), self.last - 1, device", SCHEDULERS),
    ("velocity's sign", "model.py", "else alpha * eps - sigma * x0", "else alpha * eps + sigma * x0", SCHEDULERS),
    ("alpha and sigma exchanged", "model.py", "return bar.sqrt(), (1 - bar).sqrt()", "return (1 - bar).sqrt(), bar.sqrt()", SCHEDULERS),
    ("token's row put at every word", "model.py", "torch.where((args[0] == self.token_id)[..., None]", "torch.where((args[0] != self.token_id)[..., None]", GRADIENTS),
    ("keys alone move", "model.py", '{"kv": ".attn2.to_k." in name or ".attn2.to_v." in name', '{"kv": ".attn2.to_k." in name', GRADIENTS),
    ("self-attention moves under kv", "model.py", '{"kv": ".attn2.to_k." in name', '{"kv": ".attn1.to_k." in name', GRADIENTS),
    # the disk
    ("resume an iteration early", "data/run.py", 'self.first, self.resumed = meta["step"], None', 'self.first, self.resumed = meta["step"] - 1, None', f"{RESUME} -k signal_leaves"),
    ("resume an iteration late", "data/run.py", 'self.first, self.resumed = meta["step"], None', 'self.first, self.resumed = meta["step"] + 1, None', f"{RESUME} -k signal_leaves"),
    ("checkpoint counts from 0", "data/run.py", "self.checkpoint(step + 1)", "self.checkpoint(step)", f"{RESUME} -k signal_leaves"),
    ("oldest checkpoints kept", "data/run.py", "[:-self.args.checkpoints_total_limit]:", "[self.args.checkpoints_total_limit:]:", f"{RESUME} -k newest"),
    ("oldest checkpoint resumed", "data/run.py", "for path in checkpoints(args.output_dir)[::-1] if latest", "for path in checkpoints(args.output_dir) if latest",
     f"{RESUME} -k truncated"),
    ("changed bytes of a checkpoint go unseen", "data/run.py", 'if header.get("sha256") != fingerprint', 'if False and header.get("sha256") != fingerprint', f"{RESUME} -k damage"),
    ("photos of a resumed run not compared", "data/run.py", "if list(then.values()) != list(now.values()):", "if False:", f"{RESUME} -k photo_has"),
    ("threads of a resumed run not compared", "data/run.py", '"threads": torch.get_num_threads()}', "}", f"{RESUME} -k last_bits"),
    ("a second run takes the lock", "data/run.py", "    except BlockingIOError:\n        return False\n", "    except BlockingIOError:\n        return True\n", f"{RESUME} -k one_run"),
    ("the lock outlives its run", "data/run.py", "    Path(file.name).unlink(missing_ok=True)\n    file.close()\n", "    file.close()\n", f"{RESUME} -k lock"),
    ("student's weights saved as the teacher's", "data/run.py", '(("teacher", pair.teacher, pair.text), ("student"', '(("teacher", pair.student, pair.text), ("student"',
     f"{METHODS} -k carried"),
    ("teacher's token loaded for both", "data/run.py", "pair.student_text.row.copy_(rows[1])", "pair.student_text.row.copy_(rows[0])", f"{METHODS} -k token_of_its_own"),
    ("half files under their own name", "data/disk.py", 'part = path.with_name(f".{path.name}.part")', "part = path", "tests/test_properties.py -k old_one"),
    ("photos mirrored without being asked", "data/images.py", "torch.cat([x, x.flip(3)]) if flip else x for", "torch.cat([x, x.flip(3)]) if flip else x.flip(3) for",
     f"{INPUT} -k mirrored"),
    ("mask of padding covers the photo", "data/images.py", "mask[:, top:bottom, left:right] = 1", "mask[:] = 1", f"{INPUT} -k pads"),
]


def copy(to):
    """The repository's files, without results and caches; weights are linked."""
    names = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.splitlines():
        target = Path(to, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).suffix == ".safetensors" and not (ROOT / name).is_symlink():
            os.symlink(ROOT / name, target)
        else:
            shutil.copyfile(ROOT / name, target, follow_symlinks=False)


def caught(file, old, new, tests):
    """(whether the tests see the bug, the name of the first that does, seconds of processor time)."""
    with tempfile.TemporaryDirectory() as folder:
        copy(folder)
        path, log = Path(folder, file), Path(folder, "log.txt")
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
        child = os.fork()  # libraries are imported once, here; what is ours, in the child
        if not child:
            os.chdir(folder)
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 1)
            os.dup2(1, 2)
            sys.path[:] = [p for p in sys.path if ROOT not in (Path(p).resolve(), Path(p).resolve().parent)]
            os._exit(pytest.main(["-x", "-p", "no:cacheprovider", *tests.split()]))
        _, status, used = os.wait4(child, 0)
        code, said = os.waitstatus_to_exitcode(status), log.read_text(encoding="utf-8", errors="replace")
    if code not in (0, 1):
        raise RuntimeError(f"pytest {tests}: exit code {code}, {said[-2000:]}")
    failed = [line.split("::")[1].split(" - ")[0].split("[")[0] for line in said.splitlines() if line.startswith("FAILED ")]
    return code == 1, failed[0] if failed else "", used.ru_utime + used.ru_stime


def main(words):
    import torch
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.dont_write_bytecode = True
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # as conftest.py does, which comes too late here
    from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel  # noqa: F401
    from transformers import AutoModel, CLIPTextModel, CLIPTokenizer  # noqa: F401
    survived, chosen = 0, [m for m in MUTATIONS if not words or any(w in m[0] for w in words)]
    print("| deliberate bug | in | caught by | s |\n|---|---|---|---|")
    for what, file, old, new, tests in chosen:
        yes, by, seconds = caught(file, old, new, tests)
        survived += not yes
        print(f"| {what} | `{file}` | {f'`{by}`' if yes else '**survived** ' + tests} | {seconds:.0f} |", flush=True)
    print(f"\n{len(chosen) - survived} of {len(chosen)} caught")
    return survived


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
