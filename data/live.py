"""A page on this machine that draws while you type: one step is fast enough to follow the keys.

    python sample.py --live                          # the newest run; --run and --base choose others
    pip install gradio==6.31.0                       # what it needs beyond requirements.txt (it takes Pillow 12 in place of 13)

Bound to 127.0.0.1, without telemetry and without a link to share. While a prompt is drawn, only the newest of those typed
meanwhile waits.
"""
import contextlib
import functools
import io
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

from data.base import load_pair, pick_device
from data.disk import fail
from data.images import to_pil
from data.run import load_run, read_run
from model import draw

GRADIO = "6.31.0"
PAINTERS = ("student", "teacher", "untouched student")


def known_runs(args):
    """{name: (folder, flags)} of the run that was asked for, then of every other finished one under out/, the newest first."""
    runs = {str(args.run): (args.run, args.flags)} if args.run else {}
    for config in sorted(Path("out").glob("*/config.json"), key=lambda p: -p.stat().st_mtime):
        with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):  # one that sample.py would refuse
            runs.setdefault(str(config.parent), read_run(config.parent))
    return runs if args.run else {f"no run: {args.base} as it came": (None, args.flags)} | runs


def serve(args, **launching):
    """Open the page and stay until Ctrl-C; launching: of gradio's launch()."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio as gr
    except ImportError as error:
        fail(f"--live needs gradio, which cannot be imported ({error}); pip install gradio=={GRADIO}")
    plain = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # the usual ones come from a server elsewhere
    blocks = page(gr, args, known_runs(args))
    _, url, _ = blocks.launch(**{"server_name": "127.0.0.1", "share": False, "inbrowser": True, "quiet": True, "ssr_mode": False, "theme": plain,
                                 "footer_links": [], "prevent_thread_lock": True} | launching)
    print(f"draw at {url} (this machine only); Ctrl-C ends")
    return blocks if launching else blocks.block_thread()


def page(gr, args, runs):
    from sample import remarks
    device, _ = pick_device(args.device)

    @functools.lru_cache(4)  # pairs kept in memory; changed: when the run was written, for it may be trained again meanwhile
    def load(name, taught, changed):
        folder, flags = runs[name]
        pair = load_pair(flags["base"], flags["token"], flags["class_word"], device, flags | {"tiny_vae": args.tiny_vae})
        if taught and folder:
            load_run(folder, pair)
        return pair

    written = {}

    def pair_of(name, taught):
        if taught and runs[name][0]:
            with contextlib.suppress(OSError):  # while it is written anew: what is in memory goes on
                written[name] = (runs[name][0] / "config.json").stat().st_mtime
        return load(name, taught, written.get(name, 0) if taught else 0)

    def look_again():
        """The runs that have come since: a page that is loaded anew offers them."""
        runs.update(known_runs(args))
        return gr.Dropdown(list(runs))

    def subject(name):
        folder, flags = runs[name]
        return f"{flags['token']} {flags['class_word']}" if folder else "dog"

    def rename(name, prompt):
        """The prompt with another run's subject in place of the last one's."""
        for other in runs:
            prompt = re.sub(rf"\ba {re.escape(subject(other))}(?!\w)", lambda _: f"a {subject(name)}", prompt)
        return prompt

    def follow(name, prompt, seed, count, steps, beside):
        """Galleries of all painters, the student's first: what is seen while typing must not wait for the teacher."""
        folder, flags = runs[name]
        asked = SimpleNamespace(run=folder, flags=flags, base_only=False)
        notes = "  \n".join(remarks([prompt], asked, pair_of(name, True).text.tokenizer))
        shown = {who: gr.skip() if who == "student" or who in beside else gr.Gallery(visible=False) for who in PAINTERS}
        for who in PAINTERS:
            if who == "student" or who in beside:
                role, taught = who.split()[-1], "untouched" not in who
                said = prompt if taught and folder else " ".join(prompt.replace(flags["token"], " ").split())
                pictures, pair = [], pair_of(name, taught)
                for s in range(int(seed or 0), int(seed or 0) + int(count)):
                    start = time.perf_counter()
                    image = to_pil(draw(pair, said, [s], role == "teacher", 16 if role == "teacher" else int(steps),
                                        flags["guidance_scale"] if args.guidance_scale is None else args.guidance_scale, args.tiny_vae))[0]
                    image.info = {"prompt": said, "seed": str(s), "model": who, "run": str(folder)}  # goes into the file that is downloaded
                    pictures.append((image, f"{s}: {1000 * (time.perf_counter() - start):.0f} ms"))
                yield [notes, *(shown | {who: gr.Gallery(pictures, visible=True)}).values()]
                shown[who] = gr.skip()

    with gr.Blocks(title="EchoDistill", analytics_enabled=False) as blocks:
        with gr.Row():
            run = gr.Dropdown(list(runs), value=next(iter(runs)), label="run", scale=2)
            seed = gr.Number(args.seed, label="first seed", precision=0, minimum=0, maximum=2 ** 32 - 9)
            count = gr.Slider(1, 8, 4, step=1, label="pictures")
            steps = gr.Radio([1, 2, 4], value=args.steps if args.steps in (1, 2, 4) else 1, label="student's steps")
            beside = gr.CheckboxGroup(PAINTERS[1:], label="beside it")
        prompt = gr.Textbox(f"a {subject(next(iter(runs)))} on the beach", label="prompt", autofocus=True, elem_id="prompt")
        note = gr.Markdown()
        with gr.Row():
            galleries = [gr.Gallery(label=who, columns=2, format="png", object_fit="contain", visible=who == "student", elem_id=who.replace(" ", "-"),
                                    buttons=["download", "fullscreen"]) for who in PAINTERS]
        blocks.load(look_again, None, run, show_progress="hidden", api_visibility="private")
        run.change(rename, [run, prompt], prompt, show_progress="hidden", api_visibility="private")
        gr.on([blocks.load, *(c.change for c in (run, prompt, seed, count, steps, beside))], follow, [run, prompt, seed, count, steps, beside],
              [note, *galleries], trigger_mode="always_last", concurrency_limit=1, show_progress="hidden", api_visibility="private")
    return blocks
