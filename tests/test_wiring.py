"""One iteration of train.py moves whom the paper says, in the right direction. python -m pytest tests/test_wiring.py"""
import pytest
import torch
from PIL import Image

import losses
import train
from model import View

OFF = dict.fromkeys(("reconstruction_weight", "adversarial_weight", "scene_adversarial_weight", "identity_weight", "latent_weight", "swd_weight",
                     "lpips_weight", "denoising_weight"), 0)
JOINT, HEARS, FOLLOWS = (train.Turn(*turn, 1.) for turn in (("both", "joint"), ("teacher", "echo"), ("student", "echo")))
CRITICS = {"clip critic", "identity critic"}


@pytest.fixture
def made(concept):
    """Makes (m, args) of a run as the paper has it (keys and values, nothing carried), with flags on top and all terms off but those."""
    def make(*switches, **flags):
        flags = dict(train_unet="kv", train_batch_size=2, mixed_precision="no", swd_projections=4, scene_prompts=0, student_lr=1e-5, teacher_lr=1e-5,
                     token_lr=1e-4, kv_rate=1) | OFF | flags
        weights = {k: v for k, v in flags.items() if k.endswith("_weight")}  # set afterwards: with none at all a run would be refused
        args = train.parse_arguments(["--concept", "dog", "--no-carry", *(f"--{k}={v}" for k, v in flags.items() if k not in weights), *switches])
        vars(args).update(weights)
        m = train.build(args, torch.device("cpu"))
        m.echo.z, m.echo.prompts = torch.randn(4, *m.pair.latent_shape, generator=torch.Generator().manual_seed(7)), ["a <v> dog"] * 4
        return m, args
    return make


def everything(m):
    """{whose: [tensor]} of all that a network holds; whose is "frozen" of what may never move."""
    owned = {"teacher": list(m.moved["teacher"].values()), "student": list(m.moved["student"].values()), "token": [m.pair.text.row],
             **{f"{k} critic": list(h.parameters()) for k, h in m.heads.items()}}
    if m.pair.student_text is not m.pair.text:
        owned["student's token"] = [m.pair.student_text.row]
    known = {id(p) for part in owned.values() for p in part}
    networks = (m.pair.teacher, m.pair.student, m.pair.text, m.pair.student_text, m.pair.vae, *m.encoders.values(), *m.heads.values())
    return owned | {"frozen": [p for n in networks for p in (*n.parameters(), *n.buffers()) if id(p) not in known]}


def movers(m, args, turn):
    """Who moves in one iteration: every tensor of theirs, and no tensor of another."""
    before = {k: [p.detach().clone() for p in part] for k, part in everything(m).items()}
    train.iteration(m, args, turn, 0)
    share = {k: [not torch.equal(*pair) for pair in zip(before[k], part)] for k, part in everything(m).items()}
    assert not [k for k, v in share.items() if any(v) and not all(v)], "moved in part"
    return {k for k, v in share.items() if any(v)}


@pytest.mark.parametrize("switches, on, who", [
    ((), ["reconstruction"], {"teacher", "token"}), (("--carry",), ["reconstruction"], {"teacher", "token", "student"}),
    ((), ["identity"], {"student"}), ((), ["latent"], {"student"}), ((), ["swd"], {"student"}), ((), ["lpips"], {"student"}),
    ((), ["adversarial"], {"student"} | CRITICS), (("--scene_prompts=1",), ["scene_adversarial"], {"student"} | CRITICS),
    ((), ["denoising"], {"student", "token"}),
    (("--no-detach_prompt",), ["latent"], {"student", "token"}), (("--no-detach_prompt", "--student_lr=0"), ["adversarial"], {"token"} | CRITICS),
    (("--no-share_text",), ["reconstruction"], {"teacher", "token"}), (("--no-share_text",), ["latent"], {"student", "student's token"}),
    (("--teacher_lr=0",), ["reconstruction"], {"token"}), (("--token_lr=0",), ["reconstruction"], {"teacher"}),
    (("--student_lr=0",), ["latent", "adversarial"], set()), ((), [], set())],
    ids=lambda v: " ".join(v) if isinstance(v, (tuple, list)) else "")
def test_each_term_alone_moves_exactly_whom_the_paper_names(made, switches, on, who):
    m, args = made(*switches, **{f"{k}_weight": 1 for k in on})
    assert movers(m, args, JOINT) == who


def test_with_all_terms_on_each_turn_moves_its_own(made):
    m, args = made("--carry", reconstruction_weight=1, adversarial_weight=1, identity_weight=1, latent_weight=1, swd_weight=.1)
    assert movers(m, args, JOINT) == {"teacher", "token", "student"} | CRITICS
    assert movers(m, args, HEARS) == {"teacher", "token"}  # nothing is carried in the echo stage
    assert movers(m, args, FOLLOWS) == {"student"} | CRITICS
    assert movers(m, args, train.Turn("student", "joint", 1.)) == {"student"} | CRITICS
    assert movers(m, args, train.Turn("both", "joint", 0.)) == set(), "a learning rate of 0 moves nobody"


@pytest.mark.parametrize("term, weight", [("reconstruction", "reconstruction"), ("denoising", "denoising"), ("adversarial", "adversarial"),
                                          *(("alignment", k) for k in ("identity", "latent", "swd", "lpips"))], ids=str)
def test_a_step_on_a_term_lowers_it_on_the_same_batch(made, term, weight):
    m, args = made(critic_lr=0, target_noise=.7, **{f"{weight}_weight": 1})
    first, second = (train.iteration(m, args, JOINT, 0)[0] for _ in range(2))
    assert second[term] < first[term]
    if term == "adversarial":  # what lowers the student's loss raises the critics' error on its images
        assert second["critic"] > first["critic"]


def test_hearing_the_echo_lowers_the_echos_loss(made):
    m, args = made(reconstruction_weight=1e-9, echo_weight=1)
    first, second = (train.iteration(m, args, HEARS, 0)[0]["echo"] for _ in range(2))
    assert second < first


@torch.no_grad()
def verdict(m, noise):
    """The critics' mean probability of "real" (of photos, of the student's images)."""
    view = View(m.pair.student.one_step(noise, m.pair.text(["a <v> dog"] * len(noise))), m.pair, m.encoders, m.autocast)
    real = [torch.stack([h(x(k)).softmax(1)[:, 1].mean() for k, h in m.heads.items()]).mean() for x in (m.known.get, view.features)]
    return real


def test_critics_learn_to_tell_photos_from_the_students_images_and_the_student_to_be_taken_for_real(made):
    m, args = made(adversarial_weight=1, critic_lr=1e-3, student_lr=1e-12)
    noise = torch.randn(4, *m.pair.latent_shape, generator=torch.Generator().manual_seed(1))
    photo, drawn = verdict(m, noise)
    reports = [train.iteration(m, args, JOINT, step) for step in range(6)]
    photo_after, drawn_after = verdict(m, noise)
    assert photo_after > photo + .05 and drawn_after < drawn - .05
    assert reports[-1][0]["critic"] < reports[0][0]["critic"] and reports[-1][0]["adversarial"] > reports[0][0]["adversarial"]
    args.critic_lr, args.student_lr = 0, 1e-3
    for step in range(4):
        train.iteration(m, args, JOINT, step)
    assert verdict(m, noise)[1] > drawn_after + .05


def test_the_critics_gradient_is_that_of_their_own_loss_alone(made):
    m, args = made(adversarial_weight=3, critic_lr=0, max_grad_norm="inf")
    seen = {k: [] for k in m.heads}
    for k, head in m.heads.items():
        head.register_forward_hook(lambda _, inputs, out, k=k: seen[k].append(inputs[0]))
    train.iteration(m, args, JOINT, 0)
    for k, head in m.heads.items():
        student, photos, again = seen[k]
        assert torch.equal(student, again) and student.requires_grad and not again.requires_grad
        assert all(any(torch.equal(row, known) for known in m.known[k]) for row in photos)
        logits = head(photos), head(again)
        expected = (-logits[0].log_softmax(1)[:, 1].mean() - logits[1].log_softmax(1)[:, 0].mean()) / 2 / len(m.heads)
        for p, g in zip(head.parameters(), torch.autograd.grad(expected, list(head.parameters()))):
            torch.testing.assert_close(p.grad, g)


def test_one_noise_is_used_three_times_and_the_target_is_the_new_teachers_guided_guess(made, monkeypatch):
    m, args = made("--weight_alignment", reconstruction_weight=1, latent_weight=1, guidance_scale=3, target_noise=.5)
    noised, started, guessed = [], [], []
    add_noise, one_step, denoise = m.pair.teacher.add_noise, m.pair.student.one_step, m.pair.teacher.denoise
    monkeypatch.setattr(m.pair.teacher, "add_noise", lambda *a: noised.append(a) or add_noise(*a))
    monkeypatch.setattr(m.pair.student, "one_step", lambda *a: started.append((*a, one_step(*a))) or started[-1][-1])
    weights = list(m.moved["teacher"].values())
    monkeypatch.setattr(m.pair.teacher, "denoise", lambda *a: guessed.append((*a, [p.detach().clone() for p in weights])) or denoise(*a))
    aligned = []
    monkeypatch.setattr(losses, "alignment", lambda s, t, *a: aligned.append((s.z, t.z)) or s.z.flatten(1)[:, 0] * 0 + 1)
    terms, _, _ = train.iteration(m, args, JOINT, 0)
    (_, eps, t), (z, again, low) = noised
    (start, _, drawn), = started
    (z_t, level, context, empty, guidance, teacher), = guessed
    assert torch.equal(eps, start) and torch.equal(eps, again) and torch.equal(z, drawn) and torch.equal(low, level)
    assert guidance == 3 and torch.equal(empty, m.pair.text([""])) and not context.requires_grad and not torch.equal(t, low)
    assert low.min() >= m.pair.teacher.last // 2
    assert all(torch.equal(*pair) for pair in zip(teacher, weights)), "the teacher had not yet taken its step"
    (student, target), = aligned
    assert student.requires_grad and not target.requires_grad
    with torch.no_grad():
        z_t = add_noise(drawn, eps, low)
        prompted, free = (m.pair.teacher.x0(z_t, low, c) for c in (context, empty.expand(2, -1, -1)))
    torch.testing.assert_close(target, 3 * prompted - 2 * free, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(terms["alignment"].detach(), m.pair.teacher.alphas_cumprod[low].mean())


def test_a_padded_photo_counts_only_where_it_is_and_an_echo_as_a_whole(made, concept, monkeypatch):
    for p in concept.iterdir():
        Image.new("RGB", (64, 16), "red").save(p)
    m, args = made("--crop=pad", reconstruction_weight=1, echo_share=1)
    seen, reconstruction = [], losses.reconstruction
    monkeypatch.setattr(losses, "reconstruction", lambda *a: seen.append(a) or reconstruction(*a))
    noised, add_noise = [], m.pair.teacher.add_noise
    monkeypatch.setattr(m.pair.teacher, "add_noise", lambda *a: noised.append(a) or add_noise(*a))
    train.iteration(m, args, HEARS, 0)
    (photo, aim, mask), (echo, echo_aim) = seen
    assert len(photo) == len(mask) == len(echo) == 2 and torch.equal(torch.cat([aim, echo_aim]), m.pair.teacher.target(*noised[0]))
    assert all(any(torch.equal(z, known) for known in m.echo.z) for z in noised[0][0][2:])
    assert mask.shape[1:] == (1, *m.pair.latent_shape[1:]) and mask[:, :, 3:5].min() == 1 and mask[:, :, :3].max() == 0 == mask[:, :, 5:].max()


def test_a_batch_and_its_noise_depend_on_seed_and_step_alone_and_the_echo_changes_no_photo(made, monkeypatch):
    m, args = made(reconstruction_weight=1)
    drawn, real_batch = [], train.real_batch
    monkeypatch.setattr(train, "real_batch", lambda *a: drawn.append(real_batch(*a)) or drawn[-1])
    levels, add_noise = [], m.pair.teacher.add_noise
    monkeypatch.setattr(m.pair.teacher, "add_noise", lambda z, eps, t: levels.append((eps[:2], t[:2], eps[2:])) or add_noise(z, eps, t))
    for turn, step, seed in ((JOINT, 3, 42), (JOINT, 4, 42), (JOINT, 3, 43), (JOINT, 3, 42), (HEARS, 3, 42), (HEARS, 4, 42)):
        args.seed = seed
        torch.randn(5)  # torch's own generator is nobody's business
        train.iteration(m, args, turn, step)
    keys = [torch.cat([b.z.flatten(), eps.flatten(), t]) for b, (eps, t, _) in zip(drawn, levels)]
    assert not torch.equal(levels[4][2], levels[5][2]), "the same echoes in every step"
    assert torch.equal(keys[0], keys[3]) and torch.equal(keys[0], keys[4])
    assert not torch.equal(keys[0], keys[1]) and not torch.equal(keys[0], keys[2])


def test_rates_fall_at_the_end_of_each_stage_and_to_zero_at_the_very_end(made):
    m, args = made(max_train_steps=10, echo_steps=4, lr_decay=.5)
    turns = train.plan(args)
    assert [(t.who, t.stage) for t in turns] == [("both", "joint")] * 10 + [("teacher", "echo")] * 4 + [("student", "echo")] * 4
    assert [round(t.rate, 2) for t in turns] == [1] * 6 + [.8, .6, .4, .2] + [1, 1, 1, .5] + [1, .75, .5, .25]
    args.kv_rate = 10.
    m.optimizers = train.make_optimizers(m, args)
    train.set_rates(m, args, turns[7])
    rates = {k: sorted({g["lr"] / getattr(args, f"{k}_lr") for g in o.param_groups}) for k, o in m.optimizers.items()}
    assert rates == {"teacher": [pytest.approx(6)], "student": [pytest.approx(6)], "token": [pytest.approx(.6)], "critic": [pytest.approx(.6)]}
