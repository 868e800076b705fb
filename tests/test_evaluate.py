"""Scores, judges, one run and the benchmark from end to end. Run: python -m pytest tests/test_evaluate.py"""
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
from conftest import ROOT, exit_of, train
from data.benchmark import download

SHORT = "--max_train_steps 2 --train_batch_size 2 --echo_steps 1 --echo_samples 4"


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1)


# -- metrics ----------------------------------------------------------------------------------------------------

def test_mean_cosine_is_the_mean_over_all_pairs():
    a, b = unit(5, 7), unit(3, 7, seed=1)
    expected = np.mean([float(np.dot(x, y)) for x in a.numpy() for y in b.numpy()])
    assert math.isclose(evaluate.mean_cosine(a, b), expected, rel_tol=1e-12)


def test_agreement_compares_row_by_row():
    a, b = unit(5, 7), unit(5, 7, seed=1)
    expected = np.mean([float(np.dot(x, y)) for x, y in zip(a.numpy(), b.numpy())])
    assert math.isclose(evaluate.agreement(a, b), expected, rel_tol=1e-12) and evaluate.agreement(a, a) == pytest.approx(1)


def test_diversity_compares_seeds_of_one_prompt_only():
    seeds, prompts = 3, 4
    e = unit(seeds * prompts, 6)
    table = e.view(seeds, prompts, 6).numpy()
    pairs = [float(np.dot(table[i, p], table[j, p])) for p in range(prompts) for i in range(seeds) for j in range(seeds) if i != j]
    assert math.isclose(evaluate.diversity(e, seeds), 1 - np.mean(pairs), rel_tol=1e-12)
    assert abs(evaluate.diversity(e[:prompts].repeat(seeds, 1), seeds)) < 1e-12


# -- judges -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def hub_judges(tmp_path_factory):
    """A folder with tiny random encoders of the classes that JUDGES names."""
    from transformers import (CLIPConfig, CLIPModel, CLIPTokenizer, Dinov2Config, Dinov2Model, SiglipConfig, SiglipModel, ViTConfig,
                              ViTModel)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("judges")
    tiny = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "data" / "emoji" / "base" / "teacher" / "tokenizer")
    text = dict(tiny, vocab_size=len(tokenizer), max_position_embeddings=tokenizer.model_max_length,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    vision = dict(tiny, image_size=32, patch_size=8)
    made = {"paper/clip": CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)),
            "paper/dino": Dinov2Model(Dinov2Config(**vision)), "dreambooth/dino": ViTModel(ViTConfig(**vision)),
            "siglip2/clip": SiglipModel(SiglipConfig(text_config=text, vision_config=vision))}
    for name, model in made.items():
        model.save_pretrained(folder / name)
    for name in ("paper", "siglip2"):
        tokenizer.save_pretrained(folder / name / "clip")
    return folder


def test_judges_of_each_class_give_unit_embeddings_of_pictures_and_prompts(hub_judges):
    x = torch.rand(3, 3, 64, 64) * 2 - 1
    for name, statistics in (("paper/clip", evaluate.CLIP), ("siglip2/clip", evaluate.HALF)):
        judge = evaluate.HubJudge(hub_judges / name, 32, statistics, "cpu")
        a, b = judge.embed(x), judge.embed_text(["a dog", "a cat on the beach"])
        assert a.shape[1] == b.shape[1] and torch.allclose(a.norm(dim=1), torch.ones(3)) and torch.allclose(b.norm(dim=1), torch.ones(2))
        assert not torch.allclose(b[0], b[1])
    for name in ("paper/dino", "dreambooth/dino"):
        a = evaluate.HubJudge(hub_judges / name, 32, evaluate.IMAGENET, "cpu").embed(x)
        assert a.shape == (3, 32) and torch.allclose(a.norm(dim=1), torch.ones(3))


def test_a_hub_judge_sees_what_the_models_own_processor_would_show_it(hub_judges):
    from transformers import CLIPImageProcessor
    judge = evaluate.HubJudge(hub_judges / "paper" / "clip", 32, evaluate.CLIP, "cpu")
    x = (torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255).round()
    seen = []
    judge.model.get_image_features = lambda pixel_values: seen.append(pixel_values) or torch.ones(1, 4)
    judge.embed(x / 127.5 - 1)
    picture = Image.fromarray(x[0].permute(1, 2, 0).byte().numpy())
    own = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)(picture, return_tensors="pt").pixel_values
    assert (seen[0] - own).abs().mean() < .01  # the processor rounds to 8 bits after each pass of its resizing


def test_the_probes_find_in_the_worlds_own_drawings_what_the_prompts_ask():
    judges = [evaluate.load_encoder(ROOT / "data" / "emoji" / "base" / "judges" / k) for k in ("clip", "names")]
    with torch.no_grad():
        truths = evaluate.Truths(*judges)
        templates = evaluate.read_spec("emoji")["prompts"]["object"]
        images = __import__("world").illustrate("teapot", templates * 4, torch.Generator().manual_seed(0))
        right, wrong = truths.score(images, templates, "teapot"), truths.score(images, templates[7:] + templates[:7])
        soft, mosaic = (truths.score(spoil(images), templates, "teapot") for spoil in (truths.measure.blur, truths.measure.mosaic))
    assert truths.ceiling["place"] > .9 and truths.ceiling["count"] > .85 and truths.ceiling["colour"] > .6
    assert right["place"] > .95 and right["count"] > .85 and right["colour"] > .6
    assert wrong["place"] < .5 and wrong["count"] < .8 and wrong["colour"] < .4
    assert abs(right["edges"] - 1) < .1 and soft["edges"] < .8
    assert abs(right["KID"]) < 10 and mosaic["KID"] > 30, mosaic


@pytest.mark.parametrize("template, kept", [("a {} at night", True), ("a photo of the {}", True), ("a red {}", False), ("a small {} in the snow", False),
                                            ("a {} next to a hat", False), ("a red {} next to a hat", False)])
def test_identity_is_asked_of_the_subject_alone_and_as_it_is(template, kept):
    assert evaluate.as_it_is(template) == kept


def test_none_of_likeness_obedience_and_drawing_makes_up_for_another():
    assert evaluate.all_three(1, 1, 1, -3) == 1 and evaluate.all_three(.5, .5, 1, 100) == pytest.approx(.5)
    assert evaluate.all_three(1, 1, 2, 0) == evaluate.all_three(1, 1, .5, 0) < evaluate.all_three(.9, .9, .9, 0)
    assert evaluate.all_three(-.1, 1, 1, 0) == evaluate.all_three(1, 0, 1, 0) == evaluate.all_three(1, 1, 0, 0) == 0


# -- one run ----------------------------------------------------------------------------------------------------

def test_a_run_is_scored_and_an_untouched_student_has_not_drifted(concept, quick_pictures, capsys):
    run = train(*SHORT.split())
    evaluate.main(["--run", str(run), "--num_seeds", "1", "--steps", "2"])
    scores = json.loads((run / "scores.json").read_text())
    assert {"student, 1 step", "student, 2 steps", "teacher, 16 steps", "untouched student, 1 step"} <= set(scores["scores"])
    drift = [scores["scores"][k]["drift"] for k in ("untouched student, 1 step", "student, 1 step")]
    assert abs(drift[0]) < 1e-4 < drift[1]
    assert scores["judges"]["clip"].endswith("judges/clip") and (run / "contact.png").is_file()
    assert "| student, 1 step" in capsys.readouterr().out


def test_a_run_without_its_photos_or_a_base_without_judges_is_refused_by_name(concept, capsys):
    run = train(*SHORT.split())
    shutil.rmtree(concept)
    code, said = exit_of(evaluate.main, ["--run", run], capsys)
    assert code == 2 and str(concept.name) in said and "out/dog" in said and "--concept" not in said
    code, said = exit_of(lambda argv: evaluate.load_judges("embedded", "sd-turbo", None, "cpu"), [], capsys)
    assert code == 2 and "--judges embedded" in said and "sd-turbo" in said


@pytest.mark.parametrize("spoil", [Path.unlink, lambda p: p.write_bytes(b"no weights")], ids=["missing", "damaged"])
def test_a_judge_that_cannot_be_loaded_is_named_in_one_sentence(spoil, hub_judges, tmp_path, capsys):
    spoil(Path(shutil.copytree(hub_judges / "paper", tmp_path / "judges"), "clip", "model.safetensors"))
    code, said = exit_of(lambda argv: evaluate.load_judges(str(tmp_path / "judges"), "emoji", None, "cpu"), [], capsys)
    assert code == 2 and "--judges" in said and "judges/clip" in said and "\n" not in said


# -- benchmark --------------------------------------------------------------------------------------------------

def benchmark(*flags):
    return ["--benchmark", "emoji", "--num_seeds", "1", "--device", "cpu", "--output_dir", "bench", *map(str, flags)]


def lines(folder="bench"):
    rows = [json.loads(r) for r in open(os.path.join(folder, "results.jsonl"), encoding="utf-8")]
    return [{k: v for k, v in r.items() if "seconds" not in k} for r in rows]


def test_two_processes_find_what_one_finds_and_finished_jobs_are_never_done_again(hub_judges, capsys):
    flags = ["--judges", hub_judges / "paper", "--subjects", 2, "--seeds", "1", "--methods", "untouched", "--reference", "short", "--method", f"short={SHORT}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(ROOT / "evaluate.py"), *benchmark(*flags)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parallel = lines()
    assert [r["seed"] for r in parallel if r["method"] == "untouched"] == [0, 0]  # training's seed does not reach it
    assert len(parallel) == 4 and "2 process(es)" in done.stdout
    os.rename("bench", "parallel")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    evaluate.main(benchmark(*flags))
    torch.set_num_threads(threads)
    assert lines() == parallel
    stamps = {p: p.stat().st_mtime_ns for p in Path("bench/jobs").rglob("*.json")}
    capsys.readouterr()
    evaluate.main(benchmark(*flags))
    assert "4 done" in capsys.readouterr().out and stamps == {p: p.stat().st_mtime_ns for p in stamps}
    page = open("bench/report.html", encoding="utf-8").read()
    with Image.open("bench/pictures.webp") as sheet:  # of two subjects, the photo, a gap and eight pictures
        assert sheet.size == (144 + 8 * 128, 2 * 128) and np.asarray(sheet)[:128, 144:].std() > 10
    assert "data:image/webp;base64," in page and "http" not in page and "untouched" in page
    code, message = exit_of(evaluate.main, benchmark(*flags[:-1], "short=--max_train_steps 3"), capsys)
    assert code == 2 and "max_train_steps 2, not 3" in message and "--output_dir" in message
    code, message = exit_of(evaluate.main, benchmark(*flags, "--num_seeds", 2), capsys)
    assert code == 2 and "num_seeds 1, not 2" in message


def test_dreambench_reads_photos_and_the_lists_of_both_kinds(hub_judges, quick_pictures, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for subject in ("backpack", "dog"):
        (tmp_path / "photos" / subject).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 255, (90, 120, 3), dtype=np.uint8)).save(tmp_path / "photos" / subject / f"{i:02d}.jpg")
    spec = evaluate.read_spec("dreambench")
    assert len(spec["subjects"]) == 30 and {len(v) for v in spec["prompts"].values()} == {25}
    assert sum(word in spec["live"] for word in spec["subjects"].values()) == 9
    flags = ["--benchmark", "dreambench", "--data", str(tmp_path / "photos"), "--judges", str(hub_judges / "paper"), "--num_seeds", "1",
             "--seeds", "0", "--method", f"short={SHORT}", "--output_dir", "bench", "--subjects"]
    code, message = exit_of(evaluate.main, flags + ["1", "--tuning"], capsys)
    assert code == 2 and "--tuning" in message
    code, message = exit_of(evaluate.main, flags + ["2"], capsys)
    assert code == 2 and "lacks backpack_dog" in message and "download.py" in message
    evaluate.main(flags + ["1", "--keep_runs"])
    (row,) = lines()
    (job,) = Path("bench/jobs").rglob("*.json")  # lost, as by a kill after the training: drawn and scored again
    spent = json.loads(job.read_text())["train_cpu_seconds"]
    job.unlink()
    os.unlink("bench/results.jsonl")
    evaluate.main(flags + ["1"])
    assert lines() == [row] and row["iterations"] == 4 and json.loads(job.read_text())["train_cpu_seconds"] == spent > 0
    assert row["subject"] == "backpack" and set(row["scores"]["student, 1 step"]) == {"CLIP-T", "CLIP-I", "DINO", "identity", "drift"}


def test_the_photos_are_fetched_whole_or_not_at_all(tmp_path, capsys):
    import tarfile
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        for name in ("dreambooth-main/dataset/dog/00.jpg", "dreambooth-main/dataset/../../evil.jpg", "dreambooth-main/README.md"):
            archive.add(tmp_path / "a.jpg", name)
    download.main(["--url", (tmp_path / "x.tar.gz").as_uri(), "--output", "got"])
    assert [str(p.relative_to("got")) for p in Path("got").rglob("*.jpg")] == ["dog/00.jpg"]
    (tmp_path / "y.tar.gz").write_bytes((tmp_path / "x.tar.gz").read_bytes()[:100])
    code, message = exit_of(download.main, ["--url", (tmp_path / "y.tar.gz").as_uri(), "--output", "half"], capsys)
    assert code == 2 and "--url" in message and not os.path.exists("half")
    code, message = exit_of(download.main, ["--url", "mirror.example/x.tar.gz", "--output", "half"], capsys)
    assert code == 2 and "--url mirror.example" in message and not os.path.exists("half")
